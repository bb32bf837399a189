//! AVX2 without VNNI.
//!
//! `vpmaddubsw` multiplies unsigned by signed bytes and adds pairs into i16, saturating. Sixteen products of at most
//! 15 * 127, a whole block's share of a lane, fit; so weights of four bits are summed in i16 over a block, and those of
//! eight bits are taken as a high and a low nibble. Sixteen registers cannot hold a block's weights and sums at once: a
//! register tile of up to 4 rows by 16 weight rows goes over them. For many rows the weights are unpacked once, into a
//! buffer in L1; for few, each tile unpacks them on the way.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::sync::atomic::{Ordering, compiler_fence};

use half::f16;

use super::super::{Avx2, Simd};
use super::{
    Aligned, BLOCK_LEN, BYTE_BYTES, BlockInputs, Dot, HALF_ROWS, NIBBLE_BYTES, PANEL_ROWS, RUN_STRIDE, SCALE_BYTES,
};

/// Rows of a register tile.
const TILE_ROWS: usize = 4;
/// Up to so many rows, weights are unpacked on the way.
const FEW_ROWS: usize = 8;
/// Weight rows of a register.
const LANES: usize = 8;
/// Registers that hold a run of a half.
const HALF_REGISTERS: usize = HALF_ROWS / LANES;
/// Runs of four inputs in a block.
const NUM_RUNS: usize = BLOCK_LEN / 4;
/// Bytes of a half when each weight has a byte.
const HALF_BYTES: usize = BYTE_BYTES / 2;

/// Room for a block's weights below 16, a byte each: `[half, run, weight row, input]`.
type Nibbles = MaybeUninit<Aligned<[u8; BYTE_BYTES]>>;

/// Use intrinsics in a method of [`Avx2`], or in a function that is given one.
macro_rules! avx2 {
    ($body:expr) => {{
        // SAFETY: An `Avx2` exists only where the CPU has the features; loads and stores also rest on the
        // promise of the caller.
        unsafe { $body }
    }};
}

impl Dot for Avx2 {
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        avx2!(_mm_prefetch::<_MM_HINT_T0>(address.cast()));
    }

    #[inline(always)]
    unsafe fn add_nibbles(self, block: *const u8, x: BlockInputs, sums: *mut f32) {
        if x.num_rows <= FEW_ROWS {
            // SAFETY: The caller's promise.
            return unsafe { self.add_nibbles_to_few(block, x, sums) };
        }
        avx2!({
            let low = _mm256_set1_epi8(15);
            let mut nibbles = Nibbles::uninit();
            let unpacked = nibbles.as_mut_ptr().cast::<u8>();
            for half in 0..2 {
                for place in (0..NIBBLE_BYTES / 2).step_by(32) {
                    let both = _mm256_loadu_si256(block.add(SCALE_BYTES + half * NIBBLE_BYTES / 2 + place).cast());
                    let out = unpacked.add(half * HALF_BYTES + place);
                    _mm256_store_si256(out.cast(), _mm256_and_si256(both, low));
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low);
                    _mm256_store_si256(out.add(HALF_BYTES / 2).cast(), high);
                }
            }
            let scales = block.cast::<f16>();
            for half in 0..2 {
                let first = half * HALF_ROWS;
                let scales = [self.load_f16(scales.add(first)), self.load_f16(scales.add(first + LANES))];
                let w = unpacked.add(half * HALF_BYTES);
                let mut row = 0;
                while row < x.num_rows {
                    let (x, sums) = (x.from(row), sums.add(row * PANEL_ROWS + first));
                    row += match x.num_rows {
                        TILE_ROWS.. => self.finish(self.dots::<TILE_ROWS>(w, x.levels, 1), scales, x, sums),
                        2.. => self.finish(self.dots::<2>(w, x.levels, 1), scales, x, sums),
                        _ => self.finish(self.dots::<1>(w, x.levels, 1), scales, x, sums),
                    };
                }
            }
        });
    }

    #[inline(always)]
    unsafe fn add_bytes(self, block: *const u8, x: BlockInputs, sums: *mut i32) {
        if x.num_rows <= FEW_ROWS {
            // SAFETY: The caller's promise.
            return unsafe { self.add_bytes_to_few(block, x, sums) };
        }
        avx2!({
            let low = _mm256_set1_epi8(15);
            let mut parts = [Nibbles::uninit(); 2];
            let parts = parts.each_mut().map(|part| part.as_mut_ptr().cast::<u8>());
            for place in (0..BYTE_BYTES).step_by(32) {
                let bytes = _mm256_loadu_si256(block.add(place).cast());
                _mm256_store_si256(parts[0].add(place).cast(), _mm256_and_si256(bytes, low));
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low);
                _mm256_store_si256(parts[1].add(place).cast(), high);
            }
            for half in 0..2 {
                for (part, factor) in parts.into_iter().zip([1, 16]) {
                    let w = part.add(half * HALF_BYTES);
                    let mut row = 0;
                    while row < x.num_rows {
                        let (x, sums) = (x.from(row), sums.add(row * PANEL_ROWS + half * HALF_ROWS));
                        row += match x.num_rows {
                            TILE_ROWS.. => self.add(self.dots::<TILE_ROWS>(w, x.levels, factor), sums),
                            2.. => self.add(self.dots::<2>(w, x.levels, factor), sums),
                            _ => self.add(self.dots::<1>(w, x.levels, factor), sums),
                        };
                    }
                }
            }
        });
    }
}

impl BlockInputs {
    /// The rows from `row` on.
    ///
    /// # Safety
    /// `row` is at most `num_rows`.
    #[inline(always)]
    unsafe fn from(self, row: usize) -> BlockInputs {
        // SAFETY: The caller's promise.
        unsafe {
            BlockInputs {
                levels: self.levels.add(row * BLOCK_LEN),
                corrections: self.corrections.add(row),
                num_rows: self.num_rows - row,
            }
        }
    }
}

impl Avx2 {
    /// As [`Dot::add_nibbles`], without a buffer.
    ///
    /// # Safety
    /// As for [`Dot::add_nibbles`].
    #[inline(always)]
    unsafe fn add_nibbles_to_few(self, block: *const u8, x: BlockInputs, sums: *mut f32) {
        avx2!({
            let scales = block.cast::<f16>();
            for half in 0..2 {
                let first = half * HALF_ROWS;
                let scales = [self.load_f16(scales.add(first)), self.load_f16(scales.add(first + LANES))];
                let w = block.add(SCALE_BYTES + half * NIBBLE_BYTES / 2);
                let mut row = 0;
                while row < x.num_rows {
                    let (x, sums) = (x.from(row), sums.add(row * PANEL_ROWS + first));
                    row += match x.num_rows {
                        TILE_ROWS.. => self.finish(self.nibble_dots::<TILE_ROWS>(w, x.levels), scales, x, sums),
                        2.. => self.finish(self.nibble_dots::<2>(w, x.levels), scales, x, sums),
                        _ => self.finish(self.nibble_dots::<1>(w, x.levels), scales, x, sums),
                    };
                }
            }
        });
    }

    /// As [`Dot::add_bytes`], without a buffer.
    ///
    /// # Safety
    /// As for [`Dot::add_bytes`].
    #[inline(always)]
    unsafe fn add_bytes_to_few(self, block: *const u8, x: BlockInputs, sums: *mut i32) {
        avx2!({
            for half in 0..2 {
                let w = block.add(half * HALF_BYTES);
                let mut row = 0;
                while row < x.num_rows {
                    let (x, sums) = (x.from(row), sums.add(row * PANEL_ROWS + half * HALF_ROWS));
                    row += match x.num_rows {
                        2.. => self.add(self.byte_dots::<2>(w, x.levels), sums),
                        _ => self.add(self.byte_dots::<1>(w, x.levels), sums),
                    };
                }
            }
        });
    }

    /// `sum over k of w[n][k] * x[m][k]` for `M` rows and the weight rows of half a W4A8 block.
    ///
    /// # Safety
    /// `NIBBLE_BYTES / 2` bytes are readable at `w`, and `M` rows at `x`.
    #[inline(always)]
    unsafe fn nibble_dots<const M: usize>(self, w: *const u8, x: *const i8) -> [[__m256i; HALF_REGISTERS]; M] {
        avx2!({
            let low = _mm256_set1_epi8(15);
            let mut sums = [[_mm256_setzero_si256(); HALF_REGISTERS]; M];
            for j in 0..NUM_RUNS / 2 {
                let mut runs = [[low; HALF_REGISTERS]; 2];
                for g in 0..HALF_REGISTERS {
                    let both = _mm256_loadu_si256(w.add(j * RUN_STRIDE + g * 32).cast());
                    runs[0][g] = _mm256_and_si256(both, low);
                    runs[1][g] = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low);
                }
                for m in 0..M {
                    for part in 0..2 {
                        let inputs = self.run_of_inputs(x, m, j + part * NUM_RUNS / 2);
                        for g in 0..HALF_REGISTERS {
                            let products = _mm256_maddubs_epi16(runs[part][g], inputs);
                            sums[m][g] = _mm256_add_epi16(sums[m][g], products);
                        }
                    }
                }
                // As in `dots`.
                compiler_fence(Ordering::SeqCst);
            }
            for m in 0..M {
                for g in 0..HALF_REGISTERS {
                    sums[m][g] = _mm256_madd_epi16(sums[m][g], _mm256_set1_epi16(1));
                }
            }
            sums
        })
    }

    /// `sum over k of w[n][k] * x[m][k]` for `M` rows and the weight rows of half a W8A8 block.
    ///
    /// # Safety
    /// `HALF_BYTES` bytes are readable at `w`, and `M` rows at `x`.
    #[inline(always)]
    unsafe fn byte_dots<const M: usize>(self, w: *const u8, x: *const i8) -> [[__m256i; HALF_REGISTERS]; M] {
        avx2!({
            let low = _mm256_set1_epi8(15);
            let mut sums = [[[_mm256_setzero_si256(); 2]; HALF_REGISTERS]; M];
            for j in 0..NUM_RUNS {
                let mut parts = [[low; 2]; HALF_REGISTERS];
                for g in 0..HALF_REGISTERS {
                    let bytes = _mm256_loadu_si256(w.add(j * RUN_STRIDE + g * 32).cast());
                    parts[g] = [_mm256_and_si256(bytes, low), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low)];
                }
                for m in 0..M {
                    let inputs = self.run_of_inputs(x, m, j);
                    for g in 0..HALF_REGISTERS {
                        for part in 0..2 {
                            let products = _mm256_maddubs_epi16(parts[g][part], inputs);
                            sums[m][g][part] = _mm256_add_epi16(sums[m][g][part], products);
                        }
                    }
                }
                // As in `dots`.
                compiler_fence(Ordering::SeqCst);
            }
            let mut out = [[_mm256_setzero_si256(); HALF_REGISTERS]; M];
            for m in 0..M {
                for g in 0..HALF_REGISTERS {
                    let [low, high] = sums[m][g];
                    let low = _mm256_madd_epi16(low, _mm256_set1_epi16(1));
                    out[m][g] = _mm256_add_epi32(low, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
                }
            }
            out
        })
    }

    /// Inputs `4 * j..` of row `m`, in every lane.
    ///
    /// # Safety
    /// The row is readable at `x + m * BLOCK_LEN`.
    #[inline(always)]
    unsafe fn run_of_inputs(self, x: *const i8, m: usize, j: usize) -> __m256i {
        avx2!(_mm256_set1_epi32(x.add(m * BLOCK_LEN + 4 * j).cast::<i32>().read_unaligned()))
    }

    /// Add the scaled sums of `M` rows with half a W4A8 block; returns `M`.
    ///
    /// # Safety
    /// As for [`Dot::add_nibbles`].
    #[inline(always)]
    unsafe fn finish<const M: usize>(
        self,
        dots: [[__m256i; HALF_REGISTERS]; M],
        scales: [__m256; HALF_REGISTERS],
        x: BlockInputs,
        sums: *mut f32,
    ) -> usize {
        avx2!({
            for m in 0..M {
                let correction = _mm256_set1_epi32(*x.corrections.add(m));
                for g in 0..HALF_REGISTERS {
                    let place = sums.add(m * PANEL_ROWS + g * LANES);
                    let dot = _mm256_cvtepi32_ps(_mm256_add_epi32(dots[m][g], correction));
                    self.store_f32(place, self.mul_add(dot, scales[g], self.load_f32(place)));
                }
            }
        });
        M
    }

    /// Add the sums of `M` rows with half a W8A8 block; returns `M`.
    ///
    /// # Safety
    /// As for [`Dot::add_bytes`].
    #[inline(always)]
    unsafe fn add<const M: usize>(self, dots: [[__m256i; HALF_REGISTERS]; M], sums: *mut i32) -> usize {
        avx2!({
            for m in 0..M {
                for g in 0..HALF_REGISTERS {
                    let place = sums.add(m * PANEL_ROWS + g * LANES).cast();
                    _mm256_storeu_si256(place, _mm256_add_epi32(dots[m][g], _mm256_loadu_si256(place)));
                }
            }
        });
        M
    }

    /// `factor * sum over k of w[n][k] * x[m][k]` for `M` rows and the weight rows of a half.
    ///
    /// # Safety
    /// `HALF_BYTES` weights below 16 are readable at `w`, and `M` rows at `x`.
    #[inline(always)]
    unsafe fn dots<const M: usize>(self, w: *const u8, x: *const i8, factor: i16) -> [[__m256i; HALF_REGISTERS]; M] {
        avx2!({
            let mut sums = [[_mm256_setzero_si256(); HALF_REGISTERS]; M];
            for j in 0..NUM_RUNS {
                let mut run = [_mm256_setzero_si256(); HALF_REGISTERS];
                for g in 0..HALF_REGISTERS {
                    run[g] = _mm256_load_si256(w.add(j * RUN_STRIDE + g * 32).cast());
                }
                for m in 0..M {
                    let inputs = self.run_of_inputs(x, m, j);
                    for g in 0..HALF_REGISTERS {
                        let products = _mm256_maddubs_epi16(run[g], inputs);
                        sums[m][g] = if j == 0 { products } else { _mm256_add_epi16(sums[m][g], products) };
                    }
                }
                // Keeps the compiler from moving all loads to the front, where they would not fit into registers.
                compiler_fence(Ordering::SeqCst);
            }
            let factor = _mm256_set1_epi16(factor);
            for m in 0..M {
                for g in 0..HALF_REGISTERS {
                    sums[m][g] = _mm256_madd_epi16(sums[m][g], factor);
                }
            }
            sums
        })
    }
}
