//! Storage of keys and values for all layers; who gets which block is decided elsewhere.

use moge_kernels::{
    AttentionLimits, AttentionScratch, Cpu, KvType, PagedKv, Precision, QkvParams, RopeAngles, RopeHead, SequenceRows,
    write_qkv,
};

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
        KvCache { layers: (0..config.num_layers()).map(layer).collect() }
    }

    /// Store the same keys and values in every layer, for measuring a context that nobody computed. Shapes and panics are
    /// those of `write_qkv` without norms and RoPE.
    pub fn write(&mut self, cpu: &Cpu, config: &ModelConfig, [k, v]: [&[f32]; 2], sequences: &[SequenceRows]) {
        let num_rows = sequences.iter().map(|sequence| sequence.num_rows).sum();
        let mut scratch = AttentionScratch::new(AttentionLimits {
            num_threads: cpu.num_threads(),
            max_rows: num_rows,
            // Nothing attends.
            max_context: 0,
            num_q_heads: config.num_q_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
        });
        let params = QkvParams {
            norms: None,
            eps: 0.0,
            // Two numbers of each head turn, by nothing.
            angles: RopeAngles { cos: &vec![1.0; num_rows], sin: &vec![0.0; num_rows] },
            rope: RopeHead { head_dim: config.head_dim, rotary_dim: 2, layout: config.rope.layout },
            activation: Precision::F32,
        };
        let mut q = vec![0.0; num_rows * config.q_size()];
        for layer in &mut self.layers {
            // Writing leaves in its inputs what it likes.
            let (mut k, mut v) = (k.to_vec(), v.to_vec());
            write_qkv(cpu, [&mut q, &mut k, &mut v], params, layer, sequences, &mut scratch);
        }
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(config: &ModelConfig, kv_type: KvType) -> u64 {
        let layer_bytes = PagedKv::block_bytes(kv_type, BLOCK_SIZE, config.num_kv_heads, config.head_dim);
        config.num_layers() as u64 * layer_bytes
    }
}
