//! What a step leaves for whoever asked.

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
    /// Every logit was NaN or `-inf`, so there was no token to sample. Broken weights do that, and so can a logit_bias or
    /// min_tokens that leave nothing.
    NoFiniteLogit,
    /// The grammar could not go on: it became too complex, or no token spells what it demands. What was said until then
    /// is a beginning of what it describes.
    GrammarFailed,
}

/// A sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: TokenId,
    /// Its log-probability, if asked for.
    pub logprobs: Option<RowLogprobs>,
}

/// What sampling made of the logit rows of one sequence in one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SequenceResult {
    /// For each row that has a next token in the prompt: what the model thought of that token. Empty if not asked for.
    pub prompt_logprobs: Vec<RowLogprobs>,
    /// New tokens: those of the draft that were accepted, and one more unless the sequence ends without it. Empty if a
    /// part of the sequence is still to be computed.
    pub sampled: Vec<Sampled>,
    /// Why the sequence ends after `sampled` without another token, if it does.
    pub end: Option<FinishReason>,
    /// As in [`SequenceOutput`], of all rows whose experts are wanted, also those of rejected draft tokens.
    pub expert_ids: Vec<u8>,
}

/// What a step did for one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceOutput {
    /// Which sequence.
    pub id: SeqId,
    /// Tokens that the step computed in prefill, those that a preemption made it compute again among them; 0 in decode.
    pub num_prefilled_tokens: usize,
    /// Prompt tokens that were in the KV cache already, for another sequence that began alike.
    pub num_cached_tokens: usize,
    /// New tokens, a stop token among them. More than one only if the sequence had a draft.
    pub sampled: Vec<Sampled>,
    /// Text that is now certain. What could be the beginning of a stop string or is part of a character is held back.
    pub text: String,
    /// Bytes of `text` that were certain after each of `sampled`. Only an end without a token leaves text after the last.
    pub(crate) text_ends: Vec<usize>,
    /// Set in the last output of a sequence.
    pub finish_reason: Option<FinishReason>,
    /// One entry for each prompt token, in the output of the step that completes the prompt, if asked for. The first
    /// is `None`: nothing comes before it.
    pub prompt_logprobs: Option<Vec<Option<RowLogprobs>>>,
    /// Experts of the tokens that this step computed for the first time, each counted from the first one of its expert
    /// group: `[token, routed layer, num_expert_groups, top_k_per_group]`, in an expert group by falling probability.
    /// Empty if not asked for. All outputs of a sequence together cover its prompt and what was sampled but for the
    /// last sampled token, which nobody computes.
    pub expert_ids: Vec<u8>,
}

impl SequenceOutput {
    /// The text that became certain with each of the new tokens.
    pub fn token_texts(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.text_ends.iter().copied());
        starts.zip(&self.text_ends).map(|(start, &end)| &self.text[start..end])
    }

    /// The text that an end without a token released.
    pub fn last_text(&self) -> &str {
        &self.text[self.text_ends.last().copied().unwrap_or(0)..]
    }
}
