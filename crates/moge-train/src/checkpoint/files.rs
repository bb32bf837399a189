//! Checksums of a checkpoint's files, and removing it in one stroke.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use moge_model::{WriteError, io_error, open_file};
use serde::{Deserialize, Serialize};

use super::{CorruptCheckpoint, TEMPORARY, with_suffix};

/// Bytes read at a time.
const BUFFER_BYTES: usize = 1 << 20;

/// A file as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileSum {
    /// Its path from the checkpoint's directory, with `/`.
    file: String,
    bytes: u64,
    crc32: u32,
}

impl FileSum {
    /// All files in `dir` and its directories, in the order of their names.
    pub(super) fn of_files_below(dir: &Path) -> Result<Vec<FileSum>, WriteError> {
        let mut sums = Vec::new();
        let mut dirs = vec![(dir.to_owned(), String::new())];
        while let Some((dir, prefix)) = dirs.pop() {
            for entry in fs::read_dir(&dir).map_err(|source| io_error(&dir, source))? {
                let entry = entry.map_err(|source| io_error(&dir, source))?;
                let (path, file) = (entry.path(), format!("{prefix}{}", entry.file_name().to_string_lossy()));
                if path.is_dir() {
                    dirs.push((path, file + "/"));
                    continue;
                }
                let (bytes, crc32) = sum(&path).map_err(|source| io_error(&path, source))?;
                sums.push(FileSum { file, bytes, crc32 });
            }
        }
        sums.sort_by(|a, b| a.file.cmp(&b.file));
        Ok(sums)
    }

    /// Refuse a file in `dir` that is not as it was written.
    pub(super) fn check(&self, dir: &Path) -> Result<(), CorruptCheckpoint> {
        let path = dir.join(&self.file);
        let problem = match sum(&path) {
            Err(error) => error.to_string(),
            Ok((bytes, _)) if bytes != self.bytes => format!("it has {bytes} bytes, {} were written", self.bytes),
            Ok((_, crc32)) if crc32 != self.crc32 => "its bytes are not those that were written".to_owned(),
            Ok(_) => return Ok(()),
        };
        Err(CorruptCheckpoint { path, problem })
    }
}

/// Length and checksum of a file.
fn sum(path: &Path) -> io::Result<(u64, u32)> {
    let mut file = open_file(path)?;
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut num_bytes = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((num_bytes, hasher.finalize())),
            Ok(len) => {
                hasher.update(&buffer[..len]);
                num_bytes += len as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Remove a checkpoint so that, stopped at any time, it is there whole or counts no more.
pub(super) fn discard(dir: &Path) -> Result<(), WriteError> {
    let gone: PathBuf = with_suffix(dir, &format!(".gone{TEMPORARY}"));
    fs::rename(dir, &gone).and_then(|()| fs::remove_dir_all(&gone)).map_err(|source| io_error(dir, source))
}
