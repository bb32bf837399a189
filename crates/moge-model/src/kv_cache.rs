//! Storage of keys and values for all layers; no policy.

use moge_kernels::ActivationType;

use crate::ModelConfig;

/// Keys and values of all layers, in blocks of [`crate::BLOCK_SIZE`] tokens.
#[derive(Debug)]
pub struct KvCache {
    num_blocks: usize,
}

impl KvCache {
    /// Room for `num_blocks` blocks.
    pub fn new(_config: &ModelConfig, _activation: ActivationType, num_blocks: usize) -> KvCache {
        KvCache { num_blocks }
    }

    /// How many blocks there are.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }
}
