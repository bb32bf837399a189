//! The products of training beside the machine's peak, with the shapes of two small models.
//!
//! `cargo bench -p moge-kernels --bench training [-- NUM_THREADS [ISA [NAME]]]` prints, for every case, the median over some
//! repetitions, each paired with a measurement of the peak just before it. Cases are those whose names contain NAME.

mod common;

use common::{cpu_of_arguments, report, seconds};
use moge_kernels::{Accumulate, Cpu, ExpertWeights, Precision, ProductRows, TrainGemm, f32_flops_per_s};

/// A product: name, number of experts, rows in all, output and input width.
const CASES: [(&str, [usize; 4]); 9] = [
    ("22m/q", [1, 4096, 288, 256]),
    ("22m/k", [1, 4096, 96, 256]),
    ("22m/shared", [1, 4096, 512, 256]),
    ("22m/experts", [20, 20480, 384, 256]),
    ("22m/down", [20, 20480, 256, 192]),
    ("104m/q", [1, 2048, 768, 768]),
    ("104m/shared", [1, 2048, 2048, 768]),
    ("104m/experts", [32, 16384, 512, 768]),
    ("104m/head", [1, 512, 8192, 768]),
];

fn main() {
    let cpu = cpu_of_arguments();
    for (name, sizes) in CASES {
        for activation in [Precision::F32, Precision::Bf16] {
            measure(&cpu, name, sizes, activation);
        }
    }
}

fn measure(cpu: &Cpu, name: &str, [num_experts, num_rows, rows, cols]: [usize; 4], activation: Precision) {
    let filter = std::env::args().filter(|argument| argument != "--bench").nth(3).unwrap_or_default();
    let label = |pass: &str| format!("{name}/{pass}_{activation:?}/{}/t{}", cpu.isa().name(), cpu.num_threads());
    let is_wanted = |pass: &str| label(pass).contains(&filter);
    if !["forward", "input", "weight"].into_iter().any(is_wanted) {
        return;
    }
    let numbers = |len: usize| (0..len).map(|i| ((i * 7919) % 1021) as f32 / 1021.0 - 0.5).collect::<Vec<f32>>();
    let (mut x, mut y, mut w) =
        (numbers(num_rows * cols), numbers(num_rows * rows), numbers(num_experts * rows * cols));
    let offsets: Vec<usize> = (0..=num_experts).map(|e| e * num_rows / num_experts).collect();
    let starts: Vec<usize> = (0..num_experts).map(|e| e * rows * cols).collect();
    let weights = ExpertWeights { offsets: &offsets, starts: &starts, rows, cols };
    let mut products = TrainGemm::new(cpu, activation);
    let flops = (2 * num_rows * rows * cols) as f64;
    let report = |pass: &str, body: &mut dyn FnMut()| {
        if is_wanted(pass) {
            report(&label(pass), "GFLOP/s", || flops / seconds(&mut *body), || f32_flops_per_s(cpu));
        }
    };
    report("forward", &mut || {
        products.forward(cpu, &mut y, ProductRows::new(&x, cols), (&w, weights), None);
    });
    report("input", &mut || {
        let dy = ProductRows::new(&y, rows);
        products.backward_input(cpu, &mut x, dy, (&w, weights), Accumulate::Set);
    });
    report("weight", &mut || {
        let (dy, x) = (ProductRows::new(&y, rows), ProductRows::new(&x, cols));
        products.backward_weight(cpu, (&mut w, weights), dy, x, Accumulate::Set);
    });
}
