//! Opening the files of a checkpoint. A downloaded directory may hold anything under the names of its files: a pipe that
//! blocks, a device without an end, a Git LFS pointer.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use crate::checkpoint::error::CheckpointError;

/// Maximum size of a file that is read whole, in bytes. The largest known, a `tokenizer.json`, has 20 MB.
const MAX_WHOLE_BYTES: u64 = 256 << 20;

/// Start of a Git LFS pointer, which replaces a file that `git clone` did not fetch.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Open a regular file for reading.
///
/// # Errors
/// If it is not a regular file, is a Git LFS pointer, or cannot be opened.
pub fn open_file(path: &Path) -> io::Result<File> {
    // Checked before opening: opening a named pipe waits for its writer.
    let metadata = fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound if is_there(path) => io::Error::new(error.kind(), "a link that leads nowhere"),
        _ => error,
    })?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut start = Vec::new();
    File::open(path)?.take(LFS_POINTER.len() as u64).read_to_end(&mut start)?;
    if start == LFS_POINTER {
        return Err(io::Error::other("only a Git LFS pointer; `git lfs pull` fetches the file itself"));
    }
    File::open(path)
}

/// Read one of the small files of a checkpoint.
///
/// # Errors
/// If it is not a regular file, is too large, or cannot be read.
pub fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let file = open_file(path)?;
    let num_bytes = file.metadata()?.len();
    if num_bytes > MAX_WHOLE_BYTES {
        return Err(io::Error::other(format!("{num_bytes} bytes; allowed: at most {MAX_WHOLE_BYTES}")));
    }
    let mut bytes = Vec::with_capacity(num_bytes as usize);
    file.take(MAX_WHOLE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Names and contents of the files in `dir` that belong to a checkpoint beside weights and config, such as the tokenizer.
/// Directories are skipped.
///
/// # Errors
/// If the directory or one of the files cannot be read.
pub fn small_files(dir: &Path) -> Result<Vec<(OsString, Vec<u8>)>, CheckpointError> {
    let failed = |path: &Path, source| CheckpointError::Read { file: path.display().to_string(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(|error| failed(dir, error))? {
        let entry = entry.map_err(|error| failed(dir, error))?;
        let path = entry.path();
        let read = || match entry.file_type()?.is_dir() {
            true => Ok(None),
            false => read_file(&path).map(Some),
        };
        if is_small_file(&entry.file_name().to_string_lossy())
            && let Some(bytes) = read().map_err(|error| failed(&path, error))?
        {
            files.push((entry.file_name(), bytes));
        }
    }
    Ok(files)
}

/// True for the files that belong to a checkpoint beside weights and config.
fn is_small_file(name: &str) -> bool {
    const NAMES: [&str; 6] = [
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "README.md",
    ];
    let prefixes = ["tokenizer", "chat_template", "LICENSE", "NOTICE"];
    NAMES.contains(&name) || prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// As [`read_file`]; `None` if the directory has no such entry. A dangling link is an error.
pub(crate) fn read_file_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    if is_there(path) { read_file(path).map(Some) } else { Ok(None) }
}

/// True if the directory has an entry of this name, including a dangling link.
pub(crate) fn is_there(path: &Path) -> bool {
    // Any other error is reported when the file is opened.
    !matches!(fs::symlink_metadata(path), Err(error) if error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_regular_file_of_sensible_size_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        assert_eq!(read_file_if_there(&path).unwrap(), None);
        fs::write(&path, "{}").unwrap();
        assert_eq!(read_file_if_there(&path).unwrap().unwrap(), b"{}");
        File::create(&path).unwrap().set_len(MAX_WHOLE_BYTES + 1).unwrap();
        assert!(read_file(&path).unwrap_err().to_string().contains("268435457 bytes; allowed: at most 268435456"));
        fs::write(&path, [LFS_POINTER, b"v1\noid sha256:00\nsize 7\n"].concat()).unwrap();
        assert!(read_file(&path).unwrap_err().to_string().contains("git lfs pull"));
        assert!(read_file(dir.path()).unwrap_err().to_string().contains("not a regular file"));
    }

    #[cfg(unix)]
    #[test]
    fn a_device_that_never_ends_and_a_link_that_leads_nowhere_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (device, broken) = (dir.path().join("device"), dir.path().join("broken"));
        std::os::unix::fs::symlink("/dev/zero", &device).unwrap();
        std::os::unix::fs::symlink("absent", &broken).unwrap();
        assert!(read_file(&device).unwrap_err().to_string().contains("not a regular file"));
        assert!(read_file_if_there(&broken).unwrap_err().to_string().contains("a link that leads nowhere"));
    }
}
