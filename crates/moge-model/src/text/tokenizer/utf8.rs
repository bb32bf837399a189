//! UTF-8 that arrives in parts.

/// The replacement of bytes that are not UTF-8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InvalidUtf8 {
    /// One U+FFFD for each maximal start of a character (Unicode's recommendation, `String::from_utf8_lossy`).
    OnePerSequence,
    /// One U+FFFD for each byte (SentencePiece).
    OnePerByte,
}

impl InvalidUtf8 {
    /// Append the replacement of `num_bytes` bytes that begin a character and do not complete it.
    pub(super) fn replace(self, num_bytes: usize, text: &mut String) {
        let times = match self {
            Self::OnePerSequence => num_bytes.min(1),
            Self::OnePerByte => num_bytes,
        };
        text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, times));
    }
}

/// Move all of `bytes` but an incomplete last character to `text`.
pub(super) fn decode_utf8(bytes: &mut Vec<u8>, invalid: InvalidUtf8, text: &mut String) {
    let mut start = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        start += chunk.valid().len();
        // Further bytes may complete an invalid chunk at the end.
        if start + chunk.invalid().len() == bytes.len() && is_incomplete(chunk.invalid()) {
            break;
        }
        invalid.replace(chunk.invalid().len(), text);
        start += chunk.invalid().len();
    }
    bytes.drain(..start);
}

/// True if further bytes can complete `bytes`, a maximal chunk of invalid UTF-8, to a character.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
