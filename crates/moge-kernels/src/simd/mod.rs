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
pub use scalar::round_to_bf16;

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
mod tests;
