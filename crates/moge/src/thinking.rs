//! Thinking and answer, told apart while tokens arrive.

use moge_model::{Detokenizer, TokenId, Tokenizer};

/// Part of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Thinking before the answer.
    Thinking,
    /// The answer.
    Answer,
}

/// Splits a token stream at the tokens around the model's thinking; those tokens are in neither part.
pub(crate) struct ThinkingSplitter<'a> {
    tokenizer: &'a Tokenizer,
    delimiters: Option<(TokenId, TokenId)>,
    detokenizer: Detokenizer,
    part: Part,
}

impl<'a> ThinkingSplitter<'a> {
    /// A splitter for the continuation of `prompt`, which may have opened the thinking already. `delimiters` open and
    /// close it; without them all is answer.
    pub(crate) fn new(
        tokenizer: &'a Tokenizer,
        delimiters: Option<(TokenId, TokenId)>,
        prompt: &[TokenId],
    ) -> ThinkingSplitter<'a> {
        let last = delimiters.and_then(|(open, close)| prompt.iter().rfind(|&&id| id == open || id == close).copied());
        let opened = last.is_some() && last == delimiters.map(|(open, _)| open);
        let part = if opened { Part::Thinking } else { Part::Answer };
        ThinkingSplitter { tokenizer, delimiters, detokenizer: Detokenizer::after(tokenizer, prompt), part }
    }

    /// Take the next token; returns the text that became certain and the part it belongs to.
    pub(crate) fn push(&mut self, token: TokenId) -> (Part, String) {
        let part = self.part;
        match self.delimiters {
            Some((open, _)) if token == open => self.part = Part::Thinking,
            Some((_, close)) if token == close => self.part = Part::Answer,
            _ => return (part, self.detokenizer.push(self.tokenizer, token)),
        }
        (part, self.detokenizer.finish(self.tokenizer))
    }

    /// End the stream; returns what was held back.
    pub(crate) fn finish(&mut self) -> (Part, String) {
        (self.part, self.detokenizer.finish(self.tokenizer))
    }
}
