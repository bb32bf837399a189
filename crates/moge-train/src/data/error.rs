//! Why there is no data to train on.

use std::io;
use std::path::Path;

use moge_model::{GenerationDefaultsError, TokenizerError, WriteError};
use thiserror::Error;

/// Why there is no data to train on.
#[derive(Debug, Error)]
pub enum DataError {
    /// A file or directory cannot be read.
    #[error("{file}: {source}")]
    Read {
        /// The file or directory.
        file: String,
        /// What the system said.
        source: io::Error,
    },
    /// A pattern fits no file.
    #[error("{pattern}: there is no such file (files of data.{name})")]
    NoFiles {
        /// The source.
        name: String,
        /// The pattern.
        pattern: String,
    },
    /// A text is not UTF-8.
    #[error("{file}: not UTF-8 at byte {position}; allowed: text in UTF-8")]
    NotUtf8 {
        /// The file.
        file: String,
        /// Where the first wrong byte is.
        position: u64,
    },
    /// A line of a JSONL file holds no document.
    #[error("{file}: line {line}: {problem}; on_bad_line = \"skip\" leaves such lines out")]
    BadLine {
        /// The file.
        file: String,
        /// The line, counted from 1.
        line: u64,
        /// What was found and what is allowed.
        problem: String,
    },
    /// The tokenizer gives up on a document.
    #[error("{file}: {}{problem}", line.map_or(String::new(), |line| format!("line {line}: ")))]
    Encode {
        /// The file.
        file: String,
        /// The line of a JSONL file, counted from 1.
        line: Option<u64>,
        /// What the tokenizer says.
        problem: String,
    },
    /// A token file is not what it must be.
    #[error("{file}: not a valid token file: {problem}")]
    TokenFile {
        /// The file.
        file: String,
        /// What was found and what is allowed.
        problem: String,
    },
    /// A token that the model has no embedding for.
    #[error("{file}: tokens[{position}] is {token}; allowed: below the model's vocab_size {vocab_size}")]
    TokenOutOfRange {
        /// The token file.
        file: String,
        /// Its place in `tokens`.
        position: u64,
        /// The token.
        token: u32,
        /// Entries of the model's vocabulary.
        vocab_size: usize,
    },
    /// All documents of a source together have no token.
    #[error(
        "data.{name}: there is no token in its files, of which {num_bad_lines} bad lines were left out; allowed: at least one document that is not empty; on_bad_line = \"stop\" tells what is wrong with the first bad line"
    )]
    Empty {
        /// The source.
        name: String,
        /// Lines that held no document.
        num_bad_lines: u64,
    },
    /// A token file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The model's tokenizer cannot be loaded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model's `generation_config.json` is refused.
    #[error(transparent)]
    GenerationConfig(#[from] GenerationDefaultsError),
    /// A state belongs to other data.
    #[error("{what} is {found}; the run that would go on had {expected}")]
    OtherData {
        /// What differs.
        what: String,
        /// As it is now.
        found: String,
        /// As the state says it was.
        expected: String,
    },
    /// A state that no loader can have had.
    #[error("the saved place in data.{name} cannot be: {state}")]
    DamagedState {
        /// The source.
        name: String,
        /// What the state says of it.
        state: String,
    },
    /// The caller asked to stop.
    #[error("data.{name}: stopped; the same command, run again, begins this source again")]
    Stopped {
        /// The source.
        name: String,
    },
}

/// The reading of `path` failed.
pub(super) fn read_error(path: &Path) -> impl Fn(io::Error) -> DataError {
    move |source| DataError::Read { file: path.display().to_string(), source }
}
