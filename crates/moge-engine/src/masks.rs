//! Token masks of grammars, computed concurrently with the forward pass.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use llguidance::CancellationHandle;
use moge_model::TokenId;

use crate::grammar::{Grammar, GrammarFailed, MaskResult};
use crate::request::SeqId;

/// Longest time that a step waits for the masks of one sequence, as all sequences wait with it. Nearly all masks take a
/// millisecond and are ready when the forward pass ends.
const MAX_MASK_TIME: Duration = Duration::from_millis(500);

/// The grammar of a sequence that will be sampled, and its draft tokens that have rows in the step.
pub(crate) struct MaskJob {
    pub(crate) id: SeqId,
    pub(crate) grammar: Grammar,
    pub(crate) draft: Vec<TokenId>,
}

/// Result of a job.
pub(crate) struct Masked {
    pub(crate) id: SeqId,
    /// `None` if the thread that had it is gone.
    pub(crate) grammar: Option<Grammar>,
    /// At least one, as [`Grammar::next_masks`] gives them.
    pub(crate) masks: Vec<MaskResult>,
}

/// Computes the masks of a step on a thread of its own, which starts with the first grammar. Between steps every
/// grammar is with its sequence, so nothing that happens to a sequence there needs to know of the thread.
#[derive(Default)]
pub(crate) struct Masks {
    thread: Option<MaskThread>,
    /// Sequences whose masks are being computed, in the order of their results.
    pending: Vec<(SeqId, Option<CancellationHandle>)>,
}

/// Ends when its jobs do.
struct MaskThread {
    jobs: mpsc::Sender<MaskJob>,
    results: mpsc::Receiver<Masked>,
}

impl Masks {
    /// Start computing the masks of a step.
    pub(crate) fn start(&mut self, jobs: Vec<MaskJob>) {
        for job in jobs {
            self.pending.push((job.id, job.grammar.cancellation()));
            if self.thread.is_none() {
                self.thread = MaskThread::spawn();
            }
            if let Some(thread) = &self.thread {
                // If the thread is gone, its result will not arrive.
                let _ = thread.jobs.send(job);
            }
        }
    }

    /// Wait for the results, one per job and in the same order. A lost grammar has a failed mask.
    pub(crate) fn finish(&mut self) -> Vec<Masked> {
        let mut results = Vec::with_capacity(self.pending.len());
        for (id, cancellation) in self.pending.drain(..) {
            let result = self.thread.as_ref().and_then(|thread| thread.result(cancellation.as_ref()));
            if result.is_none() {
                self.thread = None;
            }
            results.push(result.unwrap_or_else(|| Masked { id, grammar: None, masks: vec![Err(GrammarFailed)] }));
        }
        results
    }
}

impl MaskThread {
    /// `None` if the system cannot start a thread.
    fn spawn() -> Option<MaskThread> {
        let (jobs, jobs_receiver) = mpsc::channel::<MaskJob>();
        let (results_sender, results) = mpsc::channel();
        let work = move || {
            for MaskJob { id, mut grammar, draft } in jobs_receiver {
                let masks = grammar.next_masks(&draft);
                if results_sender.send(Masked { id, grammar: Some(grammar), masks }).is_err() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("masks".into()).spawn(work);
        thread.ok().map(|_| MaskThread { jobs, results })
    }

    /// Wait for the next result; cancels the job after [`MAX_MASK_TIME`]. `None` if the thread is gone.
    fn result(&self, cancellation: Option<&CancellationHandle>) -> Option<Masked> {
        match self.results.recv_timeout(MAX_MASK_TIME) {
            Err(RecvTimeoutError::Timeout) => {
                cancellation.inspect(|cancellation| cancellation.cancel());
                self.results.recv().ok()
            }
            result => result.ok(),
        }
    }
}
