//! One run of `moge quantize`: every tensor of the source, in the order of the output's files, in pieces of bounded size. One
//! thread writes while all others convert the next piece.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};

use moge_kernels::{Cpu, PackError};
use moge_model::{
    CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, ModelConfig, QuantScheme, WriteError, io_error, small_files,
    sync_directory, write_file,
};

use crate::error::QuantizeError;
use crate::item::Item;
use crate::journal::{self, Identity, Journal, Record, refuse_files_in};
use crate::pieces::TensorChunk;
use crate::rounding::{Rounding, RoundingErrors, TensorError};
use crate::source::Source;

/// Bytes that may be lost by a kill: as often the data is brought to the disk, then noted. A second of work or two.
const SYNC_BYTES: usize = 256 << 20;

/// Pieces that may wait to be written.
const WAITING_PIECES: usize = 1;

/// A checked source and what will be made of it where.
#[derive(Debug)]
pub struct Job {
    source: Source,
    /// The tokenizer and the like, by name: read before the work, so that they cannot fail after it.
    small_files: Vec<(OsString, Vec<u8>)>,
    out: PathBuf,
    identity: Identity,
    /// What an earlier run brought to the disk.
    complete: Vec<Record>,
}

/// To the thread that writes.
enum Message {
    /// More of the current tensor.
    Data(Vec<u8>),
    /// It is complete.
    Complete(Record),
}

impl Job {
    /// Open the checkpoint in `model`, in a float type or one of the official int8 ones, to be written to `out` as `scheme`
    /// says: a new or empty directory, or one where an earlier run for the same was stopped or killed. Nothing is written
    /// yet.
    ///
    /// # Errors
    /// If the source is refused, does not fit the scheme, or `out` holds anything else.
    pub fn open(model: &Path, out: &Path, scheme: &QuantScheme) -> Result<Job, QuantizeError> {
        let source = Source::open(model, scheme)?;
        let identity = Identity::of(model, scheme)?;
        let small_files = small_files(model)?;
        let complete = match journal::read(out, &identity)? {
            Some(complete) => complete,
            None => {
                refuse_files_in(out)?;
                Vec::new()
            }
        };
        Ok(Job { source, small_files, out: out.to_owned(), identity, complete })
    }

    /// The network of the source.
    pub fn config(&self) -> &ModelConfig {
        &self.source.config
    }

    /// Bytes of weights that the output will have.
    pub fn output_bytes(&self) -> u64 {
        self.source.items.iter().map(num_bytes).sum()
    }

    /// Bytes of weights that are still to be written.
    pub fn missing_bytes(&self) -> u64 {
        let complete: HashSet<&str> = self.complete.iter().map(|record| record.name.as_str()).collect();
        let missing = self.source.items.iter().filter(|item| !complete.contains(item.spec.name.as_str()));
        missing.map(num_bytes).sum()
    }

    /// Write the output. `progress` gets the bytes of the source read so far and in all, those of earlier runs counted in;
    /// if it breaks, the run stops, and can be continued. `config.json` comes last: without it no reader takes a directory
    /// for a checkpoint. The same source and scheme give the same bytes with any number of threads.
    ///
    /// # Errors
    /// If the output cannot be written, a weight is no number, an int8 weight has a bias that has no place, or `progress`
    /// broke. All but the last tensors are kept for another run.
    pub fn run(
        mut self,
        cpu: &Cpu,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<RoundingErrors, QuantizeError> {
        fs::create_dir_all(&self.out).map_err(|source| io_error(&self.out, source))?;
        let (journal, complete) = Journal::open(&self.out, &self.identity)?;
        self.complete = complete;
        let plan = self.source.items.iter().map(Item::planned).collect();
        let num_complete = self.complete.len();
        let mut writer = CheckpointWriter::resume(&self.out, plan, DEFAULT_MAX_SHARD_BYTES, num_complete)?;
        self.sort_items(&writer)?;
        let (sender, receiver) = sync_channel(WAITING_PIECES);
        let journal = std::thread::scope(|scope| {
            let writer = &mut writer;
            let thread = scope.spawn(move || write(&receiver, writer, journal));
            // Where the writing has failed nobody receives; its error is the one that counts.
            let converted = self.convert(cpu, progress, &|message| sender.send(message).is_ok());
            drop(sender);
            let journal = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            self.complete.extend(converted?);
            Ok::<Journal, QuantizeError>(journal)
        })?;
        writer.finish()?;
        self.write_small_files()?;
        journal.remove()?;
        Ok(self.damage())
    }

    /// Bring the items into the writer's order, and see that the complete ones are its first.
    fn sort_items(&mut self, writer: &CheckpointWriter) -> Result<(), QuantizeError> {
        let planned = writer.tensors();
        let places: HashMap<&str, usize> = planned.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
        self.source.items.sort_by_key(|item| places[item.spec.name.as_str()]);
        if self.complete.len() > planned.len() || self.complete.iter().zip(planned).any(|(a, b)| a.name != b.name) {
            let path = self.out.join(moge_model::JOURNAL_NAME);
            let problem = "it names other tensors".to_owned();
            return Err(WriteError::Damaged { path, problem }.into());
        }
        Ok(())
    }

    /// Convert what is missing, handing it to `send` until that fails. Returns the records of the tensors that were sent.
    fn convert(
        &self,
        cpu: &Cpu,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
        send: &dyn Fn(Message) -> bool,
    ) -> Result<Vec<Record>, QuantizeError> {
        let source_bytes = |items: &[Item]| items.iter().map(|item| item.tensor().bytes().len() as u64).sum::<u64>();
        let (complete, missing) = self.source.items.split_at(self.complete.len());
        let total_bytes = source_bytes(&self.source.items);
        let mut done_bytes = source_bytes(complete);
        let mut records = Vec::new();
        let pieces: Vec<(&Item, TensorChunk)> =
            missing.iter().flat_map(|item| item.pieces().map(move |piece| (item, piece))).collect();
        let mut error = PackError::default();
        for (index, (item, piece)) in pieces.iter().enumerate() {
            if progress(done_bytes, total_bytes).is_break() {
                return Err(QuantizeError::Stopped { dir: self.out.clone() });
            }
            let next = pieces.get(index + 1);
            if let Some((next, piece)) = next {
                next.source(piece).prefetch();
            }
            let converted = item.convert(cpu, piece, &self.source.dir)?;
            error = error.merge(converted.error);
            let source = item.source(piece);
            source.release();
            done_bytes += source.bytes().len() as u64;
            let is_last = next.is_none_or(|(next, _)| next.spec.name != item.spec.name);
            if !send(Message::Data(converted.bytes)) {
                break;
            }
            if is_last {
                let record = self.record(item, std::mem::take(&mut error))?;
                if !send(Message::Complete(record.clone())) {
                    break;
                }
                records.push(record);
            }
        }
        let _ = progress(done_bytes, total_bytes);
        Ok(records)
    }

    /// What the journal will hold of a tensor.
    fn record(&self, item: &Item, error: PackError) -> Result<Record, QuantizeError> {
        let name = item.spec.name.clone();
        match error.num_non_finite {
            0 => Ok(Record { name, rounding: item.spec.packed.map(|_| Rounding::from(error)) }),
            found => Err(QuantizeError::NonFinite {
                dir: self.source.dir.display().to_string(),
                name,
                num_non_finite: found as u64,
            }),
        }
    }

    /// Write the tokenizer and the like, then the config.
    fn write_small_files(&self) -> Result<(), QuantizeError> {
        let to = &self.out;
        for (name, bytes) in &self.small_files {
            write_file(&to.join(name), bytes)?;
        }
        let config = serde_json::to_string_pretty(&self.source.config_json).expect("JSON can be written");
        write_file(&to.join("config.json"), format!("{config}\n").as_bytes())?;
        // The names of the files must be on the disk before the journal goes.
        Ok(sync_directory(to)?)
    }

    fn damage(&self) -> RoundingErrors {
        let roundings = self.source.items.iter().zip(&self.complete);
        let tensors = roundings.filter_map(|(item, record)| {
            Some(TensorError::new(record.name.clone(), item.spec.packed?, record.rounding?))
        });
        RoundingErrors::of(tensors.collect())
    }
}

/// The thread that writes: pieces as they come, and now and then what is complete into the journal.
fn write(
    messages: &Receiver<Message>,
    writer: &mut CheckpointWriter,
    mut journal: Journal,
) -> Result<Journal, WriteError> {
    let mut unsynced_bytes = 0;
    for message in messages {
        match message {
            Message::Data(bytes) => {
                writer.append(&bytes)?;
                unsynced_bytes += bytes.len();
            }
            Message::Complete(record) => {
                journal.add(&record);
                if unsynced_bytes >= SYNC_BYTES {
                    writer.sync()?;
                    journal.flush()?;
                    unsynced_bytes = 0;
                }
            }
        }
    }
    writer.sync()?;
    journal.flush()?;
    Ok(journal)
}

fn num_bytes(item: &Item) -> u64 {
    let planned = item.planned();
    planned.shape.iter().map(|&size| size as u64).product::<u64>() * (planned.dtype.bitsize() / 8) as u64
}
