//! The bytes of checkpoint files and tensors: mapped, or read into memory.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::Dtype as StoredDtype;

use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::files;

/// Bytes read by one thread at a time.
pub(crate) const READ_CHUNK_BYTES: usize = 16 << 20;

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

    /// The bytes, to write; empty for a mapped file.
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

/// A tensor as it is stored in a file.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    pub(crate) storage: Arc<Storage>,
    pub(crate) range: Range<usize>,
    pub(crate) dtype: StoredDtype,
    pub(crate) shape: Vec<usize>,
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

    /// The rows `range` of its first dimension.
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

    /// Start to read it from the disk, if it is in a mapped file. A hint that cannot fail.
    pub fn prefetch(&self) {
        if let Storage::Mapped(map) = &*self.storage {
            let _ = map.advise_range(memmap2::Advice::WillNeed, self.range.start, self.range.len());
        }
    }

    /// Release the memory of its pages, if it is in a mapped file; they are read again when accessed. A hint that cannot
    /// fail.
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

#[allow(unsafe_code)]
pub(crate) fn map_file(path: &Path) -> Result<Storage, CheckpointError> {
    let read_error = |source| CheckpointError::Read { file: path.display().to_string(), source };
    let file = files::open_file(path).map_err(read_error)?;
    // SAFETY: The map is read only. The file must not change while it is mapped; that is the contract of a checkpoint
    // directory, documented in the README, and the reason why `LoadMode::Read` exists.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(read_error)?;
    Ok(Storage::Mapped(map))
}

pub(crate) fn read_file(path: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<Storage, CheckpointError> {
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
pub(crate) fn each_part<P: Send, E: Send>(
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
        // If a thread cannot be started, the others do its work.
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
