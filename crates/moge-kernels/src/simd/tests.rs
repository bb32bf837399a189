//! Every ISA lane by lane against scalar arithmetic.

use super::round_to_bf16;
use super::{MAX_LANES, Simd, SimdOp};
use crate::Isa;
use half::{bf16, f16};

/// What each method made of the inputs, lane by lane.
struct Methods<'a> {
    a: &'a [f32; MAX_LANES],
    b: &'a [f32; MAX_LANES],
}

impl SimdOp for Methods<'_> {
    type Output = (usize, Vec<[f32; MAX_LANES]>, [f32; 4]);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let (a, b) = (simd.load(self.a), simd.load(self.b));
        let a_bf16 = self.a.map(bf16::from_f32);
        let a_f16 = self.a.map(f16::from_f32);
        // SAFETY: Both arrays hold MAX_LANES numbers.
        let (from_bf16, from_f16) = unsafe { (simd.load_bf16(a_bf16.as_ptr()), simd.load_f16(a_f16.as_ptr())) };
        let results = [
            simd.add(a, b),
            simd.sub(a, b),
            simd.mul(a, b),
            simd.div(a, b),
            simd.max(a, b),
            simd.min(a, b),
            simd.round(a),
            simd.pow2(simd.round(a)),
            simd.round_to_bf16(a),
            from_bf16,
            from_f16,
            simd.mul_add(a, b, simd.splat(0.25)),
        ];
        let mut lanes = Vec::new();
        for v in results {
            let mut out = [0.0; MAX_LANES];
            simd.store(&mut out, v);
            lanes.push(out);
        }
        (S::LANES, lanes, simd.sum4([a, b, simd.splat(1.0), simd.splat(0.5)]))
    }
}

#[test]
fn every_method_agrees_with_plain_arithmetic_on_every_isa() {
    let a: [f32; MAX_LANES] = std::array::from_fn(|i| (i as f32 - 7.0) * 1.37 + 0.5);
    let b: [f32; MAX_LANES] = std::array::from_fn(|i| 3.0 - (i as f32) * 0.73);
    for isa in Isa::available() {
        let (num_lanes, lanes, sums) = isa.run(Methods { a: &a, b: &b });
        for i in 0..num_lanes {
            let (x, y) = (a[i], b[i]);
            let expected = [
                x + y,
                x - y,
                x * y,
                x / y,
                x.max(y),
                x.min(y),
                x.round_ties_even(),
                x.round_ties_even().exp2(),
                round_to_bf16(x),
                bf16::from_f32(x).to_f32(),
                f16::from_f32(x).to_f32(),
            ];
            for (method, expected) in expected.iter().enumerate() {
                assert_eq!(lanes[method][i], *expected, "{} method {method} lane {i}", isa.name());
            }
            assert!((lanes[11][i] - (x * y + 0.25)).abs() < 1e-5);
        }
        let expected = [
            a[..num_lanes].iter().sum::<f32>(),
            b[..num_lanes].iter().sum::<f32>(),
            num_lanes as f32,
            num_lanes as f32 / 2.0,
        ];
        for (sum, expected) in sums.iter().zip(expected) {
            assert!((sum - expected).abs() < 1e-4, "{}: {sum} {expected}", isa.name());
        }
    }
}

/// What the methods on pairs made of pairs of int8 and of bf16 numbers and one pair of int16.
struct PairMethods<'a> {
    int8: &'a [i8; 2 * MAX_LANES],
    halves: &'a [bf16; 2 * MAX_LANES],
    factors: [i16; 2],
}

/// Of each lane: sum of products, that as f32, first and second of bf16, and the lane rounded to i16.
type PairLanes = ([i32; MAX_LANES], [[f32; MAX_LANES]; 3], [i16; MAX_LANES]);

impl SimdOp for PairMethods<'_> {
    type Output = (usize, PairLanes, f32);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let (mut sums, mut floats, mut rounded) = ([0; MAX_LANES], [[0.0; MAX_LANES]; 3], [0; MAX_LANES]);
        // SAFETY: Every array holds MAX_LANES numbers or pairs.
        let (v, first, second) = unsafe {
            let (pairs, factors) = (simd.load_i8_pairs(self.int8.as_ptr()), simd.splat_pair(self.factors.as_ptr()));
            let once = simd.add_pair_products(pairs, factors, simd.zero_i32());
            simd.store_i32(sums.as_mut_ptr(), simd.add_pair_products(pairs, factors, once));
            let v = simd.i32_to_f32(simd.load_i32(sums.as_ptr()));
            simd.store_i16(rounded.as_mut_ptr(), simd.mul(v, simd.splat(0.5)));
            (v, simd.load_bf16_first(self.halves.as_ptr()), simd.load_bf16_second(self.halves.as_ptr()))
        };
        for (out, v) in floats.iter_mut().zip([v, first, second]) {
            simd.store(out, v);
        }
        simd.prefetch(self.int8.as_ptr().cast());
        (S::LANES, (sums, floats, rounded), simd.max_lane(v))
    }
}

#[test]
fn methods_on_pairs_agree_with_plain_arithmetic_on_every_isa() {
    let int8: [i8; 2 * MAX_LANES] = std::array::from_fn(|i| (i as i32 * 37 % 255 - 127) as i8);
    let halves: [bf16; 2 * MAX_LANES] = std::array::from_fn(|i| bf16::from_f32(i as f32 * 1.7 - 20.0));
    let factors = [-127, 93];
    for isa in Isa::available() {
        let (num_lanes, (sums, floats, rounded), max) = isa.run(PairMethods { int8: &int8, halves: &halves, factors });
        let mut expected_max = f32::NEG_INFINITY;
        for i in 0..num_lanes {
            let product = |j: usize| i32::from(int8[2 * i + j]) * i32::from(factors[j]);
            let sum = 2 * (product(0) + product(1));
            assert_eq!(sums[i], sum, "{} lane {i}", isa.name());
            let expected = [sum as f32, halves[2 * i].to_f32(), halves[2 * i + 1].to_f32()];
            assert_eq!(floats.map(|lanes| lanes[i]), expected, "{} lane {i}", isa.name());
            assert_eq!(i32::from(rounded[i]), sum / 2, "{} lane {i}", isa.name());
            expected_max = expected_max.max(sum as f32);
        }
        assert_eq!(max, expected_max, "{}", isa.name());
    }
}

/// Transposes eight rows of nine numbers, from the second on.
struct Transpose<'a> {
    rows: &'a [[f32; 9]; 8],
    out: &'a mut [f32],
    stride: usize,
}

impl SimdOp for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert!(self.out.len() >= 7 * self.stride + 8);
        let rows = std::array::from_fn(|m| self.rows[m][1..].as_ptr());
        // SAFETY: The rows hold eight more numbers, and the line above checked the output.
        unsafe { simd.transpose_8x8(rows, self.out.as_mut_ptr(), self.stride) };
    }
}

#[test]
fn a_transpose_writes_its_steps_in_order_on_every_isa_and_stride() {
    let rows: [[f32; 9]; 8] = std::array::from_fn(|m| std::array::from_fn(|k| (10 * m + k) as f32));
    for isa in Isa::available() {
        for stride in [6, 8, 16] {
            let (mut found, mut expected) = ([-1.0; 128], [-1.0; 128]);
            isa.run(Transpose { rows: &rows, out: &mut found, stride });
            for k in 0..8 {
                for m in 0..8 {
                    expected[k * stride + m] = rows[m][k + 1];
                }
            }
            assert_eq!(found, expected, "{} stride {stride}", isa.name());
        }
    }
}

#[test]
fn max_and_min_give_the_second_argument_for_nan() {
    let nan = [f32::NAN; MAX_LANES];
    let one = [1.0; MAX_LANES];
    for isa in Isa::available() {
        let (num_lanes, lanes, _) = isa.run(Methods { a: &nan, b: &one });
        assert_eq!((lanes[4][num_lanes - 1], lanes[5][num_lanes - 1]), (1.0, 1.0));
        assert!(lanes[8][0].is_nan(), "bf16 keeps NaN");
        let (_, lanes, _) = isa.run(Methods { a: &one, b: &nan });
        assert!(lanes[4][0].is_nan() && lanes[5][0].is_nan());
    }
}
