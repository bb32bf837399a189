//! Why checkpoints cannot be written or taken up.

use std::path::PathBuf;

use moge_model::{CheckpointError, WriteError};
use thiserror::Error;

use super::CorruptCheckpoint;

/// Why checkpoints cannot be written or taken up.
#[derive(Debug, Error)]
pub enum CheckpointsError {
    /// The file system refuses.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A file that is copied into checkpoints cannot be read.
    #[error(transparent)]
    Read(#[from] CheckpointError),
    /// The model's `config.json` cannot be copied into checkpoints.
    #[error("{}: {problem}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Another process has the directory.
    #[error("{}: another process trains there", dir.display())]
    InUse {
        /// The output directory.
        dir: PathBuf,
    },
    /// A checkpoint is of a newer or older program.
    #[error("{}: version {found}; this program reads version {expected}", path.display())]
    Version {
        /// The file that says so.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What it should say.
        expected: u32,
    },
    /// A checkpoint is of another network.
    #[error(
        "{}: {what} is {found}, the run's model has {expected}; name another output.dir to begin anew", dir.display()
    )]
    OtherModel {
        /// The checkpoint.
        dir: PathBuf,
        /// The tensor or field of `config.json` that differs.
        what: String,
        /// What the checkpoint has.
        found: String,
        /// What the run's model has.
        expected: String,
    },
    /// There are checkpoints, and none is whole.
    #[error("{}: no checkpoint is whole: {}; remove them to begin anew", dir.display(), list(damaged))]
    NoneWhole {
        /// The output directory.
        dir: PathBuf,
        /// What is wrong with each.
        damaged: Vec<CorruptCheckpoint>,
    },
}

fn list(damaged: &[CorruptCheckpoint]) -> String {
    damaged.iter().map(CorruptCheckpoint::to_string).collect::<Vec<_>>().join("; ")
}
