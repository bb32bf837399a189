//! Safetensors files of a checkpoint: their headers checked, their data mapped or read, nothing interpreted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::tensor::Metadata;

use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::index::{Files, INDEX_NAME, bytes_of, list_files, read_index};
use crate::checkpoint::storage::{READ_CHUNK_BYTES, Storage, StoredTensor, each_part, map_file, read_file};

/// Maximum length of a header, as in the safetensors library.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The way in which the data of a checkpoint is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LoadMode {
    /// Map the files; pages are read when they are first accessed.
    #[default]
    Mmap,
    /// Read the files into memory, several parts in parallel: faster on network disks.
    Read,
}

/// The tensors of a checkpoint by name.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    tensors: BTreeMap<String, StoredTensor>,
    shards: Vec<Arc<Storage>>,
}

impl Checkpoint {
    /// Open the files of `dir` and check every header. `progress` gets the bytes read so far and in all; only
    /// [`LoadMode::Read`] calls it.
    ///
    /// # Errors
    /// If a file is missing, unreadable or malformed, or the index and the files disagree.
    pub fn open(
        dir: &Path,
        mode: LoadMode,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open_files(dir, &list_files(dir)?, &dir.join(INDEX_NAME), mode, progress)
    }

    /// As [`Checkpoint::open`], with an index, `*.json`, or a single safetensors file under another name than usual.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_named(
        file: &Path,
        mode: LoadMode,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Checkpoint, CheckpointError> {
        let dir = file.parent().unwrap_or(Path::new("."));
        let files = match file.extension() {
            Some(extension) if extension == "json" => read_index(file)?,
            _ => Files::from([(file.file_name().unwrap_or_default().to_string_lossy().into_owned(), None)]),
        };
        Checkpoint::open_files(dir, &files, file, mode, progress)
    }

    fn open_files(
        dir: &Path,
        files: &Files,
        index: &Path,
        mode: LoadMode,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Checkpoint, CheckpointError> {
        let total_bytes = bytes_of(dir, files);
        let mut checkpoint = Checkpoint { dir: dir.to_owned(), tensors: BTreeMap::new(), shards: Vec::new() };
        let mut bytes_before = 0;
        for (file, listed) in files {
            let path = dir.join(file);
            let storage = Arc::new(match mode {
                LoadMode::Mmap => map_file(&path)?,
                LoadMode::Read => read_file(&path, &|bytes| progress(bytes_before + bytes, total_bytes))?,
            });
            bytes_before += storage.bytes().len() as u64;
            checkpoint.add_shard(&path, storage, listed.as_ref(), index)?;
        }
        Ok(checkpoint)
    }

    /// Bytes of the files that [`Checkpoint::open`] would open, without opening them.
    ///
    /// # Errors
    /// If there are no such files, or the index is not valid.
    pub fn file_bytes(dir: &Path) -> Result<u64, CheckpointError> {
        Ok(bytes_of(dir, &list_files(dir)?))
    }

    /// The checkpoint's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All tensors, in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }

    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes().len() as u64).sum()
    }

    /// Touch every page of mapped files with `num_threads` threads, so that the first step finds them in memory.
    pub fn prefault(&self, num_threads: usize, progress: &(dyn Fn(u64, u64) + Sync)) {
        let total_bytes = self.total_bytes();
        let mut bytes_before = 0;
        for shard in &self.shards {
            let bytes = shard.bytes();
            let touch = |chunk: &[u8]| {
                std::hint::black_box(chunk.iter().step_by(4096).fold(0u8, |sum, byte| sum.wrapping_add(*byte)));
                Ok(())
            };
            let parts = bytes.chunks(READ_CHUNK_BYTES);
            let result: Result<(), std::convert::Infallible> = each_part(parts, num_threads, touch, &|done| {
                progress((bytes_before + done).min(total_bytes), total_bytes);
            });
            let Ok(()) = result;
            bytes_before += bytes.len() as u64;
        }
    }

    fn add_shard(
        &mut self,
        path: &Path,
        storage: Arc<Storage>,
        listed: Option<&BTreeSet<String>>,
        index: &Path,
    ) -> Result<(), CheckpointError> {
        let bytes = storage.bytes();
        let bad_header = |problem: String| CheckpointError::Header {
            file: path.display().to_string(),
            file_bytes: bytes.len() as u64,
            problem,
        };
        let (data_start, metadata) = read_header(bytes).map_err(bad_header)?;
        for (name, info) in metadata.tensors() {
            if listed.is_some_and(|listed| !listed.contains(&name)) {
                let problem = format!("is in {} and not listed", path.display());
                return Err(CheckpointError::Index { file: index.display().to_string(), field: name, problem });
            }
            let (start, end) = info.data_offsets;
            let range = data_start + start..data_start + end;
            let tensor = StoredTensor { storage: storage.clone(), range, dtype: info.dtype, shape: info.shape.clone() };
            self.tensors.insert(name, tensor);
        }
        for name in listed.into_iter().flatten() {
            if !self.tensors.contains_key(name) {
                let problem = format!("{} does not hold it", path.display());
                let file = index.display().to_string();
                return Err(CheckpointError::Index { file, field: name.clone(), problem });
            }
        }
        self.shards.push(storage);
        Ok(())
    }
}

/// Offset of the data in a safetensors file, and its header: tensors that follow one another without a gap and fill the
/// rest of the file.
fn read_header(bytes: &[u8]) -> Result<(usize, Metadata), String> {
    let (length, rest) = bytes.split_first_chunk().ok_or("it is shorter than the length of a header")?;
    let length = u64::from_le_bytes(*length);
    let allowed = MAX_HEADER_BYTES.min(rest.len() as u64);
    if length > allowed {
        return Err(format!("it states a header of {length} bytes, it can have {allowed}"));
    }
    let (header, data) = rest.split_at(length as usize);
    // Parsing checks each tensor against its shape, and that the first begins at 0 and each where the last one ends.
    let metadata: Metadata = serde_json::from_slice(header).map_err(|e| format!("its header: {e}"))?;
    if metadata.data_len() != data.len() {
        let (described, found) = (metadata.data_len(), data.len());
        return Err(format!("its header describes {described} bytes of data, it has {found}"));
    }
    Ok((bytes.len() - data.len(), metadata))
}
