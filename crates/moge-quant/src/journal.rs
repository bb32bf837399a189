//! The journal of an unfinished output: what it is made of, and which tensors are on the disk. One JSON value per line; a
//! last line without its end was being written and does not count.

use std::fs::{DirEntry, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use moge_model::{JOURNAL_NAME, QuantScheme, WriteError, io_error};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::QuantizeError;
use crate::rounding::Rounding;

/// What an output is made of: only work on the same may be continued.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Identity {
    scheme: Value,
    source: Vec<SourceFile>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct SourceFile {
    name: String,
    num_bytes: u64,
    modified_ns: u64,
}

/// A tensor that is on the disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) name: String,
    /// What packing did to it; none if it was copied.
    pub(crate) rounding: Option<Rounding>,
}

impl Identity {
    /// Of the JSON and weight files in `dir`, quantised as `scheme` says.
    pub(crate) fn of(dir: &Path, scheme: &QuantScheme) -> Result<Identity, QuantizeError> {
        let mut source = Vec::new();
        for entry in entries_of(dir)? {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".safetensors") || name.ends_with(".json") {
                let path = entry.path();
                let file = SourceFile::of(name, &path).map_err(|error| read_error(&path, error))?;
                source.push(file);
            }
        }
        source.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Identity { scheme: scheme.to_json(), source })
    }

    /// What makes `self` other work than `other`.
    fn difference(&self, other: &Identity) -> Option<&'static str> {
        match (self.scheme == other.scheme, self.source == other.source) {
            (true, true) => None,
            (false, _) => Some("scheme"),
            (true, false) => Some("source, or the source was changed since"),
        }
    }
}

impl SourceFile {
    fn of(name: String, path: &Path) -> io::Result<SourceFile> {
        let metadata = std::fs::metadata(path)?;
        let modified = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(SourceFile { name, num_bytes: metadata.len(), modified_ns: modified.as_nanos() as u64 })
    }
}

/// Read the journal in `dir`, if work was begun there: the tensors that are on the disk.
pub(crate) fn read(dir: &Path, identity: &Identity) -> Result<Option<Vec<Record>>, QuantizeError> {
    let path = dir.join(JOURNAL_NAME);
    match std::fs::read_to_string(&path) {
        // Killed before the first line was whole: nothing was done yet.
        Ok(text) if whole_lines(&text).is_empty() => Ok(None),
        Ok(text) => parse(dir, &path, &text, identity).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(read_error(&path, error)),
    }
}

fn parse(dir: &Path, path: &Path, text: &str, identity: &Identity) -> Result<Vec<Record>, QuantizeError> {
    let whole = whole_lines(text);
    let damaged = |line: usize, error: serde_json::Error| {
        let problem = format!("line {}: {error}", line + 1);
        QuantizeError::Write(WriteError::Damaged { path: path.to_owned(), problem })
    };
    let mut lines = whole.lines().enumerate();
    let Some((_, first)) = lines.next() else { return Ok(Vec::new()) };
    let found: Identity = serde_json::from_str(first).map_err(|error| damaged(0, error))?;
    if let Some(what) = found.difference(identity) {
        return Err(QuantizeError::OtherWork { dir: dir.to_owned(), what });
    }
    lines.map(|(line, text)| serde_json::from_str(text).map_err(|error| damaged(line, error))).collect()
}

fn whole_lines(text: &str) -> &str {
    &text[..text.rfind('\n').map_or(0, |end| end + 1)]
}

/// A journal being written; nobody else can while it is.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    /// Lines that are not in the file yet.
    waiting: Vec<u8>,
}

impl Journal {
    /// Open the journal in `dir` to add lines, or begin it. With it come the tensors that are on the disk: until now
    /// another process may have added some.
    pub(crate) fn open(dir: &Path, identity: &Identity) -> Result<(Journal, Vec<Record>), QuantizeError> {
        let path = dir.join(JOURNAL_NAME);
        let io_error = |source| io_error(&path, source);
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.map_err(io_error)?;
        // A file system without locks cannot tell us of others.
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(QuantizeError::Busy { dir: dir.to_owned() });
        }
        let text = io::read_to_string(&file).map_err(io_error)?;
        let len = whole_lines(&text).len() as u64;
        // One who finished until now has removed the journal: what we have locked is that one, or new.
        let is_removed = !path.exists();
        if len == 0 || is_removed {
            refuse_files_in(dir).inspect_err(|_| {
                // The other files are what the caller must know of, whether or not ours can be removed.
                let _ = std::fs::remove_file(&path);
            })?;
        }
        if is_removed {
            return Err(QuantizeError::Busy { dir: dir.to_owned() });
        }
        let complete = parse(dir, &path, &text, identity)?;
        file.set_len(len).and_then(|()| file.seek(SeekFrom::End(0))).map_err(io_error)?;
        let mut journal = Journal { path: path.clone(), file, waiting: Vec::new() };
        if len == 0 {
            journal.add_line(identity);
            journal.flush()?;
        }
        Ok((journal, complete))
    }

    /// Note a tensor, which must be on the disk at the next [`Journal::flush`].
    pub(crate) fn add(&mut self, record: &Record) {
        self.add_line(record);
    }

    fn add_line(&mut self, line: &impl Serialize) {
        serde_json::to_writer(&mut self.waiting, line).expect("names and numbers are JSON, and memory takes them");
        self.waiting.push(b'\n');
    }

    /// Bring what was noted to the disk.
    pub(crate) fn flush(&mut self) -> Result<(), WriteError> {
        let written = self.file.write_all(&self.waiting).and_then(|()| self.file.sync_data());
        self.waiting.clear();
        written.map_err(|source| io_error(&self.path, source))
    }

    /// The output is whole.
    pub(crate) fn remove(self) -> Result<(), WriteError> {
        std::fs::remove_file(&self.path).map_err(|source| io_error(&self.path, source))
    }
}

/// Refuse a directory that holds anything but a journal.
pub(crate) fn refuse_files_in(dir: &Path) -> Result<(), QuantizeError> {
    match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(read_error(dir, error)),
        Ok(_) => {}
    }
    match entries_of(dir)?.into_iter().find(|entry| entry.file_name() != JOURNAL_NAME) {
        None => Ok(()),
        Some(entry) => Err(QuantizeError::NotEmpty { dir: dir.to_owned(), found: entry.file_name() }),
    }
}

/// What is in a directory.
fn entries_of(dir: &Path) -> Result<Vec<DirEntry>, QuantizeError> {
    let entries = std::fs::read_dir(dir).and_then(Iterator::collect);
    entries.map_err(|error| read_error(dir, error))
}

/// That `path` cannot be read.
fn read_error(path: &Path, source: io::Error) -> QuantizeError {
    QuantizeError::Read { path: path.to_owned(), source }
}
