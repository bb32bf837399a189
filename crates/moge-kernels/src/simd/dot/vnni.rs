//! AVX-VNNI and AVX-512 VNNI: one instruction for four products of every lane, exact in i32.
//!
//! A block's weights of as many weight rows as a register has lanes are unpacked into eight registers, and all rows of
//! the inputs go over them, some at once so that the latencies of their sums overlap.

use std::arch::x86_64::*;

use half::f16;

use super::super::{Avx2, Avx512, Simd};
use super::{BLOCK_LEN, BYTE_BYTES, BlockInputs, Dot, HALF_ROWS, NIBBLE_BYTES, PANEL_ROWS, RUN_STRIDE, SCALE_BYTES};

/// Runs of four inputs in a block.
const NUM_RUNS: usize = BLOCK_LEN / 4;

/// Proof of AVX-VNNI and of what [`Avx2`] proves.
#[derive(Clone, Copy)]
pub(crate) struct AvxVnni(Avx2);

impl AvxVnni {
    /// State that the CPU has the features.
    ///
    /// # Safety
    /// It has AVX-VNNI, AVX2, FMA and F16C.
    #[inline(always)]
    pub(crate) unsafe fn new() -> AvxVnni {
        // SAFETY: The caller's promise.
        AvxVnni(unsafe { Avx2::new() })
    }
}

/// Proof of AVX-512 VNNI and of what [`Avx512`] proves.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Vnni(Avx512);

impl Avx512Vnni {
    /// State that the CPU has the features.
    ///
    /// # Safety
    /// It has AVX-512 F, BW, DQ, VL and VNNI, AVX2, FMA and F16C.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Avx512Vnni {
        // SAFETY: The caller's promise.
        Avx512Vnni(unsafe { Avx512::new() })
    }
}

/// Use intrinsics in a method of a type that proves their features.
macro_rules! proven {
    ($body:expr) => {{
        // SAFETY: The type exists only where the CPU has the features; loads and stores also rest on the
        // promise of the caller.
        unsafe { $body }
    }};
}

/// The intrinsics of one register width.
macro_rules! impl_dot {
    ($proof:ty, $simd:ty, $ints:ty, $max_rows:literal, $load:ident, $store:ident, $splat:ident, $widen:ident, $and:ident, $shift:ident, $dot:ident) => {
        impl Dot for $proof {
            #[inline(always)]
            fn prefetch(self, address: *const u8) {
                proven!(_mm_prefetch::<_MM_HINT_T0>(address.cast()));
            }

            #[inline(always)]
            unsafe fn add_nibbles(self, block: *const u8, x: BlockInputs, sums: *mut f32) {
                for first in (0..PANEL_ROWS).step_by(<$simd>::LANES) {
                    proven!({
                        let w = block.add(SCALE_BYTES + first / HALF_ROWS * NIBBLE_BYTES / 2 + first % HALF_ROWS * 4);
                        let low = $splat(0x0f0f_0f0f);
                        let mut runs = [low; NUM_RUNS];
                        for j in 0..NUM_RUNS / 2 {
                            let both = $load(w.add(j * RUN_STRIDE).cast());
                            runs[j] = $and(both, low);
                            runs[NUM_RUNS / 2 + j] = $and($shift::<4>(both), low);
                        }
                        let scale = self.0.load_f16(block.cast::<f16>().add(first));
                        let sums = sums.add(first);
                        let mut row = 0;
                        while row < x.num_rows {
                            row += match x.num_rows - row {
                                $max_rows.. => self.add_nibble_rows::<$max_rows>(runs, scale, x, row, sums),
                                2.. => self.add_nibble_rows::<2>(runs, scale, x, row, sums),
                                _ => self.add_nibble_rows::<1>(runs, scale, x, row, sums),
                            };
                        }
                    });
                }
            }

            #[inline(always)]
            unsafe fn add_bytes(self, block: *const u8, x: BlockInputs, sums: *mut i32) {
                for first in (0..PANEL_ROWS).step_by(<$simd>::LANES) {
                    proven!({
                        let w = block.add(first / HALF_ROWS * BYTE_BYTES / 2 + first % HALF_ROWS * 4);
                        let mut runs = [$splat(0); NUM_RUNS];
                        for j in 0..NUM_RUNS {
                            runs[j] = $load(w.add(j * RUN_STRIDE).cast());
                        }
                        let sums = sums.add(first);
                        let mut row = 0;
                        while row < x.num_rows {
                            row += match x.num_rows - row {
                                $max_rows.. => self.add_byte_rows::<$max_rows>(runs, x, row, sums),
                                2.. => self.add_byte_rows::<2>(runs, x, row, sums),
                                _ => self.add_byte_rows::<1>(runs, x, row, sums),
                            };
                        }
                    });
                }
            }
        }

        impl $proof {
            /// Add the scaled products of `M` rows from `row` with some weight rows of a W4A8 block; returns `M`.
            ///
            /// # Safety
            /// As for [`Dot::add_nibbles`].
            #[inline(always)]
            unsafe fn add_nibble_rows<const M: usize>(
                self,
                w: [$ints; NUM_RUNS],
                scale: <$simd as Simd>::Vector,
                x: BlockInputs,
                row: usize,
                sums: *mut f32,
            ) -> usize {
                proven!({
                    let mut start = [$splat(0); M];
                    for m in 0..M {
                        start[m] = $splat(*x.corrections.add(row + m));
                    }
                    let dots = self.dots(w, x.levels.add(row * BLOCK_LEN), start);
                    for m in 0..M {
                        let place = sums.add((row + m) * PANEL_ROWS);
                        let sum = self.0.mul_add($widen(dots[m]), scale, self.0.load_f32(place));
                        self.0.store_f32(place, sum);
                    }
                });
                M
            }

            /// Add the products of `M` rows from `row` with some weight rows of a W8A8 block; returns `M`.
            ///
            /// # Safety
            /// As for [`Dot::add_bytes`].
            #[inline(always)]
            unsafe fn add_byte_rows<const M: usize>(
                self,
                w: [$ints; NUM_RUNS],
                x: BlockInputs,
                row: usize,
                sums: *mut i32,
            ) -> usize {
                proven!({
                    let mut start = [$splat(0); M];
                    for m in 0..M {
                        start[m] = $load(sums.add((row + m) * PANEL_ROWS).cast());
                    }
                    let dots = self.dots(w, x.levels.add(row * BLOCK_LEN), start);
                    for m in 0..M {
                        $store(sums.add((row + m) * PANEL_ROWS).cast(), dots[m]);
                    }
                });
                M
            }

            /// `sums[m] + sum over k of w[k] * x[m][k]` for `M` rows and as many weight rows as there are lanes.
            ///
            /// # Safety
            /// `M` rows are readable at `x`.
            #[inline(always)]
            unsafe fn dots<const M: usize>(
                self,
                w: [$ints; NUM_RUNS],
                x: *const i8,
                mut sums: [$ints; M],
            ) -> [$ints; M] {
                proven!({
                    for j in 0..NUM_RUNS {
                        for m in 0..M {
                            let inputs = $splat(x.add(m * BLOCK_LEN + 4 * j).cast::<i32>().read_unaligned());
                            sums[m] = $dot(sums[m], w[j], inputs);
                        }
                    }
                    sums
                })
            }
        }
    };
}

impl_dot!(
    AvxVnni,
    Avx2,
    __m256i,
    4,
    _mm256_loadu_si256,
    _mm256_storeu_si256,
    _mm256_set1_epi32,
    _mm256_cvtepi32_ps,
    _mm256_and_si256,
    _mm256_srli_epi16,
    _mm256_dpbusd_avx_epi32
);

impl_dot!(
    Avx512Vnni,
    Avx512,
    __m512i,
    10,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    _mm512_set1_epi32,
    _mm512_cvtepi32_ps,
    _mm512_and_si512,
    _mm512_srli_epi16,
    _mm512_dpbusd_epi32
);
