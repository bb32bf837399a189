//! The error of a refused `tokenizer.model`.

use thiserror::Error;

/// Why a `tokenizer.model` is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{file}: {field}: found {value}; allowed: {allowed}")]
pub struct SentencePieceError {
    /// The file's name.
    pub file: String,
    /// The field, with its place in the message.
    pub field: String,
    /// The value found.
    pub value: String,
    /// The values allowed.
    pub allowed: String,
}

/// A [`SentencePieceError`] without its file.
#[derive(Debug)]
pub(super) struct Problem {
    field: String,
    pub(super) value: String,
    pub(super) allowed: String,
}

impl Problem {
    pub(super) fn new(field: &str, value: String, allowed: &str) -> Problem {
        Problem { field: field.to_owned(), value, allowed: allowed.to_owned() }
    }

    /// The same problem with `message` before the field's path.
    pub(super) fn inside(mut self, message: &str) -> Problem {
        self.field = format!("{message}.{}", self.field);
        self
    }

    pub(super) fn in_file(self, file: &str) -> SentencePieceError {
        SentencePieceError { file: file.to_owned(), field: self.field, value: self.value, allowed: self.allowed }
    }
}
