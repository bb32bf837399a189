//! AVX-512 (F, BW, DQ, VL): sixteen lanes.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Avx2, Simd};

/// Proof of AVX-512 F, BW, DQ and VL, and of what AVX2 proves.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// State that the CPU has the features.
    ///
    /// # Safety
    /// It has AVX-512 F, BW, DQ and VL, AVX2, FMA and F16C.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Avx512 {
        Avx512(())
    }
}

/// Use intrinsics in a method of [`Avx512`].
macro_rules! avx512 {
    ($body:expr) => {{
        // SAFETY: An `Avx512` exists only where the CPU has the features; loads and stores also rest on the
        // promise of the method's caller.
        unsafe { $body }
    }};
}

impl Simd for Avx512 {
    type Vector = __m512;

    type Ints = __m512i;

    type Pairs = __m512i;

    const LANES: usize = 16;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        avx512!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    unsafe fn load_f32(self, x: *const f32) -> __m512 {
        avx512!(_mm512_loadu_ps(x))
    }

    #[inline(always)]
    unsafe fn load_bf16(self, x: *const bf16) -> __m512 {
        avx512!({
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        })
    }

    #[inline(always)]
    unsafe fn load_f16(self, x: *const f16) -> __m512 {
        avx512!(_mm512_cvtph_ps(_mm256_loadu_si256(x.cast())))
    }

    #[inline(always)]
    unsafe fn store_f32(self, out: *mut f32, v: __m512) {
        avx512!(_mm512_storeu_ps(out, v));
    }

    #[inline(always)]
    unsafe fn transpose_8x8(self, rows: [*const f32; 8], out: *mut f32, stride: usize) {
        avx512!(Avx2::new().transpose_8x8(rows, out, stride));
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        avx512!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        avx512!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn pow2(self, a: __m512) -> __m512 {
        avx512!({
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        })
    }

    #[inline(always)]
    fn round_to_bf16(self, a: __m512) -> __m512 {
        avx512!({
            let bits = _mm512_castps_si512(a);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a);
            let chosen = _mm512_mask_blend_epi32(nan, rounded, quiet);
            _mm512_castsi512_ps(_mm512_and_si512(chosen, _mm512_set1_epi32(-0x1_0000)))
        })
    }

    #[inline(always)]
    unsafe fn load_bf16_first(self, x: *const bf16) -> __m512 {
        avx512!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(x.cast()))))
    }

    #[inline(always)]
    unsafe fn load_bf16_second(self, x: *const bf16) -> __m512 {
        avx512!({
            let pairs = _mm512_loadu_si512(x.cast());
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x1_0000)))
        })
    }

    #[inline(always)]
    unsafe fn load_i32(self, x: *const i32) -> __m512i {
        avx512!(_mm512_loadu_si512(x.cast()))
    }

    #[inline(always)]
    unsafe fn store_i32(self, out: *mut i32, v: __m512i) {
        avx512!(_mm512_storeu_si512(out.cast(), v));
    }

    #[inline(always)]
    fn zero_i32(self) -> __m512i {
        avx512!(_mm512_setzero_si512())
    }

    #[inline(always)]
    fn i32_to_f32(self, v: __m512i) -> __m512 {
        avx512!(_mm512_cvtepi32_ps(v))
    }

    #[inline(always)]
    unsafe fn store_i16(self, out: *mut i16, v: __m512) {
        avx512!(_mm256_storeu_si256(out.cast(), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v))));
    }

    #[inline(always)]
    unsafe fn load_i8_pairs(self, x: *const i8) -> __m512i {
        avx512!(_mm512_cvtepi8_epi16(_mm256_loadu_si256(x.cast())))
    }

    #[inline(always)]
    unsafe fn splat_pair(self, x: *const i16) -> __m512i {
        avx512!(_mm512_set1_epi32(x.cast::<i32>().read_unaligned()))
    }

    #[inline(always)]
    fn add_pair_products(self, a: __m512i, b: __m512i, sums: __m512i) -> __m512i {
        avx512!(_mm512_add_epi32(sums, _mm512_madd_epi16(a, b)))
    }

    #[inline(always)]
    fn prefetch(self, x: *const u8) {
        avx512!(_mm_prefetch::<_MM_HINT_T0>(x.cast()));
    }

    #[inline(always)]
    fn max_lane(self, v: __m512) -> f32 {
        avx512!(_mm512_reduce_max_ps(v))
    }

    #[inline(always)]
    fn sum4(self, v: [__m512; 4]) -> [f32; 4] {
        avx512!({
            // The upper half is added to the lower one; from there on the tree is that of AVX2.
            let mut half = [_mm256_setzero_ps(); 4];
            for i in 0..4 {
                half[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps::<1>(v[i]));
            }
            let ab = _mm256_hadd_ps(half[0], half[1]);
            let cd = _mm256_hadd_ps(half[2], half[3]);
            let quarters = _mm256_hadd_ps(ab, cd);
            let sums = _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps::<1>(quarters));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sums);
            out
        })
    }
}
