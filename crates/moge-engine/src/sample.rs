//! The logits of one step to log-probabilities of prompt tokens and to new tokens.

use std::borrow::Cow;

use moge_model::TokenId;

use crate::grammar::{MaskResult, TokenMask};
use crate::logprobs::{RowLogprobs, row_logprobs};
use crate::output::{FinishReason, Sampled, SequenceResult};
use crate::sampler::{History, NoFiniteLogit, Sampler};
use crate::sampling_params::SamplingParams;

/// The rows of one sequence that want logits, and all that sampling from them depends on.
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
    /// With a grammar: what it allows in each of the rows to sample from, as far as it allows the draft.
    pub(crate) masks: Option<Vec<MaskResult>>,
}

/// Turn `logits` `[num_logit_rows, vocab_size]`, those of `sequences` in their order, into log-probabilities of prompt
/// tokens and new tokens. A draft token is accepted while it is what its sequence would have sampled without it, so a
/// draft changes no token.
///
/// # Panics
/// If `logits` has another length.
pub(crate) fn sample(
    sampler: &mut Sampler,
    sequences: &[LogitRows],
    logits: &[f32],
    vocab_size: usize,
) -> Vec<SequenceResult> {
    let num_rows: usize = sequences.iter().map(|rows| rows.num_prompt_logit_rows + rows.num_sample_rows).sum();
    assert_eq!(logits.len(), num_rows * vocab_size);
    let mut logits = logits.chunks_exact(vocab_size);
    sequences
        .iter()
        .map(|rows| {
            let prompt_logprobs = logits.by_ref().take(rows.num_prompt_logit_rows);
            let prompt_logprobs = rows.prompt_logprobs(prompt_logprobs);
            let mut result = SequenceResult { prompt_logprobs, ..SequenceResult::default() };
            // All rows are taken, also those after a mismatch.
            let sample_rows: Vec<&[f32]> = logits.by_ref().take(rows.num_sample_rows).collect();
            rows.sample(sampler, &sample_rows, &mut result);
            result
        })
        .collect()
}

impl LogitRows<'_> {
    /// Log-probabilities of the tokens that follow `rows`.
    fn prompt_logprobs<'a>(&self, rows: impl Iterator<Item = &'a [f32]>) -> Vec<RowLogprobs> {
        let following = self.tokens.iter().skip(self.first_position + 1);
        let num_alternatives = self.params.prompt_logprobs.unwrap_or(0);
        rows.zip(following).map(|(row, &token)| row_logprobs(row, token, num_alternatives)).collect()
    }

    /// Sample from `rows` up to the first token that differs from the draft.
    fn sample(&self, sampler: &mut Sampler, rows: &[&[f32]], result: &mut SequenceResult) {
        let num_rows = self.masks.as_ref().map_or(rows.len(), Vec::len);
        for (index, row) in rows.iter().take(num_rows).enumerate() {
            let end = self.first_position + self.num_prompt_logit_rows + index + 1;
            let mask = self.masks.as_ref().map(|masks| &masks[index]);
            match self.sample_after(sampler, &self.tokens[..end], row, mask) {
                Err(reason) => {
                    result.end = Some(reason);
                    return;
                }
                Ok(sampled) => {
                    let is_as_drafted = self.tokens.get(end) == Some(&sampled.token);
                    result.sampled.push(sampled);
                    if !is_as_drafted {
                        return;
                    }
                }
            }
        }
    }

    /// The token that follows `tokens`, or why there is none.
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
