//! Per-sequence results of one step.

use moge_model::TokenId;
use serde::Serialize;

use crate::logprobs::RowLogprobs;
use crate::request::SeqId;

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token, an end-of-sequence token, a stop string, or the end of what the grammar describes.
    Stop,
    /// `max_tokens` are sampled, or the context or the KV cache is full.
    Length,
    /// It was cancelled.
    Cancelled,
    /// Every logit was NaN or `-inf`, so no token could be sampled. Caused by broken weights, or by a logit_bias or
    /// min_tokens that excludes every token.
    NoFiniteLogit,
    /// The grammar could not continue: it became too complex, or no token matches it. The output so far is a prefix of a
    /// text that it describes.
    GrammarFailed,
}

/// A sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: TokenId,
    /// Its log-probability, if requested.
    pub logprobs: Option<RowLogprobs>,
}

/// Result of sampling from one sequence's logit rows in one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SequenceResult {
    /// For each row followed by a prompt token: the log-probability of that token. Empty unless requested.
    pub prompt_logprobs: Vec<RowLogprobs>,
    /// New tokens: the accepted draft tokens, and one more unless the sequence ends without it. Empty while a part of the
    /// sequence is still to be computed.
    pub sampled: Vec<Sampled>,
    /// Set if the sequence ends after `sampled` without another token.
    pub end: Option<FinishReason>,
    /// As in [`SequenceOutput`], for all route rows, including those of rejected draft tokens.
    pub expert_ids: Vec<u8>,
}

/// One sequence's output of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceOutput {
    /// The sequence.
    pub id: SeqId,
    /// Tokens computed in prefill, including those computed again after a preemption; 0 in decode.
    pub num_prefilled_tokens: usize,
    /// Prompt tokens found in the prefix cache.
    pub num_cached_tokens: usize,
    /// New tokens, including a stop token. More than one only if the sequence had a draft.
    pub sampled: Vec<Sampled>,
    /// Text that is now certain. A possible beginning of a stop string or of a character is held back.
    pub text: String,
    /// Length of `text` in bytes after each of `sampled`. Text after the last one was released by an end without a token.
    pub(crate) text_ends: Vec<usize>,
    /// Set in the last output of a sequence.
    pub finish_reason: Option<FinishReason>,
    /// One entry for each prompt token, in the output of the step that completes the prompt, if asked for. The first
    /// is `None`: nothing comes before it.
    pub prompt_logprobs: Option<Vec<Option<RowLogprobs>>>,
    /// Experts of the tokens that this step computed for the first time, each counted from the first one of its expert
    /// group: `[token, routed layer, num_expert_groups, top_k_per_group]`, in an expert group by falling probability.
    /// Empty unless requested. All outputs of a sequence together cover its prompt and what was sampled but for the
    /// last sampled token, which is never computed.
    pub expert_ids: Vec<u8>,
}

impl SequenceOutput {
    /// The text that became certain with each new token.
    pub fn token_texts(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.text_ends.iter().copied());
        starts.zip(&self.text_ends).map(|(start, &end)| &self.text[start..end])
    }

    /// The text released by an end without a token.
    pub fn last_text(&self) -> &str {
        &self.text[self.text_ends.last().copied().unwrap_or(0)..]
    }
}
