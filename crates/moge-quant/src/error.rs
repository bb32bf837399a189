//! Why a checkpoint was not quantised.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use moge_model::{CheckpointError, ConfigError, WriteError};
use thiserror::Error;

/// Why a checkpoint was not quantised.
#[derive(Debug, Error)]
pub enum QuantizeError {
    /// The source's `config.json` is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The source's tensors are refused.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The output cannot be written, or what is there cannot be continued.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A file or directory cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The source is in the packed layout.
    #[error("{}: quantised already; allowed: a checkpoint in f32, f16 or bf16, or an official int8 one", dir.display())]
    AlreadyQuantized {
        /// The source's directory.
        dir: PathBuf,
    },
    /// The description of an int8 checkpoint, or the list of its files, is wrong or asks for what is not implemented.
    #[error("{file}: {field}: {problem}")]
    Description {
        /// The file's path.
        file: String,
        /// The entry, or what the error is about.
        field: String,
        /// What was found and what is allowed.
        problem: String,
    },
    /// A tensor of an int8 checkpoint is not what its description makes it.
    #[error("{dir}: tensor {name}: {problem}")]
    Tensor {
        /// The source's directory.
        dir: String,
        /// The tensor's name.
        name: String,
        /// What was found and what is allowed.
        problem: String,
    },
    /// Weights are no numbers; nothing can be made of them.
    #[error("{dir}: tensor {name}: {num_non_finite} of its numbers are NaN or infinite")]
    NonFinite {
        /// The source's directory.
        dir: String,
        /// The tensor's name.
        name: String,
        /// How many.
        num_non_finite: u64,
    },
    /// The output directory holds something else; nothing is ever overwritten.
    #[error("{}: not empty, {} is there; name a new directory", dir.display(), found.display())]
    NotEmpty {
        /// The output directory.
        dir: PathBuf,
        /// One of the files.
        found: OsString,
    },
    /// The output directory holds the unfinished work of another command.
    #[error("{}: begun with another {what}; name a new directory, or remove this one", dir.display())]
    OtherWork {
        /// The output directory.
        dir: PathBuf,
        /// What differs.
        what: &'static str,
    },
    /// Another process is writing there.
    #[error("{}: another process is writing it", dir.display())]
    Busy {
        /// The output directory.
        dir: PathBuf,
    },
    /// The caller asked to stop; the work can be continued.
    #[error("{}: stopped; the same command, run again, will go on", dir.display())]
    Stopped {
        /// The output directory.
        dir: PathBuf,
    },
}
