//! Write a checkpoint: safetensors shards and their index, streamed in bounded memory.
//!
//! The plan (names, types, shapes) is known first, so that every header can be written before the data. Everything is
//! written under temporary names; the final names appear in [`CheckpointWriter::finish`], when all data is on the disk.
//! A writer that is dropped earlier removes what it wrote.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
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
    /// There is no space left for the data.
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
    /// Shards that have a temporary file; the last of them is being written.
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
        let (tensors, shards) = split_into_shards(plan, max_shard_bytes)?;
        let mut writer = CheckpointWriter {
            dir: dir.to_path_buf(),
            tensors,
            shards,
            num_opened: 0,
            file: None,
            current_tensor: 0,
            missing_bytes: 0,
        };
        let final_names = writer.shards.iter().map(|shard| shard.name.as_str());
        for name in final_names.chain([SINGLE_SHARD_NAME, INDEX_NAME]) {
            let path = dir.join(name);
            if path.try_exists().map_err(|source| io_error(&path, source))? {
                return Err(WriteError::TargetExists { path });
            }
        }
        writer.open_shard()?;
        writer.missing_bytes = writer.tensors.first().map_or(0, num_bytes);
        writer.skip_complete_tensors()?;
        Ok(writer)
    }

    /// The plan in the order in which the data must arrive: shard by shard in the order of the names; inside a shard the
    /// widest types first, so that every tensor is aligned for its type.
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

    /// Give the shards their final names, then write the index if there is more than one.
    ///
    /// # Panics
    /// If a tensor is not complete.
    pub fn finish(mut self) -> Result<(), WriteError> {
        assert_eq!(self.current_tensor, self.tensors.len(), "a tensor is not complete");
        for index in 0..self.shards.len() {
            let path = self.dir.join(&self.shards[index].name);
            fs::rename(self.temporary_path(index), &path).map_err(|source| io_error(&path, source))?;
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
        let mut file = create_new(&path)?;
        self.num_opened += 1;
        file.write_all(&header).map_err(|source| io_error(&path, source))?;
        self.file = Some(file);
        Ok(())
    }

    fn temporary_path(&self, shard: usize) -> PathBuf {
        temporary_path(&self.dir.join(&self.shards[shard].name))
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
    /// Remove the temporary files of a checkpoint that was not finished.
    fn drop(&mut self) {
        for index in 0..self.num_opened {
            // There is nobody to tell; a temporary file that stays does no harm.
            let _ = fs::remove_file(self.temporary_path(index));
        }
    }
}

/// Write a whole file so that it is either absent or complete: temporary name, fsync, rename.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), WriteError> {
    let temporary = temporary_path(path);
    let mut file = create_new(&temporary)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| {
        // The write error is what the caller must see, whether or not the file can be removed.
        let _ = fs::remove_file(&temporary);
        io_error(path, source)
    })
}

/// Sort a file system error into the kinds that a user can act on.
pub(crate) fn io_error(path: &Path, source: io::Error) -> WriteError {
    let path = path.to_path_buf();
    match source.kind() {
        io::ErrorKind::AlreadyExists => WriteError::TargetExists { path },
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => WriteError::DiskFull { path },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => WriteError::NotWritable { path, source },
        _ => WriteError::Io { path, source },
    }
}

/// Make the renames inside `dir` survive a power cut.
fn sync_directory(dir: &Path) -> Result<(), WriteError> {
    // Only Unix lets a directory be opened as a file.
    if cfg!(unix) {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(|source| io_error(dir, source))?;
    }
    Ok(())
}

fn create_new(path: &Path) -> Result<File, WriteError> {
    OpenOptions::new().write(true).create_new(true).open(path).map_err(|source| io_error(path, source))
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

/// Sort by name, fill shards greedily, and order each shard by falling alignment.
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
        tensors[range.clone()].sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.bitsize()));
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

/// The length, the JSON header, and spaces up to a multiple of 8 bytes, as the format wants.
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
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    Ok(header)
}

#[cfg(test)]
mod tests;
