//! A network that is loaded, or made of parameters in memory.

use std::path::Path;

use moge_kernels::Cpu;
use thiserror::Error;

use crate::checkpoint::error::{CheckpointError, TensorProblem};
use crate::checkpoint::quant_scheme::QuantScheme;
use crate::checkpoint::reader::{Checkpoint, LoadMode};
use crate::cost::NetworkCost;
use crate::network::batch::Batch;
use crate::network::config::{ConfigError, ModelConfig};
use crate::network::cpu::{CpuStep, Workspace};
use crate::network::decoder::decode;
use crate::network::kv_cache::KvCache;
use crate::network::load::{load, load_quantizing};
use crate::network::output::StepOutput;
use crate::network::params::ParamStore;
use crate::network::weights::{Network, Share};

/// Why a model cannot be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Its `config.json` is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its weights are refused.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A checkpoint is to be quantised that is so already.
    #[error("{dir}: is quantised already; it can only run as it is")]
    QuantizedAlready {
        /// The checkpoint's directory.
        dir: String,
    },
}

/// A loaded network.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    network: Network,
    inverse_frequencies: Vec<f32>,
    source: Source,
}

/// Where the weights lie.
#[derive(Debug)]
enum Source {
    Checkpoint(Checkpoint),
    Params(ParamStore),
}

impl Model {
    /// Load the checkpoint in `dir`. `progress` gets the bytes read so far and in all.
    ///
    /// # Errors
    /// If the config or the weights are refused.
    pub fn load(dir: &Path, mode: LoadMode, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Model, LoadError> {
        let config = ModelConfig::load(dir)?;
        let checkpoint = Checkpoint::open(dir, mode, progress)?;
        let network = load(&config, Share::WHOLE, &checkpoint)?;
        Ok(Model::new(config, network, Source::Checkpoint(checkpoint)))
    }

    /// As [`Model::load`], mapped, quantising the weights in memory as `scheme` says.
    ///
    /// # Errors
    /// As [`Model::load`], and if the checkpoint is quantised already or a weight has a width that its format does not
    /// allow.
    pub fn load_quantizing(
        dir: &Path,
        cpu: &Cpu,
        scheme: QuantScheme,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Model, LoadError> {
        let config = ModelConfig::load(dir)?;
        if !config.quant.is_none() {
            return Err(LoadError::QuantizedAlready { dir: dir.display().to_string() });
        }
        let checkpoint = Checkpoint::open(dir, LoadMode::Mmap, &|_, _| {})?;
        let total = checkpoint.total_bytes();
        let config = ModelConfig { quant: scheme, ..config };
        let network = load_quantizing(&config, &checkpoint, cpu, &|read| progress(read, total))?;
        Ok(Model::new(config, network, Source::Checkpoint(checkpoint)))
    }

    /// The network that `config` describes with the numbers of `params`, its tensors one after another in the order of
    /// [`crate::expected_tensors`], packed as `scheme` says: for what is trained in this process.
    ///
    /// # Errors
    /// If a weight has a width that its format does not allow.
    ///
    /// # Panics
    /// If `config` is that of a quantised network, or `params` has another length.
    pub fn from_params(
        cpu: &Cpu,
        config: &ModelConfig,
        params: &[f32],
        scheme: QuantScheme,
    ) -> Result<Model, TensorProblem> {
        let mut store = ParamStore::new(config, scheme)?;
        store.write(cpu, params);
        let config = store.config().clone();
        Ok(Model::new(config, store.network(), Source::Params(store)))
    }

    /// Replace the numbers of a model made by [`Model::from_params`], in the same memory.
    ///
    /// # Panics
    /// If it was not made so, or `params` has another length.
    pub fn update_params(&mut self, cpu: &Cpu, params: &[f32]) {
        let Source::Params(store) = &mut self.source else { panic!("the weights are those of a checkpoint") };
        // The weights borrow the memory that is written.
        drop(std::mem::take(&mut self.network));
        store.write(cpu, params);
        self.network = store.network();
    }

    fn new(config: ModelConfig, network: Network, source: Source) -> Model {
        let inverse_frequencies = config.rope.inverse_frequencies();
        Model { config, network, inverse_frequencies, source }
    }

    /// The network's description.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The files that the weights lie in; `None` if they were made in memory.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        match &self.source {
            Source::Checkpoint(checkpoint) => Some(checkpoint),
            Source::Params(_) => None,
        }
    }

    /// Sizes of the weights as they are stored.
    pub fn cost(&self) -> NetworkCost {
        NetworkCost::of_loaded(&self.config, &self.network)
    }

    /// One step: write the keys and values of all rows, and leave the results that `batch` wants in `output`.
    ///
    /// The numbers of a row depend on its sequence alone, bit for bit: not on the other rows of the batch, on how a
    /// prompt is cut into chunks, or on the number of threads.
    ///
    /// # Panics
    /// If `batch` is larger than `work`, names a token outside the vocabulary, a block outside `kv_cache` or a row that
    /// it has not, or if `kv_cache` is that of another network.
    pub fn forward(
        &self,
        cpu: &Cpu,
        batch: &Batch,
        kv_cache: &mut KvCache,
        work: &mut Workspace,
        output: &mut StepOutput,
    ) {
        assert_eq!(kv_cache.layers.len(), self.network.layers.len(), "layers of the KV cache and of the network");
        let mut step = CpuStep { config: &self.config, cpu, batch, kv_cache, work, output };
        step.begin(&self.inverse_frequencies);
        decode(&self.network, &mut step);
    }
}
