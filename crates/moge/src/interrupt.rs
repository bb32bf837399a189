//! Ctrl-C: stops an answer, or work that can be gone on with, while there is one, else the program, which then leaves
//! nothing behind.

use std::path::{Path, PathBuf};
use std::process::exit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

use crate::output::say_line;

/// Exit status of a program that Ctrl-C ended, as shells have it.
const STATUS: i32 = 130;

/// How often the removal of a folder is tried.
const NUM_TRIES: usize = 8;

/// What Ctrl-C does, once installed.
#[derive(Clone)]
pub(crate) struct Interrupt(Arc<State>);

#[derive(Default)]
struct State {
    answering: AtomicBool,
    requested: AtomicBool,
    /// A second Ctrl-C ends the program.
    is_second_final: AtomicBool,
    temporary_folder: Mutex<Option<PathBuf>>,
}

impl Interrupt {
    /// For a program that sees to Ctrl-C itself.
    pub(crate) fn new() -> Interrupt {
        Interrupt(Arc::default())
    }

    /// Take Ctrl-C over; once in a program.
    pub(crate) fn install() -> Result<Interrupt> {
        let interrupt = Interrupt::new();
        let state = Arc::clone(&interrupt.0);
        ctrlc::set_handler(move || {
            let is_second =
                state.requested.swap(true, Ordering::SeqCst) && state.is_second_final.load(Ordering::SeqCst);
            if is_second || !state.answering.load(Ordering::SeqCst) {
                state.leave();
            }
        })
        .context("Ctrl-C")?;
        Ok(interrupt)
    }

    /// Remove this folder, too, when Ctrl-C ends the program.
    pub(crate) fn remove_on_exit(&self, folder: &Path) {
        *self.0.temporary_folder.lock().unwrap_or_else(PoisonError::into_inner) = Some(folder.to_owned());
    }

    /// An answer begins; it ends when the returned guard is dropped.
    pub(crate) fn answering(&self) -> impl Drop + use<> {
        struct Guard(Arc<State>);
        impl Drop for Guard {
            fn drop(&mut self) {
                self.0.answering.store(false, Ordering::SeqCst);
            }
        }
        self.0.requested.store(false, Ordering::SeqCst);
        self.0.answering.store(true, Ordering::SeqCst);
        Guard(Arc::clone(&self.0))
    }

    /// As [`Interrupt::answering`], for work that takes a while to stop: whoever cannot wait presses Ctrl-C again, which ends
    /// the program at once.
    pub(crate) fn working(&self) -> impl Drop + use<> {
        self.0.is_second_final.store(true, Ordering::SeqCst);
        self.answering()
    }

    /// True if the answer or the work is to stop.
    pub(crate) fn requested(&self) -> bool {
        self.0.requested.load(Ordering::SeqCst)
    }

    /// End the program as Ctrl-C does.
    pub(crate) fn leave(&self) -> ! {
        self.0.leave()
    }
}

impl State {
    fn leave(&self) -> ! {
        if let Some(folder) = self.temporary_folder.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // The program still runs, and may put a file into the folder while we empty it.
            let removed = (0..NUM_TRIES).any(|_| std::fs::remove_dir_all(&folder).is_ok() || !folder.exists());
            if !removed {
                say_line(format_args!("{}: unfinished, and cannot be removed", folder.display()));
            }
        }
        exit(STATUS)
    }
}
