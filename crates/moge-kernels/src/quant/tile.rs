//! The inner loops: one panel of weights times one tile of inputs.
//!
//! A block of weights is unpacked once and all rows of the tile go over it; their sums wait in L1. With one
//! row this is a stream of weights, with many it is bound by the integer products.

use super::rows::{TILE_ROWS, Tile};
use super::{PackedFormat, PackedMatrix, W4_BLOCK_BYTES, W8_SCALE_BYTES};
use crate::isa::Isa;
use crate::simd::{Aligned, BLOCK_LEN, BYTE_BYTES, BlockInputs, Dot, DotOp, PANEL_ROWS};

/// How far ahead weights are fetched: the latency of memory at the rate of one thread.
const PREFETCH_BYTES: usize = 9216;

/// Products of a tile with a panel: row of the tile, weight row. The front part that a tile has is used.
pub(super) type Products = Aligned<[[f32; PANEL_ROWS]; TILE_ROWS]>;

/// Products that nobody has computed yet.
pub(super) const NO_PRODUCTS: Products = Aligned([[0.0; PANEL_ROWS]; TILE_ROWS]);

/// `out[r][n] = x[r] . w[n]` for the rows of `x` and the weight rows of panel `panel`, scales applied.
pub(super) fn multiply_panel(isa: Isa, w: PackedMatrix<'_>, panel: usize, x: Tile<'_>, out: &mut Products) {
    let num_blocks = w.cols.div_ceil(BLOCK_LEN);
    let num_rows = x.scales.len();
    assert!(num_rows <= TILE_ROWS && x.levels.len() == num_blocks * num_rows * BLOCK_LEN);
    assert!(x.corrections.len() == num_blocks * num_rows && x.sums.len() == num_rows);
    let panel = w.panel(panel);
    match w.format {
        PackedFormat::W8A8 => isa.run_dot(MultiplyBytes { panel, x, out }),
        PackedFormat::W4A8 => isa.run_dot(MultiplyNibbles { panel, x, out }),
    }
}

/// A W4A8 panel times a tile.
struct MultiplyNibbles<'a> {
    panel: &'a [u8],
    x: Tile<'a>,
    out: &'a mut Products,
}

impl DotOp for MultiplyNibbles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dot>(self, dot: D) {
        let out = &mut self.out.0[..self.x.scales.len()];
        for out in &mut *out {
            out.fill(0.0);
        }
        for (index, block) in self.panel.chunks_exact(W4_BLOCK_BYTES).enumerate() {
            prefetch(dot, block);
            // SAFETY: The block is whole, and `out` has a row for each row of the tile.
            unsafe { dot.add_nibbles(block.as_ptr(), self.x.block(index), out.as_mut_ptr().cast()) };
        }
        for (out, &scale) in out.iter_mut().zip(self.x.scales) {
            for out in out {
                *out *= scale;
            }
        }
    }
}

/// A W8A8 panel times a tile.
struct MultiplyBytes<'a> {
    panel: &'a [u8],
    x: Tile<'a>,
    out: &'a mut Products,
}

impl DotOp for MultiplyBytes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dot>(self, dot: D) {
        let (weights, scales) = self.panel.split_at(self.panel.len() - W8_SCALE_BYTES);
        let mut sums = Aligned([[0i32; PANEL_ROWS]; TILE_ROWS]);
        let sums = &mut sums.0[..self.x.scales.len()];
        for (sums, sum) in sums.iter_mut().zip(self.x.sums) {
            // Weights are stored plus 128.
            sums.fill(-128 * sum);
        }
        for (index, block) in weights.chunks_exact(BYTE_BYTES).enumerate() {
            prefetch(dot, block);
            // SAFETY: The block is whole, and there are sums for each row of the tile.
            unsafe { dot.add_bytes(block.as_ptr(), self.x.block(index), sums.as_mut_ptr().cast()) };
        }
        let weight_scales: [f32; PANEL_ROWS] =
            std::array::from_fn(|n| f32::from_le_bytes(std::array::from_fn(|i| scales[4 * n + i])));
        for (out, (sums, scale)) in self.out.0.iter_mut().zip(sums.iter().zip(self.x.scales)) {
            for n in 0..PANEL_ROWS {
                out[n] = sums[n] as f32 * weight_scales[n] * scale;
            }
        }
    }
}

/// Ask for the block that will be needed in a while.
#[inline(always)]
fn prefetch<D: Dot>(dot: D, block: &[u8]) {
    for line in (0..block.len()).step_by(64) {
        dot.prefetch(block.as_ptr().wrapping_add(PREFETCH_BYTES + line));
    }
}

impl Tile<'_> {
    /// The inputs of one block.
    #[inline(always)]
    fn block(self, block: usize) -> BlockInputs {
        let num_rows = self.scales.len();
        BlockInputs {
            levels: self.levels[block * num_rows * BLOCK_LEN..][..num_rows * BLOCK_LEN].as_ptr(),
            corrections: self.corrections[block * num_rows..][..num_rows].as_ptr(),
            num_rows,
        }
    }
}
