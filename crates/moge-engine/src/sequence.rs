//! One token stream and how far it is computed.

use moge_model::{BLOCK_SIZE, BlockId, TokenId};

use crate::block_manager::PrefixId;
use crate::grammar::Grammar;
use crate::logprobs::RowLogprobs;
use crate::output::{FinishReason, Sampled, SequenceOutput, SequenceResult};
use crate::request::SeqId;
use crate::sampling_params::SamplingParams;
use crate::step::ScheduledSequence;
use crate::text::TextStream;

/// Work of a step for a running sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Compute the tokens known when it started: the prompt, and after a preemption also the sampled tokens.
    Prefill,
    /// Compute the token sampled by the previous step, and perhaps a draft.
    Decode,
}

/// One token stream. It waits while it has no blocks, and runs while it has those of all its tokens.
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    pub(crate) sampling: SamplingParams,
    /// Prompt, then sampled tokens.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) num_prompt_tokens: usize,
    /// Tokens proposed to follow `tokens`; cleared by every step that samples.
    pub(crate) draft: Vec<TokenId>,
    pub(crate) phase: Phase,
    /// Tokens, from the first on, whose keys and values are in the KV cache.
    pub(crate) num_computed_tokens: usize,
    /// The most that `num_computed_tokens` ever was: a preemption does not lower it.
    pub(crate) num_ever_computed_tokens: usize,
    /// Prompt tokens that were in the KV cache when the sequence first began to run; `None` before.
    pub(crate) num_cached_tokens: Option<usize>,
    /// Tokens that may be sampled in all.
    pub(crate) max_tokens: usize,
    /// Tokens that end the sequence: those of the request and, unless ignored, the model's.
    pub(crate) stop_token_ids: Vec<TokenId>,
    pub(crate) block_table: Vec<BlockId>,
    /// The text of the published blocks; `None` if they were computed with weights that have changed since, so that no
    /// further one is published.
    pub(crate) published: Option<PrefixId>,
    pub(crate) num_published_blocks: usize,
    /// The grammar of the output; taken out while its masks are computed.
    pub(crate) grammar: Option<Grammar>,
    /// `None` without a tokenizer; all text is empty then.
    pub(crate) text: Option<TextStream>,
    /// Of the rows computed so far; none if not asked for, or handed out already.
    pub(crate) prompt_logprobs: Option<Vec<Option<RowLogprobs>>>,
}

impl Sequence {
    /// Tokens that the sequence can have in the end.
    pub(crate) fn max_total_tokens(&self) -> usize {
        self.num_prompt_tokens + self.max_tokens
    }

    /// Tokens that the next steps have to compute: the rest of the prompt, or the token sampled last; after a
    /// preemption all of them.
    pub(crate) fn num_uncomputed_tokens(&self) -> usize {
        self.tokens.len() - self.num_computed_tokens
    }

    /// Draft tokens worth verifying: together with the token sampled after them, no more than may still follow.
    /// Tokens from the first stop token on are useless: it ends the sequence or is rejected.
    pub(crate) fn num_useful_draft_tokens(&self) -> usize {
        let may_follow = self.max_total_tokens() - self.tokens.len();
        let before_stop = self.draft.iter().position(|token| self.stop_token_ids.contains(token));
        before_stop.unwrap_or(self.draft.len()).min(may_follow - 1)
    }

    /// True if every row of the next chunk has to give logits, not only the last row of the prompt.
    pub(crate) fn wants_prompt_logits(&self) -> bool {
        self.prompt_logprobs.is_some()
    }

    /// True if its prompt need not be computed where another sequence has done that.
    pub(crate) fn may_share_prompt(&self) -> bool {
        self.sampling.prompt_logprobs.is_none() && !self.sampling.return_expert_ids
    }

    /// Tokens, from the first on, that need not be computed if their keys and values are found. The last token is
    /// computed in any case: its row gives the logits of the next. So is whatever gives results that are still wanted.
    pub(crate) fn num_reusable_tokens(&self) -> usize {
        if self.wants_prompt_logits() {
            0
        } else if self.sampling.return_expert_ids {
            self.num_ever_computed_tokens
        } else {
            self.tokens.len() - 1
        }
    }

    /// Blocks for all its tokens.
    pub(crate) fn num_needed_blocks(&self) -> usize {
        self.tokens.len().div_ceil(BLOCK_SIZE)
    }

    /// True if the tokens it can have in the end may need more blocks than it has.
    pub(crate) fn may_need_more_blocks(&self) -> bool {
        self.max_total_tokens() > self.block_table.len() * BLOCK_SIZE
    }

    /// Take out the blocks that hold only rejected draft tokens.
    pub(crate) fn take_surplus_blocks(&mut self) -> Vec<BlockId> {
        self.block_table.split_off(self.num_needed_blocks().min(self.block_table.len()))
    }

    /// Discard the computed state; returns the blocks.
    pub(crate) fn preempt(&mut self) -> Vec<BlockId> {
        self.phase = Phase::Prefill;
        self.num_computed_tokens = 0;
        self.num_published_blocks = 0;
        self.published = Some(PrefixId::default());
        if let Some(prompt_logprobs) = &mut self.prompt_logprobs {
            prompt_logprobs.truncate(1);
        }
        std::mem::take(&mut self.block_table)
    }

    /// Apply the results of a step with `num_rows` rows of this sequence, including draft rows.
    pub(crate) fn advance(
        &mut self,
        scheduled: &ScheduledSequence,
        num_rows: usize,
        result: SequenceResult,
    ) -> SequenceOutput {
        let SequenceResult { prompt_logprobs, sampled, end, mut expert_ids } = result;
        let mut output = self.output();
        if self.phase == Phase::Prefill {
            output.num_prefilled_tokens = num_rows - scheduled.num_draft_rows();
        }
        for sampled in sampled {
            self.append(sampled, &mut output);
            if output.finish_reason.is_some() {
                break;
            }
        }
        // Rows after the last one used belong to rejected draft tokens.
        let mut num_accepted_rows = output.sampled.len();
        if let (Some(reason), None) = (end, output.finish_reason) {
            self.finish(reason, &mut output);
            num_accepted_rows += 1;
        }
        let num_rejected_rows = scheduled.num_sample_rows - num_accepted_rows;
        self.num_computed_tokens += num_rows - num_rejected_rows;
        self.num_ever_computed_tokens = self.num_ever_computed_tokens.max(self.num_computed_tokens);
        if scheduled.num_sample_rows > 0 {
            self.phase = Phase::Decode;
            self.draft.clear();
        }
        if let Some(known) = &mut self.prompt_logprobs {
            known.extend(prompt_logprobs.into_iter().map(Some));
        }
        if self.num_computed_tokens >= self.num_prompt_tokens {
            output.prompt_logprobs = self.prompt_logprobs.take();
        }
        if let Some(ids_per_row) = expert_ids.len().checked_div(scheduled.num_route_rows) {
            expert_ids.truncate((scheduled.num_route_rows - num_rejected_rows) * ids_per_row);
        }
        SequenceOutput { expert_ids, ..output }
    }

    /// End the sequence before its time.
    pub(crate) fn cancel(mut self) -> SequenceOutput {
        let mut output = self.output();
        self.finish(FinishReason::Cancelled, &mut output);
        output
    }

    /// An output with nothing new.
    fn output(&self) -> SequenceOutput {
        SequenceOutput {
            id: self.id,
            num_prefilled_tokens: 0,
            num_cached_tokens: self.num_cached_tokens.unwrap_or(0),
            sampled: Vec::new(),
            text: String::new(),
            text_ends: Vec::new(),
            finish_reason: None,
            prompt_logprobs: None,
            expert_ids: Vec::new(),
        }
    }

    fn append(&mut self, sampled: Sampled, output: &mut SequenceOutput) {
        let token = sampled.token;
        output.sampled.push(sampled);
        let reason = self.take(token, output);
        if let Some(reason) = reason {
            self.finish(reason, output);
        }
        output.text_ends.push(output.text.len());
    }

    /// Append the next token; returns the finish reason if it is the last one.
    fn take(&mut self, token: TokenId, output: &mut SequenceOutput) -> Option<FinishReason> {
        let may_stop = self.sampling.may_stop_after(self.tokens.len() - self.num_prompt_tokens);
        self.tokens.push(token);
        if may_stop && self.stop_token_ids.contains(&token) {
            return Some(FinishReason::Stop);
        }
        if let Some(text) = &mut self.text {
            output.text += &text.push(token, may_stop);
            if text.hit_stop_string() {
                return Some(FinishReason::Stop);
            }
        }
        if let Some(grammar) = &mut self.grammar {
            grammar.push(token);
        }
        (self.tokens.len() == self.max_total_tokens()).then_some(FinishReason::Length)
    }

    fn finish(&mut self, reason: FinishReason, output: &mut SequenceOutput) {
        output.finish_reason = Some(reason);
        if let Some(text) = &mut self.text {
            output.text += &text.finish();
        }
    }
}
