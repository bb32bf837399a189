//! RMSNorm, and the elementwise work around it.

use crate::cpu::Cpu;
use crate::elements::{Accumulate, Precision};
use crate::isa::Isa;
use crate::simd::{Simd, SimdOp, update};
use crate::sums::column_sums;

/// Registers that sum squares side by side, so that their latencies overlap.
const NUM_SUMS: usize = 4;

/// What an RMSNorm multiplies with and adds.
#[derive(Clone, Copy, Debug)]
pub struct RmsNormParams<'a> {
    /// `[width]`.
    pub weight: &'a [f32],
    /// Added to the mean of the squares.
    pub eps: f32,
    /// Whether the result is rounded.
    pub activation: Precision,
}

/// [`rms_norm`] of one row.
pub(crate) fn rms_norm_row(isa: Isa, out: &mut [f32], x: &[f32], params: RmsNormParams<'_>) {
    let RmsNormParams { weight, eps, activation } = params;
    assert!(out.len() == weight.len(), "a row of {}, a weight of {}", out.len(), weight.len());
    out.copy_from_slice(x);
    isa.run(RmsNorm { x: out, weight, eps, activation });
}

/// `out = x / sqrt(mean(x^2) + eps) * weight` for each row, rounded if `activation` says so.
///
/// Shapes: `out` and `x` `[num_rows, weight.len()]`. The order of the sum depends on the ISA alone. A NaN or an
/// infinity makes its own row NaN or 0, and no other. Source: arXiv 1910.07467.
///
/// # Panics
/// If a length does not fit.
pub fn rms_norm(cpu: &Cpu, out: &mut [f32], x: &[f32], params: RmsNormParams<'_>) {
    assert_eq!(out.len(), x.len(), "out and x");
    let width = params.weight.len();
    let isa = cpu.isa();
    cpu.for_each_rows(out, width, |rows, out| {
        let x = &x[rows.start * width..rows.end * width];
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            rms_norm_row(isa, out, x, params);
        }
    });
}

/// As [`rms_norm`], in place: `x` is `[num_rows, weight.len()]`.
///
/// # Panics
/// If the length of `x` does not fit.
pub fn rms_norm_in_place(cpu: &Cpu, x: &mut [f32], weight: &[f32], eps: f32, activation: Precision) {
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
    activation: Precision,
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
pub(crate) fn norm_row<S: Simd>(simd: S, x: &mut [f32], weight: &[f32], eps: f32, activation: Precision) {
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
fn apply<S: Simd>(simd: S, x: S::Vector, scale: S::Vector, weight: S::Vector, activation: Precision) -> S::Vector {
    let y = simd.mul(simd.mul(x, scale), weight);
    match activation {
        Precision::F32 => y,
        Precision::Bf16 => simd.round_to_bf16(y),
    }
}

/// The sum of squares.
#[inline(always)]
fn sum_of_squares<S: Simd>(simd: S, x: &[f32]) -> f32 {
    sum_terms(
        simd,
        [x],
        #[inline(always)]
        |[x], sum| simd.mul_add(x, x, sum),
    )
}

/// The sum of what `add_term` adds for each index: register `j` of [`NUM_SUMS`] takes every [`NUM_SUMS`]th run of lanes.
/// The inputs are of one length; the last register is filled up with zeros. A closure for `add_term` must be
/// `inline(always)`.
#[inline(always)]
fn sum_terms<S: Simd, const N: usize>(
    simd: S,
    inputs: [&[f32]; N],
    add_term: impl Fn([S::Vector; N], S::Vector) -> S::Vector,
) -> f32 {
    let len = inputs[0].len();
    assert!(inputs.iter().all(|x| x.len() == len), "lengths differ");
    let mut sums = [simd.splat(0.0); NUM_SUMS];
    let (mut run, mut x) = (inputs, [simd.splat(0.0); N]);
    let mut i = 0;
    while i + NUM_SUMS * S::LANES <= len {
        for j in 0..N {
            run[j] = &inputs[j][i..i + NUM_SUMS * S::LANES];
        }
        for k in 0..NUM_SUMS {
            for j in 0..N {
                x[j] = simd.load(&run[j][k * S::LANES..]);
            }
            sums[k] = add_term(x, sums[k]);
        }
        i += NUM_SUMS * S::LANES;
    }
    while i + S::LANES <= len {
        for j in 0..N {
            x[j] = simd.load(&inputs[j][i..i + S::LANES]);
        }
        sums[0] = add_term(x, sums[0]);
        i += S::LANES;
    }
    if i < len {
        for j in 0..N {
            x[j] = simd.load_part(&inputs[j][i..], 0.0);
        }
        sums[1] = add_term(x, sums[1]);
    }
    let sums = simd.sum4(sums);
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

/// Where [`rms_norm_backward`] writes.
#[derive(Debug)]
pub struct RmsNormBackward<'a> {
    /// Gradient of the input, `[num_rows, width]`.
    pub dx: &'a mut [f32],
    /// Whether `dx` is replaced.
    pub dx_store: Accumulate,
    /// Gradient of the weight, `[width]`.
    pub dweight: &'a mut [f32],
    /// Whether `dweight` is replaced.
    pub dweight_store: Accumulate,
    /// At least [`rms_norm_scratch_len`] numbers.
    pub scratch: &'a mut [f32],
}

/// Rows whose share of the weight's gradient is summed first: few enough for many threads, enough to make the sums' own
/// memory traffic small. The number of threads must not change it, because it sets the order of the sum.
const ROWS_PER_PARTIAL: usize = 64;

/// Numbers of scratch memory that [`rms_norm_backward`] needs.
pub fn rms_norm_scratch_len(num_rows: usize, width: usize) -> usize {
    num_rows.div_ceil(ROWS_PER_PARTIAL) * width
}

/// The gradients of [`rms_norm`], unrounded, where `dy` is that of its output. With `r = 1 / sqrt(mean(x^2) + eps)` of a row:
/// `dx (= or +=) r weight dy - x r^3 mean(weight dy x)` and `dweight (= or +=) sum over the rows of dy x r`.
///
/// Shapes: `dy` and `x` `[num_rows, weight.len()]`. The order of the sums depends on the shape and the ISA alone.
///
/// # Panics
/// If a length does not fit.
pub fn rms_norm_backward(cpu: &Cpu, out: RmsNormBackward<'_>, dy: &[f32], x: &[f32], weight: &[f32], eps: f32) {
    let RmsNormBackward { dx, dx_store, dweight, dweight_store, scratch } = out;
    let width = weight.len();
    assert_eq!(dx.len(), x.len(), "dx and x");
    assert_eq!(dy.len(), x.len(), "dy and x");
    assert_eq!(dweight.len(), width, "dweight and weight");
    assert!(width > 0 && x.len().is_multiple_of(width), "{} numbers are not rows of {width}", x.len());
    let partials = &mut scratch[..rms_norm_scratch_len(x.len() / width, width)];
    let isa = cpu.isa();
    let chunk_len = ROWS_PER_PARTIAL * width;
    cpu.for_each_slices([dx, &mut *partials], [chunk_len, width], |chunk, [dx, dweight]| {
        dweight.fill(0.0);
        let numbers = chunk * chunk_len..chunk * chunk_len + dx.len();
        let rows = dy[numbers.clone()].chunks_exact(width).zip(x[numbers].chunks_exact(width));
        for (dx, (dy, x)) in dx.chunks_exact_mut(width).zip(rows) {
            isa.run(RmsNormRowBackward { dx, dweight, inputs: [dy, x, weight], eps, store: dx_store });
        }
    });
    column_sums(cpu, dweight, partials, dweight_store);
}

/// One row; adds to `dweight`.
struct RmsNormRowBackward<'a> {
    dx: &'a mut [f32],
    dweight: &'a mut [f32],
    /// `dy`, `x` and the weight.
    inputs: [&'a [f32]; 3],
    eps: f32,
    store: Accumulate,
}

impl SimdOp for RmsNormRowBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let [_, x, _] = self.inputs;
        let width = x.len() as f32;
        let r = 1.0 / (sum_of_squares(simd, x) / width + self.eps).sqrt();
        let dot = sum_terms(
            simd,
            self.inputs,
            #[inline(always)]
            |[dy, x, weight], sum| simd.mul_add(simd.mul(weight, dy), x, sum),
        );
        let (scale, x_scale) = (simd.splat(r), simd.splat(-r * r * r * (dot / width)));
        update(
            simd,
            [self.dx, self.dweight],
            self.inputs,
            #[inline(always)]
            |[dx, dweight], [dy, x, weight]| {
                let dy = simd.mul(dy, scale);
                let gradient = simd.mul_add(x, x_scale, simd.mul(dy, weight));
                let dx = match self.store {
                    Accumulate::Set => gradient,
                    Accumulate::Add => simd.add(dx, gradient),
                };
                [dx, simd.mul_add(dy, x, dweight)]
            },
        );
    }
}

/// `residual += y`.
///
/// # Panics
/// If the lengths differ.
pub fn add(cpu: &Cpu, residual: &mut [f32], y: &[f32]) {
    assert_eq!(residual.len(), y.len(), "residual and y");
    let isa = cpu.isa();
    cpu.for_each_rows(residual, 1, |range, residual| add_row(isa, residual, &y[range]));
}

/// [`add`] on this thread.
pub(crate) fn add_row(isa: Isa, residual: &mut [f32], y: &[f32]) {
    isa.run(Add { residual, y });
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
        let y = &self.y[..self.residual.len()];
        for i in 0..y.len() {
            self.residual[i] += y[i];
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
