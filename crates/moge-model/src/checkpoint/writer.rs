//! Write a checkpoint: safetensors shards and their index, streamed in bounded memory.
//!
//! The plan (names, types, shapes) is known first, so that every header can be written before the data. Everything is
//! written under temporary names; the final names appear in [`CheckpointWriter::finish`], when all data is on the disk.
//! A writer that is dropped earlier removes what it wrote, unless it is one that can be resumed.
//!
//! The data of a shard begins at a cache line, and so does every tensor whose bytes are whole cache lines, as those of
//! large tensors are: loads of registers then never straddle two.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use thiserror::Error;

/// Size of a shard that the official releases keep to, in bytes.
pub const DEFAULT_MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Name of a checkpoint that fits in one shard.
pub(crate) const SINGLE_SHARD_NAME: &str = "model.safetensors";

/// Name of the file that says which shard holds which tensor.
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";

/// Name of the journal in a directory whose weights are not all written, see [`CheckpointWriter::resume`]. Whoever keeps
/// it removes it when the checkpoint is whole.
pub const JOURNAL_NAME: &str = "unfinished.jsonl";

/// Bytes of a cache line.
const LINE_BYTES: u64 = 64;

/// A tensor that will be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Type of its numbers.
    pub dtype: Dtype,
    /// Its dimensions, slowest first.
    pub shape: Vec<usize>,
}

/// Why a checkpoint could not be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// A file that would be written is there already; nothing is ever overwritten.
    #[error("{}: exists already; remove it or choose another directory", path.display())]
    TargetExists {
        /// The file.
        path: PathBuf,
    },
    /// There is no space left for the data, or the system allows no longer file.
    #[error("{}: the disk is full", path.display())]
    DiskFull {
        /// The file being written.
        path: PathBuf,
    },
    /// The directory or a file in it may not be written.
    #[error("{}: not writable: {source}", path.display())]
    NotWritable {
        /// The directory or file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another failure of the file system.
    #[error("{}: {source}", path.display())]
    Io {
        /// The directory or file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that an earlier writer left is not as it must be.
    #[error("{}: {problem}; remove the directory and begin again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The plan cannot be written as safetensors.
    #[error("tensor {name}: {problem}")]
    Plan {
        /// The tensor's name.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Streams the tensors of a plan into shards. See the module's description.
#[derive(Debug)]
pub struct CheckpointWriter {
    dir: PathBuf,
    /// In the order in which they are written.
    tensors: Vec<PlannedTensor>,
    shards: Vec<Shard>,
    /// If it is dropped before the end, its files stay.
    is_resumable: bool,
    /// Shards that have a file; the last of them is being written.
    num_opened: usize,
    file: Option<File>,
    /// The tensor being written, and how many of its bytes are still missing.
    current_tensor: usize,
    missing_bytes: u64,
}

/// A file of the checkpoint: its tensors as a range of the plan.
#[derive(Debug)]
struct Shard {
    name: String,
    tensors: Range<usize>,
}

impl CheckpointWriter {
    /// Check the plan, split it into shards of at most `max_shard_bytes` (a larger tensor has a shard of its own), and
    /// open the first. `dir` must exist and hold none of the files that will be written.
    pub fn create(dir: &Path, plan: Vec<PlannedTensor>, max_shard_bytes: u64) -> Result<CheckpointWriter, WriteError> {
        let mut writer = CheckpointWriter::new(dir, plan, max_shard_bytes, false)?;
        let final_names = writer.shards.iter().map(|shard| shard.name.as_str());
        for name in final_names.chain([SINGLE_SHARD_NAME, INDEX_NAME]) {
            let path = dir.join(name);
            if is_there(&path)? {
                return Err(WriteError::TargetExists { path });
            }
        }
        writer.open_shard()?;
        writer.missing_bytes = writer.tensors.first().map_or(0, num_bytes);
        writer.skip_complete_tensors()?;
        Ok(writer)
    }

    /// Go on where an earlier writer of the same plan stopped, wherever that was, in the same `dir`: the first
    /// `num_complete` tensors are on the disk. With 0, begin. What the writer makes stays when it is dropped.
    ///
    /// # Errors
    /// As [`CheckpointWriter::create`], and if files of the complete tensors are missing, too short, or of another plan.
    pub fn resume(
        dir: &Path,
        plan: Vec<PlannedTensor>,
        max_shard_bytes: u64,
        num_complete: usize,
    ) -> Result<CheckpointWriter, WriteError> {
        let mut writer = CheckpointWriter::new(dir, plan, max_shard_bytes, true)?;
        let num_whole = writer.shards.iter().take_while(|shard| shard.tensors.end <= num_complete).count();
        for index in 0..num_whole {
            writer.check_whole(index)?;
        }
        writer.num_opened = num_whole;
        writer.current_tensor = num_complete;
        if num_whole < writer.shards.len() {
            writer.reopen_shard(num_complete)?;
            writer.missing_bytes = num_bytes(&writer.tensors[num_complete]);
            writer.skip_complete_tensors()?;
        }
        Ok(writer)
    }

    fn new(
        dir: &Path,
        plan: Vec<PlannedTensor>,
        max_shard_bytes: u64,
        is_resumable: bool,
    ) -> Result<CheckpointWriter, WriteError> {
        let (tensors, shards) = split_into_shards(plan, max_shard_bytes)?;
        Ok(CheckpointWriter {
            dir: dir.to_path_buf(),
            tensors,
            shards,
            is_resumable,
            num_opened: 0,
            file: None,
            current_tensor: 0,
            missing_bytes: 0,
        })
    }

    /// The plan in the order in which the data must arrive: shard by shard in the order of the names; inside a shard first
    /// the tensors of whole cache lines, then the widest types first, so that every tensor is aligned for its type.
    pub fn tensors(&self) -> &[PlannedTensor] {
        &self.tensors
    }

    /// Bytes of all tensors together, headers not counted.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.iter().map(num_bytes).sum()
    }

    /// Append little-endian data to the current tensor: the first that is not complete.
    ///
    /// # Panics
    /// If `bytes` reaches past the end of that tensor.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let length = bytes.len() as u64;
        assert!(
            length <= self.missing_bytes,
            "{length} bytes given, {} missing in tensor {}",
            self.missing_bytes,
            self.current_tensor
        );
        let path = self.temporary_path(self.num_opened - 1);
        if let Some(file) = &mut self.file {
            file.write_all(bytes).map_err(|source| io_error(&path, source))?;
        }
        self.missing_bytes -= length;
        self.skip_complete_tensors()
    }

    /// Wait until what was appended is on the disk.
    pub fn sync(&mut self) -> Result<(), WriteError> {
        match &self.file {
            Some(file) => {
                file.sync_data().map_err(|source| io_error(&self.temporary_path(self.num_opened - 1), source))
            }
            None => Ok(()),
        }
    }

    /// Give the shards their final names, then write the index if there is more than one.
    ///
    /// # Panics
    /// If a tensor is not complete.
    pub fn finish(mut self) -> Result<(), WriteError> {
        assert_eq!(self.current_tensor, self.tensors.len(), "a tensor is not complete");
        for index in 0..self.shards.len() {
            let (path, temporary) = (self.final_path(index), self.temporary_path(index));
            // An earlier writer may have stopped here, some shards having their names.
            if !self.is_resumable || is_there(&temporary)? {
                fs::rename(temporary, &path).map_err(|source| io_error(&path, source))?;
            }
        }
        if self.shards.len() > 1 {
            write_file(&self.dir.join(INDEX_NAME), self.index_json().as_bytes())?;
        }
        self.num_opened = 0;
        sync_directory(&self.dir)
    }

    /// Move to the next tensor that has data, closing and opening shards on the way.
    fn skip_complete_tensors(&mut self) -> Result<(), WriteError> {
        while self.missing_bytes == 0 && self.current_tensor < self.tensors.len() {
            self.current_tensor += 1;
            if self.current_tensor == self.shards[self.num_opened - 1].tensors.end {
                let path = self.temporary_path(self.num_opened - 1);
                if let Some(file) = self.file.take() {
                    file.sync_all().map_err(|source| io_error(&path, source))?;
                }
                if self.num_opened < self.shards.len() {
                    self.open_shard()?;
                }
            }
            self.missing_bytes = self.tensors.get(self.current_tensor).map_or(0, num_bytes);
        }
        Ok(())
    }

    /// Create the next shard under its temporary name and write its header.
    fn open_shard(&mut self) -> Result<(), WriteError> {
        let path = self.temporary_path(self.num_opened);
        let header = header_bytes(&self.tensors[self.shards[self.num_opened].tensors.clone()])?;
        // An earlier writer may have begun it; nothing in it counts.
        let new = if self.is_resumable { File::create(&path) } else { File::create_new(&path) };
        let mut file = new.map_err(|source| io_error(&path, source))?;
        self.num_opened += 1;
        file.write_all(&header).map_err(|source| io_error(&path, source))?;
        self.file = Some(file);
        Ok(())
    }

    /// Open the shard in which `num_complete` tensors of the plan end, cut what follows them, and go on there.
    fn reopen_shard(&mut self, num_complete: usize) -> Result<(), WriteError> {
        let path = self.temporary_path(self.num_opened);
        let tensors = self.shards[self.num_opened].tensors.clone();
        if num_complete == tensors.start {
            return self.open_shard();
        }
        let damaged = |problem: &str| Err(WriteError::Damaged { path: path.clone(), problem: problem.to_string() });
        let header = header_bytes(&self.tensors[tensors.clone()])?;
        let len = header.len() as u64 + self.tensors[tensors.start..num_complete].iter().map(num_bytes).sum::<u64>();
        let open = || {
            let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
            let mut found = Vec::with_capacity(header.len());
            (&mut file).take(header.len() as u64).read_to_end(&mut found)?;
            Ok((file.metadata()?.len(), found, file))
        };
        let (found_len, found_header, mut file) = open().map_err(|source| resume_error(&path, source))?;
        if found_header != header {
            return damaged("it holds other tensors");
        }
        if found_len < len {
            return damaged(&format!("it has {found_len} bytes, {len} were written"));
        }
        let cut = file.set_len(len).and_then(|()| file.seek(SeekFrom::End(0)));
        cut.map_err(|source| io_error(&path, source))?;
        self.num_opened += 1;
        self.file = Some(file);
        Ok(())
    }

    /// Refuse a shard that should be whole and is not as long as it must be.
    fn check_whole(&self, index: usize) -> Result<(), WriteError> {
        let tensors = &self.tensors[self.shards[index].tensors.clone()];
        let len = header_bytes(tensors)?.len() as u64 + tensors.iter().map(num_bytes).sum::<u64>();
        let temporary = self.temporary_path(index);
        let path = if is_there(&temporary)? { temporary } else { self.final_path(index) };
        let found = fs::metadata(&path).map_err(|source| resume_error(&path, source))?.len();
        if found != len {
            let problem = format!("it has {found} bytes, {len} were written");
            return Err(WriteError::Damaged { path, problem });
        }
        Ok(())
    }

    fn final_path(&self, shard: usize) -> PathBuf {
        self.dir.join(&self.shards[shard].name)
    }

    fn temporary_path(&self, shard: usize) -> PathBuf {
        temporary_path(&self.final_path(shard))
    }

    fn index_json(&self) -> String {
        let mut weight_map = serde_json::Map::new();
        for shard in &self.shards {
            for tensor in &self.tensors[shard.tensors.clone()] {
                weight_map.insert(tensor.name.clone(), shard.name.as_str().into());
            }
        }
        weight_map.sort_keys();
        let index = serde_json::json!({
            "metadata": { "total_size": self.total_bytes() },
            "weight_map": weight_map,
        });
        format!("{index:#}\n")
    }
}

impl Drop for CheckpointWriter {
    /// Remove the temporary files of a checkpoint that was not finished, unless it can be.
    fn drop(&mut self) {
        if self.is_resumable {
            return;
        }
        for index in 0..self.num_opened {
            // There is nobody to tell; a temporary file that stays does no harm.
            let _ = fs::remove_file(self.temporary_path(index));
        }
    }
}

/// Write a whole file so that it is either absent or complete: temporary name, fsync, rename.
///
/// # Errors
/// If the file system refuses.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), WriteError> {
    let temporary = temporary_path(path);
    // A writer that was killed may have left a part of it.
    let mut file = File::create(&temporary).map_err(|source| io_error(&temporary, source))?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| {
        // The write error is what the caller must see, whether or not the file can be removed.
        let _ = fs::remove_file(&temporary);
        io_error(path, source)
    })
}

/// Sort a file system error into the kinds that a user can act on.
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

/// The same for a file that an earlier writer left: it must be there.
fn resume_error(path: &Path, source: io::Error) -> WriteError {
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

fn is_there(path: &Path) -> Result<bool, WriteError> {
    path.try_exists().map_err(|source| io_error(path, source))
}

fn temporary_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    PathBuf::from(name)
}

/// Bytes of a tensor's data. The plan has been checked, so nothing overflows.
fn num_bytes(tensor: &PlannedTensor) -> u64 {
    tensor.shape.iter().product::<usize>() as u64 * (tensor.dtype.bitsize() / 8) as u64
}

fn check_plan(tensors: &[PlannedTensor]) -> Result<(), WriteError> {
    let mut total_bits = 0usize;
    for tensor in tensors {
        let refuse = |problem: String| Err(WriteError::Plan { name: tensor.name.clone(), problem });
        let bits =
            tensor.shape.iter().try_fold(tensor.dtype.bitsize(), |product, &dimension| product.checked_mul(dimension));
        let Some(sum) = bits.and_then(|bits| total_bits.checked_add(bits)) else {
            return refuse(format!("shape {:?} is too large", tensor.shape));
        };
        total_bits = sum;
        if !tensor.dtype.bitsize().is_multiple_of(8) {
            return refuse(format!("type {} has no whole number of bytes", tensor.dtype));
        }
    }
    match tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        Some(pair) => Err(WriteError::Plan { name: pair[0].name.clone(), problem: "is in the plan twice".to_string() }),
        None => Ok(()),
    }
}

/// Sort by name, fill shards greedily, and order each shard by falling alignment: whole cache lines, then by type.
fn split_into_shards(
    mut tensors: Vec<PlannedTensor>,
    max_shard_bytes: u64,
) -> Result<(Vec<PlannedTensor>, Vec<Shard>), WriteError> {
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    check_plan(&tensors)?;
    let mut ranges = Vec::new();
    let (mut start, mut shard_bytes) = (0, 0);
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = num_bytes(tensor);
        if index > start && shard_bytes + bytes > max_shard_bytes {
            ranges.push(start..index);
            (start, shard_bytes) = (index, 0);
        }
        shard_bytes += bytes;
    }
    ranges.push(start..tensors.len());
    for range in &ranges {
        tensors[range.clone()].sort_by_key(|tensor| {
            let is_aligned = num_bytes(tensor).is_multiple_of(LINE_BYTES);
            (!is_aligned, std::cmp::Reverse(tensor.dtype.bitsize()))
        });
    }
    let num_shards = ranges.len();
    let shards = ranges.into_iter().enumerate().map(|(index, tensors)| Shard {
        name: match num_shards {
            1 => SINGLE_SHARD_NAME.to_string(),
            _ => format!("model-{:05}-of-{num_shards:05}.safetensors", index + 1),
        },
        tensors,
    });
    Ok((tensors, shards.collect()))
}

/// The length, the JSON header, and spaces up to whole cache lines; the format wants a multiple of 8 bytes.
fn header_bytes(tensors: &[PlannedTensor]) -> Result<Vec<u8>, WriteError> {
    let mut offset = 0;
    let infos = tensors.iter().map(|tensor| {
        let start = offset;
        offset += num_bytes(tensor) as usize;
        let info = TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (start, offset) };
        (tensor.name.clone(), info)
    });
    let about = HashMap::from([("format".to_string(), "pt".to_string())]);
    let refuse = |problem: String| {
        let name = tensors.first().map_or_else(String::new, |tensor| tensor.name.clone());
        WriteError::Plan { name, problem }
    };
    let metadata = Metadata::new(Some(about), infos.collect()).map_err(|error| refuse(error.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| refuse(error.to_string()))?;
    let length_bytes = size_of::<u64>();
    json.resize((length_bytes + json.len()).next_multiple_of(LINE_BYTES as usize) - length_bytes, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    Ok(header)
}

#[cfg(test)]
mod tests;
