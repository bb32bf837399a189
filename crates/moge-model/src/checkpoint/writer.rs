//! Write a checkpoint: safetensors shards and their index, streamed in bounded memory.
//!
//! The plan (names, types, shapes) is known first, so that every header can be written before the data. Everything is
//! written under temporary names; the final names appear in [`CheckpointWriter::finish`], when all data is on the disk.
//! A writer that is dropped earlier removes what it wrote, unless it is one that can be resumed.
//!
//! The data of a shard begins at a cache line, and so does every tensor whose bytes are whole cache lines, as those of
//! large tensors are: loads of registers then never straddle two.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::checkpoint::index::{INDEX_NAME, SINGLE_SHARD_NAME};
use crate::checkpoint::shards::{PlannedTensor, Shard, header_bytes, num_bytes, split_into_shards};
use crate::checkpoint::write_file::{
    WriteError, io_error, is_there, resume_error, sync_directory, temporary_path, write_file,
};

/// Size of a shard that the official releases keep to, in bytes.
pub const DEFAULT_MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Name of the journal in a directory whose weights are not all written, see [`CheckpointWriter::resume`]. Whoever keeps
/// it removes it when the checkpoint is whole.
pub const JOURNAL_NAME: &str = "unfinished.jsonl";

/// Streams the tensors of a plan into shards. See the module's description.
#[derive(Debug)]
pub struct CheckpointWriter {
    dir: PathBuf,
    /// In the order in which they are written.
    tensors: Vec<PlannedTensor>,
    shards: Vec<Shard>,
    /// Keep the files if it is dropped before the end.
    is_resumable: bool,
    /// Shards that have a file; the last of them is being written.
    num_opened: usize,
    file: Option<File>,
    /// The tensor being written, and how many of its bytes are still missing.
    current_tensor: usize,
    missing_bytes: u64,
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
    /// `num_complete` tensors are on the disk; 0 starts anew. The files of the writer are kept when it is dropped.
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
            // The error cannot be reported; a temporary file that is left does no harm.
            let _ = fs::remove_file(self.temporary_path(index));
        }
    }
}

#[cfg(test)]
mod tests;
