//! Our matrix products beside those of the crate `gemm`, in turn.
//!
//! `cargo xtask bench gemm [NUM_THREADS [ISA]]` prints, for every case, the median rate of both and the median of the
//! ratios of neighbouring measurements. `gemm` knows no bf16: ours is compared with its f16, whose weights are as
//! wide, but whose inputs and outputs are f16 too. Its products take a plain matrix and pack it themselves, as ours do.

#![allow(unsafe_code)]

use std::time::Instant;

use ::gemm::Parallelism;
use half::{bf16, f16};
use moge_kernels::{Cpu, Elements, Isa, Matrix, available_threads};

/// Width of the model's residual stream.
const HIDDEN: usize = 5120;
/// Output width: the gate and up weights of an expert, 27 MB in bf16, more than a cache.
const COLS: usize = 2 * 1344;
const MAX_ROWS: usize = 512;
const NUM_REPETITIONS: usize = 9;

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let num_threads = arguments.next().map_or(available_threads(), |text| text.parse().expect("NUM_THREADS"));
    let isa = arguments.next().map_or(Isa::best(), |name| Isa::named(&name).expect("ISA"));
    let cpu = Cpu::new(isa, num_threads);

    let x: Vec<f32> = (0..MAX_ROWS * HIDDEN).map(|i| ((i * 7919) % 1021) as f32 / 1021.0 - 0.5).collect();
    let w: Vec<f32> = (0..COLS * HIDDEN).map(|i| ((i * 7877) % 1019) as f32 / 1019.0 - 0.5).collect();
    let w_bf16: Vec<bf16> = w.iter().map(|&w| bf16::from_f32(w)).collect();
    let [x_f16, w_f16] = [&x, &w].map(|from| from.iter().map(|&x| f16::from_f32(x)).collect::<Vec<f16>>());
    let by_f32 = Matrix::new(Elements::F32(&w), COLS, HIDDEN);
    let by_bf16 = Matrix::new(Elements::Bf16(&w_bf16), COLS, HIDDEN);

    println!("{:28} {:>14} {:>14} {:>6}", format!("{}, {num_threads} threads", isa.name()), "moge", "gemm", "ratio");
    let mut out = vec![0.0; MAX_ROWS * COLS];
    let mut their_out = vec![0.0; MAX_ROWS * COLS];
    let mut their_out_f16 = vec![f16::ZERO; MAX_ROWS * COLS];
    for num_rows in [1, 8, 64, MAX_ROWS] {
        let ours = |out: &mut [f32], w| {
            moge_kernels::gemm(&cpu, &mut out[..num_rows * COLS], &x[..num_rows * HIDDEN], w, None);
        };
        compare(
            &format!("rows{num_rows}_f32"),
            num_rows,
            || ours(&mut out, by_f32),
            || their_gemm(&mut their_out[..num_rows * COLS], &x, &w, 1.0, num_threads),
        );
        let pairs = out.iter().zip(&their_out).take(num_rows * COLS);
        let difference = pairs.map(|(ours, theirs)| (ours - theirs).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-2, "both compute the same product, but numbers differ by {difference}");
        compare(
            &format!("rows{num_rows}_bf16 (f16)"),
            num_rows,
            || ours(&mut out, by_bf16),
            || their_gemm(&mut their_out_f16[..num_rows * COLS], &x_f16, &w_f16, f16::ONE, num_threads),
        );
    }
}

/// Print the medians of both rates and of their ratio.
fn compare(name: &str, num_rows: usize, mut ours: impl FnMut(), mut theirs: impl FnMut()) {
    let gflop = (2 * num_rows * COLS * HIDDEN) as f64 / 1e9;
    // The first run is for caches and clocks; few rows are repeated until they take a while.
    let num_calls = (64 / num_rows).max(1);
    let rate = |body: &mut dyn FnMut()| {
        let start = Instant::now();
        (0..num_calls).for_each(|_| body());
        gflop * num_calls as f64 / start.elapsed().as_secs_f64()
    };
    let pairs: Vec<(f64, f64)> = (0..=NUM_REPETITIONS).map(|_| (rate(&mut ours), rate(&mut theirs))).skip(1).collect();
    let median = |of: fn(&(f64, f64)) -> f64| {
        let mut values: Vec<f64> = pairs.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let [our_rate, their_rate] = [median(|pair| pair.0), median(|pair| pair.1)];
    println!("{name:28} {our_rate:6.1} GFLOP/s {their_rate:6.1} GFLOP/s {:6.2}", median(|pair| pair.0 / pair.1));
}

/// `out[row, col]` = sum over `k` of `x[row, k] * w[col, k]`: shapes `out` `[num_rows, COLS]`, `x` at least
/// `[num_rows, HIDDEN]`, `w` `[COLS, HIDDEN]`.
fn their_gemm<T: Copy + 'static>(out: &mut [T], x: &[T], w: &[T], one: T, num_threads: usize) {
    let num_rows = out.len() / COLS;
    assert!(x.len() >= num_rows * HIDDEN && w.len() == COLS * HIDDEN);
    let threads = if num_threads == 1 { Parallelism::None } else { Parallelism::Rayon(num_threads) };
    let (cols, hidden) = (COLS as isize, HIDDEN as isize);
    // SAFETY: The pointers are of matrices of these sizes, with the strides of dense rows, and `out` overlaps neither.
    // `read_dst` is false, so that `alpha`, which is also `one`, has no effect.
    unsafe {
        ::gemm::gemm(
            num_rows,
            COLS,
            HIDDEN,
            out.as_mut_ptr(),
            1,
            cols,
            false,
            x.as_ptr(),
            1,
            hidden,
            w.as_ptr(),
            hidden,
            1,
            one,
            one,
            false,
            false,
            false,
            threads,
        );
    }
}
