//! RMSNorm, and the elementwise work around it.

use crate::cpu::Cpu;
use crate::elements::ActivationType;
use crate::simd::{Simd, SimdOp};

/// Registers that sum squares side by side, so that their latencies overlap.
const NUM_SUMS: usize = 4;

/// `out = x / sqrt(mean(x^2) + eps) * weight` for each row, rounded if `activation` says so.
///
/// Shapes: `out` and `x` `[num_rows, weight.len()]`. The order of the sum depends on the ISA alone. A NaN or an
/// infinity makes its own row NaN or 0, and no other. Source: arXiv 1910.07467.
///
/// # Panics
/// If a length does not fit.
pub fn rms_norm(cpu: &Cpu, out: &mut [f32], x: &[f32], weight: &[f32], eps: f32, activation: ActivationType) {
    assert_eq!(out.len(), x.len(), "out and x");
    let width = weight.len();
    let isa = cpu.isa();
    cpu.for_each_rows(out, width, |rows, out| {
        let x = &x[rows.start * width..rows.end * width];
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            out.copy_from_slice(x);
            isa.run(RmsNorm { x: out, weight, eps, activation });
        }
    });
}

/// As [`rms_norm`], in place: `x` is `[num_rows, weight.len()]`.
///
/// # Panics
/// If the length of `x` does not fit.
pub fn rms_norm_in_place(cpu: &Cpu, x: &mut [f32], weight: &[f32], eps: f32, activation: ActivationType) {
    let isa = cpu.isa();
    cpu.for_each_rows(x, weight.len(), |_, x| {
        for x in x.chunks_exact_mut(weight.len()) {
            isa.run(RmsNorm { x, weight, eps, activation });
        }
    });
}

/// One row.
struct RmsNorm<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
    activation: ActivationType,
}

impl SimdOp for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        norm_row(simd, self.x, self.weight, self.eps, self.activation);
    }
}

/// [`rms_norm`] of one row, in place.
#[inline(always)]
pub(crate) fn norm_row<S: Simd>(simd: S, x: &mut [f32], weight: &[f32], eps: f32, activation: ActivationType) {
    let mean = sum_of_squares(simd, x) / x.len() as f32;
    let scale = simd.splat(1.0 / (mean + eps).sqrt());
    let mut i = 0;
    while i + S::LANES <= x.len() {
        let y = apply(simd, simd.load(&x[i..]), scale, simd.load(&weight[i..]), activation);
        simd.store(&mut x[i..], y);
        i += S::LANES;
    }
    if i < x.len() {
        let (x_rest, weight_rest) = (simd.load_part(&x[i..], 0.0), simd.load_part(&weight[i..], 0.0));
        let y = apply(simd, x_rest, scale, weight_rest, activation);
        simd.store_part(&mut x[i..], y);
    }
}

/// `x * scale * weight`, rounded if `activation` says so.
#[inline(always)]
fn apply<S: Simd>(simd: S, x: S::Vector, scale: S::Vector, weight: S::Vector, activation: ActivationType) -> S::Vector {
    let y = simd.mul(simd.mul(x, scale), weight);
    match activation {
        ActivationType::F32 => y,
        ActivationType::Bf16 => simd.round_to_bf16(y),
    }
}

/// The sum of squares: register `j` of [`NUM_SUMS`] takes every [`NUM_SUMS`]th run of lanes.
#[inline(always)]
fn sum_of_squares<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let mut sums = [simd.splat(0.0); NUM_SUMS];
    let mut runs = x.chunks_exact(NUM_SUMS * S::LANES);
    for run in &mut runs {
        for j in 0..NUM_SUMS {
            let x = simd.load(&run[j * S::LANES..]);
            sums[j] = simd.mul_add(x, x, sums[j]);
        }
    }
    let mut rest = runs.remainder().chunks_exact(S::LANES);
    for x in &mut rest {
        let x = simd.load(x);
        sums[0] = simd.mul_add(x, x, sums[0]);
    }
    let x = simd.load_part(rest.remainder(), 0.0);
    sums[1] = simd.mul_add(x, x, sums[1]);
    let sums = simd.sum4(sums);
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

/// `residual += y`.
///
/// # Panics
/// If the lengths differ.
pub fn add(cpu: &Cpu, residual: &mut [f32], y: &[f32]) {
    assert_eq!(residual.len(), y.len(), "residual and y");
    let isa = cpu.isa();
    cpu.for_each_rows(residual, 1, |range, residual| isa.run(Add { residual, y: &y[range] }));
}

struct Add<'a> {
    residual: &'a mut [f32],
    y: &'a [f32],
}

impl SimdOp for Add<'_> {
    type Output = ();

    /// A plain loop: the compiler vectorises it.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (residual, y) in self.residual.iter_mut().zip(self.y) {
            *residual += y;
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{add, rms_norm, rms_norm_in_place};
    use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu};
    use crate::{ActivationType, round_to_bf16};

    const EPS: f32 = 1e-5;

    #[test]
    fn rms_norm_matches_f64_on_every_isa_and_awkward_width() {
        for cpu in every_cpu() {
            for width in [1, 2, 7, 8, 9, 31, 33, 63, 64, 65, 128, 1343] {
                let num_rows = 11;
                let mut numbers = Numbers::new(width as u64);
                let (x, weight) = (numbers.vec(num_rows * width), numbers.vec(width));
                let mut expected = Vec::new();
                for x in x.chunks_exact(width) {
                    let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / width as f64;
                    let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
                    expected.extend(x.iter().zip(&weight).map(|(&x, &w)| f64::from(x) * scale * f64::from(w)));
                }
                let mut out = vec![0.0; x.len()];
                rms_norm(&cpu, &mut out, &x, &weight, EPS, ActivationType::F32);
                assert_close(&out, &expected, 2e-6, 0.0);
                let mut in_place = x.clone();
                rms_norm_in_place(&cpu, &mut in_place, &weight, EPS, ActivationType::F32);
                assert_same_bits(&in_place, &out);
                rms_norm(&cpu, &mut in_place, &x, &weight, EPS, ActivationType::Bf16);
                assert!(in_place.iter().zip(&out).all(|(&rounded, &y)| rounded == round_to_bf16(y)));
            }
        }
    }

    #[test]
    fn a_row_among_many_is_normed_to_the_same_bits_as_alone() {
        for cpu in every_cpu() {
            let (num_rows, width) = (37, 1029);
            let mut numbers = Numbers::new(5);
            let (x, weight) = (numbers.vec(num_rows * width), numbers.vec(width));
            let mut all = vec![0.0; x.len()];
            rms_norm(&cpu, &mut all, &x, &weight, EPS, ActivationType::F32);
            for (all, x) in all.chunks_exact(width).zip(x.chunks_exact(width)) {
                let mut alone = vec![0.0; width];
                rms_norm(&cpu, &mut alone, x, &weight, EPS, ActivationType::F32);
                assert_same_bits(&alone, all);
            }
        }
    }

    #[test]
    fn a_nan_row_leaves_the_other_rows_alone() {
        for cpu in every_cpu() {
            let mut x = [1.0, 1.0, f32::NAN, 1.0, f32::INFINITY, 1.0];
            rms_norm_in_place(&cpu, &mut x, &[1.0, 2.0], 0.0, ActivationType::F32);
            assert_eq!(x[..2], [1.0, 2.0]);
            assert!(x[2].is_nan() && x[3].is_nan() && x[4].is_nan());
            assert_eq!(x[5], 0.0);
        }
    }

    #[test]
    fn add_covers_every_number_at_any_length() {
        for cpu in every_cpu() {
            for len in [0, 1, 17, 20_011] {
                let mut numbers = Numbers::new(9);
                let (before, y) = (numbers.vec(len), numbers.vec(len));
                let mut x = before.clone();
                add(&cpu, &mut x, &y);
                assert!(x.iter().zip(before.iter().zip(&y)).all(|(&x, (a, b))| x == a + b));
            }
        }
    }
}
