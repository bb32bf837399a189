//! Attention for training, forward and backward, beside the f32 peak.
//!
//! `cargo bench -p moge-kernels --bench attention_training [-- NUM_THREADS [ISA]]` prints, for every case, the median over
//! some repetitions, each paired with a measurement of the peak just before it. Only what a causal mask leaves is counted:
//! two products in forward, five in backward.

mod common;

use common::{cpu_of_arguments, report, seconds};
use moge_kernels::{
    AttentionKept, Cpu, SegmentAttention, SegmentAttentionScratch, attention_backward, attention_forward,
    f32_flops_per_s,
};

/// Pieces, rows of each, query heads, KV heads, width of a head.
const CASES: [[usize; 5]; 4] = [[16, 256, 6, 2, 48], [8, 256, 12, 4, 64], [2, 2048, 12, 4, 64], [1, 4096, 8, 2, 128]];

fn main() {
    let cpu = cpu_of_arguments();
    for case in CASES {
        let mut layer = Layer::new(&cpu, case);
        let [num_pieces, num_rows, num_q_heads, num_kv_heads, head_dim] = case;
        let name = format!("{num_pieces}x{num_rows}_{num_q_heads}/{num_kv_heads}x{head_dim}");
        let suffix = format!("{name}/{}/t{}", cpu.isa().name(), cpu.num_threads());
        // Of one product: a multiplication and an addition for each pair of a query and a key, and number of a head.
        let flops = (num_pieces * num_rows * (num_rows + 1) * num_q_heads * head_dim) as f64;
        report(
            &format!("attention/forward_{suffix}"),
            "GFLOP/s",
            || 2.0 * flops / seconds(|| layer.forward(&cpu)),
            || f32_flops_per_s(&cpu),
        );
        report(
            &format!("attention/backward_{suffix}"),
            "GFLOP/s",
            || 5.0 * flops / seconds(|| layer.backward(&cpu)),
            || f32_flops_per_s(&cpu),
        );
    }
}

/// What one layer reads and writes.
struct Layer {
    heads: [usize; 3],
    offsets: Vec<usize>,
    qkv: [Vec<f32>; 3],
    out: Vec<f32>,
    log_sums: Vec<f32>,
    d_out: Vec<f32>,
    d_qkv: [Vec<f32>; 3],
    scratch: SegmentAttentionScratch,
}

impl Layer {
    fn new(cpu: &Cpu, [num_pieces, num_rows, num_q_heads, num_kv_heads, head_dim]: [usize; 5]) -> Layer {
        let len = |num_heads: usize| num_pieces * num_rows * num_heads * head_dim;
        let numbers =
            |num_heads: usize| (0..len(num_heads)).map(|i| ((i * 7919) % 1021) as f32 / 510.5 - 1.0).collect();
        let zeros = |num_heads: usize| vec![0.0; len(num_heads)];
        let max_rows = num_pieces * num_rows;
        Layer {
            heads: [num_q_heads, num_kv_heads, head_dim],
            offsets: (0..=num_pieces).map(|i| i * num_rows).collect(),
            qkv: [numbers(num_q_heads), numbers(num_kv_heads), numbers(num_kv_heads)],
            out: zeros(num_q_heads),
            log_sums: vec![0.0; max_rows * num_q_heads],
            d_out: numbers(num_q_heads),
            d_qkv: [zeros(num_q_heads), zeros(num_kv_heads), zeros(num_kv_heads)],
            scratch: SegmentAttentionScratch::new(cpu.num_threads(), max_rows, num_q_heads / num_kv_heads, head_dim),
        }
    }

    fn forward(&mut self, cpu: &Cpu) {
        let [num_q_heads, num_kv_heads, head_dim] = self.heads;
        let shape = SegmentAttention { num_q_heads, num_kv_heads, head_dim, offsets: &self.offsets };
        let qkv = self.qkv.each_ref().map(Vec::as_slice);
        attention_forward(cpu, shape, &mut self.out, &mut self.log_sums, qkv, &mut self.scratch);
    }

    fn backward(&mut self, cpu: &Cpu) {
        let [num_q_heads, num_kv_heads, head_dim] = self.heads;
        let shape = SegmentAttention { num_q_heads, num_kv_heads, head_dim, offsets: &self.offsets };
        let qkv = self.qkv.each_ref().map(Vec::as_slice);
        let kept = AttentionKept { qkv, out: &self.out, log_sums: &self.log_sums };
        let d_qkv = self.d_qkv.each_mut().map(Vec::as_mut_slice);
        attention_backward(cpu, shape, d_qkv, &self.d_out, kept, &mut self.scratch);
    }
}
