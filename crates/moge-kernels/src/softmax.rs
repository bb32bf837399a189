//! Softmax of one row.

use crate::exp::exp;
use crate::isa::Isa;
use crate::simd::{Simd, SimdOp, map};

/// `x[i] = exp(x[i] - max) / sum over j of exp(x[j] - max)`, in place; the order of the sum depends on the ISA alone.
///
/// A NaN or +inf anywhere, or -inf everywhere, makes the whole row NaN. A single -inf gives 0. An empty row stays empty.
pub fn softmax(isa: Isa, x: &mut [f32]) {
    isa.run(Softmax(x));
}

struct Softmax<'a>(&'a mut [f32]);

impl SimdOp for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (_, sum) = exp_minus_max(simd, self.0);
        let sum = simd.splat(sum);
        map(
            simd,
            self.0,
            #[inline(always)]
            |x| simd.div(x, sum),
        );
    }
}

/// `x[i] = exp(x[i] - max)`, in place; returns the maximum and the sum of the new numbers.
#[inline(always)]
pub(crate) fn exp_minus_max<S: Simd>(simd: S, x: &mut [f32]) -> (f32, f32) {
    let mut max_lanes = simd.splat(f32::NEG_INFINITY);
    let chunks = x.chunks_exact(S::LANES);
    let rest = chunks.remainder();
    for x in chunks {
        max_lanes = simd.max(max_lanes, simd.load(x));
    }
    if !rest.is_empty() {
        max_lanes = simd.max(max_lanes, simd.load_part(rest, f32::NEG_INFINITY));
    }
    let mut lanes = [f32::NEG_INFINITY; crate::simd::MAX_LANES];
    simd.store(&mut lanes, max_lanes);
    // The order of a maximum does not matter; a NaN it may lose shows up in the sum.
    let max = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);

    let max_lanes = simd.splat(max);
    let mut sums = simd.splat(0.0);
    let mut chunks = x.chunks_exact_mut(S::LANES);
    for x in &mut chunks {
        let power = exp(simd, simd.sub(simd.load(x), max_lanes));
        sums = simd.add(sums, power);
        simd.store(x, power);
    }
    let rest = chunks.into_remainder();
    if !rest.is_empty() {
        let power = exp(simd, simd.sub(simd.load_part(rest, f32::NEG_INFINITY), max_lanes));
        sums = simd.add(sums, power);
        simd.store_part(rest, power);
    }
    (max, simd.sum(sums))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::softmax;
    use crate::Isa;
    use crate::testing::{Numbers, assert_close};

    #[test]
    fn softmax_matches_f64_on_every_isa_and_awkward_length() {
        for isa in Isa::available() {
            for len in [1, 2, 7, 8, 9, 15, 16, 17, 64, 1343] {
                let x: Vec<f32> = Numbers::new(len as u64).vec(len).iter().map(|x| 10.0 * x).collect();
                let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let powers: Vec<f64> = x.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).collect();
                let sum: f64 = powers.iter().sum();
                let expected: Vec<f64> = powers.iter().map(|power| power / sum).collect();
                let mut out = x.clone();
                softmax(isa, &mut out);
                assert_close(&out, &expected, 2e-6, 0.0);
            }
        }
    }

    #[test]
    fn softmax_of_special_rows_is_as_documented() {
        for isa in Isa::available() {
            softmax(isa, &mut []);
            let mut row = [1.0, f32::NEG_INFINITY, 1.0];
            softmax(isa, &mut row);
            assert_eq!(row, [0.5, 0.0, 0.5]);
            let mut row = [3e38, 3e38, -3e38, -3e38];
            softmax(isa, &mut row);
            assert_eq!(row, [0.5, 0.5, 0.0, 0.0]);
            for bad in [f32::NAN, f32::INFINITY] {
                for len in [1, 9, 17] {
                    let mut row = vec![0.25; len];
                    row[len / 2] = bad;
                    softmax(isa, &mut row);
                    assert!(row.iter().all(|x| x.is_nan()));
                }
            }
            let mut row = [f32::NEG_INFINITY; 5];
            softmax(isa, &mut row);
            assert!(row.iter().all(|x| x.is_nan()));
        }
    }
}
