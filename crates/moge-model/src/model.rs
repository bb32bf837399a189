//! The network on one screen.

use moge_kernels::{ActivationType, Cpu};

use crate::{Batch, KvCache, ModelConfig};

/// A loaded network.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
}

/// Scratch memory of a step, allocated once.
#[derive(Debug)]
pub struct Workspace {
    logits: Vec<f32>,
}

impl Workspace {
    /// Scratch for steps of at most `max_rows` rows of which at most `max_logit_rows` want logits.
    pub fn new(
        _config: &ModelConfig,
        _activation: ActivationType,
        _max_rows: usize,
        _max_logit_rows: usize,
    ) -> Workspace {
        Workspace { logits: Vec::new() }
    }

    /// Logits of the last step, `[num_logit_rows, vocab_size]`, in the order of [`Batch::logit_rows`].
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }
}

impl Model {
    /// The network's description.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// One step: write the rows' keys and values, leave the wanted logits in `work`.
    pub fn forward(&self, _cpu: &Cpu, _batch: &Batch, _kv_cache: &mut KvCache, _work: &mut Workspace) {
        unimplemented!()
    }
}
