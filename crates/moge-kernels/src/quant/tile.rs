//! The inner loops: one panel of weights times one tile of inputs.
//!
//! A block of weights is unpacked once and all rows of the tile go over it; their sums wait in L1. With one
//! row this is a stream of weights, with many it is bound by the integer products.

use std::cell::RefCell;

use super::rows::{TILE_ROWS, Tile};
use super::{PackedFormat, Panel, W4_BLOCK_BYTES};
use crate::isa::Isa;
use crate::simd::{Aligned, BLOCK_LEN, BYTE_BYTES, BlockInputs, Dot, DotOp, PANEL_ROWS};

/// How far ahead weights are fetched, in each of the panels that are read side by side.
const PREFETCH_BYTES: usize = 2 * W4_BLOCK_BYTES;

/// Products of a tile with a panel: row of the tile, weight row. The front part that a tile has is used.
pub(super) type PanelSums = Aligned<[[f32; PANEL_ROWS]; TILE_ROWS]>;

/// Call `body` with this thread's place for products, which holds any numbers: clearing it would take a thousand cycles
/// each time, and push the inputs out of L1.
pub(super) fn with_place<T>(body: impl FnOnce(&mut [PanelSums; MAX_PANELS]) -> T) -> T {
    thread_local! {
        static PLACE: RefCell<Box<[PanelSums; MAX_PANELS]>> =
            RefCell::new(Box::new([Aligned([[0.0; PANEL_ROWS]; TILE_ROWS]); MAX_PANELS]));
    }
    PLACE.with_borrow_mut(|place| body(place))
}

/// Panels that [`multiply_panels`] takes at once.
pub(super) const MAX_PANELS: usize = 4;
/// Up to so many rows, all panels are read side by side: a core reads several streams faster than one.
const FEW_ROWS: usize = 8;

/// `out[p][r][n] = x[r] . w[n]` for the rows of `x` and the weight rows of each panel, scales applied. The panels
/// are of one format, and at most [`MAX_PANELS`].
pub(super) fn multiply_panels<'a>(
    isa: Isa,
    panels: impl Iterator<Item = Panel<'a>>,
    x: Tile<'_>,
    out: &mut [PanelSums; MAX_PANELS],
) {
    let mut places = [None; MAX_PANELS];
    let num_panels = panels.zip(&mut places).map(|(panel, place)| *place = Some(panel)).count();
    let Some(first) = places[0] else { return };
    let panels = &places.map(|place| place.unwrap_or(first))[..num_panels];
    let num_rows = x.scales.len();
    assert!(num_rows <= TILE_ROWS);
    assert!(panels.iter().all(|panel| panel.format == first.format && panel.bytes.len() == first.bytes.len()));
    let num_blocks = first.format.num_blocks(first.bytes.len());
    assert!(x.levels.len() == num_blocks * num_rows * BLOCK_LEN);
    assert!(x.corrections.len() == num_blocks * num_rows && x.sums.len() == num_rows);
    let at_once = if num_rows <= FEW_ROWS { MAX_PANELS } else { 1 };
    for (panels, out) in panels.chunks(at_once).zip(out.chunks_mut(at_once)) {
        match first.format {
            PackedFormat::W8A8 => isa.run_dot(MultiplyBytes { panels, num_blocks, x, out }),
            PackedFormat::W4A8 => isa.run_dot(MultiplyNibbles { panels, num_blocks, x, out }),
        }
    }
}

/// W4A8 panels times a tile.
struct MultiplyNibbles<'a> {
    panels: &'a [Panel<'a>],
    num_blocks: usize,
    x: Tile<'a>,
    out: &'a mut [PanelSums],
}

impl DotOp for MultiplyNibbles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dot>(self, dot: D) {
        let num_rows = self.x.scales.len();
        for out in &mut *self.out {
            out.0[..num_rows].fill([0.0; PANEL_ROWS]);
        }
        for index in 0..self.num_blocks {
            let x = self.x.block(index);
            for (panel, out) in self.panels.iter().zip(&mut *self.out) {
                let block = &panel.bytes[index * W4_BLOCK_BYTES..][..W4_BLOCK_BYTES];
                prefetch(dot, block);
                // SAFETY: The block is whole, and `out` has a row for each row of the tile.
                unsafe { dot.add_nibbles(block.as_ptr(), x, out.0.as_mut_ptr().cast()) };
            }
        }
        for out in self.out {
            for (out, &scale) in out.0.iter_mut().zip(self.x.scales) {
                for out in out {
                    *out *= scale;
                }
            }
        }
    }
}

/// W8A8 panels times a tile.
struct MultiplyBytes<'a> {
    panels: &'a [Panel<'a>],
    num_blocks: usize,
    x: Tile<'a>,
    out: &'a mut [PanelSums],
}

impl DotOp for MultiplyBytes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dot>(self, dot: D) {
        let num_rows = self.x.scales.len();
        // The integer sums stand, as bits, where the products will.
        for out in &mut *self.out {
            for (out, sum) in out.0[..num_rows].iter_mut().zip(self.x.sums) {
                // Weights are stored plus 128.
                out.fill(f32::from_bits((-128 * sum) as u32));
            }
        }
        for index in 0..self.num_blocks {
            let x = self.x.block(index);
            for (panel, out) in self.panels.iter().zip(&mut *self.out) {
                let block = &panel.bytes[index * BYTE_BYTES..][..BYTE_BYTES];
                prefetch(dot, block);
                // SAFETY: The block is whole, and there are sums for each row of the tile.
                unsafe { dot.add_bytes(block.as_ptr(), x, out.0.as_mut_ptr().cast()) };
            }
        }
        for (panel, out) in self.panels.iter().zip(self.out) {
            let scales = &panel.bytes[self.num_blocks * BYTE_BYTES..];
            let weight_scales: [f32; PANEL_ROWS] =
                std::array::from_fn(|n| f32::from_le_bytes(std::array::from_fn(|i| scales[4 * n + i])));
            for (out, scale) in out.0.iter_mut().zip(self.x.scales) {
                for (out, weight_scale) in out.iter_mut().zip(&weight_scales) {
                    *out = out.to_bits() as i32 as f32 * weight_scale * scale;
                }
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
