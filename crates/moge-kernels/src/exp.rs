//! The exponential function on registers.

use crate::simd::Simd;

/// `e^x` within 1.5 units in the last place; exact at 0, infinite above the largest f32, gradually 0
/// below the smallest, NaN for NaN.
///
/// `x = n ln 2 + r` with a whole `n` and `|r| <= ln 2 / 2`; `e^r` is its Taylor polynomial of degree 7, whose
/// remainder `r^8 / 8!` is a tenth of a unit; `2^n` is applied in two factors, so that results below the
/// smallest normal number come out, and `n = 128` does not overflow too early.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    /// ln 2 in two parts; the first has nine bits, so that its product with a small whole number is exact.
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    const LN_2_LOW: f32 = (std::f64::consts::LN_2 - 355.0 / 512.0) as f32;
    /// 1 / k! from k = 7 down to 1 and 0.
    const COEFFICIENTS: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 1.0 / 2.0, 1.0, 1.0];
    // Beyond these the result is 0 or infinite anyway. `x` comes second, so that NaN stays.
    let x = simd.min(simd.splat(89.0), simd.max(simd.splat(-105.0), x));
    let n = simd.round(simd.mul(x, simd.splat(std::f32::consts::LOG2_E)));
    let r = simd.mul_add(n, simd.splat(-LN_2_HIGH), x);
    let r = simd.mul_add(n, simd.splat(-LN_2_LOW), r);
    let mut power = simd.splat(COEFFICIENTS[0]);
    for coefficient in &COEFFICIENTS[1..] {
        power = simd.mul_add(power, r, simd.splat(*coefficient));
    }
    let half = simd.round(simd.mul(n, simd.splat(0.5)));
    simd.mul(simd.mul(power, simd.pow2(half)), simd.pow2(simd.sub(n, half)))
}

/// `2^x` for `x` up to 0, within 1.5 units in the last place; exact at 0, 0 below -126.5, NaN for NaN.
///
/// `x = n + r` with a whole `n` and `|r| <= 1 / 2`; `2^r` is the Taylor polynomial of degree 7, as in [`exp`].
#[inline(always)]
pub(crate) fn exp2_up_to_0<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    /// (ln 2)^k / k! from k = 7 down to 0.
    const COEFFICIENTS: [f32; 8] = {
        let mut coefficients = [1.0; 8];
        let (mut k, mut coefficient) = (1, 1.0);
        while k < 8 {
            coefficient *= std::f64::consts::LN_2 / k as f64;
            coefficients[7 - k] = coefficient as f32;
            k += 1;
        }
        coefficients
    };
    // `x` comes second, so that NaN stays.
    let x = simd.max(simd.splat(-127.0), x);
    let n = simd.round(x);
    let r = simd.sub(x, n);
    let mut power = simd.splat(COEFFICIENTS[0]);
    for coefficient in &COEFFICIENTS[1..] {
        power = simd.mul_add(power, r, simd.splat(*coefficient));
    }
    simd.mul(power, simd.pow2(n))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{exp, exp2_up_to_0};
    use crate::Isa;
    use crate::simd::{Simd, SimdOp, map};

    /// Largest error of [`exp`] in units in the last place, over all f32.
    const MAX_EXP_ERROR_ULPS: f64 = 1.5;

    struct ExpInPlace<'a>(&'a mut [f32]);

    impl SimdOp for ExpInPlace<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            map(
                simd,
                self.0,
                #[inline(always)]
                |x| exp(simd, x),
            );
        }
    }

    struct Exp2InPlace<'a>(&'a mut [f32]);

    impl SimdOp for Exp2InPlace<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            map(
                simd,
                self.0,
                #[inline(always)]
                |x| exp2_up_to_0(simd, x),
            );
        }
    }

    #[test]
    fn exp2_up_to_0_is_within_its_bound_on_every_isa() {
        let inputs: Vec<f32> = (0..400_001).map(|i| i as f32 * -0.000_316).collect();
        for isa in Isa::available() {
            let mut outputs = inputs.clone();
            isa.run(Exp2InPlace(&mut outputs));
            for (&x, &found) in inputs.iter().zip(&outputs) {
                if x < -126.0 {
                    assert!((0.0..=f32::MIN_POSITIVE).contains(&found), "{x}: {found}");
                } else {
                    let error = error_ulps(found, f64::from(x).exp2());
                    assert!(error <= MAX_EXP_ERROR_ULPS, "{} at {x}: {error} units", isa.name());
                }
            }
            let mut x = [0.0, -0.0, -127.0, -1e9, f32::NEG_INFINITY, f32::NAN];
            isa.run(Exp2InPlace(&mut x));
            assert_eq!(x[..5], [1.0, 1.0, 0.0, 0.0, 0.0]);
            assert!(x[5].is_nan());
        }
    }

    /// The error of `found` against `expected` in units in the last place of an f32 of that size.
    fn error_ulps(found: f32, expected: f64) -> f64 {
        let smallest_ulp = f64::from(f32::from_bits(1));
        let ulp = (expected.abs().log2().floor() - 23.0).exp2().max(smallest_ulp);
        (f64::from(found) - expected).abs() / ulp
    }

    fn check(isa: Isa, inputs: &[f32]) -> f64 {
        let mut outputs = inputs.to_vec();
        isa.run(ExpInPlace(&mut outputs));
        let mut worst = 0.0f64;
        for (&x, &found) in inputs.iter().zip(&outputs) {
            // Nine tenths of all f32 are too large or too small to need more than a look.
            if x.abs() < 1e-8 {
                assert_eq!(found, 1.0, "{x}");
                continue;
            } else if x.abs() > 110.0 {
                assert_eq!(found, if x > 0.0 { f32::INFINITY } else { 0.0 }, "{x}");
                continue;
            }
            let expected = f64::from(x).exp();
            if x.is_nan() {
                assert!(found.is_nan());
            } else if expected > f64::from(f32::MAX) * (1.0 + 1e-7) {
                assert_eq!(found, f32::INFINITY, "{x}");
            } else if found.is_infinite() {
                assert!(expected > f64::from(f32::MAX) * (1.0 - 1e-7), "{x}");
            } else {
                worst = worst.max(error_ulps(found, expected));
            }
        }
        worst
    }

    #[test]
    fn exp_is_within_its_bound_on_every_isa() {
        let mut inputs: Vec<f32> = (0..400_001).map(|i| -106.0 + i as f32 * 0.0005).collect();
        inputs.extend((0..=u32::MAX).step_by(10_007).map(f32::from_bits));
        inputs.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN, 88.722_84, -87.336_55]);
        for isa in Isa::available() {
            let worst = check(isa, &inputs);
            assert!(worst <= MAX_EXP_ERROR_ULPS, "{}: {worst} units", isa.name());
        }
    }

    #[test]
    fn exp_of_zero_is_one_and_of_minus_infinity_zero() {
        for isa in Isa::available() {
            let mut x = [0.0, -0.0, f32::NEG_INFINITY];
            isa.run(ExpInPlace(&mut x));
            assert_eq!(x, [1.0, 1.0, 0.0]);
        }
    }

    #[test]
    #[ignore = "minutes: all f32"]
    fn exp_is_within_its_bound_for_all_f32() {
        for isa in Isa::available() {
            let mut worst = 0.0f64;
            for upper in 0..=u16::MAX {
                let inputs: Vec<f32> =
                    (0..=u16::MAX).map(|lower| f32::from_bits(u32::from(upper) << 16 | u32::from(lower))).collect();
                worst = worst.max(check(isa, &inputs));
            }
            assert!(worst <= MAX_EXP_ERROR_ULPS, "{}: {worst} units", isa.name());
        }
    }
}
