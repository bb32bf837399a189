//! Turns the logits of one step into log-probabilities of prompt tokens and new tokens.

use std::borrow::Cow;

use moge_model::{Cpu, TokenId};

use crate::grammar::{MaskResult, TokenMask};
use crate::logprobs::row_logprobs;
use crate::output::{FinishReason, Sampled, SequenceResult};
use crate::sampler::{History, NoFiniteLogit, Sampler, Samplers};
use crate::sampling_params::SamplingParams;

/// One sequence's logit rows, and everything that sampling from them depends on.
pub(crate) struct LogitRows<'a> {
    pub(crate) params: &'a SamplingParams,
    /// Prompt, tokens sampled so far, and the draft tokens that have rows in this step.
    pub(crate) tokens: Cow<'a, [TokenId]>,
    pub(crate) num_prompt_tokens: usize,
    /// Position of the first of these rows in `tokens`.
    pub(crate) first_position: usize,
    pub(crate) num_prompt_logit_rows: usize,
    pub(crate) num_sample_rows: usize,
    /// Tokens that end the sequence.
    pub(crate) stop_token_ids: &'a [TokenId],
    /// With a grammar: the masks of the sample rows, up to the first draft token that it refuses.
    pub(crate) masks: Option<Vec<MaskResult>>,
}

/// Turn `logits` `[num_logit_rows, vocab_size]`, those of `sequences` in their order, into log-probabilities of prompt
/// tokens and new tokens. A draft token is accepted while it is what its sequence would have sampled without it, so a
/// draft changes no token. The sequences are shared among the threads of `cpu`; each is a function of its own rows.
///
/// # Panics
/// If `logits` has another length.
pub(crate) fn sample(
    cpu: &Cpu,
    samplers: &Samplers,
    sequences: &[LogitRows],
    logits: &[f32],
    vocab_size: usize,
) -> Vec<SequenceResult> {
    let num_rows: usize = sequences.iter().map(LogitRows::num_rows).sum();
    assert_eq!(logits.len(), num_rows * vocab_size);
    let first_rows = sequences.iter().scan(0, |next, rows| Some(std::mem::replace(next, *next + rows.num_rows())));
    let first_rows: Vec<usize> = first_rows.collect();
    let mut results = vec![SequenceResult::default(); sequences.len()];
    cpu.for_each_slice(&mut results, 1, |index, result| {
        let rows = &sequences[index];
        let own = &logits[first_rows[index] * vocab_size..][..rows.num_rows() * vocab_size];
        let own: Vec<&[f32]> = own.chunks_exact(vocab_size).collect();
        samplers.with(|sampler| result[0] = rows.sample(sampler, &own));
    });
    results
}

impl LogitRows<'_> {
    fn num_rows(&self) -> usize {
        self.num_prompt_logit_rows + self.num_sample_rows
    }

    /// Log-probabilities of the prompt's tokens, and what is sampled, from these `rows`.
    fn sample(&self, sampler: &mut Sampler, rows: &[&[f32]]) -> SequenceResult {
        let (prompt_rows, sample_rows) = rows.split_at(self.num_prompt_logit_rows);
        let following = &self.tokens[self.first_position + 1..];
        let num_alternatives = self.params.prompt_logprobs.unwrap_or(0);
        let prompt_logprobs = prompt_rows.iter().zip(following);
        let prompt_logprobs = prompt_logprobs.map(|(row, &token)| row_logprobs(row, token, num_alternatives)).collect();
        let mut result = SequenceResult { prompt_logprobs, ..SequenceResult::default() };
        // Up to the first token that differs from the draft.
        let num_sample_rows = self.masks.as_ref().map_or(sample_rows.len(), Vec::len);
        for (index, row) in sample_rows.iter().take(num_sample_rows).enumerate() {
            let end = self.first_position + self.num_prompt_logit_rows + index + 1;
            let mask = self.masks.as_ref().map(|masks| &masks[index]);
            match self.sample_after(sampler, &self.tokens[..end], row, mask) {
                Err(reason) => {
                    result.end = Some(reason);
                    break;
                }
                Ok(sampled) => {
                    let is_as_drafted = self.tokens.get(end) == Some(&sampled.token);
                    result.sampled.push(sampled);
                    if !is_as_drafted {
                        break;
                    }
                }
            }
        }
        result
    }

    /// The token that follows `tokens`, or the reason to end without one.
    fn sample_after(
        &self,
        sampler: &mut Sampler,
        tokens: &[TokenId],
        row: &[f32],
        mask: Option<&MaskResult>,
    ) -> Result<Sampled, FinishReason> {
        let (prompt, output) = tokens.split_at(self.num_prompt_tokens);
        let may_stop = self.params.may_stop_after(output.len());
        let allowed = mask.map(|mask| allowed_tokens(mask, self.stop_token_ids, may_stop)).transpose()?;
        let banned = if may_stop { &[] } else { self.stop_token_ids };
        let history = History { prompt, output, allowed: allowed.as_deref(), banned };
        let token = sampler.sample(row, self.params, &history);
        let token = token.map_err(|NoFiniteLogit| FinishReason::NoFiniteLogit)?;
        let logprobs = self.params.logprobs.map(|num_alternatives| row_logprobs(row, token, num_alternatives));
        Ok(Sampled { token, logprobs })
    }
}

/// A bit for each token that the grammar leaves, stop tokens exactly where the answer may end. If nothing but the end is
/// left, the sequence ends without sampling one of them: there may be none, and they may be banned.
fn allowed_tokens(mask: &MaskResult, stop_token_ids: &[TokenId], may_stop: bool) -> Result<Vec<u32>, FinishReason> {
    let Ok(TokenMask { words, may_end }) = mask else { return Err(FinishReason::GrammarFailed) };
    let mut words = words.clone();
    let stops = |words: &mut [u32], allowed| {
        for token in stop_token_ids {
            let (word, bit) = (&mut words[token.0 as usize / 32], 1 << (token.0 % 32));
            *word = if allowed { *word | bit } else { *word & !bit };
        }
    };
    stops(&mut words, false);
    if words.iter().all(|&word| word == 0) {
        return Err(if *may_end { FinishReason::Stop } else { FinishReason::GrammarFailed });
    }
    stops(&mut words, *may_end && may_stop);
    Ok(words)
}

#[cfg(test)]
mod tests;
