//! Matrix products beside what the machine can do.
//!
//! `cargo bench -p moge-kernels --bench gemm [-- NUM_THREADS [ISA]]` prints, for every case, the median over some
//! repetitions, each paired with a measurement of the ceiling just before it.

mod common;

use common::{cpu_of_arguments, report, seconds};
use half::bf16;
use moge_kernels::{Elements, GroupedRows, Matrix, MemoryRead, f32_flops_per_s, gemm, grouped_gemm};

/// Width of the model's residual stream.
const HIDDEN: usize = 5120;
/// Output width: the gate and up weights of eight experts, 220 MB in bf16, far more than a cache.
const GEMV_COLS: usize = 8 * 2 * 1344;
/// Output width of the products with many rows.
const GEMM_COLS: usize = 2 * 1344;

fn main() {
    let cpu = cpu_of_arguments();
    let (isa, num_threads) = (cpu.isa(), cpu.num_threads());
    let memory = MemoryRead::new(&cpu);

    let numbers: Vec<f32> = (0..GEMV_COLS * HIDDEN).map(|i| ((i * 7919) % 1021) as f32 / 1021.0 - 0.5).collect();
    let halves: Vec<bf16> = numbers.iter().map(|&x| bf16::from_f32(x)).collect();
    let by_bf16 = Matrix::new(Elements::Bf16(&halves), GEMV_COLS, HIDDEN);
    let by_f32 = Matrix::new(Elements::F32(&numbers), GEMV_COLS, HIDDEN);
    let x = &numbers[..512 * HIDDEN];
    let mut out = vec![0.0; 512 * GEMM_COLS];

    for num_rows in [1, 4, 8, 16] {
        for (name, w) in [("f32", by_f32), ("bf16", by_bf16)] {
            let mut out = vec![0.0; num_rows * GEMV_COLS];
            let bytes = w.elements().len() * w.elements().dtype().size_bytes();
            report(
                &format!("gemm/rows{num_rows}_{name}/{}/t{num_threads}", isa.name()),
                "GB/s",
                || bytes as f64 / seconds(|| gemm(&cpu, &mut out, &x[..num_rows * HIDDEN], w, None)),
                || memory.bytes_per_s(&cpu),
            );
        }
    }
    for (name, w) in [("f32", by_f32), ("bf16", by_bf16)] {
        let w = w.slice_rows(0..GEMM_COLS);
        let flops = (2 * 512 * GEMM_COLS * HIDDEN) as f64;
        report(
            &format!("gemm/rows512_{name}/{}/t{num_threads}", isa.name()),
            "GFLOP/s",
            || flops / seconds(|| gemm(&cpu, &mut out, x, w, None)),
            || f32_flops_per_s(&cpu),
        );
        let experts: Vec<Matrix> = (0..8).map(|e| w.slice_rows(e * 336..(e + 1) * 336)).collect();
        let rows = GroupedRows { offsets: &[0, 64, 128, 192, 256, 320, 384, 448, 512], source_rows: None };
        report(
            &format!("grouped_gemm/rows64_{name}/{}/t{num_threads}", isa.name()),
            "GFLOP/s",
            || flops / 8.0 / seconds(|| grouped_gemm(&cpu, &mut out[..512 * 336], x, rows, &|e| experts[e])),
            || f32_flops_per_s(&cpu),
        );
    }
}
