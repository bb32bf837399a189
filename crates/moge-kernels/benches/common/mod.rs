//! What benches share: arguments, medians, and what the machine can do.

#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)]

use std::hint::black_box;
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
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let found = median(pairs.iter().map(|pair| pair.1).collect()) / 1e9;
    let best = median(pairs.iter().map(|pair| pair.0).collect()) / 1e9;
    let share = median(pairs.iter().map(|pair| 100.0 * pair.1 / pair.0).collect());
    println!("{name:40} {found:8.1} {unit:8} ceiling {best:8.1} ({share:.0} %)");
}

pub(crate) fn seconds(body: impl FnOnce()) -> f64 {
    let start = Instant::now();
    body();
    start.elapsed().as_secs_f64()
}

/// Bytes per second at which all threads together read memory.
pub(crate) fn read_bandwidth(cpu: &Cpu, numbers: &[f32]) -> f64 {
    const CHUNK: usize = 1 << 18;
    let has_avx2 = ["avx2", "avx512"].contains(&cpu.isa().name());
    let elapsed = seconds(|| {
        cpu.for_each(numbers.len() / CHUNK, |chunk| {
            let numbers = &numbers[chunk * CHUNK..(chunk + 1) * CHUNK];
            #[cfg(target_arch = "x86_64")]
            if has_avx2 {
                // SAFETY: The ISA says that the CPU has AVX2.
                return unsafe { read_avx2(numbers) };
            }
            black_box(numbers.iter().fold(0u32, |sum, x| sum.wrapping_add(x.to_bits())));
        });
    });
    (numbers.len() / CHUNK * CHUNK * 4) as f64 / elapsed
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn read_avx2(numbers: &[f32]) {
    use std::arch::x86_64::{_mm256_loadu_si256, _mm256_or_si256, _mm256_setzero_si256};
    let mut bits = [_mm256_setzero_si256(); 8];
    for run in numbers.chunks_exact(64) {
        for i in 0..8 {
            // SAFETY: A run holds 8 times 8 numbers.
            let next = unsafe { _mm256_loadu_si256(run.as_ptr().add(8 * i).cast()) };
            bits[i] = _mm256_or_si256(bits[i], next);
        }
    }
    black_box(bits);
}

/// Floating-point operations per second of independent multiply-adds in registers.
pub(crate) fn peak_flops(cpu: &Cpu) -> f64 {
    const NUM_STEPS: usize = 2_000_000;
    let num_lanes = match cpu.isa().name() {
        "avx512" => 16,
        "avx2" => 8,
        _ => 1,
    };
    let elapsed = seconds(|| {
        cpu.for_each(cpu.num_threads(), |_| match num_lanes {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: The ISA of this name has these features.
            16 => unsafe { multiply_add_avx512(NUM_STEPS) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: The ISA of this name has these features.
            8 => unsafe { multiply_add_avx2(NUM_STEPS) },
            _ => {
                let mut sums = [1.0f32; 12];
                for _ in 0..NUM_STEPS {
                    sums.iter_mut().for_each(|sum| *sum = *sum * black_box(0.5) + 0.25);
                }
                black_box(sums);
            }
        });
    });
    (cpu.num_threads() * NUM_STEPS * 12 * num_lanes * 2) as f64 / elapsed
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn multiply_add_avx2(num_steps: usize) {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps};
    let factor = _mm256_set1_ps(black_box(0.5));
    let mut sums = [_mm256_set1_ps(1.0); 12];
    for _ in 0..num_steps {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, factor);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn multiply_add_avx512(num_steps: usize) {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_set1_ps};
    let factor = _mm512_set1_ps(black_box(0.5));
    let mut sums = [_mm512_set1_ps(1.0); 12];
    for _ in 0..num_steps {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, factor);
        }
    }
    black_box(sums);
}
