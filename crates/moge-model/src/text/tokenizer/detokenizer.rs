//! Text of a token stream, as soon as it is certain.

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

/// What stands for bytes that are no UTF-8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InvalidUtf8 {
    /// One U+FFFD for the longest start of a character (Unicode's recommendation, `String::from_utf8_lossy`).
    OnePerSequence,
    /// One U+FFFD for each byte (SentencePiece).
    OnePerByte,
}

impl InvalidUtf8 {
    /// Append what stands for `num_bytes` bytes that begin a character and do not finish it.
    pub(super) fn replace(self, num_bytes: usize, text: &mut String) {
        let times = match self {
            Self::OnePerSequence => num_bytes.min(1),
            Self::OnePerByte => num_bytes,
        };
        text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, times));
    }
}

/// Move everything that later bytes cannot change from `bytes` to `text`; an unfinished last character stays.
pub(super) fn decode_utf8(bytes: &mut Vec<u8>, invalid: InvalidUtf8, text: &mut String) {
    let mut start = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        start += chunk.valid().len();
        // A chunk at the end may be the beginning of a character that further bytes finish.
        if start + chunk.invalid().len() == bytes.len() && is_unfinished(chunk.invalid()) {
            break;
        }
        invalid.replace(chunk.invalid().len(), text);
        start += chunk.invalid().len();
    }
    bytes.drain(..start);
}

/// Whether further bytes can make a character of `bytes`, a maximal chunk of invalid UTF-8.
fn is_unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
