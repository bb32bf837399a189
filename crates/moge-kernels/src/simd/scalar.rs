//! One number at a time: the ISA that every CPU has.

use half::{bf16, f16};

use super::{Simd, Stored};

/// The scalar ISA.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

impl Simd for Scalar {
    type Vector = f32;

    type Ints = i32;

    type Pairs = [i16; 2];

    const LANES: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> f32 {
        x
    }

    #[inline(always)]
    unsafe fn load_f32(self, x: *const f32) -> f32 {
        // SAFETY: The caller's promise.
        unsafe { *x }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, x: *const bf16) -> f32 {
        // SAFETY: The caller's promise.
        unsafe { (*x).widen() }
    }

    #[inline(always)]
    unsafe fn load_f16(self, x: *const f16) -> f32 {
        // SAFETY: The caller's promise.
        unsafe { x.read_unaligned().widen() }
    }

    #[inline(always)]
    unsafe fn store_f32(self, out: *mut f32, v: f32) {
        // SAFETY: The caller's promise.
        unsafe { *out = v }
    }

    #[inline(always)]
    unsafe fn transpose_8x8(self, rows: [*const f32; 8], out: *mut f32, stride: usize) {
        for k in 0..8 {
            for m in 0..8 {
                // SAFETY: The caller's promise.
                unsafe { *out.add(k * stride + m) = *rows[m].add(k) };
            }
        }
    }

    #[inline(always)]
    fn add(self, a: f32, b: f32) -> f32 {
        a + b
    }

    #[inline(always)]
    fn sub(self, a: f32, b: f32) -> f32 {
        a - b
    }

    #[inline(always)]
    fn mul(self, a: f32, b: f32) -> f32 {
        a * b
    }

    #[inline(always)]
    fn div(self, a: f32, b: f32) -> f32 {
        a / b
    }

    #[inline(always)]
    fn mul_add(self, a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }

    #[inline(always)]
    fn max(self, a: f32, b: f32) -> f32 {
        if a > b { a } else { b }
    }

    #[inline(always)]
    fn min(self, a: f32, b: f32) -> f32 {
        if a < b { a } else { b }
    }

    #[inline(always)]
    fn round(self, a: f32) -> f32 {
        // Adding and taking away 1.5 * 2^23 leaves no bit for the fraction; `round_ties_even` may be a library call.
        const SHIFT: f32 = 12_582_912.0;
        if a.abs() < 4_194_304.0 { (a + SHIFT) - SHIFT } else { a }
    }

    #[inline(always)]
    fn pow2(self, a: f32) -> f32 {
        f32::from_bits(((a as i32).wrapping_add(127) as u32) << 23)
    }

    #[inline(always)]
    fn round_to_bf16(self, a: f32) -> f32 {
        round_to_bf16(a)
    }

    #[inline(always)]
    unsafe fn load_bf16_first(self, x: *const bf16) -> f32 {
        // SAFETY: The caller's promise.
        unsafe { (*x).widen() }
    }

    #[inline(always)]
    unsafe fn load_bf16_second(self, x: *const bf16) -> f32 {
        // SAFETY: The caller's promise.
        unsafe { (*x.add(1)).widen() }
    }

    #[inline(always)]
    unsafe fn load_i32(self, x: *const i32) -> i32 {
        // SAFETY: The caller's promise.
        unsafe { *x }
    }

    #[inline(always)]
    unsafe fn store_i32(self, out: *mut i32, v: i32) {
        // SAFETY: The caller's promise.
        unsafe { *out = v }
    }

    #[inline(always)]
    fn zero_i32(self) -> i32 {
        0
    }

    #[inline(always)]
    fn i32_to_f32(self, v: i32) -> f32 {
        v as f32
    }

    #[inline(always)]
    unsafe fn store_i16(self, out: *mut i16, v: f32) {
        // SAFETY: The caller's promise.
        unsafe { *out = self.round(v) as i16 }
    }

    #[inline(always)]
    unsafe fn load_i8_pairs(self, x: *const i8) -> [i16; 2] {
        // SAFETY: The caller's promise.
        unsafe { [i16::from(*x), i16::from(*x.add(1))] }
    }

    #[inline(always)]
    unsafe fn splat_pair(self, x: *const i16) -> [i16; 2] {
        // SAFETY: The caller's promise.
        unsafe { [*x, *x.add(1)] }
    }

    #[inline(always)]
    fn add_pair_products(self, a: [i16; 2], b: [i16; 2], sums: i32) -> i32 {
        let [first, second] = [0, 1].map(|i| i32::from(a[i]) * i32::from(b[i]));
        sums.wrapping_add(first.wrapping_add(second))
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}

    #[inline(always)]
    fn max_lane(self, v: f32) -> f32 {
        v
    }

    #[inline(always)]
    fn sum4(self, v: [f32; 4]) -> [f32; 4] {
        v
    }
}

/// `x` rounded to bf16 (nearest, ties to even), as f32. NaN stays NaN; what is too large becomes infinite.
#[inline(always)]
pub fn round_to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let quiet_nan = bits | 0x0040_0000;
    f32::from_bits((if x.is_nan() { quiet_nan } else { rounded }) & 0xffff_0000)
}
