//! Inputs quantised to eight bits, in the order in which a product reads them.

use std::ops::Range;

use crate::cpu::{Cpu, SharedMut};
use crate::gemm::GroupedRows;
use crate::norm::{RmsNormParams, rms_norm_row};
use crate::simd::{BLOCK_LEN, Simd, SimdOp};

/// Most rows of a tile: they share a block of weights while it is in registers, and their sums for one panel, 8 KiB, stay
/// in L1.
pub(super) const TILE_ROWS: usize = 64;

/// Rows that a thread quantises at a time: some microseconds of work.
const CHUNK_ROWS: usize = 8;

/// Largest level: the range is symmetric.
const MAX_LEVEL: f32 = 127.0;

/// Rows of inputs, each quantised to -127..=127 with a scale of its own: `x = scale * level`, to the nearest level, ties
/// to even, where the largest magnitude of a row is level 127.
///
/// Rows are grouped by expert and cut into tiles. A tile's numbers are ordered by block of 32 columns, then by row, so
/// that a product walks through them once.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    width: usize,
    /// Ends of the experts' rows, as in [`GroupedRows::offsets`].
    offsets: Vec<usize>,
    /// Never shorter than before, as `corrections`: what grows is cleared first.
    levels: Vec<i8>,
    /// `-8 * sum of the levels` of each block and row of a tile: what four-bit weights, stored plus 8, need.
    corrections: Vec<i32>,
    /// `[num_rows]`.
    scales: Vec<f32>,
    /// Sum of a row's levels, `[num_rows]`.
    sums: Vec<i32>,
}

/// One tile, borrowed.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    /// `[num_blocks, num_rows, BLOCK_LEN]`.
    pub(super) levels: &'a [i8],
    /// `[num_blocks, num_rows]`.
    pub(super) corrections: &'a [i32],
    /// `[num_rows]`.
    pub(super) scales: &'a [f32],
    /// `[num_rows]`.
    pub(super) sums: &'a [i32],
}

impl QuantizedRows {
    /// Room for `max_rows` rows of up to `max_width` numbers, of up to `max_experts` experts.
    pub fn with_capacity(max_rows: usize, max_width: usize, max_experts: usize) -> QuantizedRows {
        let num_blocks = max_width.div_ceil(BLOCK_LEN);
        QuantizedRows {
            width: 0,
            offsets: Vec::with_capacity(max_experts + 1),
            levels: Vec::with_capacity(max_rows * num_blocks * BLOCK_LEN),
            corrections: Vec::with_capacity(max_rows * num_blocks),
            scales: Vec::with_capacity(max_rows),
            sums: Vec::with_capacity(max_rows),
        }
    }

    /// Bytes that [`QuantizedRows::with_capacity`] reserves, small lists left out.
    pub fn capacity_bytes(max_rows: usize, max_width: usize) -> usize {
        max_rows * (max_width.div_ceil(BLOCK_LEN) * (BLOCK_LEN + 4) + 8)
    }

    /// Quantise rows of `x`, `[.., width]`: row `d` is the input row of the dispatched row `d`.
    ///
    /// A row that holds a NaN or an infinity gets a scale of NaN, so that its products are NaN.
    ///
    /// # Panics
    /// If a length does not fit, if `offsets` falls, or if a source row is out of bounds.
    pub fn quantize(&mut self, cpu: &Cpu, x: &[f32], width: usize, rows: GroupedRows<'_>) {
        rows.check(x.len(), width);
        self.quantize_each(cpu, width, rows.offsets, |row| {
            let source = rows.source_row(row);
            &x[source * width..(source + 1) * width]
        });
    }

    /// [`crate::rms_norm`] of rows of `x` into `out`, and their quantisation, while each row is in a cache.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn quantize_normed(&mut self, cpu: &Cpu, out: &mut [f32], x: &[f32], norm: RmsNormParams<'_>) {
        assert_eq!(out.len(), x.len(), "out and x");
        let width = norm.weight.len();
        let num_rows = x.len() / width;
        assert_eq!(x.len(), num_rows * width, "x in rows of {width}");
        let out = SharedMut::new(out);
        let isa = cpu.isa();
        self.quantize_each(cpu, width, &[0, num_rows], |row| {
            let numbers = row * width..(row + 1) * width;
            // SAFETY: Each row is asked for once.
            let out = unsafe { out.slice(numbers.clone()) };
            rms_norm_row(isa, out, &x[numbers], norm);
            out
        });
    }

    /// Quantise `row_of(d)`, `[width]`, for every dispatched row `d`; each is asked for once, on any thread.
    fn quantize_each<'x>(
        &mut self,
        cpu: &Cpu,
        width: usize,
        offsets: &[usize],
        row_of: impl Fn(usize) -> &'x [f32] + Sync,
    ) {
        let num_rows = offsets.last().copied().unwrap_or(0);
        let num_blocks = width.div_ceil(BLOCK_LEN);
        self.width = width;
        self.offsets.clear();
        self.offsets.extend_from_slice(offsets);
        self.levels.resize(self.levels.len().max(num_rows * num_blocks * BLOCK_LEN), 0);
        self.corrections.resize(self.corrections.len().max(num_rows * num_blocks), 0);
        self.scales.resize(num_rows, 0.0);
        self.sums.resize(num_rows, 0);
        let levels = SharedMut::new(&mut self.levels);
        let corrections = SharedMut::new(&mut self.corrections);
        let scales = SharedMut::new(&mut self.scales);
        let sums = SharedMut::new(&mut self.sums);
        let isa = cpu.isa();
        let tiles = || offsets.windows(2).flat_map(|pair| tiles(pair[0]..pair[1]));
        let num_tiles = tiles().count();
        let runs_per_tile = num_rows.div_ceil(num_tiles.max(1)).div_ceil(CHUNK_ROWS);
        cpu.for_each(num_tiles * runs_per_tile, |chunk| {
            let Some(tile) = tiles().nth(chunk / runs_per_tile) else { return };
            for place in split(tile.len(), runs_per_tile, chunk % runs_per_tile) {
                let row = tile.start + place;
                let mut sum = 0;
                let put = |block: usize, block_levels: &[i8; BLOCK_LEN]| {
                    let place = tile.start * num_blocks + block * tile.len() + place;
                    let block_sum: i32 = block_levels.iter().map(|&level| i32::from(level)).sum();
                    sum += block_sum;
                    // SAFETY: Each row is in one chunk, and its blocks are disjoint from those of other rows.
                    unsafe {
                        levels.slice(place * BLOCK_LEN..(place + 1) * BLOCK_LEN).copy_from_slice(block_levels);
                        corrections.slice(place..place + 1)[0] = -8 * block_sum;
                    }
                };
                let scale = isa.run(QuantizeRow { x: row_of(row), put });
                // SAFETY: Each row is in one chunk.
                unsafe {
                    scales.slice(row..row + 1)[0] = scale;
                    sums.slice(row..row + 1)[0] = sum;
                }
            }
        });
    }

    /// Numbers of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows, over all experts.
    pub fn num_rows(&self) -> usize {
        self.scales.len()
    }

    /// Ends of the experts' rows, as in [`GroupedRows::offsets`].
    pub(super) fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// The tile with rows `rows`: one of [`tiles`] of an expert's rows.
    pub(super) fn tile(&self, rows: Range<usize>) -> Tile<'_> {
        let num_blocks = self.width.div_ceil(BLOCK_LEN);
        let blocks = rows.start * num_blocks..rows.end * num_blocks;
        Tile {
            levels: &self.levels[blocks.start * BLOCK_LEN..blocks.end * BLOCK_LEN],
            corrections: &self.corrections[blocks],
            scales: &self.scales[rows.clone()],
            sums: &self.sums[rows],
        }
    }
}

/// The rows of one expert in as few tiles as they need, of sizes as even as possible.
pub(super) fn tiles(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let num_tiles = rows.len().div_ceil(TILE_ROWS);
    (0..num_tiles).map(move |tile| {
        let part = split(rows.len(), num_tiles, tile);
        rows.start + part.start..rows.start + part.end
    })
}

/// Part `part` of `num_parts` even parts of `0..len`.
fn split(len: usize, num_parts: usize, part: usize) -> Range<usize> {
    len * part / num_parts..len * (part + 1) / num_parts
}

/// Quantise a row; `put(block, levels)` takes each block. Returns the scale.
struct QuantizeRow<'a, P> {
    x: &'a [f32],
    put: P,
}

impl<P: FnMut(usize, &[i8; BLOCK_LEN])> SimdOp for QuantizeRow<'_, P> {
    type Output = f32;

    /// Plain loops, which the compiler vectorises.
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) -> f32 {
        /// Maxima side by side, so that the compiler can use registers.
        const LANES: usize = 16;
        let mut largest = [0u32; LANES];
        let mut chunks = self.x.chunks_exact(LANES);
        // Magnitudes compare like their bits, and NaN is the largest of all.
        for chunk in &mut chunks {
            for i in 0..LANES {
                largest[i] = largest[i].max(chunk[i].to_bits() & 0x7fff_ffff);
            }
        }
        for (largest, x) in largest.iter_mut().zip(chunks.remainder()) {
            *largest = (*largest).max(x.to_bits() & 0x7fff_ffff);
        }
        let largest = f32::from_bits(largest.into_iter().fold(0, u32::max));
        let scale = if largest.is_finite() { largest / MAX_LEVEL } else { f32::NAN };
        // Below the smallest normal number its inverse would be infinite: such a row is zero.
        let inverse = if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
        if inverse == 0.0 {
            (0..self.x.len().div_ceil(BLOCK_LEN)).for_each(|block| (self.put)(block, &[0; BLOCK_LEN]));
            return scale;
        }
        for (block, x) in self.x.chunks(BLOCK_LEN).enumerate() {
            let mut levels = [0i8; BLOCK_LEN];
            if x.len() == BLOCK_LEN {
                for i in 0..BLOCK_LEN {
                    levels[i] = level(x[i], inverse);
                }
            } else {
                for (level_at, &x) in levels.iter_mut().zip(x) {
                    *level_at = level(x, inverse);
                }
            }
            (self.put)(block, &levels);
        }
        scale
    }
}

/// The nearest level, ties to even: adding 1.5 * 2^23 leaves it in the low bits of the sum.
#[inline(always)]
fn level(x: f32, inverse_scale: f32) -> i8 {
    const SHIFT: f32 = 12_582_912.0;
    let scaled = (x * inverse_scale).clamp(-MAX_LEVEL, MAX_LEVEL);
    ((scaled + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32) as i8
}
