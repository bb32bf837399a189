//! Incremental decoding of a token stream.

use super::utf8::decode_utf8;
use super::{Run, Tokenizer};
use crate::TokenId;

/// Decodes the tokens of one sequence while they arrive.
///
/// The results of all calls, concatenated, equal [`Tokenizer::decode`] of all tokens. Only the bytes of an incomplete
/// character are held back, so a U+FFFD that the model itself writes is returned at once.
///
/// SentencePiece drops the space before the first word of a text. A text that continues a prompt keeps it:
/// [`Detokenizer::after`].
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    /// The first bytes of an incomplete UTF-8 character; at most three between calls.
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

    /// Take the next token of the sequence; returns the text that is complete, which is empty if the token ends inside a
    /// character. All calls for a sequence take the same tokenizer.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: TokenId) -> String {
        tokenizer.append_bytes(id, &mut self.run, &mut self.pending);
        let mut text = String::new();
        decode_utf8(&mut self.pending, tokenizer.invalid_utf8(), &mut text);
        text
    }

    /// End the sequence; returns the text of an incomplete character. A new sequence may follow.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let mut text = String::new();
        tokenizer.invalid_utf8().replace(self.pending.len(), &mut text);
        *self = Self::default();
        text
    }
}
