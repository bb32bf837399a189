//! The gated activation of an MLP.

use crate::cpu::Cpu;
use crate::elements::Precision;
use crate::exp::exp;
use crate::isa::Isa;
use crate::simd::{Simd, SimdOp, map2, update};

/// Numbers of an inner row that a chunk should at least hold, of all its rows: some microseconds of work.
const MIN_CHUNK_LEN: usize = 4096;

/// `out[r] = silu(gate) * up` with `silu(a) = a / (1 + exp(-a))` and `[gate, up] = gate_up[r]`.
///
/// Shapes: `out` `[num_rows, inter]`, `gate_up` `[num_rows, 2 * inter]`: in each row the gates, then the ups.
///
/// # Panics
/// If a length does not fit.
pub fn swiglu_rows(cpu: &Cpu, out: &mut [f32], gate_up: &[f32], inter: usize) {
    assert_eq!(gate_up.len(), 2 * out.len(), "gate_up and out");
    let isa = cpu.isa();
    cpu.for_each_rows(out, inter, |rows, out| {
        let gate_up = &gate_up[2 * inter * rows.start..2 * inter * rows.end];
        for (out, gate_up) in out.chunks_exact_mut(inter).zip(gate_up.chunks_exact(2 * inter)) {
            let (gate, up) = gate_up.split_at(inter);
            swiglu(isa, out, gate, up, Precision::F32);
        }
    });
}

/// `out = silu(gate) * up` with `silu(a) = a / (1 + exp(-a))`, rounded if `activation` says so; all of one length.
pub(crate) fn swiglu(isa: Isa, out: &mut [f32], gate: &[f32], up: &[f32], activation: Precision) {
    assert!(gate.len() == out.len() && up.len() == out.len());
    isa.run(Swiglu { out, gate, up, activation });
}

struct Swiglu<'a> {
    out: &'a mut [f32],
    gate: &'a [f32],
    up: &'a [f32],
    activation: Precision,
}

impl SimdOp for Swiglu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let one = simd.splat(1.0);
        map2(
            simd,
            self.out,
            self.gate,
            self.up,
            #[inline(always)]
            |gate, up| {
                let denominator = simd.add(one, exp(simd, simd.sub(simd.splat(0.0), gate)));
                let product = simd.mul(simd.div(gate, denominator), up);
                match self.activation {
                    Precision::F32 => product,
                    Precision::Bf16 => simd.round_to_bf16(product),
                }
            },
        );
    }
}

/// The factor that each row's result is multiplied with further on.
#[derive(Debug)]
pub struct RowWeights<'a> {
    /// `[num_rows]`.
    pub weights: &'a [f32],
    /// Replaced by their gradients, `[num_rows]`.
    pub dweights: &'a mut [f32],
}

/// The gradients of [`swiglu_rows`], in place, where a row's result goes through a linear map and is then multiplied
/// with the row's weight `w`; without `row_weights` that is 1.
///
/// Before: `gate_up` as it was forward; `inner`, the gradient `d` of `silu(gate) * up` as it would be with `w = 1`. After:
/// `gate_up[r] = [w d up silu'(gate), w d silu(gate)]`, `inner[r] = w silu(gate) up`, which the gradient of the linear
/// map's matrix needs, and `dweights[r] = sum of d silu(gate) up`, in an order that depends on the ISA alone.
///
/// Shapes: `gate_up` `[num_rows, 2 * inter]`, `inner` `[num_rows, inter]`.
///
/// # Panics
/// If a length does not fit.
pub fn swiglu_backward(
    cpu: &Cpu,
    gate_up: &mut [f32],
    inner: &mut [f32],
    inter: usize,
    row_weights: Option<RowWeights<'_>>,
) {
    assert!(inter > 0 && inner.len().is_multiple_of(inter), "{} numbers are not rows of {inter}", inner.len());
    assert_eq!(gate_up.len(), 2 * inner.len(), "gate_up and inner");
    let isa = cpu.isa();
    let rows_per_chunk = MIN_CHUNK_LEN.div_ceil(inter);
    let [gate_up_chunk, inner_chunk] = [rows_per_chunk * 2 * inter, rows_per_chunk * inter];
    let Some(RowWeights { weights, dweights }) = row_weights else {
        return cpu.for_each_slices([gate_up, inner], [gate_up_chunk, inner_chunk], |_, [gate_up, inner]| {
            for (gate_up, inner) in gate_up.chunks_exact_mut(2 * inter).zip(inner.chunks_exact_mut(inter)) {
                isa.run(SwigluBackward { gate_up, inner, weight: 1.0 });
            }
        });
    };
    assert_eq!(weights.len(), inner.len() / inter, "weights and rows");
    assert_eq!(dweights.len(), weights.len(), "dweights and weights");
    let chunk_lens = [gate_up_chunk, inner_chunk, rows_per_chunk];
    cpu.for_each_slices([gate_up, inner, dweights], chunk_lens, |chunk, [gate_up, inner, dweights]| {
        let weights = &weights[chunk * rows_per_chunk..];
        let rows = gate_up.chunks_exact_mut(2 * inter).zip(inner.chunks_exact_mut(inter));
        for ((gate_up, inner), (dweight, &weight)) in rows.zip(dweights.iter_mut().zip(weights)) {
            *dweight = isa.run(SwigluBackward { gate_up, inner, weight });
        }
    });
}

/// One row; returns the gradient of its weight.
struct SwigluBackward<'a> {
    gate_up: &'a mut [f32],
    inner: &'a mut [f32],
    weight: f32,
}

impl SimdOp for SwigluBackward<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let (gate, up) = self.gate_up.split_at_mut(self.inner.len());
        let (one, weight) = (simd.splat(1.0), simd.splat(self.weight));
        let mut dweight = simd.splat(0.0);
        update(
            simd,
            [gate, up, self.inner],
            [],
            #[inline(always)]
            |[gate, up, d], []| {
                let sigmoid = simd.div(one, simd.add(one, exp(simd, simd.sub(simd.splat(0.0), gate))));
                let silu = simd.mul(gate, sigmoid);
                let inner = simd.mul(silu, up);
                dweight = simd.mul_add(inner, d, dweight);
                let d = simd.mul(weight, d);
                // silu' = sigmoid + gate sigmoid (1 - sigmoid) = sigmoid + silu (1 - sigmoid)
                let slope = simd.mul_add(silu, simd.sub(one, sigmoid), sigmoid);
                [simd.mul(simd.mul(d, up), slope), simd.mul(d, silu), simd.mul(weight, inner)]
            },
        );
        simd.sum(dweight)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{RowWeights, swiglu, swiglu_backward, swiglu_rows};
    use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu, finite_differences};
    use crate::{Isa, Precision, round_to_bf16};

    #[test]
    fn swiglu_is_silu_of_gate_times_up_on_every_isa_and_awkward_length() {
        for isa in Isa::available() {
            for len in [0, 1, 15, 16, 17, 1343] {
                let mut numbers = Numbers::new(len as u64);
                let (gate, up) = (numbers.vec(len), numbers.vec(len));
                let gate: Vec<f32> = gate.iter().map(|x| x * 20.0).collect();
                let expected: Vec<f64> = gate
                    .iter()
                    .zip(&up)
                    .map(|(&gate, &up)| f64::from(gate) / (1.0 + (-f64::from(gate)).exp()) * f64::from(up))
                    .collect();
                let mut out = vec![0.0; len];
                swiglu(isa, &mut out, &gate, &up, Precision::F32);
                assert_close(&out, &expected, 1e-6, 1e-7);
                let mut rounded = vec![0.0; len];
                swiglu(isa, &mut rounded, &gate, &up, Precision::Bf16);
                assert!(rounded.iter().zip(&out).all(|(&rounded, &x)| rounded == round_to_bf16(x)));
            }
        }
    }

    #[test]
    fn swiglu_of_extreme_gates_is_zero_or_the_gate_and_nan_stays() {
        for isa in Isa::available() {
            let mut out = [0.0; 4];
            swiglu(isa, &mut out, &[-200.0, 200.0, f32::NAN, f32::INFINITY], &[2.0; 4], Precision::F32);
            assert_eq!((out[0], out[1], out[3]), (0.0, 400.0, f32::INFINITY));
            assert!(out[2].is_nan());
        }
    }

    #[test]
    fn swiglu_rows_gates_each_row_with_its_own_first_half() {
        for cpu in every_cpu() {
            for (num_rows, inter) in [(0, 3), (1, 1), (5, 9), (301, 24), (3, 8200)] {
                let gate_up = Numbers::new(3).vec(num_rows * 2 * inter);
                let mut out = vec![f32::NAN; num_rows * inter];
                swiglu_rows(&cpu, &mut out, &gate_up, inter);
                for (out, gate_up) in out.chunks_exact(inter).zip(gate_up.chunks_exact(2 * inter)) {
                    let mut expected = vec![0.0; inter];
                    swiglu(cpu.isa(), &mut expected, &gate_up[..inter], &gate_up[inter..], Precision::F32);
                    assert_same_bits(out, &expected);
                }
            }
        }
    }

    /// `silu(gate) * up` of one row, in f64.
    fn forward(gate_up: &[f64]) -> Vec<f64> {
        let (gate, up) = gate_up.split_at(gate_up.len() / 2);
        gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
    }

    #[test]
    fn swiglu_backward_matches_finite_differences_on_every_isa_and_awkward_length() {
        for cpu in every_cpu() {
            for (num_rows, inter) in [(0, 2), (1, 1), (3, 7), (2, 8), (5, 19)] {
                let mut numbers = Numbers::new(inter as u64);
                let gate_up: Vec<f32> = numbers.vec(num_rows * 2 * inter).iter().map(|x| 4.0 * x).collect();
                let (d, weights) = (numbers.vec(num_rows * inter), numbers.vec(num_rows));
                let (mut gate_up_out, mut inner, mut dweights) = (gate_up.clone(), d.clone(), vec![f32::NAN; num_rows]);
                let row_weights = RowWeights { weights: &weights, dweights: &mut dweights };
                swiglu_backward(&cpu, &mut gate_up_out, &mut inner, inter, Some(row_weights));
                for row in 0..num_rows {
                    let (weight, d) = (f64::from(weights[row]), &d[row * inter..][..inter]);
                    let gate_up = &gate_up[row * 2 * inter..][..2 * inter];
                    let dot = |inner: Vec<f64>| inner.iter().zip(d).map(|(x, &d)| x * f64::from(d)).sum::<f64>();
                    let expected = finite_differences(gate_up, |gate_up| weight * dot(forward(gate_up)));
                    assert_close(&gate_up_out[row * 2 * inter..][..2 * inter], &expected, 2e-6, 1e-6);
                    let unweighted = forward(&gate_up.iter().map(|&x| x.into()).collect::<Vec<f64>>());
                    let expected: Vec<f64> = unweighted.iter().map(|x| weight * x).collect();
                    assert_close(&inner[row * inter..][..inter], &expected, 2e-6, 0.0);
                    assert_close(&dweights[row..=row], &[dot(unweighted)], 2e-6, 2e-6);
                }
            }
        }
    }

    #[test]
    fn swiglu_backward_without_weights_is_that_with_weights_of_one() {
        for cpu in every_cpu() {
            let (num_rows, inter) = (123, 67);
            let mut numbers = Numbers::new(8);
            let (gate_up, d) = (numbers.vec(num_rows * 2 * inter), numbers.vec(num_rows * inter));
            let (mut weighted, mut plain) = ((gate_up.clone(), d.clone()), (gate_up, d));
            let row_weights = RowWeights { weights: &vec![1.0; num_rows], dweights: &mut vec![0.0; num_rows] };
            swiglu_backward(&cpu, &mut weighted.0, &mut weighted.1, inter, Some(row_weights));
            swiglu_backward(&cpu, &mut plain.0, &mut plain.1, inter, None);
            assert_same_bits(&plain.0, &weighted.0);
            assert_same_bits(&plain.1, &weighted.1);
        }
    }

    #[test]
    fn swiglu_backward_of_extreme_gates_is_finite() {
        for cpu in every_cpu() {
            let (mut gate_up, mut inner) = ([-300.0, 300.0, 2.0, 3.0], [5.0, 7.0]);
            swiglu_backward(&cpu, &mut gate_up, &mut inner, 2, None);
            assert_eq!((gate_up, inner), ([0.0, 21.0, 0.0, 2100.0], [0.0, 900.0]));
        }
    }
}
