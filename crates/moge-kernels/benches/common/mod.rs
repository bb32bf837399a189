//! What benches share: arguments and medians.

#![allow(dead_code, reason = "each bench uses its part")]

use std::time::Instant;

use moge_kernels::{Cpu, Isa, available_threads};

const NUM_REPETITIONS: usize = 9;

/// Threads and ISA of the arguments `[NUM_THREADS [ISA]]`.
pub(crate) fn cpu_of_arguments() -> Cpu {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let num_threads = arguments.next().map_or(available_threads(), |text| text.parse().expect("NUM_THREADS"));
    let isa = arguments.next().map_or(Isa::best(), |name| Isa::named(&name).expect("ISA"));
    Cpu::new(isa, num_threads)
}

/// Print the medians of what `measure` gives, of the ceiling and of their ratio.
pub(crate) fn report(name: &str, unit: &str, mut measure: impl FnMut() -> f64, mut ceiling: impl FnMut() -> f64) {
    measure();
    let pairs: Vec<(f64, f64)> = (0..NUM_REPETITIONS).map(|_| (ceiling(), measure())).collect();
    let found = median(pairs.iter().map(|pair| pair.1).collect()) / 1e9;
    let best = median(pairs.iter().map(|pair| pair.0).collect()) / 1e9;
    let share = median(pairs.iter().map(|pair| 100.0 * pair.1 / pair.0).collect());
    println!("{name:40} {found:8.1} {unit:8} ceiling {best:8.1} ({share:.0} %)");
}

/// The value in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub(crate) fn seconds(body: impl FnOnce()) -> f64 {
    let start = Instant::now();
    body();
    start.elapsed().as_secs_f64()
}
