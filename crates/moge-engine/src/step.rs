//! One step's work.

use moge_model::Batch;

use crate::request::SeqId;

/// One step's work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Input of the forward pass.
    pub batch: Batch,
    /// The sequences of the batch, parallel to `batch.sequences`.
    pub sequences: Vec<ScheduledSequence>,
    /// Sequences preempted before this step.
    pub preempted: Vec<SeqId>,
}

/// One sequence's share of a step. Its last rows want logits: first those for log-probabilities of the prompt, then
/// those to sample from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduledSequence {
    /// The sequence.
    pub id: SeqId,
    /// Rows whose logits give the log-probability of the next prompt token.
    pub num_prompt_logit_rows: usize,
    /// Rows to sample from: that of the last token, and those of the draft tokens after it. 0 if a part of the sequence
    /// is still to be computed.
    pub num_sample_rows: usize,
    /// Rows whose experts are wanted; the last rows of the sequence.
    pub num_route_rows: usize,
}

impl ScheduledSequence {
    /// Rows of draft tokens; the last rows of the sequence.
    pub fn num_draft_rows(&self) -> usize {
        self.num_sample_rows.saturating_sub(1)
    }
}
