//! One step's work.

use moge_model::Batch;

use crate::request::SeqId;

/// One step's work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// What the model computes.
    pub batch: Batch,
    /// Whose rows these are, parallel to `batch.sequences`.
    pub sequences: Vec<ScheduledSequence>,
    /// Sequences that had to give their blocks to older ones before this step.
    pub preempted: Vec<SeqId>,
}

/// One sequence's share of a step. Its last rows want logits: first those for log-probabilities of the prompt, then
/// those to sample from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduledSequence {
    /// Which sequence.
    pub id: SeqId,
    /// Rows whose logits are compared with the next token of the prompt.
    pub num_prompt_logit_rows: usize,
    /// Rows to sample from: that of the last token, and those of the draft tokens after it. 0 if a part of the sequence
    /// is still to be computed.
    pub num_sample_rows: usize,
    /// Of how many of its rows the experts are wanted. They are its last rows.
    pub num_route_rows: usize,
}

impl ScheduledSequence {
    /// Rows of draft tokens. They are its last rows.
    pub fn num_draft_rows(&self) -> usize {
        self.num_sample_rows.saturating_sub(1)
    }
}
