//! Attention beside what the machine can do.
//!
//! `cargo bench -p moge-kernels --bench attention [-- NUM_THREADS [ISA]]` prints, for every case, the median over some
//! repetitions, each paired with a measurement of the ceiling just before it. Decode reads every key and value of the
//! context once: its ceiling is memory. Prefill multiplies: its ceiling is the f32 peak, with causal products counted
//! once, which int8 may exceed.

mod common;

use std::time::Instant;

use common::{cpu_of_arguments, report, seconds};
use moge_kernels::{
    AttentionLimits, AttentionRows, AttentionScratch, BlockId, Cpu, KvType, MemoryRead, PagedKv, Precision, QkvParams,
    RopeAngles, RopeHead, RopeLayout, SequenceRows, f32_flops_per_s, paged_attention, write_qkv,
};

/// Heads of Pangu Pro MoE.
const NUM_Q_HEADS: usize = 40;
const NUM_KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const BLOCK_SIZE: usize = 32;
const MAX_CONTEXT: usize = 32 * 1024;
/// Rows of the longest prefill.
const MAX_ROWS: usize = 2048;

fn main() {
    let cpu = cpu_of_arguments();
    let memory = MemoryRead::new(&cpu);
    let types = [(KvType::F32, "f32"), (KvType::Bf16, "bf16"), (KvType::Int8, "int8")];
    for (kv_type, name) in types {
        let mut layer = Layer::new(&cpu, kv_type);
        let suffix = format!("{name}/{}/t{}", cpu.isa().name(), cpu.num_threads());
        for context in [2048, 8192, MAX_CONTEXT] {
            let block_bytes = PagedKv::block_bytes(kv_type, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM);
            let bytes = context / BLOCK_SIZE * block_bytes as usize;
            report(
                &format!("attention/decode_context{context}_{suffix}"),
                "GB/s",
                || {
                    // Reads far more than a cache holds: the layer's numbers leave it.
                    memory.bytes_per_s(&cpu);
                    wake(&cpu);
                    bytes as f64 / seconds(|| layer.attend(&cpu, context - 1, 1))
                },
                || memory.bytes_per_s(&cpu),
            );
        }
        for num_rows in [512, MAX_ROWS] {
            let products = NUM_Q_HEADS * HEAD_DIM * num_rows * (num_rows + 1);
            report(
                &format!("attention/prefill{num_rows}_{suffix}"),
                "GFLOP/s",
                || 2.0 * products as f64 / seconds(|| layer.attend(&cpu, 0, num_rows)),
                || f32_flops_per_s(&cpu),
            );
        }
        let q_bytes = 4 * MAX_ROWS * NUM_Q_HEADS * HEAD_DIM;
        report(
            &format!("attention/write_qkv{MAX_ROWS}_{suffix}"),
            "GB/s",
            || {
                layer.project();
                q_bytes as f64 / seconds(|| layer.write(&cpu, 0))
            },
            || memory.bytes_per_s(&cpu),
        );
    }
}

/// Have all threads awake, as in the middle of a step.
fn wake(cpu: &Cpu) {
    let start = Instant::now();
    while start.elapsed().as_micros() < 200 {
        cpu.for_each(cpu.num_threads(), |_| {});
    }
}

/// One layer's cache, full, and rows for it.
struct Layer {
    kv: PagedKv,
    scratch: AttentionScratch,
    block_table: Vec<BlockId>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
}

impl Layer {
    fn new(cpu: &Cpu, kv_type: KvType) -> Layer {
        let num_blocks = MAX_CONTEXT / BLOCK_SIZE;
        let limits = AttentionLimits {
            num_threads: cpu.num_threads(),
            max_rows: MAX_ROWS,
            max_context: MAX_CONTEXT,
            num_q_heads: NUM_Q_HEADS,
            num_kv_heads: NUM_KV_HEADS,
            head_dim: HEAD_DIM,
        };
        let zeros = |num_heads: usize| vec![0.0; MAX_ROWS * num_heads * HEAD_DIM];
        let mut layer = Layer {
            kv: PagedKv::new(kv_type, num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM),
            scratch: AttentionScratch::new(limits),
            // Scattered as after some use.
            block_table: (0..num_blocks).map(|i| BlockId((i * 389 % num_blocks) as u32)).collect(),
            q: zeros(NUM_Q_HEADS),
            k: zeros(NUM_KV_HEADS),
            v: zeros(NUM_KV_HEADS),
            out: zeros(NUM_Q_HEADS),
        };
        for position in (0..MAX_CONTEXT).step_by(MAX_ROWS) {
            layer.project();
            layer.write(cpu, position);
        }
        layer
    }

    fn rows(&self, first_position: usize, num_rows: usize) -> SequenceRows {
        SequenceRows { num_rows, first_position, block_table: self.block_table.clone() }
    }

    /// Queries, keys and values of [`MAX_ROWS`] rows, as from the projections.
    fn project(&mut self) {
        for x in [&mut self.q, &mut self.k, &mut self.v] {
            x.iter_mut().enumerate().for_each(|(i, x)| *x = ((i * 7919) % 1021) as f32 / 510.5 - 1.0);
        }
    }

    fn write(&mut self, cpu: &Cpu, first_position: usize) {
        let sequences = [self.rows(first_position, MAX_ROWS)];
        let (cos, sin) = (vec![0.6; MAX_ROWS * HEAD_DIM / 2], vec![0.8; MAX_ROWS * HEAD_DIM / 2]);
        let params = QkvParams {
            norms: None,
            eps: 1e-5,
            angles: RopeAngles { cos: &cos, sin: &sin },
            rope: RopeHead { head_dim: HEAD_DIM, rotary_dim: HEAD_DIM, layout: RopeLayout::RotateHalf },
            activation: Precision::Bf16,
        };
        let Layer { kv, scratch, q, k, v, .. } = self;
        write_qkv(cpu, [q, k, v], params, kv, &sequences, scratch);
    }

    fn attend(&mut self, cpu: &Cpu, first_position: usize, num_rows: usize) {
        let sequences = [self.rows(first_position, num_rows)];
        let len = num_rows * NUM_Q_HEADS * HEAD_DIM;
        let rows = AttentionRows { q: &self.q[..len], sequences: &sequences, activation: Precision::Bf16 };
        paged_attention(cpu, &mut self.out[..len], rows, &self.kv, &mut self.scratch);
    }
}
