//! Errors of loading and using a tokenizer.

use thiserror::Error;

use super::sentencepiece::SentencePieceError;
use crate::TokenId;

/// Why a tokenizer cannot be loaded or used.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// The directory holds no tokenizer.
    #[error("{dir}: there is neither tokenizer.json nor tokenizer.model")]
    Missing {
        /// The directory.
        dir: String,
    },
    /// A file cannot be read.
    #[error("{file}: {source}")]
    Read {
        /// The file's path.
        file: String,
        /// The I/O error.
        source: std::io::Error,
    },
    /// A file is not of the expected format.
    #[error("{file}: {problem}")]
    Invalid {
        /// The file's path.
        file: String,
        /// The value found.
        problem: String,
    },
    /// A field is not valid, or asks for a feature that is not implemented.
    #[error("{file}: {field}: {problem}")]
    Field {
        /// The file's path.
        file: String,
        /// The field's name.
        field: String,
        /// The value found and the values allowed.
        problem: String,
    },
    /// `tokenizer.model` is refused.
    #[error(transparent)]
    SentencePiece(#[from] SentencePieceError),
    /// The tokenizer has tokens that the model has no embedding for.
    #[error("{file}: token {piece:?} has id {id}; allowed: below the model's vocab_size {vocab_size}", id = id.0)]
    DoesNotFit {
        /// The tokenizer's file.
        file: String,
        /// The first token that does not fit.
        id: TokenId,
        /// Its text in the vocabulary.
        piece: String,
        /// Entries of the model's vocabulary.
        vocab_size: usize,
    },
    /// The text cannot be encoded.
    #[error("{file}: the text cannot be encoded: {problem}")]
    Encode {
        /// The tokenizer's file.
        file: String,
        /// The tokenizer's message.
        problem: String,
    },
}

/// [`TokenizerError::Field`] from its parts.
pub(super) fn field_error(file: &str, field: &str, problem: String) -> TokenizerError {
    TokenizerError::Field { file: file.to_owned(), field: field.to_owned(), problem }
}
