//! Errors of requests that are refused.

use thiserror::Error;

/// Why a request is refused. The engine is unchanged by a refused request.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AdmitError {
    /// The prompt is empty.
    #[error("prompt: it has no token, at least 1 is needed")]
    EmptyPrompt,
    /// The prompt leaves no room for a token in the model's context.
    #[error("prompt: {num_tokens} tokens, the model's context allows at most {max_tokens}")]
    PromptTooLong {
        /// Tokens of the prompt.
        num_tokens: usize,
        /// Tokens that a prompt may have.
        max_tokens: usize,
    },
    /// A prompt token is not in the vocabulary.
    #[error("prompt: token {token} at index {index} is not below the vocabulary size {vocab_size}")]
    TokenOutOfVocabulary {
        /// Its index in the prompt.
        index: usize,
        /// The token.
        token: u32,
        /// Entries of the vocabulary.
        vocab_size: usize,
    },
    /// Too many requests wait already.
    #[error("queue: {max_waiting} requests wait already, no more are allowed")]
    QueueFull {
        /// Requests that may wait.
        max_waiting: usize,
    },
    /// Prompt and output need more KV cache than there is, even with nothing else running.
    #[error(
        "max_tokens: a prompt of {num_prompt_tokens} tokens and {max_tokens} more need {num_blocks} blocks of KV cache, \
         there are {max_blocks}"
    )]
    NeverFits {
        /// Tokens of the prompt.
        num_prompt_tokens: usize,
        /// Tokens that may follow it.
        max_tokens: usize,
        /// Blocks that both need.
        num_blocks: usize,
        /// Blocks that there are.
        max_blocks: usize,
    },
    /// A sampling parameter is out of its range.
    #[error("{field}: {value} is not allowed, must be {allowed}")]
    InvalidParameter {
        /// Name of the field in [`crate::SamplingParams`].
        field: &'static str,
        /// The value found.
        value: String,
        /// The allowed values.
        allowed: String,
    },
}
