//! Random checkpoints in the official layout, with a small tokenizer: to try, test and measure without a download.

mod config_json;
mod random;
pub(crate) mod sizes;
mod tokenizer;
mod weights;

use std::ffi::OsString;
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::checkpoint::shards::PlannedTensor;
use crate::checkpoint::write_file::{WriteError, io_error, write_file};
use crate::checkpoint::writer::{CheckpointWriter, DEFAULT_MAX_SHARD_BYTES};
use crate::cost::NetworkCost;
use crate::network::config::{Architecture, ConfigError, ModelConfig};
use crate::network::tensors::TensorSpec;
use crate::network::weights::expected_tensors;
pub use random::{TensorRng, Uniform};
pub use sizes::{Preset, SynthConfig, SynthMlp};
use weights::Source;

/// All presets. Tiny ones have dimensions that differ from one another, so that swapped names show.
pub fn presets() -> impl Iterator<Item = &'static Preset> {
    Architecture::ALL.into_iter().flat_map(|architecture| architecture.spec().synth.presets)
}

/// Reasons why no checkpoint was written.
#[derive(Debug, Error)]
pub enum SynthError {
    /// The sizes do not describe a valid network.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The vocabulary has no room for the special tokens and the alphabet.
    #[error("vocab_size: {found} is too small for the tokenizer; at least {min} is needed")]
    VocabularyTooSmall {
        /// The size asked for.
        found: usize,
        /// The smallest that is possible.
        min: usize,
    },
    /// The directory holds files; nothing is ever overwritten.
    #[error("{}: not empty, {} is there; name a new directory", dir.display(), found.display())]
    DirectoryNotEmpty {
        /// The directory.
        dir: PathBuf,
        /// One of the files.
        found: OsString,
    },
    /// The files could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl SynthConfig {
    /// Check the sizes and give the network that they describe.
    ///
    /// # Errors
    /// If the vocabulary is too small for a tokenizer, or the sizes are refused as a `config.json` with them would be.
    pub fn model_config(&self) -> Result<ModelConfig, SynthError> {
        Ok(ModelConfig::from_json(self.config_json()?.as_bytes(), "config.json")?)
    }

    /// Bytes that the weights will take on disk. The other files take a few megabytes at most.
    ///
    /// # Errors
    /// As [`SynthConfig::model_config`].
    pub fn weight_bytes(&self) -> Result<u64, SynthError> {
        Ok(NetworkCost::of(&self.model_config()?).total.bytes)
    }

    fn config_json(&self) -> Result<String, SynthError> {
        let min = tokenizer::min_vocab_size(self.architecture);
        if self.vocab_size < min {
            return Err(SynthError::VocabularyTooSmall { found: self.vocab_size, min });
        }
        Ok(config_json::config_json(self, &tokenizer::special_ids(self.architecture, self.vocab_size)))
    }
}

/// Write a random checkpoint into `dir`, which is created if absent and must be empty otherwise. `progress` gets
/// the bytes of weights written so far and in all.
///
/// The same config gives the same bytes on every machine. `config.json` comes last: without it no reader takes a
/// directory for a checkpoint.
///
/// # Errors
/// If the config is refused, the directory is not empty, or the files cannot be written.
pub fn write_checkpoint(
    dir: &Path,
    config: &SynthConfig,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SynthError> {
    let num_threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    write_with_threads(dir, config, num_threads, progress)
}

fn write_with_threads(
    dir: &Path,
    config: &SynthConfig,
    num_threads: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SynthError> {
    let config_json = config.config_json()?;
    let model_config = config.model_config()?;
    claim_directory(dir)?;
    let dtype = weights::stored_dtype(config.dtype);
    let plan = expected_tensors(&model_config).into_iter();
    let plan = plan.map(|TensorSpec { name, shape, .. }| PlannedTensor { name, dtype, shape }).collect();
    let mut writer = CheckpointWriter::create(dir, plan, DEFAULT_MAX_SHARD_BYTES)?;
    let total_bytes = writer.total_bytes();
    let source = Source { seed: config.seed, num_threads };
    weights::write_tensors(&mut writer, &model_config, source, &mut |bytes| progress(bytes, total_bytes))?;
    writer.finish()?;
    let ids = tokenizer::special_ids(config.architecture, config.vocab_size);
    let generation_config = config_json::generation_config_json(config.architecture, &ids).into_bytes();
    let mut files = tokenizer::files(config.architecture, config.vocab_size);
    files.extend([("generation_config.json", generation_config), ("config.json", config_json.into_bytes())]);
    for (name, bytes) in files {
        write_file(&dir.join(name), &bytes)?;
    }
    Ok(())
}

/// Make `dir`, or see that it is empty.
fn claim_directory(dir: &Path) -> Result<(), SynthError> {
    fs::create_dir_all(dir).map_err(|source| io_error(dir, source))?;
    let mut entries = fs::read_dir(dir).map_err(|source| io_error(dir, source))?;
    match entries.next() {
        None => Ok(()),
        Some(Ok(entry)) => Err(SynthError::DirectoryNotEmpty { dir: dir.to_path_buf(), found: entry.file_name() }),
        Some(Err(source)) => Err(io_error(dir, source).into()),
    }
}

#[cfg(test)]
mod tests;
