//! Distribution of a step's rows among its sequences.

use moge_model::{BLOCK_SIZE, BlockId, SequenceRows};

use crate::sequence::Sequence;
use crate::step::{ScheduledSequence, Step};

/// Remaining capacity of a step while it is filled.
pub(super) struct Budget {
    pub(super) rows: usize,
    pub(super) prompt_logit_rows: usize,
}

/// One running sequence's rows in a step.
pub(super) struct Share {
    /// Index in `Scheduler::running`.
    pub(super) index: usize,
    /// Rows of its tokens.
    pub(super) num_rows: usize,
    pub(super) num_draft_rows: usize,
}

impl Budget {
    /// Take rows for the uncomputed tokens of `sequence` at `index`, as far as they last.
    pub(super) fn take(&mut self, index: usize, sequence: &Sequence) -> Share {
        let mut num_rows = sequence.num_uncomputed_tokens().min(self.rows);
        if sequence.wants_prompt_logits() {
            num_rows = num_rows.min(self.prompt_logit_rows);
            self.prompt_logit_rows -= num_rows;
        }
        self.rows -= num_rows;
        Share { index, num_rows, num_draft_rows: 0 }
    }
}

impl Share {
    /// True if the share covers all uncomputed tokens of `sequence`, so that the next token can be sampled.
    pub(super) fn is_last_of(&self, sequence: &Sequence) -> bool {
        self.num_rows == sequence.num_uncomputed_tokens()
    }

    /// Add the rows of `sequence` to the batch.
    pub(super) fn push_to(&self, step: &mut Step, sequence: &Sequence) {
        let first_position = sequence.num_computed_tokens;
        let num_rows = self.num_rows + self.num_draft_rows;
        let end = first_position + num_rows;
        let num_sample_rows = if self.is_last_of(sequence) { 1 + self.num_draft_rows } else { 0 };
        let num_prompt_logit_rows = if sequence.wants_prompt_logits() { num_rows - num_sample_rows } else { 0 };
        let batch = &mut step.batch;
        batch.tokens.extend(&sequence.tokens[first_position..first_position + self.num_rows]);
        batch.tokens.extend(&sequence.draft[..self.num_draft_rows]);
        let end_row = batch.tokens.len() as u32; // at most max_batched_tokens rows, see `Scheduler::new`
        let num_logit_rows = num_prompt_logit_rows + num_sample_rows;
        batch.logit_rows.extend(end_row - num_logit_rows as u32..end_row);
        let num_route_rows =
            if sequence.sampling.return_expert_ids { end.saturating_sub(sequence.num_ever_computed_tokens) } else { 0 };
        batch.route_rows.extend(end_row - num_route_rows as u32..end_row);
        let block_table: Vec<BlockId> = sequence.block_table[..end.div_ceil(BLOCK_SIZE)].to_vec();
        batch.sequences.push(SequenceRows { num_rows, first_position, block_table });
        let id = sequence.id;
        step.sequences.push(ScheduledSequence { id, num_prompt_logit_rows, num_sample_rows, num_route_rows });
    }
}
