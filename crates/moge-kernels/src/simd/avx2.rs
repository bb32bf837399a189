//! AVX2 with FMA and F16C: eight lanes.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Simd;

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// State that the CPU has the features.
    ///
    /// # Safety
    /// It has AVX2, FMA and F16C.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Avx2 {
        Avx2(())
    }
}

/// Use intrinsics in a method of [`Avx2`].
macro_rules! avx2 {
    ($body:expr) => {{
        // SAFETY: An `Avx2` exists only where the CPU has the features; loads and stores also rest on the
        // promise of the method's caller.
        unsafe { $body }
    }};
}

impl Simd for Avx2 {
    type Vector = __m256;

    type Ints = __m256i;

    type Pairs = __m256i;

    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        avx2!(_mm256_set1_ps(x))
    }

    #[inline(always)]
    unsafe fn load_f32(self, x: *const f32) -> __m256 {
        avx2!(_mm256_loadu_ps(x))
    }

    #[inline(always)]
    unsafe fn load_bf16(self, x: *const bf16) -> __m256 {
        avx2!({
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        })
    }

    #[inline(always)]
    unsafe fn load_f16(self, x: *const f16) -> __m256 {
        avx2!(_mm256_cvtph_ps(_mm_loadu_si128(x.cast())))
    }

    #[inline(always)]
    unsafe fn store_f32(self, out: *mut f32, v: __m256) {
        avx2!(_mm256_storeu_ps(out, v));
    }

    #[inline(always)]
    unsafe fn transpose_8x8(self, rows: [*const f32; 8], out: *mut f32, stride: usize) {
        avx2!({
            for half in 0..2 {
                // Numbers of four steps: those of row `i` in the lower half, of row `i + 4` in the upper.
                let x: [__m256; 4] = std::array::from_fn(|i| {
                    let low = _mm256_castps128_ps256(_mm_loadu_ps(rows[i].add(4 * half)));
                    _mm256_insertf128_ps::<1>(low, _mm_loadu_ps(rows[i + 4].add(4 * half)))
                });
                let (ab_low, ab_high) = (_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
                let (cd_low, cd_high) = (_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
                let steps = [
                    _mm256_shuffle_ps::<0x44>(ab_low, cd_low),
                    _mm256_shuffle_ps::<0xee>(ab_low, cd_low),
                    _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
                    _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
                ];
                for i in 0..4 {
                    _mm256_storeu_ps(out.add((4 * half + i) * stride), steps[i]);
                }
            }
        });
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        avx2!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        avx2!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn pow2(self, a: __m256) -> __m256 {
        avx2!({
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        })
    }

    #[inline(always)]
    fn round_to_bf16(self, a: __m256) -> __m256 {
        avx2!({
            let bits = _mm256_castps_si256(a);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(a, a);
            let chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
            _mm256_and_ps(chosen, _mm256_castsi256_ps(_mm256_set1_epi32(-0x1_0000)))
        })
    }

    #[inline(always)]
    unsafe fn load_bf16_first(self, x: *const bf16) -> __m256 {
        avx2!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(x.cast()))))
    }

    #[inline(always)]
    unsafe fn load_bf16_second(self, x: *const bf16) -> __m256 {
        avx2!({
            let pairs = _mm256_loadu_si256(x.cast());
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x1_0000)))
        })
    }

    #[inline(always)]
    unsafe fn load_i32(self, x: *const i32) -> __m256i {
        avx2!(_mm256_loadu_si256(x.cast()))
    }

    #[inline(always)]
    unsafe fn store_i32(self, out: *mut i32, v: __m256i) {
        avx2!(_mm256_storeu_si256(out.cast(), v));
    }

    #[inline(always)]
    fn zero_i32(self) -> __m256i {
        avx2!(_mm256_setzero_si256())
    }

    #[inline(always)]
    fn i32_to_f32(self, v: __m256i) -> __m256 {
        avx2!(_mm256_cvtepi32_ps(v))
    }

    #[inline(always)]
    unsafe fn store_i16(self, out: *mut i16, v: __m256) {
        avx2!({
            let ints = _mm256_cvtps_epi32(v);
            let packed = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256::<1>(ints));
            _mm_storeu_si128(out.cast(), packed);
        });
    }

    #[inline(always)]
    unsafe fn load_i8_pairs(self, x: *const i8) -> __m256i {
        avx2!(_mm256_cvtepi8_epi16(_mm_loadu_si128(x.cast())))
    }

    #[inline(always)]
    unsafe fn splat_pair(self, x: *const i16) -> __m256i {
        avx2!(_mm256_set1_epi32(x.cast::<i32>().read_unaligned()))
    }

    #[inline(always)]
    fn add_pair_products(self, a: __m256i, b: __m256i, sums: __m256i) -> __m256i {
        avx2!(_mm256_add_epi32(sums, _mm256_madd_epi16(a, b)))
    }

    #[inline(always)]
    fn prefetch(self, x: *const u8) {
        avx2!(_mm_prefetch::<_MM_HINT_T0>(x.cast()));
    }

    #[inline(always)]
    fn max_lane(self, v: __m256) -> f32 {
        avx2!({
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        })
    }

    #[inline(always)]
    fn sum4(self, v: [__m256; 4]) -> [f32; 4] {
        avx2!({
            let ab = _mm256_hadd_ps(v[0], v[1]);
            let cd = _mm256_hadd_ps(v[2], v[3]);
            let quarters = _mm256_hadd_ps(ab, cd);
            let sums = _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps::<1>(quarters));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sums);
            out
        })
    }
}
