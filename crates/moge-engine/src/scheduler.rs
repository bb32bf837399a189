//! Chooses the rows of each step, and applies its results to the sequences. Independent of the model.
//!
//! First come, first served. A step holds one row for every sequence in decode, then chunks of prefill in order of
//! arrival while the budget lasts, and what is left verifies drafts. A sequence is admitted when blocks for its tokens are free, and one more for each
//! that runs and may grow past those it has; it takes further ones as it grows. Where none is left, the youngest is
//! preempted: it gives its blocks back, waits before all others, and computes its tokens again, which gives the same
//! ones. Prompts that begin alike share blocks.

mod share;

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use moge_model::{BLOCK_SIZE, TokenId, Tokenizer};

use share::{Budget, Share};

use crate::block_manager::{BlockManager, PrefixId};
use crate::error::AdmitError;
use crate::grammar::MaskResult;
use crate::masks::{MaskJob, Masked};
use crate::output::{SequenceOutput, SequenceResult};
use crate::request::{Request, SeqId};
use crate::sample::LogitRows;
use crate::sequence::{Phase, Sequence};
use crate::stats::EngineStats;
use crate::step::Step;
use crate::text::TextStream;

/// Rows of a step that may want logits for `prompt_logprobs`, over all sequences. Enough for a step to share the
/// reading of the weights among many rows, while the logits of a vocabulary of 153 376 take no more than 39 MB.
const MAX_PROMPT_LOGIT_ROWS: usize = 64;

/// Limits of a scheduler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Longest sequence, prompt and output together.
    pub max_sequence_tokens: usize,
    /// Blocks of the KV cache.
    pub num_blocks: usize,
    /// Rows of a step, at least 1.
    pub max_batched_tokens: usize,
    /// Sequences that have blocks at the same time, at least 1. More than `max_batched_tokens` never run, as each
    /// needs a row per step.
    pub max_running: usize,
    /// Requests that may wait for blocks. Sequences that were preempted wait too, though they be more.
    pub max_waiting: usize,
    /// Tokens that end a sequence unless its request ignores them. Those outside the vocabulary never come.
    pub eos_token_ids: Vec<TokenId>,
    /// Most draft tokens of a sequence that one step verifies; 0 without a drafter. Each may need a row of logits.
    pub max_draft_tokens: usize,
}

impl SchedulerConfig {
    /// Most rows of a step that want logits: those to sample from for each running sequence, and prompt rows for
    /// `prompt_logprobs`.
    pub fn max_logit_rows(&self) -> usize {
        let max_sample_rows = self.max_running.saturating_mul(self.max_draft_tokens.saturating_add(1));
        self.max_batched_tokens.min(max_sample_rows.saturating_add(MAX_PROMPT_LOGIT_ROWS))
    }
}

/// Waiting and running sequences, and the blocks that the running ones hold.
pub struct Scheduler {
    config: SchedulerConfig,
    tokenizer: Option<Arc<Tokenizer>>,
    next_id: SeqId,
    waiting: VecDeque<Sequence>,
    /// In order of arrival, so by ascending id.
    running: Vec<Sequence>,
    block_manager: BlockManager,
    num_preemptions: u64,
    num_prompt_tokens_looked_up: u64,
    num_prompt_tokens_cached: u64,
}

impl Scheduler {
    /// A scheduler without requests. Without a tokenizer all text is empty.
    ///
    /// # Panics
    /// If `max_batched_tokens` or `max_running` is 0, so that nothing would ever run, or if the numbers of rows or
    /// blocks do not fit in 32 bits.
    pub fn new(mut config: SchedulerConfig, tokenizer: Option<Arc<Tokenizer>>) -> Scheduler {
        assert!(config.max_batched_tokens > 0, "max_batched_tokens is 0");
        assert!(config.max_running > 0, "max_running is 0");
        assert!(u32::try_from(config.max_batched_tokens).is_ok(), "rows have 32 bits");
        config.eos_token_ids.retain(|token| (token.0 as usize) < config.vocab_size);
        let block_manager = BlockManager::new(config.num_blocks);
        Scheduler {
            config,
            tokenizer,
            next_id: SeqId(0),
            waiting: VecDeque::new(),
            running: Vec::new(),
            block_manager,
            num_preemptions: 0,
            num_prompt_tokens_looked_up: 0,
            num_prompt_tokens_cached: 0,
        }
    }

    /// Queue a request.
    ///
    /// # Errors
    /// [`AdmitError`] if it is invalid, could never run, or the queue is full.
    pub fn add_request(&mut self, request: Request) -> Result<SeqId, AdmitError> {
        request.validate(self.config.vocab_size, self.config.max_sequence_tokens)?;
        let Request { prompt, sampling, grammar } = request;
        if self.tokenizer.is_none() && !sampling.stop.is_empty() {
            let (value, allowed) = (format!("{:?}", sampling.stop), "empty, as the model has no tokenizer".to_owned());
            return Err(AdmitError::InvalidParameter { field: "stop", value, allowed });
        }
        if let Some(grammar) = grammar.as_ref().filter(|grammar| grammar.vocab_size() != self.config.vocab_size) {
            let value = format!("made for {} tokens", grammar.vocab_size());
            let allowed = format!("made for the model's {}", self.config.vocab_size);
            return Err(AdmitError::InvalidParameter { field: "grammar", value, allowed });
        }
        let max_tokens = self.max_tokens(prompt.len(), sampling.max_tokens)?;
        if self.waiting.len() >= self.config.max_waiting {
            return Err(AdmitError::QueueFull { max_waiting: self.config.max_waiting });
        }
        let id = self.next_id;
        self.next_id = SeqId(id.0 + 1);
        let eos_token_ids: &[TokenId] = if sampling.ignore_eos { &[] } else { &self.config.eos_token_ids };
        self.waiting.push_back(Sequence {
            id,
            num_prompt_tokens: prompt.len(),
            num_computed_tokens: 0,
            num_ever_computed_tokens: 0,
            num_cached_tokens: None,
            max_tokens,
            stop_token_ids: [&sampling.stop_token_ids, eos_token_ids].concat(),
            block_table: Vec::new(),
            published: Some(PrefixId::default()),
            num_published_blocks: 0,
            text: self.tokenizer.clone().map(|tokenizer| TextStream::new(tokenizer, &prompt, &sampling.stop)),
            prompt_logprobs: sampling.prompt_logprobs.map(|_| vec![None]),
            tokens: prompt,
            draft: Vec::new(),
            phase: Phase::Prefill,
            sampling,
            grammar,
        });
        Ok(id)
    }

    /// Propose tokens to follow the last token of a sequence, replacing an earlier proposal; called by a drafter between
    /// two steps. The next step that samples the sequence verifies as many as it has room for, accepts those that it would
    /// have sampled anyway, and discards the rest. Without effect if the sequence has ended.
    pub fn set_draft(&mut self, id: SeqId, mut draft: Vec<TokenId>) {
        let Some(sequence) = self.running.iter_mut().chain(&mut self.waiting).find(|s| s.id == id) else { return };
        let in_vocabulary = draft.iter().take_while(|token| (token.0 as usize) < self.config.vocab_size).count();
        draft.truncate(in_vocabulary.min(self.config.max_draft_tokens));
        sequence.draft = draft;
    }

    /// Choose the rows of the next step; `None` if there is nothing to do. Its results go to
    /// [`Scheduler::postprocess`] before the next call.
    pub fn schedule(&mut self) -> Option<Step> {
        let mut step = Step { preempted: self.make_room(), ..Step::default() };
        let mut budget = Budget { rows: self.config.max_batched_tokens, prompt_logit_rows: MAX_PROMPT_LOGIT_ROWS };
        let is_decode = |index: &usize| self.running[*index].phase == Phase::Decode;
        let (decodes, prefills): (Vec<usize>, Vec<usize>) = (0..self.running.len()).partition(is_decode);
        let in_order = decodes.into_iter().chain(prefills);
        let mut shares: Vec<Share> = in_order.map(|index| budget.take(index, &self.running[index])).collect();
        while budget.rows > 0
            && let Some(index) = self.start_next()
        {
            shares.push(budget.take(index, &self.running[index]));
        }
        shares.retain(|share| share.num_rows > 0);
        // Drafts come last, so that they never delay other tokens.
        for share in &mut shares {
            share.num_draft_rows = self.num_draft_rows(share, budget.rows);
            budget.rows -= share.num_draft_rows;
        }
        for share in shares {
            share.push_to(&mut step, &self.running[share.index]);
        }
        (!step.sequences.is_empty()).then_some(step)
    }

    /// Take in the results of `step`, one for each of its sequences, and release the sequences that ended.
    ///
    /// # Panics
    /// If `results` does not belong to `step`, or `step` not to what runs.
    pub fn postprocess(&mut self, step: &Step, results: Vec<SequenceResult>) -> Vec<SequenceOutput> {
        assert_eq!(results.len(), step.sequences.len(), "one result per sequence");
        let mut outputs = Vec::with_capacity(results.len());
        for ((scheduled, rows), result) in step.sequences.iter().zip(&step.batch.sequences).zip(results) {
            let num_used_rows = result.sampled.len() + usize::from(result.end.is_some());
            let allowed = scheduled.num_sample_rows.min(1)..=scheduled.num_sample_rows;
            assert!(allowed.contains(&num_used_rows), "sequence {}: results of {num_used_rows} rows", scheduled.id);
            let index = self.running_index(scheduled.id);
            let output = self.running[index].advance(scheduled, rows.num_rows, result);
            self.publish_blocks(index);
            if output.finish_reason.is_some() {
                self.block_manager.free(self.running.remove(index).block_table);
            } else {
                self.block_manager.free(self.running[index].take_surplus_blocks());
            }
            outputs.push(output);
        }
        outputs
    }

    /// The grammars of the sequences that `step` will sample. They come back with [`Scheduler::return_grammars`].
    pub(crate) fn take_grammars(&mut self, step: &Step) -> Vec<MaskJob> {
        let mut jobs = Vec::new();
        for scheduled in step.sequences.iter().filter(|scheduled| scheduled.num_sample_rows > 0) {
            let index = self.running_index(scheduled.id);
            let sequence = &mut self.running[index];
            let draft = || sequence.draft[..scheduled.num_draft_rows()].to_vec();
            jobs.extend(sequence.grammar.take().map(|grammar| MaskJob { id: scheduled.id, grammar, draft: draft() }));
        }
        jobs
    }

    /// Give every sequence its grammar back; returns the masks.
    pub(crate) fn return_grammars(&mut self, masked: Vec<Masked>) -> BTreeMap<SeqId, Vec<MaskResult>> {
        let mut all = BTreeMap::new();
        for Masked { id, grammar, masks } in masked {
            let index = self.running_index(id);
            self.running[index].grammar = grammar;
            all.insert(id, masks);
        }
        all
    }

    /// The logit rows of `step` and all that sampling depends on; `masks` are those of the sequences with a grammar.
    pub(crate) fn logit_rows<'a>(
        &'a self,
        step: &Step,
        mut masks: BTreeMap<SeqId, Vec<MaskResult>>,
    ) -> Vec<LogitRows<'a>> {
        let mut all = Vec::with_capacity(step.sequences.len());
        for (scheduled, rows) in step.sequences.iter().zip(&step.batch.sequences) {
            let sequence = &self.running[self.running_index(scheduled.id)];
            let draft = &sequence.draft[..scheduled.num_draft_rows()];
            let tokens = if draft.is_empty() {
                Cow::Borrowed(&*sequence.tokens)
            } else {
                Cow::Owned([&sequence.tokens, draft].concat())
            };
            let num_logit_rows = scheduled.num_prompt_logit_rows + scheduled.num_sample_rows;
            all.push(LogitRows {
                params: &sequence.sampling,
                tokens,
                num_prompt_tokens: sequence.num_prompt_tokens,
                first_position: rows.first_position + rows.num_rows - num_logit_rows,
                num_prompt_logit_rows: scheduled.num_prompt_logit_rows,
                num_sample_rows: scheduled.num_sample_rows,
                stop_token_ids: &sequence.stop_token_ids,
                masks: masks.remove(&scheduled.id),
            });
        }
        all
    }

    /// Empty the prefix cache, as is necessary after the weights have changed. Running sequences continue with the keys and
    /// values that they have, which no other sequence will find.
    pub fn clear_prefix_cache(&mut self) {
        self.block_manager.clear_cache();
        self.running.iter_mut().for_each(|sequence| sequence.published = None);
    }

    /// End a sequence now and free its blocks. Returns its last output, `None` if it has ended before.
    pub fn cancel(&mut self, id: SeqId) -> Option<SequenceOutput> {
        let mut sequence = if let Ok(index) = self.running.binary_search_by_key(&id, |s| s.id) {
            self.running.remove(index)
        } else {
            let index = self.waiting.binary_search_by_key(&id, |s| s.id).ok()?;
            self.waiting.remove(index)?
        };
        self.block_manager.free(std::mem::take(&mut sequence.block_table));
        Some(sequence.cancel())
    }

    /// True while a request waits or runs.
    pub fn has_unfinished(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }

    /// Requests without blocks.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences with blocks.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Blocks that no sequence holds.
    pub fn num_free_blocks(&self) -> usize {
        self.block_manager.num_free_blocks()
    }

    /// Current state, and totals since the start.
    pub fn stats(&self) -> EngineStats {
        EngineStats {
            num_running: self.num_running(),
            num_waiting: self.num_waiting(),
            num_blocks: self.config.num_blocks,
            num_free_blocks: self.num_free_blocks(),
            num_preemptions: self.num_preemptions,
            num_prompt_tokens_looked_up: self.num_prompt_tokens_looked_up,
            num_prompt_tokens_cached: self.num_prompt_tokens_cached,
        }
    }

    /// Check what must hold between steps: no block lost, every running sequence with the blocks of what is computed,
    /// no waiting one with any, ids ascending, and as many running as allowed.
    ///
    /// # Panics
    /// If something does not hold.
    pub fn check_integrity(&self) {
        self.block_manager.check_integrity(self.running.iter().map(|s| s.block_table.as_slice()));
        assert!(self.running.len() <= self.max_running());
        assert!(self.waiting.len() <= self.config.max_waiting + self.max_running());
        assert!(self.running.iter().chain(&self.waiting).map(|s| s.id).is_sorted_by(|a, b| a < b));
        for sequence in &self.running {
            let num_blocks = sequence.block_table.len();
            assert!(sequence.num_computed_tokens.div_ceil(BLOCK_SIZE) <= num_blocks);
            assert!(num_blocks <= sequence.num_needed_blocks());
            let num_full_blocks = sequence.num_computed_tokens / BLOCK_SIZE;
            assert!(sequence.published.is_none() || sequence.num_published_blocks == num_full_blocks);
            assert!(sequence.num_uncomputed_tokens() > 0);
            assert!(sequence.tokens.len() < sequence.max_total_tokens());
        }
        assert!(self.waiting.iter().all(|s| s.block_table.is_empty() && s.num_computed_tokens == 0));
    }

    fn running_index(&self, id: SeqId) -> usize {
        match self.running.binary_search_by_key(&id, |s| s.id) {
            Ok(index) => index,
            Err(_) => panic!("sequence {id} does not run"),
        }
    }

    fn max_running(&self) -> usize {
        self.config.max_running.min(self.config.max_batched_tokens)
    }

    /// Give every running sequence blocks for its tokens, the oldest first, preempting the youngest where none is free.
    /// Returns the preempted sequences.
    fn make_room(&mut self) -> Vec<SeqId> {
        let mut preempted = Vec::new();
        let mut index = 0;
        while let Some(sequence) = self.running.get_mut(index) {
            let num_missing = sequence.num_needed_blocks() - sequence.block_table.len();
            if let Some(blocks) = self.block_manager.allocate(num_missing) {
                sequence.block_table.extend(blocks);
                index += 1;
            } else if let Some(mut youngest) = self.running.pop() {
                self.block_manager.free(youngest.preempt());
                self.num_preemptions += 1;
                preempted.push(youngest.id);
                self.waiting.push_front(youngest);
            }
        }
        preempted
    }

    /// Start the request that has waited longest, if it can start; returns its index in `running`. No request overtakes
    /// it, so that small ones do not starve a large one. It does not start while a running sequence computes a block that
    /// it could share: of several answers to one prompt, the first computes the prompt and the others then reuse it.
    fn start_next(&mut self) -> Option<usize> {
        if self.running.len() >= self.max_running() {
            return None;
        }
        let sequence = self.waiting.front()?;
        let reusable = &sequence.tokens[..sequence.num_reusable_tokens()];
        let (mut block_table, published) = self.block_manager.hold_prefix(reusable);
        let num_published_blocks = block_table.len();
        if self.is_being_computed(reusable, num_published_blocks) {
            self.block_manager.free(block_table);
            return None;
        }
        let num_missing = sequence.num_needed_blocks() - num_published_blocks;
        // Room for those that run to grow, so that they do not preempt it at once.
        let num_growing = self.running.iter().filter(|s| s.may_need_more_blocks()).count();
        if num_missing + num_growing > self.block_manager.num_free_blocks() {
            self.block_manager.free(block_table);
            return None;
        }
        block_table.extend(self.block_manager.allocate(num_missing)?);
        let mut sequence = self.waiting.pop_front()?;
        sequence.num_computed_tokens = num_published_blocks * BLOCK_SIZE;
        if sequence.num_cached_tokens.is_none() {
            sequence.num_cached_tokens = Some(sequence.num_computed_tokens);
            self.num_prompt_tokens_cached += sequence.num_computed_tokens as u64;
            if sequence.may_share_prompt() {
                self.num_prompt_tokens_looked_up += sequence.num_prompt_tokens as u64;
            }
        }
        self.running.push(Sequence { block_table, published: Some(published), num_published_blocks, ..sequence });
        Some(self.running.len() - 1)
    }

    /// Draft tokens that the step verifies for the sequence of `share`, limited by the remaining rows and free blocks. No
    /// other sequence loses a block.
    fn num_draft_rows(&mut self, share: &Share, rows_left: usize) -> usize {
        let sequence = &mut self.running[share.index];
        if !share.is_last_of(sequence) {
            return 0;
        }
        let num_wanted = sequence.num_useful_draft_tokens().min(rows_left);
        let num_tokens = sequence.tokens.len();
        let num_missing = (num_tokens + num_wanted).div_ceil(BLOCK_SIZE).saturating_sub(sequence.block_table.len());
        let num_blocks = num_missing.min(self.block_manager.num_free_blocks());
        sequence.block_table.extend(self.block_manager.allocate(num_blocks).unwrap_or_default());
        num_wanted.min(sequence.block_table.len() * BLOCK_SIZE - num_tokens)
    }

    /// True if a running sequence is computing the block of `tokens` after its first `num_blocks`.
    fn is_being_computed(&self, tokens: &[TokenId], num_blocks: usize) -> bool {
        let Some(wanted) = tokens.get(..(num_blocks + 1) * BLOCK_SIZE) else { return false };
        // Prompts with log-probabilities advance by few rows per step, so waiting for them does not pay.
        let publishes = |s: &&Sequence| s.phase == Phase::Prefill && s.published.is_some() && !s.wants_prompt_logits();
        self.running.iter().filter(publishes).any(|s| s.tokens.starts_with(wanted))
    }

    /// Enter the blocks of a running sequence that are full by now into the prefix cache.
    fn publish_blocks(&mut self, index: usize) {
        let sequence = &mut self.running[index];
        let Some(mut published) = sequence.published else { return };
        let (blocks, _) = sequence.tokens[..sequence.num_computed_tokens].as_chunks();
        for (&block, &tokens) in sequence.block_table.iter().zip(blocks).skip(sequence.num_published_blocks) {
            published = self.block_manager.publish(block, published, tokens);
            sequence.num_published_blocks += 1;
        }
        sequence.published = Some(published);
    }

    /// Tokens that may follow a prompt: as many as requested, up to the end of the context. Without a request, no more than
    /// the KV cache holds either.
    fn max_tokens(&self, num_prompt_tokens: usize, asked: Option<usize>) -> Result<usize, AdmitError> {
        let max_blocks = self.config.num_blocks;
        let in_context = self.config.max_sequence_tokens - num_prompt_tokens;
        let in_cache = max_blocks.saturating_mul(BLOCK_SIZE).saturating_sub(num_prompt_tokens);
        let max_tokens = asked.unwrap_or(in_cache.max(1)).min(in_context);
        if max_tokens > in_cache {
            let num_blocks = (num_prompt_tokens + max_tokens).div_ceil(BLOCK_SIZE);
            return Err(AdmitError::NeverFits { num_prompt_tokens, max_tokens, num_blocks, max_blocks });
        }
        Ok(max_tokens)
    }
}

#[cfg(test)]
mod tests;
