//! Text of a token stream, as soon as it is certain.

use super::utf8::decode_utf8;
use super::{Run, Tokenizer};
use crate::TokenId;

/// Turns one sequence's tokens into text while they arrive.
///
/// What all calls return together equals [`Tokenizer::decode`] of all tokens. Only the bytes of an unfinished
/// character are held back, so a U+FFFD that the model itself writes comes out at once.
///
/// SentencePiece drops the space before the first word of a text. Text that goes on after a prompt keeps it:
/// [`Detokenizer::after`].
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    /// The first bytes of an unfinished UTF-8 character; at most three between calls.
    pending: Vec<u8>,
    run: Run,
}

impl Detokenizer {
    /// For the text that follows `prompt`.
    pub fn after(tokenizer: &Tokenizer, prompt: &[TokenId]) -> Detokenizer {
        let mut detokenizer = Detokenizer::default();
        for &token in prompt {
            detokenizer.push(tokenizer, token);
        }
        detokenizer
    }

    /// Take the next token of the sequence; returns the text that became certain, often empty for a part of a
    /// character. Every call for one sequence must be given the same tokenizer.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: TokenId) -> String {
        tokenizer.append_bytes(id, &mut self.run, &mut self.pending);
        let mut text = String::new();
        decode_utf8(&mut self.pending, tokenizer.invalid_utf8(), &mut text);
        text
    }

    /// End the sequence; returns what an unfinished character decodes to. A new sequence may follow.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let mut text = String::new();
        tokenizer.invalid_utf8().replace(self.pending.len(), &mut text);
        *self = Self::default();
        text
    }
}
