//! What a step leaves for whoever asked.

use moge_model::TokenId;
use serde::Serialize;

use crate::{NoFiniteLogit, RowLogprobs, SeqId};

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token, an end-of-sequence token or a stop string.
    Stop,
    /// `max_tokens` are sampled, or the context or the KV cache is full.
    Length,
    /// It was cancelled.
    Cancelled,
    /// [`NoFiniteLogit`]: there was no token to sample.
    NoFiniteLogit,
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
    /// The new token; `None` if part of the prompt is still to be computed.
    pub sampled: Option<Result<Sampled, NoFiniteLogit>>,
}

/// What a step did for one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceOutput {
    /// Which sequence.
    pub id: SeqId,
    /// Prompt tokens that the step computed; 0 in decode.
    pub num_prefilled_tokens: usize,
    /// The new token, stop tokens included.
    pub sampled: Option<Sampled>,
    /// Text that is now certain. What could be the beginning of a stop string or is part of a character is held back.
    pub text: String,
    /// Set in the last output of a sequence.
    pub finish_reason: Option<FinishReason>,
    /// One entry for each prompt token, in the output of the step that completes the prompt, if asked for. The first
    /// is `None`: nothing comes before it.
    pub prompt_logprobs: Option<Vec<Option<RowLogprobs>>>,
}
