//! Requests to an engine.

use std::fmt;

use moge_model::TokenId;

use crate::error::AdmitError;
use crate::grammar::Grammar;
use crate::sampling_params::SamplingParams;

/// A sequence of one engine; never used twice, and later requests have greater ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A request.
#[derive(Clone, Debug)]
pub struct Request {
    /// The tokens to continue, taken literally; at least one.
    pub prompt: Vec<TokenId>,
    /// Sampling parameters.
    pub sampling: SamplingParams,
    /// Grammar of the continuation, if any; fresh from [`crate::GrammarCompiler`]. A complete continuation
    /// ends, whatever `min_tokens` and `ignore_eos` say.
    pub grammar: Option<Grammar>,
}

impl Request {
    /// Check everything that does not depend on the engine's size, so that a server can refuse before queueing.
    ///
    /// # Errors
    /// If a sampling parameter is out of its range, or the prompt is empty, too long for a context of
    /// `max_sequence_tokens`, or holds a token outside the vocabulary.
    pub fn validate(&self, vocab_size: usize, max_sequence_tokens: usize) -> Result<(), AdmitError> {
        self.sampling.validate(vocab_size)?;
        let num_tokens = self.prompt.len();
        if num_tokens == 0 {
            return Err(AdmitError::EmptyPrompt);
        }
        if num_tokens >= max_sequence_tokens {
            return Err(AdmitError::PromptTooLong { num_tokens, max_tokens: max_sequence_tokens.saturating_sub(1) });
        }
        match self.prompt.iter().position(|token| token.0 as usize >= vocab_size) {
            Some(index) => Err(AdmitError::TokenOutOfVocabulary { index, token: self.prompt[index].0, vocab_size }),
            None => Ok(()),
        }
    }
}
