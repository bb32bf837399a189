//! The gated activation of an MLP.

use crate::elements::ActivationType;
use crate::exp::exp;
use crate::isa::Isa;
use crate::simd::{Simd, SimdOp, map2};

/// `out = silu(gate) * up` with `silu(a) = a / (1 + exp(-a))`, rounded if `activation` says so; all of one length.
pub(crate) fn swiglu(isa: Isa, out: &mut [f32], gate: &[f32], up: &[f32], activation: ActivationType) {
    assert!(gate.len() == out.len() && up.len() == out.len());
    isa.run(Swiglu { out, gate, up, activation });
}

struct Swiglu<'a> {
    out: &'a mut [f32],
    gate: &'a [f32],
    up: &'a [f32],
    activation: ActivationType,
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
                    ActivationType::F32 => product,
                    ActivationType::Bf16 => simd.round_to_bf16(product),
                }
            },
        );
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::swiglu;
    use crate::testing::{Numbers, assert_close};
    use crate::{ActivationType, Isa, round_to_bf16};

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
                swiglu(isa, &mut out, &gate, &up, ActivationType::F32);
                assert_close(&out, &expected, 1e-6, 1e-7);
                let mut rounded = vec![0.0; len];
                swiglu(isa, &mut rounded, &gate, &up, ActivationType::Bf16);
                assert!(rounded.iter().zip(&out).all(|(&rounded, &x)| rounded == round_to_bf16(x)));
            }
        }
    }

    #[test]
    fn swiglu_of_extreme_gates_is_zero_or_the_gate_and_nan_stays() {
        for isa in Isa::available() {
            let mut out = [0.0; 4];
            swiglu(isa, &mut out, &[-200.0, 200.0, f32::NAN, f32::INFINITY], &[2.0; 4], ActivationType::F32);
            assert_eq!((out[0], out[1], out[3]), (0.0, 400.0, f32::INFINITY));
            assert!(out[2].is_nan());
        }
    }
}
