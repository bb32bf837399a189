//! The cases: what each step of them computes.

use std::fmt;

use anyhow::{Result, ensure};
use moge_model::{
    BLOCK_SIZE, Batch, BlockId, Cpu, KvCache, KvType, ModelConfig, Precision, SequenceRows, StepLimits, TokenId,
    Workspace,
};

use super::random::Random;
use crate::model_files::MAX_BATCHED_TOKENS;

/// How activations and KV cache are stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Precisions {
    pub(crate) activation: Precision,
    pub(crate) kv: KvType,
}

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Case {
    /// Prompts that come at the same time, computed one after another in steps of at most [`MAX_BATCHED_TOKENS`] rows.
    /// Logits are wanted of each prompt's last row.
    Prefill { tokens: usize, prompts: usize },
    /// Steps that each add a token to every sequence of a batch, from a context that nobody computed.
    Decode { steps: usize, batch: usize, context: usize },
}

impl Case {
    /// `prefill` or `decode`.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Case::Prefill { .. } => "prefill",
            Case::Decode { .. } => "decode",
        }
    }

    /// Tokens that each sequence gets.
    pub(crate) fn tokens(self) -> usize {
        match self {
            Case::Prefill { tokens, .. } => tokens,
            Case::Decode { steps, .. } => steps,
        }
    }

    /// Sequences.
    pub(crate) fn batch(self) -> usize {
        match self {
            Case::Prefill { prompts, .. } => prompts,
            Case::Decode { batch, .. } => batch,
        }
    }

    /// Tokens of each sequence that are in the KV cache before the first step.
    pub(crate) fn context(self) -> usize {
        match self {
            Case::Prefill { .. } => 0,
            Case::Decode { context, .. } => context,
        }
    }

    /// Refuse sequences longer than the model's.
    pub(crate) fn check(self, config: &ModelConfig) -> Result<()> {
        let (tokens, longest) = (self.sequence_tokens(), config.max_position_embeddings);
        ensure!(tokens <= longest, "{self}: sequences of {tokens} tokens, and the model takes at most {longest}");
        Ok(())
    }

    /// Bytes of keys and values.
    pub(crate) fn kv_bytes(self, config: &ModelConfig, kv: KvType) -> u64 {
        KvCache::block_bytes(config, kv).saturating_mul(self.num_blocks() as u64)
    }

    /// The largest of its steps.
    pub(crate) fn limits(self, num_threads: usize) -> StepLimits {
        let max_rows = match self {
            Case::Prefill { tokens, prompts } => MAX_BATCHED_TOKENS.min(tokens * prompts),
            Case::Decode { batch, .. } => batch,
        };
        StepLimits {
            max_rows,
            max_logit_rows: max_rows.min(self.batch()),
            max_context: self.sequence_tokens(),
            num_threads,
        }
    }

    /// A KV cache for its sequences. The context holds random numbers: blocks that were never written would all be one
    /// page of zeros, which costs nothing to read.
    pub(crate) fn kv_cache(self, cpu: &Cpu, config: &ModelConfig, precisions: Precisions) -> KvCache {
        let mut kv_cache = KvCache::new(config, precisions.kv, self.num_blocks());
        let width = config.kv_size();
        let mut random = Random(0);
        let mut rows = || -> Vec<f32> { (0..BLOCK_SIZE * width).map(|_| random.next_unit()).collect() };
        let (k, v) = (rows(), rows());
        for sequence in 0..self.batch() {
            let mut rows = SequenceRows { num_rows: 0, first_position: 0, block_table: self.block_table(sequence) };
            for first_position in (0..self.context()).step_by(BLOCK_SIZE) {
                rows.first_position = first_position;
                rows.num_rows = BLOCK_SIZE.min(self.context() - first_position);
                let len = rows.num_rows * width;
                kv_cache.write(cpu, config, [&k[..len], &v[..len]], std::slice::from_ref(&rows));
            }
        }
        kv_cache
    }

    /// Scratch memory for its steps.
    pub(crate) fn workspace(self, cpu: &Cpu, config: &ModelConfig, precisions: Precisions) -> Workspace {
        Workspace::new(config, precisions.activation, self.limits(cpu.num_threads()))
    }

    /// Steps of one repetition.
    pub(crate) fn num_steps(self) -> usize {
        match self {
            Case::Prefill { tokens, prompts } => (tokens * prompts).div_ceil(MAX_BATCHED_TOKENS),
            Case::Decode { steps, .. } => steps,
        }
    }

    /// Step `index` of a repetition.
    pub(crate) fn step(self, index: usize, random: &mut RandomTokens) -> Batch {
        match self {
            Case::Prefill { tokens, prompts } => {
                // The rows of all prompts in order, cut into steps.
                let first_row = index * MAX_BATCHED_TOKENS;
                let end = (tokens * prompts).min(first_row + MAX_BATCHED_TOKENS);
                let mut step = Batch { tokens: random.take(end - first_row), ..Batch::default() };
                let mut row = first_row;
                while row < end {
                    let (prompt, first_position) = (row / tokens, row % tokens);
                    let num_rows = (tokens - first_position).min(end - row);
                    let block_table = self.block_table(prompt);
                    step.sequences.push(SequenceRows { num_rows, first_position, block_table });
                    row += num_rows;
                    if row.is_multiple_of(tokens) {
                        step.logit_rows.push((row - first_row - 1) as u32);
                    }
                }
                step
            }
            Case::Decode { batch, context, .. } => {
                let rows = |sequence| SequenceRows {
                    num_rows: 1,
                    first_position: context + index,
                    block_table: self.block_table(sequence),
                };
                Batch {
                    tokens: random.take(batch),
                    sequences: (0..batch).map(rows).collect(),
                    logit_rows: (0..batch as u32).collect(),
                    ..Batch::default()
                }
            }
        }
    }

    fn sequence_tokens(self) -> usize {
        self.context().saturating_add(self.tokens())
    }

    fn blocks_per_sequence(self) -> usize {
        self.sequence_tokens().div_ceil(BLOCK_SIZE)
    }

    fn num_blocks(self) -> usize {
        self.batch() * self.blocks_per_sequence()
    }

    fn block_table(self, sequence: usize) -> Vec<BlockId> {
        let first = sequence * self.blocks_per_sequence();
        (first..first + self.blocks_per_sequence()).map(|block| BlockId(block as u32)).collect()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Case::Prefill { tokens, prompts: 1 } => write!(f, "prefill {tokens}"),
            Case::Prefill { tokens, prompts } => write!(f, "prefill {prompts} x {tokens}"),
            Case::Decode { batch, context, .. } => write!(f, "decode batch {batch}, context {context}"),
        }
    }
}

/// Random tokens, none of which comes again before all of the vocabulary have come.
pub(crate) struct RandomTokens {
    shuffled: Vec<TokenId>,
    next: usize,
}

impl RandomTokens {
    /// The same tokens in every run.
    pub(crate) fn new(vocab_size: usize) -> RandomTokens {
        let mut random = Random(1);
        let mut shuffled: Vec<TokenId> = (0..vocab_size as u32).map(TokenId).collect();
        for end in (1..shuffled.len()).rev() {
            shuffled.swap(end, random.next_below(end + 1));
        }
        RandomTokens { shuffled, next: 0 }
    }

    fn take(&mut self, num_tokens: usize) -> Vec<TokenId> {
        let first = self.next;
        self.next += num_tokens;
        (first..self.next).map(|index| self.shuffled[index % self.shuffled.len()]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(case: Case, vocab_size: usize) -> Vec<Batch> {
        let mut tokens = RandomTokens::new(vocab_size);
        (0..case.num_steps()).map(|index| case.step(index, &mut tokens)).collect()
    }

    /// Rows, first position and blocks of each sequence of each step.
    fn layout(steps: &[Batch]) -> Vec<Vec<(usize, usize, u32)>> {
        let of = |rows: &SequenceRows| (rows.num_rows, rows.first_position, rows.block_table[0].0);
        steps.iter().map(|step| step.sequences.iter().map(of).collect()).collect()
    }

    #[test]
    fn prompts_fill_steps_one_after_another_and_want_their_last_row_only() {
        let case = Case::Prefill { tokens: 700, prompts: 2 };
        let steps = steps(case, 10_000);
        assert_eq!(layout(&steps), [vec![(512, 0, 0)], vec![(188, 512, 0), (324, 0, 22)], vec![(376, 324, 22)]]);
        let wanted: Vec<&[u32]> = steps.iter().map(|step| &step.logit_rows[..]).collect();
        assert_eq!(wanted, [&[][..], &[187], &[375]]);
        assert!(
            steps
                .iter()
                .all(|step| step.tokens.len() == step.sequences.iter().map(|rows| rows.num_rows).sum::<usize>())
        );
        assert_eq!(case.limits(1).max_rows, 512);
        assert_eq!(case.limits(1).max_logit_rows, 2);
    }

    #[test]
    fn decode_steps_follow_the_context_with_tokens_of_their_own() {
        let case = Case::Decode { steps: 3, batch: 2, context: 31 };
        let steps = steps(case, 100);
        assert_eq!(layout(&steps), [[(1, 31, 0), (1, 31, 2)], [(1, 32, 0), (1, 32, 2)], [(1, 33, 0), (1, 33, 2)]]);
        let mut tokens: Vec<TokenId> = steps.iter().flat_map(|step| step.tokens.clone()).collect();
        tokens.sort();
        tokens.dedup();
        assert_eq!(tokens.len(), 6);
        assert!(steps.iter().all(|step| step.logit_rows == [0, 1]));
        assert_eq!(case.num_blocks(), 4);
    }

    #[test]
    fn a_small_vocabulary_comes_round_again() {
        let mut tokens = RandomTokens::new(5);
        let (mut first, second) = (tokens.take(5), tokens.take(5));
        assert_eq!(first, second);
        first.sort();
        assert_eq!(first, (0..5).map(TokenId).collect::<Vec<_>>());
    }
}
