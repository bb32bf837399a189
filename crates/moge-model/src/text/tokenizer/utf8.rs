//! Bytes that arrive in parts to text.

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
