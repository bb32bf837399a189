//! Storage of keys and values for all layers; who gets which block is decided elsewhere.

use moge_kernels::{KvType, PagedKv};

use crate::{BLOCK_SIZE, ModelConfig};

/// Keys and values of all layers, in blocks of [`BLOCK_SIZE`] tokens.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) layers: Vec<PagedKv>,
}

impl KvCache {
    /// Room for `num_blocks` blocks. The system hands out the memory when it is first written.
    pub fn new(config: &ModelConfig, kv_type: KvType, num_blocks: usize) -> KvCache {
        let layer = |_| PagedKv::new(kv_type, num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim);
        KvCache { layers: (0..config.num_layers).map(layer).collect() }
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(config: &ModelConfig, kv_type: KvType) -> u64 {
        let layer_bytes = PagedKv::block_bytes(kv_type, BLOCK_SIZE, config.num_kv_heads, config.head_dim);
        config.num_layers as u64 * layer_bytes
    }
}
