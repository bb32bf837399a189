//! Storage of keys and values for all layers; who gets which block is decided elsewhere.

use moge_kernels::{ActivationType, Cpu, PagedKv, SequenceRows};

use crate::{BLOCK_SIZE, ModelConfig};

/// Keys and values of all layers, in blocks of [`BLOCK_SIZE`] tokens.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) layers: Vec<PagedKv>,
}

impl KvCache {
    /// Room for `num_blocks` blocks. The system hands out the memory when it is first written.
    pub fn new(config: &ModelConfig, activation: ActivationType, num_blocks: usize) -> KvCache {
        let layer = |_| PagedKv::new(activation, num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim);
        KvCache { layers: (0..config.num_layers).map(layer).collect() }
    }

    /// Store the same keys and values in every layer, for measuring a context that nobody computed. Shapes and panics are
    /// those of [`PagedKv::write`].
    pub fn write(&mut self, cpu: &Cpu, k: &[f32], v: &[f32], sequences: &[SequenceRows]) {
        self.layers.iter_mut().for_each(|layer| layer.write(cpu, k, v, sequences));
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(config: &ModelConfig, activation: ActivationType) -> u64 {
        let number_bytes = match activation {
            ActivationType::F32 => 4,
            ActivationType::Bf16 => 2,
        };
        (2 * config.num_layers * BLOCK_SIZE * config.kv_size() * number_bytes) as u64
    }
}
