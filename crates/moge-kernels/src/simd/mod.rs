//! One register of f32 lanes, the same on every ISA.
//!
//! A kernel body is written once, generic over [`Simd`], and [`crate::Isa::run`] compiles it for each ISA.
//! A value of a `Simd` type exists only where the CPU has the features, which is what makes its safe
//! methods safe. Every method, and every body that uses one, is `inline(always)`: a body must end up
//! inside the one function that is compiled with the features.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dot;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use dot::{
    Aligned, BLOCK_LEN, BYTE_BYTES, BlockInputs, Dot, DotOp, HALF_ROWS, NIBBLE_BYTES, PANEL_ROWS, RUN_STRIDE,
    SCALE_BYTES,
};
#[cfg(target_arch = "x86_64")]
pub(crate) use dot::{Avx512Vnni, AvxVnni};
pub(crate) use scalar::Scalar;

use half::{bf16, f16};

/// Lanes of the widest register.
pub(crate) const MAX_LANES: usize = 16;

/// A kernel body that [`crate::Isa::run`] compiles for each ISA. Its fields are the arguments.
pub(crate) trait SimdOp {
    /// What the body returns.
    type Output;

    /// The body; must be `inline(always)`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Proof that the CPU has an ISA's features, and the arithmetic on its registers.
pub(crate) trait Simd: Copy {
    /// A register of [`Simd::LANES`] f32 numbers.
    type Vector: Copy;

    /// A register of [`Simd::LANES`] i32 numbers.
    type Ints: Copy;

    /// A register of `2 * LANES` i16 numbers: a pair to each lane.
    type Pairs: Copy;

    /// f32 numbers in a register.
    const LANES: usize;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::Vector;

    /// Numbers at `x`.
    ///
    /// # Safety
    /// [`Simd::LANES`] numbers are readable at `x`, which need not be aligned to more than a number.
    unsafe fn load_f32(self, x: *const f32) -> Self::Vector;

    /// Numbers at `x`, widened.
    ///
    /// # Safety
    /// As for [`Simd::load_f32`].
    unsafe fn load_bf16(self, x: *const bf16) -> Self::Vector;

    /// Numbers at `x`, widened.
    ///
    /// # Safety
    /// [`Simd::LANES`] numbers are readable at `x`, which may be any address.
    unsafe fn load_f16(self, x: *const f16) -> Self::Vector;

    /// Write the lanes to `out`.
    ///
    /// # Safety
    /// [`Simd::LANES`] numbers are writable at `out`.
    unsafe fn store_f32(self, out: *mut f32, v: Self::Vector);

    /// Write the transpose of eight numbers of each of `rows`: number `k` of row `m` to `out + k * stride + m`, in the
    /// order of `k`, so that with a stride below eight a step overwrites the last numbers of the one before.
    ///
    /// # Safety
    /// The numbers are readable and writable.
    unsafe fn transpose_8x8(self, rows: [*const f32; 8], out: *mut f32, stride: usize);

    /// `a + b`.
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;

    /// `a - b`.
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;

    /// `a * b`.
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;

    /// `a / b`.
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;

    /// `a * b + c`: rounded once, except on the scalar ISA, where a fused multiply-add may be a library call.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;

    /// The larger lane; `b` where either is NaN.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;

    /// The smaller lane; `b` where either is NaN.
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;

    /// The nearest whole number, ties to even.
    fn round(self, a: Self::Vector) -> Self::Vector;

    /// Two to the power of each lane. The lanes are whole numbers in -126..=127, or -127, which gives 0; others give
    /// unspecified numbers.
    fn pow2(self, a: Self::Vector) -> Self::Vector;

    /// Each lane rounded to bf16 (nearest, ties to even); NaN stays NaN.
    fn round_to_bf16(self, a: Self::Vector) -> Self::Vector;

    /// The sum over the lanes of each of four registers, each in the order of one fixed tree.
    fn sum4(self, v: [Self::Vector; 4]) -> [f32; 4];

    /// Of `LANES` pairs at `x` the first numbers, widened.
    ///
    /// # Safety
    /// `2 * LANES` numbers are readable at `x`.
    unsafe fn load_bf16_first(self, x: *const bf16) -> Self::Vector;

    /// Of `LANES` pairs at `x` the second numbers, widened.
    ///
    /// # Safety
    /// `2 * LANES` numbers are readable at `x`.
    unsafe fn load_bf16_second(self, x: *const bf16) -> Self::Vector;

    /// Numbers at `x`.
    ///
    /// # Safety
    /// [`Simd::LANES`] numbers are readable at `x`.
    unsafe fn load_i32(self, x: *const i32) -> Self::Ints;

    /// Write the lanes to `out`.
    ///
    /// # Safety
    /// [`Simd::LANES`] numbers are writable at `out`.
    unsafe fn store_i32(self, out: *mut i32, v: Self::Ints);

    /// Zero in every lane.
    fn zero_i32(self) -> Self::Ints;

    /// Each lane as f32, rounded to nearest, ties to even.
    fn i32_to_f32(self, v: Self::Ints) -> Self::Vector;

    /// Write the lanes to `out`, rounded to nearest, ties to even. Beyond i16, and for NaN, they are unspecified numbers.
    ///
    /// # Safety
    /// [`Simd::LANES`] numbers are writable at `out`.
    unsafe fn store_i16(self, out: *mut i16, v: Self::Vector);

    /// `LANES` pairs at `x`, widened.
    ///
    /// # Safety
    /// `2 * LANES` numbers are readable at `x`.
    unsafe fn load_i8_pairs(self, x: *const i8) -> Self::Pairs;

    /// The pair at `x`, to every lane.
    ///
    /// # Safety
    /// Two numbers are readable at `x`.
    unsafe fn splat_pair(self, x: *const i16) -> Self::Pairs;

    /// In every lane `sums` plus the first numbers' product plus the second numbers' product, wrapping.
    fn add_pair_products(self, a: Self::Pairs, b: Self::Pairs, sums: Self::Ints) -> Self::Ints;

    /// Ask for the cache line at `x`, which may be any address.
    fn prefetch(self, x: *const u8);

    /// The largest lane; an unspecified number if one is NaN.
    fn max_lane(self, v: Self::Vector) -> f32;

    /// The sum over the lanes, in the same order as [`Simd::sum4`].
    #[inline(always)]
    fn sum(self, v: Self::Vector) -> f32 {
        let zero = self.splat(0.0);
        self.sum4([v, zero, zero, zero])[0]
    }

    /// The first [`Simd::LANES`] numbers of `x`.
    #[inline(always)]
    fn load(self, x: &[f32]) -> Self::Vector {
        assert!(x.len() >= Self::LANES);
        // SAFETY: The line above checked the length.
        unsafe { self.load_f32(x.as_ptr()) }
    }

    /// Write the lanes to the first [`Simd::LANES`] numbers of `out`.
    #[inline(always)]
    fn store(self, out: &mut [f32], v: Self::Vector) {
        assert!(out.len() >= Self::LANES);
        // SAFETY: The line above checked the length.
        unsafe { self.store_f32(out.as_mut_ptr(), v) }
    }

    /// The numbers of `x`, fewer than a register holds, followed by `fill`.
    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> Self::Vector {
        let mut padded = [fill; MAX_LANES];
        padded[..x.len()].copy_from_slice(x);
        self.load(&padded)
    }

    /// Write the leading lanes to all of `out`, which is shorter than a register.
    #[inline(always)]
    fn store_part(self, out: &mut [f32], v: Self::Vector) {
        let mut padded = [0.0; MAX_LANES];
        self.store(&mut padded, v);
        out.copy_from_slice(&padded[..out.len()]);
    }
}

/// `x[i] = f(x[i])`, register by register. A closure for `f` must be `inline(always)`.
#[inline(always)]
pub(crate) fn map<S: Simd>(simd: S, x: &mut [f32], f: impl Fn(S::Vector) -> S::Vector) {
    let mut chunks = x.chunks_exact_mut(S::LANES);
    for x in &mut chunks {
        simd.store(x, f(simd.load(x)));
    }
    let rest = chunks.into_remainder();
    if !rest.is_empty() {
        simd.store_part(rest, f(simd.load_part(rest, 0.0)));
    }
}

/// `out[i] = f(a[i], b[i])`, register by register, over the length of `out`. A closure for `f` must be `inline(always)`.
#[inline(always)]
pub(crate) fn map2<S: Simd>(
    simd: S,
    out: &mut [f32],
    a: &[f32],
    b: &[f32],
    f: impl Fn(S::Vector, S::Vector) -> S::Vector,
) {
    let (a, b) = (&a[..out.len()], &b[..out.len()]);
    let mut i = 0;
    while i + S::LANES <= out.len() {
        simd.store(&mut out[i..], f(simd.load(&a[i..]), simd.load(&b[i..])));
        i += S::LANES;
    }
    if i < out.len() {
        simd.store_part(&mut out[i..], f(simd.load_part(&a[i..], 0.0), simd.load_part(&b[i..], 0.0)));
    }
}

/// Replace `[x, y, ..]` at each index by `f([x, y, ..], [a, b, ..])`, register by register: `in_out` is read and written,
/// `inputs` are read, all of one length. The last register is filled up with zeros. A closure for `f` must be
/// `inline(always)`.
#[inline(always)]
#[expect(clippy::needless_pass_by_value, reason = "an array of exclusive slices is of no further use to the caller")]
pub(crate) fn update<S: Simd, const M: usize, const N: usize>(
    simd: S,
    in_out: [&mut [f32]; M],
    inputs: [&[f32]; N],
    mut f: impl FnMut([S::Vector; M], [S::Vector; N]) -> [S::Vector; M],
) {
    let len = in_out[0].len();
    assert!(in_out.iter().all(|x| x.len() == len) && inputs.iter().all(|a| a.len() == len), "lengths differ");
    let (mut x, mut a) = ([simd.splat(0.0); M], [simd.splat(0.0); N]);
    let mut i = 0;
    while i + S::LANES <= len {
        for j in 0..M {
            x[j] = simd.load(&in_out[j][i..i + S::LANES]);
        }
        for j in 0..N {
            a[j] = simd.load(&inputs[j][i..i + S::LANES]);
        }
        x = f(x, a);
        for j in 0..M {
            simd.store(&mut in_out[j][i..i + S::LANES], x[j]);
        }
        i += S::LANES;
    }
    if i < len {
        for j in 0..M {
            x[j] = simd.load_part(&in_out[j][i..], 0.0);
        }
        for j in 0..N {
            a[j] = simd.load_part(&inputs[j][i..], 0.0);
        }
        x = f(x, a);
        for j in 0..M {
            simd.store_part(&mut in_out[j][i..], x[j]);
        }
    }
}

/// A stored number that kernels widen in registers.
pub(crate) trait Stored: Copy + Send + Sync + 'static {
    /// Zero.
    const ZERO: Self;

    /// A register of numbers at `x`, widened.
    ///
    /// # Safety
    /// [`Simd::LANES`] numbers are readable at `x`.
    unsafe fn load<S: Simd>(simd: S, x: *const Self) -> S::Vector;

    /// The number, widened.
    fn widen(self) -> f32;
}

impl Stored for f32 {
    const ZERO: f32 = 0.0;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, x: *const f32) -> S::Vector {
        // SAFETY: The caller's promise.
        unsafe { simd.load_f32(x) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Stored for bf16 {
    const ZERO: bf16 = bf16::ZERO;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, x: *const bf16) -> S::Vector {
        // SAFETY: The caller's promise.
        unsafe { simd.load_bf16(x) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        // Not `to_f32`, which branches on NaN.
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Stored for f16 {
    const ZERO: f16 = f16::ZERO;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, x: *const f16) -> S::Vector {
        // SAFETY: The caller's promise.
        unsafe { simd.load_f16(x) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{MAX_LANES, Simd, SimdOp};
    use crate::Isa;
    use crate::elements::round_to_bf16;
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
            let (num_lanes, (sums, floats, rounded), max) =
                isa.run(PairMethods { int8: &int8, halves: &halves, factors });
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
}
