//! Files that are either absent or complete, and the errors of writing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Reasons why a checkpoint could not be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// A file that would be written exists already; files are never overwritten.
    #[error("{}: exists already; remove it or choose another directory", path.display())]
    TargetExists {
        /// The file.
        path: PathBuf,
    },
    /// There is no space left for the data, or the file would exceed a limit of the system.
    #[error("{}: the disk is full", path.display())]
    DiskFull {
        /// The file being written.
        path: PathBuf,
    },
    /// No permission to write the directory or a file in it.
    #[error("{}: not writable: {source}", path.display())]
    NotWritable {
        /// The directory or file.
        path: PathBuf,
        /// The I/O error.
        source: io::Error,
    },
    /// Another failure of the file system.
    #[error("{}: {source}", path.display())]
    Io {
        /// The directory or file.
        path: PathBuf,
        /// The I/O error.
        source: io::Error,
    },
    /// A file of an earlier writer is not valid.
    #[error("{}: {problem}; remove the directory and begin again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The problem.
        problem: String,
    },
    /// The plan cannot be written as safetensors.
    #[error("tensor {name}: {problem}")]
    Plan {
        /// The tensor's name.
        name: String,
        /// The problem.
        problem: String,
    },
}

/// Write a whole file so that it is either absent or complete: temporary name, fsync, rename.
///
/// # Errors
/// If the file system refuses.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), WriteError> {
    let temporary = temporary_path(path);
    // An earlier writer that was killed may have left a part of it.
    let mut file = File::create(&temporary).map_err(|source| io_error(&temporary, source))?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| {
        // The write error is what the caller must see, whether or not the file can be removed.
        let _ = fs::remove_file(&temporary);
        io_error(path, source)
    })
}

/// Classify a file system error by what a user can do about it.
pub fn io_error(path: &Path, source: io::Error) -> WriteError {
    let path = path.to_path_buf();
    match source.kind() {
        io::ErrorKind::AlreadyExists => WriteError::TargetExists { path },
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            WriteError::DiskFull { path }
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => WriteError::NotWritable { path, source },
        _ => WriteError::Io { path, source },
    }
}

/// As [`io_error`], for a file of an earlier writer, which must exist.
pub(super) fn resume_error(path: &Path, source: io::Error) -> WriteError {
    match source.kind() {
        io::ErrorKind::NotFound => {
            WriteError::Damaged { path: path.to_path_buf(), problem: "it is missing".to_string() }
        }
        _ => io_error(path, source),
    }
}

/// Make the renames inside `dir` survive a power cut.
///
/// # Errors
/// If the file system refuses.
pub fn sync_directory(dir: &Path) -> Result<(), WriteError> {
    // Only Unix lets a directory be opened as a file.
    if cfg!(unix) {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(|source| io_error(dir, source))?;
    }
    Ok(())
}

pub(super) fn is_there(path: &Path) -> Result<bool, WriteError> {
    path.try_exists().map_err(|source| io_error(path, source))
}

pub(super) fn temporary_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    PathBuf::from(name)
}
