//! The project's chores. `cargo xtask help` lists them.

mod bench;
mod chores;
mod clients;
mod command;
mod outcome;
mod peers;
mod picture;
mod train;
mod venv;

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Result, bail};

fn main() -> ExitCode {
    match run_task() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_task() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let (task, rest) = match words.split_first() {
        Some((task, rest)) => (task.as_str(), rest),
        None => ("help", &[][..]),
    };
    match task {
        "check" => chores::check(rest),
        "test" => chores::test(rest),
        "bench" => bench::run(rest),
        "help" | "-h" | "--help" => {
            print_help();
            Ok(())
        }
        other => bail!("no task is called `{other}`; `cargo xtask help` lists them"),
    }
}

fn print_help() {
    println!("cargo xtask check [STEP..]  what must hold before a commit");
    println!("cargo xtask test [STEP..]   all of `check`, then every test; `clients` needs Python 3 too");
    println!("cargo xtask bench WHAT      measure, on an otherwise idle machine; `cargo xtask bench help` says what");
    println!("cargo xtask help            this text\n");
    chores::print_steps();
}

/// The repository's root.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The cargo that runs us, in the repository's root, with nothing to read.
fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).stdin(Stdio::null());
    command
}
