//! One number at a time.

use half::f16;

use super::super::{Scalar, Stored};
use super::{BLOCK_LEN, BlockInputs, Dot, HALF_ROWS, PANEL_ROWS, RUN_STRIDE, SCALE_BYTES};

/// Byte of weight row `n`, run `j` of four inputs, in a block of `num_runs` runs.
#[inline(always)]
fn place(n: usize, j: usize, num_runs: usize) -> usize {
    (n / HALF_ROWS * num_runs + j) * RUN_STRIDE + n % HALF_ROWS * 4
}

impl Dot for Scalar {
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}

    #[inline(always)]
    unsafe fn add_nibbles(self, block: *const u8, x: BlockInputs, sums: *mut f32) {
        for n in 0..PANEL_ROWS {
            // SAFETY: The caller's promise.
            let scale = unsafe { block.add(2 * n).cast::<f16>().read_unaligned() }.widen();
            for row in 0..x.num_rows {
                // SAFETY: The caller's promise.
                unsafe {
                    let mut sum = *x.corrections.add(row);
                    for k in 0..BLOCK_LEN {
                        let byte = *block.add(SCALE_BYTES + place(n, k % 16 / 4, 4) + k % 4);
                        let w = if k < 16 { byte & 15 } else { byte >> 4 };
                        sum += i32::from(w) * i32::from(*x.levels.add(row * BLOCK_LEN + k));
                    }
                    *sums.add(row * PANEL_ROWS + n) += scale * sum as f32;
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn add_bytes(self, block: *const u8, x: BlockInputs, sums: *mut i32) {
        for n in 0..PANEL_ROWS {
            for row in 0..x.num_rows {
                // SAFETY: The caller's promise.
                unsafe {
                    let mut sum = 0;
                    for k in 0..BLOCK_LEN {
                        let w = *block.add(place(n, k / 4, 8) + k % 4);
                        sum += i32::from(w) * i32::from(*x.levels.add(row * BLOCK_LEN + k));
                    }
                    *sums.add(row * PANEL_ROWS + n) += sum;
                }
            }
        }
    }
}
