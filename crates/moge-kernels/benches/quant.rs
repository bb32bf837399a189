//! Products with packed weights beside what the machine can do, at the sizes of a routed expert.
//!
//! `cargo bench -p moge-kernels --bench quant [-- NUM_THREADS [ISA]]` prints, for each format and number of rows per
//! expert, the median over some repetitions, each paired with a measurement of the ceiling just before it. Weights come
//! from memory: there are more than any cache holds. Before that, the best of many repetitions on one panel of weights that
//! stays in L2, on one thread, beside the best ceiling: what the inner loop does when nothing disturbs it.

mod common;

use common::{cpu_of_arguments, median, seconds};
use moge_kernels::{
    Begin, Cpu, ExpertsDown, GroupedRows, Int8Product, Isa, MemoryRead, PackedFormat, PackedMatrix, PackedProduct,
    QuantizedRows, int8_ops_per_s, packed_experts_down, packed_gemm, packed_swiglu,
};

const HIDDEN: usize = 5120;
const INTER: usize = 1344;
const NUM_EXPERTS: usize = 64;
/// Weight rows of a panel.
const PANEL_ROWS: usize = 32;
const NUM_REPETITIONS: usize = 7;
/// Repetitions of which the best counts, and the multiply-adds of one.
const NUM_UNDISTURBED: usize = 200;
const UNDISTURBED_MACS: usize = 1 << 26;
/// Rows of each expert.
const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 64, 128];

fn main() {
    let cpu = cpu_of_arguments();
    let memory = MemoryRead::new(&cpu);
    for (format, product) in [(PackedFormat::W4A8, Int8Product::U4xI8), (PackedFormat::W8A8, Int8Product::I8xI8)] {
        let weights = Weights::new(format);
        for rows in ROWS {
            bench_panel(cpu.isa(), &weights, product, rows);
        }
        for rows in ROWS {
            bench(&cpu, &memory, &weights, product, rows);
        }
    }
}

/// The product of `rows` rows with one panel that stays in L2.
fn bench_panel(isa: Isa, weights: &Weights, product: Int8Product, rows: usize) {
    let cpu = Cpu::new(isa, 1);
    let x = inputs(rows);
    let mut quantized = QuantizedRows::with_capacity(rows, HIDDEN, 1);
    quantized.quantize(&cpu, &x, HIDDEN, GroupedRows { offsets: &[0, rows], source_rows: None });
    let mut out = vec![0.0; rows * PANEL_ROWS];
    let macs = rows * PANEL_ROWS * HIDDEN;
    let products = UNDISTURBED_MACS / macs;
    let best = |measure: &mut dyn FnMut() -> f64| (0..NUM_UNDISTURBED).map(|_| measure()).fold(0.0, f64::max);
    let ops = best(&mut || {
        let seconds = seconds(|| {
            for _ in 0..products {
                let weight = weights.weight(0, PANEL_ROWS, HIDDEN);
                packed_gemm(&cpu, &quantized, [PackedProduct { out: &mut out, weight, bias: None }]);
            }
        });
        (2 * products * macs) as f64 / seconds
    });
    let peak = best(&mut || int8_ops_per_s(&cpu, product));
    let name = format!("{:?} one panel rows {rows}", weights.format);
    println!("{name:24} {:6.0} GOP/s ({:3.0} % of int8), one thread at best", ops / 1e9, 100.0 * ops / peak);
}

/// `rows` rows of [`HIDDEN`] numbers.
fn inputs(rows: usize) -> Vec<f32> {
    (0..rows * HIDDEN).map(|i| ((i * 7919) % 1021) as f32 / 1021.0 - 0.5).collect()
}

/// Experts with `rows` rows each.
fn bench(cpu: &Cpu, memory: &MemoryRead, weights: &Weights, product: Int8Product, rows: usize) {
    let num_rows = NUM_EXPERTS * rows;
    let offsets: Vec<usize> = (0..=NUM_EXPERTS).map(|expert| expert * rows).collect();
    let source_rows: Vec<u32> = (0..num_rows).map(|row| (row % rows) as u32).collect();
    let x = inputs(rows);
    let grouped = GroupedRows { offsets: &offsets, source_rows: Some(&source_rows) };
    let mut quantized = QuantizedRows::with_capacity(num_rows, HIDDEN, NUM_EXPERTS);
    let mut inner = vec![0.0; num_rows * INTER];
    let mut residual = vec![0.0; rows * HIDDEN];
    let factors = vec![0.1; num_rows];
    let macs = (num_rows * INTER * HIDDEN) as f64;
    let bytes = (NUM_EXPERTS * weights.expert_bytes) as f64;
    let report = |name: &str, parts: f64, measure: &mut dyn FnMut() -> f64| {
        measure();
        let mut shares = [const { Vec::new() }; 4];
        for _ in 0..NUM_REPETITIONS {
            let (peak, read) = (int8_ops_per_s(cpu, product), memory.bytes_per_s(cpu));
            let seconds = measure();
            let (ops, bytes) = (2.0 * parts * macs / seconds, parts * bytes / seconds);
            for (shares, value) in
                shares.iter_mut().zip([ops / 1e9, 100.0 * ops / peak, bytes / 1e9, 100.0 * bytes / read])
            {
                shares.push(value);
            }
        }
        let [ops, of_peak, bytes, of_memory] = shares.map(median);
        let name = format!("{:?} {name} rows {rows}", weights.format);
        println!("{name:24} {ops:6.0} GOP/s ({of_peak:3.0} % of int8) {bytes:6.1} GB/s ({of_memory:3.0} % of memory)");
    };
    quantized.quantize(cpu, &x, HIDDEN, grouped);
    report("gate+up", 2.0, &mut || seconds(|| packed_swiglu(cpu, &mut inner, &quantized, &|e| weights.gate_up(e))));
    let mut quantized = QuantizedRows::with_capacity(num_rows, INTER, NUM_EXPERTS);
    quantized.quantize(cpu, &inner, INTER, GroupedRows { source_rows: None, ..grouped });
    let down = |e: usize| weights.down(e);
    let experts = ExpertsDown { inner: &quantized, down: &down, source_rows: &source_rows, row_weights: &factors };
    report("down", 1.0, &mut || seconds(|| packed_experts_down(cpu, &mut residual, Begin::Residual, HIDDEN, experts)));
}

/// Bytes that stand for the gate, up and down weights of all experts; what they mean is of no matter to the time.
struct Weights {
    format: PackedFormat,
    bytes: Vec<u8>,
    /// Where the first weight begins: at a cache line, as in a checkpoint.
    start: usize,
    expert_bytes: usize,
}

impl Weights {
    fn new(format: PackedFormat) -> Weights {
        let expert_bytes = format.weight_bytes(INTER, HIDDEN).max(format.weight_bytes(HIDDEN, INTER));
        // 0x2c2c is a small f16, and 0x2c2c2c2c a small f32.
        let bytes = vec![0x2c; 3 * NUM_EXPERTS * expert_bytes + 64];
        let start = bytes.as_ptr().align_offset(64);
        Weights { format, bytes, start, expert_bytes }
    }

    fn weight(&self, index: usize, rows: usize, cols: usize) -> PackedMatrix<'_> {
        let bytes = &self.bytes[self.start + index * self.expert_bytes..][..self.format.weight_bytes(rows, cols)];
        PackedMatrix::new(bytes, self.format, rows, cols)
    }

    fn gate_up(&self, expert: usize) -> [PackedMatrix<'_>; 2] {
        [0, 1].map(|which| self.weight(3 * expert + which, INTER, HIDDEN))
    }

    fn down(&self, expert: usize) -> PackedMatrix<'_> {
        self.weight(3 * expert + 2, HIDDEN, INTER)
    }
}
