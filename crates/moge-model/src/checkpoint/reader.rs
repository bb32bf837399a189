//! Safetensors files of a checkpoint: their headers checked, their data mapped or read, nothing interpreted.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moge_kernels::QUANT_BLOCK_LEN;
use safetensors::tensor::{Dtype as StoredDtype, Metadata};
use serde_json::Value;
use thiserror::Error;

use crate::checkpoint::files;
use crate::checkpoint::writer::{INDEX_NAME, SINGLE_SHARD_NAME};

/// Bytes read by one thread at a time.
const READ_CHUNK_BYTES: usize = 16 << 20;

/// Longest header that is parsed, as in the library that writes them.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// How the data of a checkpoint comes into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LoadMode {
    /// Map the files; pages come in when they are touched.
    #[default]
    Mmap,
    /// Read the files whole, several parts at once: faster on network disks.
    Read,
}

/// Why a checkpoint is refused.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// A file cannot be read.
    #[error("{file}: {source}")]
    Read {
        /// The file's path.
        file: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Neither `model.safetensors.index.json` nor `model.safetensors` is there.
    #[error("{dir}: no model.safetensors.index.json and no model.safetensors{advice}")]
    NoWeights {
        /// The checkpoint's directory.
        dir: String,
        /// What can be done about it, or nothing.
        advice: &'static str,
    },
    /// A safetensors header is wrong: its length, its JSON, its offsets.
    #[error("{file}: not a valid safetensors file ({file_bytes} bytes): {problem}")]
    Header {
        /// The file's path.
        file: String,
        /// The file's size.
        file_bytes: u64,
        /// What is wrong.
        problem: String,
    },
    /// The index is not what it must be.
    #[error("{file}: {field}: {problem}")]
    Index {
        /// The index file's path.
        file: String,
        /// The entry.
        field: String,
        /// What was found and what is allowed.
        problem: String,
    },
    /// Tensors are missing, unexpected, or have another shape or type than the config says.
    #[error("{dir}: {} of the tensors do not fit config.json: {}", .problems.len(), first_problems(.problems))]
    Tensors {
        /// The checkpoint's directory.
        dir: String,
        /// One line for each tensor.
        problems: Vec<TensorProblem>,
    },
}

/// What is wrong with one tensor.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TensorProblem {
    /// The config asks for it and no file has it.
    #[error("{name}: missing, should be {shape:?}")]
    Missing {
        /// The tensor's name.
        name: String,
        /// The shape that the config gives it.
        shape: Vec<usize>,
    },
    /// A file has it and the config has no place for it.
    #[error("{name}: unexpected, is {shape:?}")]
    Unexpected {
        /// The tensor's name.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// It has another shape.
    #[error("{name}: shape is {found:?}, should be {expected:?}")]
    Shape {
        /// The tensor's name.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that the config gives it.
        expected: Vec<usize>,
    },
    /// It has a type that the engine cannot run.
    #[error("{name}: dtype is {found}, allowed are {allowed}")]
    Dtype {
        /// The tensor's name.
        name: String,
        /// Its type.
        found: String,
        /// Types that it may have.
        allowed: &'static str,
    },
    /// Its width is not one that its quantised format allows.
    #[error(
        "{name}: {width} columns cannot be {format}, which needs a multiple of {QUANT_BLOCK_LEN} (w4a8), or at most 65536 (w8a8)"
    )]
    Width {
        /// The tensor's name.
        name: String,
        /// Its columns.
        width: usize,
        /// The format.
        format: &'static str,
    },
}

fn first_problems(problems: &[TensorProblem]) -> String {
    const MAX_SHOWN: usize = 4;
    let mut shown: Vec<String> = problems.iter().take(MAX_SHOWN).map(ToString::to_string).collect();
    if problems.len() > MAX_SHOWN {
        shown.push(format!("and {} more", problems.len() - MAX_SHOWN));
    }
    shown.join("; ")
}

/// The bytes of one file, or of one tensor that had to be copied.
#[derive(Debug)]
pub(crate) enum Storage {
    Mapped(memmap2::Mmap),
    /// Whole words, so that every number type is aligned; the second field is the length in bytes.
    Owned(Vec<u64>, usize),
}

impl Storage {
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Storage::Mapped(map) => map,
            Storage::Owned(words, len) => &bytemuck::cast_slice(words)[..*len],
        }
    }

    /// `len` bytes of zero at the range that is returned, which begins at a cache line.
    pub(crate) fn aligned(len: usize) -> (Storage, Range<usize>) {
        const LINE_BYTES: usize = 64;
        let storage = Storage::zeroed(len + LINE_BYTES);
        let start = storage.bytes().as_ptr().align_offset(LINE_BYTES);
        (storage, start..start + len)
    }

    /// The bytes of memory that is not a mapped file; none of one that is.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Storage::Mapped(_) => &mut [],
            Storage::Owned(words, len) => &mut bytemuck::cast_slice_mut(words)[..*len],
        }
    }

    fn zeroed(len: usize) -> Storage {
        Storage::Owned(vec![0u64; len.div_ceil(8)], len)
    }

    pub(crate) fn copy_of(bytes: &[u8]) -> Storage {
        let mut storage = Storage::zeroed(bytes.len());
        storage.bytes_mut().copy_from_slice(bytes);
        storage
    }
}

/// A tensor as it lies in a file.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    pub(crate) storage: Arc<Storage>,
    pub(crate) range: Range<usize>,
    dtype: StoredDtype,
    shape: Vec<usize>,
}

impl StoredTensor {
    /// Its type.
    pub fn dtype(&self) -> StoredDtype {
        self.dtype
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its bytes, little endian, row-major; not necessarily aligned for its type.
    pub fn bytes(&self) -> &[u8] {
        &self.storage.bytes()[self.range.clone()]
    }

    /// The part of it at `range` of its slowest dimension.
    ///
    /// # Panics
    /// If it has no dimension, or `range` is out of bounds.
    pub fn rows(&self, range: Range<usize>) -> StoredTensor {
        let num_rows = self.shape[0];
        assert!(range.start <= range.end && range.end <= num_rows, "rows {range:?} of {num_rows}");
        let row_bytes = self.range.len().checked_div(num_rows).unwrap_or(0);
        let start = self.range.start;
        let mut shape = self.shape.clone();
        shape[0] = range.len();
        let range = start + range.start * row_bytes..start + range.end * row_bytes;
        StoredTensor { storage: self.storage.clone(), range, dtype: self.dtype, shape }
    }

    /// Begin to read it from the disk, if it lies in a mapped file. A hint: nothing fails.
    pub fn prefetch(&self) {
        if let Storage::Mapped(map) = &*self.storage {
            let _ = map.advise_range(memmap2::Advice::WillNeed, self.range.start, self.range.len());
        }
    }

    /// Let go of the memory that its pages take, if it lies in a mapped file; touched again, they are read again. A hint:
    /// nothing fails.
    #[allow(unsafe_code)]
    pub fn release(&self) {
        if let Storage::Mapped(map) = &*self.storage {
            // SAFETY: The map is of a file and read only: a page that is dropped comes back with the file's bytes.
            let _ = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, self.range.start, self.range.len())
            };
        }
    }
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
    /// If there are no such files, or the index is wrong.
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

/// File name to the tensors that the index says it holds; `None` where there is no index.
type Files = BTreeMap<String, Option<BTreeSet<String>>>;

fn list_files(dir: &Path) -> Result<Files, CheckpointError> {
    let index = dir.join(INDEX_NAME);
    if files::is_there(&index) {
        return read_index(&index);
    }
    if !files::is_there(&dir.join(SINGLE_SHARD_NAME)) {
        let mut entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let is_int8 = entries.any(|entry| entry.file_name().to_string_lossy().starts_with("quant_model_weight"));
        let advice = if is_int8 { "; `moge quantize` makes what is there one that runs" } else { "" };
        return Err(CheckpointError::NoWeights { dir: dir.display().to_string(), advice });
    }
    Ok(BTreeMap::from([(SINGLE_SHARD_NAME.to_owned(), None)]))
}

/// Bytes of `files`; one that cannot be asked counts nothing, opening it will tell.
fn bytes_of(dir: &Path, files: &Files) -> u64 {
    files.keys().map(|file| dir.join(file).metadata().map_or(0, |m| m.len())).sum()
}

/// Where the data of a safetensors file begins, and what its header says: tensors that follow one another without a
/// gap and fill the rest of the file.
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

fn read_index(path: &Path) -> Result<Files, CheckpointError> {
    let file = path.display().to_string();
    let bad =
        |field: &str, problem: String| CheckpointError::Index { file: file.clone(), field: field.into(), problem };
    let text = files::read_file(path).map_err(|source| CheckpointError::Read { file: file.clone(), source })?;
    let index: Value = serde_json::from_slice(&text).map_err(|e| bad("(whole file)", format!("not JSON: {e}")))?;
    let Some(map) = index.get("weight_map").and_then(Value::as_object) else {
        return Err(bad("weight_map", "missing, or not an object of tensor name to file name".to_owned()));
    };
    let mut files = Files::new();
    for (name, shard) in map {
        let plain = shard.as_str().filter(|s| !s.is_empty() && !s.contains(['/', '\\', '\0']) && !s.starts_with('.'));
        let Some(shard) = plain else {
            return Err(bad(name, format!("{shard} is not a plain file name")));
        };
        files.entry(shard.to_owned()).or_default().get_or_insert_default().insert(name.clone());
    }
    let dir = path.parent().unwrap_or(Path::new("."));
    for (shard, listed) in &files {
        if !dir.join(shard).is_file() {
            let first = listed.iter().flatten().next().map_or("", String::as_str);
            return Err(bad(first, format!("names {shard}, which is not in {}", dir.display())));
        }
    }
    if files.is_empty() {
        return Err(bad("weight_map", "is empty".to_owned()));
    }
    Ok(files)
}

#[allow(unsafe_code)]
fn map_file(path: &Path) -> Result<Storage, CheckpointError> {
    let read_error = |source| CheckpointError::Read { file: path.display().to_string(), source };
    let file = files::open_file(path).map_err(read_error)?;
    // SAFETY: the map is read only. Nobody must change the file while we run; that is the contract of a checkpoint
    // directory, documented in the README, and the reason why `LoadMode::Read` exists.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(read_error)?;
    Ok(Storage::Mapped(map))
}

fn read_file(path: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<Storage, CheckpointError> {
    let read_error = |source| CheckpointError::Read { file: path.display().to_string(), source };
    let file = files::open_file(path).map_err(read_error)?;
    let len = file.metadata().map_err(read_error)?.len() as usize;
    let mut storage = Storage::zeroed(len);
    let parts = storage.bytes_mut().chunks_mut(READ_CHUNK_BYTES).enumerate();
    let read = |(i, part): (usize, &mut [u8])| file.read_exact_at(part, (i * READ_CHUNK_BYTES) as u64);
    // Network disks answer many requests at once; more threads than cores keep them busy.
    each_part(parts, 8, read, &|done| progress(done.min(len as u64))).map_err(read_error)?;
    Ok(storage)
}

/// Run `work` on every part with several threads; `progress` gets an upper bound of the bytes done.
fn each_part<P: Send, E: Send>(
    parts: impl Iterator<Item = P> + Send,
    num_threads: usize,
    work: impl Fn(P) -> Result<(), E> + Sync,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(), E> {
    let parts = std::sync::Mutex::new((parts, 0u64));
    let next = || {
        let mut guard = parts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        guard.1 += READ_CHUNK_BYTES as u64;
        guard.0.next().map(|part| (part, guard.1))
    };
    let run = || {
        while let Some((part, done)) = next() {
            work(part)?;
            progress(done);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        // Where the system refuses a thread, the others do its share.
        let spawn = |_| std::thread::Builder::new().spawn_scoped(scope, run).ok();
        let threads: Vec<_> = (1..num_threads).map_while(spawn).collect();
        let mut result = run();
        for thread in threads {
            let other = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(other);
        }
        result
    })
}
