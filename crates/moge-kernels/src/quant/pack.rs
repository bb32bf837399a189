//! Weights to packed panels and back: rounding with the least squared error.

use half::f16;

use super::{PANEL_ROWS, PackedFormat, W4_BLOCK_BYTES, W8_SCALE_BYTES};
use crate::isa::Isa;
use crate::simd::{Aligned, BLOCK_LEN, BYTE_BYTES, HALF_ROWS, NIBBLE_BYTES, RUN_STRIDE, SCALE_BYTES, Simd, SimdOp};

/// What rounding did to some weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PackError {
    /// Sum of the squared weights.
    pub squared_sum: f64,
    /// Sum of the squared differences that packing made.
    pub squared_error: f64,
    /// The largest difference.
    pub max_error: f32,
    /// Weights that are NaN or infinite; they are packed as zero.
    pub num_non_finite: usize,
}

impl PackError {
    /// The errors of both.
    pub fn merge(self, other: PackError) -> PackError {
        PackError {
            squared_sum: self.squared_sum + other.squared_sum,
            squared_error: self.squared_error + other.squared_error,
            max_error: self.max_error.max(other.max_error),
            num_non_finite: self.num_non_finite + other.num_non_finite,
        }
    }

    /// Root of the squared error over the squared weights; 0 if all weights are.
    pub fn relative(self) -> f64 {
        if self.squared_sum > 0.0 { (self.squared_error / self.squared_sum).sqrt() } else { 0.0 }
    }
}

/// Quantise up to [`PANEL_ROWS`] rows of `cols` weights into one panel, `out`. Missing rows become zero.
///
/// A scale is chosen for the least squared error among candidates near that which just covers the largest weight: over
/// a quant block in W4A8, where least squares improve each candidate, over a row in W8A8. The bytes depend on the
/// weights and on `isa`, whose sums are ordered in its own way.
///
/// # Panics
/// If `rows` is longer than a panel or not whole rows, if the format does not allow `cols`, or if `out` does not
/// have [`PackedFormat::panel_bytes`].
pub fn pack_panel(isa: Isa, format: PackedFormat, rows: &[f32], cols: usize, out: &mut [u8]) -> PackError {
    assert!(format.allows_cols(cols), "{format:?} of {cols} columns");
    assert!(rows.len().is_multiple_of(cols) && rows.len() <= PANEL_ROWS * cols, "{} weights", rows.len());
    assert_eq!(out.len(), format.panel_bytes(cols), "bytes of a panel");
    match format {
        PackedFormat::W8A8 => {
            clear_byte_panel(out);
            let rows = rows.chunks_exact(cols).enumerate();
            let errors = rows.map(|(row, weights)| isa.run(PackByteRow { weights, row, out }));
            errors.fold(PackError::default(), PackError::merge)
        }
        PackedFormat::W4A8 => isa.run(PackNibbles { rows, cols, out }),
    }
}

/// Put up to [`PANEL_ROWS`] rows of `cols` weights that are quantised already, `scales[row] * levels[row][col]`, into one
/// W8A8 panel, `out`. Nothing is rounded. Missing rows become zero.
///
/// # Panics
/// If `levels` is not a row for each of `scales`, if there are more than a panel has, if the format does not allow
/// `cols`, or if `out` does not have [`PackedFormat::panel_bytes`].
pub fn pack_int8(levels: &[i8], scales: &[f32], cols: usize, out: &mut [u8]) {
    assert!(PackedFormat::W8A8.allows_cols(cols) && scales.len() <= PANEL_ROWS, "{} x {cols}", scales.len());
    assert_eq!(levels.len(), scales.len() * cols, "levels");
    assert_eq!(out.len(), PackedFormat::W8A8.panel_bytes(cols), "bytes of a panel");
    clear_byte_panel(out);
    for (row, (levels, &scale)) in levels.chunks_exact(cols).zip(scales).enumerate() {
        for (col, &level) in levels.iter().enumerate() {
            out[byte_place(row, col)] = (i32::from(level) + 128) as u8;
        }
        put_row_scale(out, row, scale);
    }
}

/// Zero weights, zero scales.
fn clear_byte_panel(out: &mut [u8]) {
    let num_weight_bytes = out.len() - W8_SCALE_BYTES;
    out[..num_weight_bytes].fill(128);
    out[num_weight_bytes..].fill(0);
}

fn put_row_scale(out: &mut [u8], row: usize, scale: f32) {
    let place = out.len() - W8_SCALE_BYTES + 4 * row;
    out[place..place + 4].copy_from_slice(&scale.to_le_bytes());
}

/// Byte of row `row`, column `col` in a W8A8 panel.
#[inline(always)]
fn byte_place(row: usize, col: usize) -> usize {
    let half = row / HALF_ROWS * (BYTE_BYTES / 2);
    col / BLOCK_LEN * BYTE_BYTES + half + col % BLOCK_LEN / 4 * RUN_STRIDE + row % HALF_ROWS * 4 + col % 4
}

/// Byte of row `row`, columns `col` and `col + 16` in a W4A8 block; `col` is below 16.
#[inline(always)]
fn nibble_place(row: usize, col: usize) -> usize {
    SCALE_BYTES + row / HALF_ROWS * (NIBBLE_BYTES / 2) + col / 4 * RUN_STRIDE + row % HALF_ROWS * 4 + col % 4
}

/// Added to a whole number of small magnitude, it leaves that number in the low bits of the sum, in two's complement.
const TO_INTEGER: f32 = 12_582_912.0;

/// One row of a W8A8 panel that is clear.
struct PackByteRow<'a> {
    weights: &'a [f32],
    row: usize,
    out: &'a mut [u8],
}

/// Largest level of W8A8: symmetric.
const MAX_BYTE: f32 = 127.0;

impl SimdOp for PackByteRow<'_> {
    type Output = PackError;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> PackError {
        let largest = largest_magnitude(self.weights);
        if !largest.is_finite() {
            return self.without_non_finite(simd);
        }
        let scale = byte_scale(simd, self.weights, largest);
        let inverse = inverse(scale);
        let mut sums = [simd.splat(0.0); 2];
        let mut max_error = simd.splat(0.0);
        let mut levels = [0.0; BLOCK_LEN];
        for (block, weights) in self.weights.chunks(BLOCK_LEN).enumerate() {
            let mut padded = [0.0; BLOCK_LEN];
            padded[..weights.len()].copy_from_slice(weights);
            for start in (0..BLOCK_LEN).step_by(S::LANES) {
                let w = simd.load(&padded[start..]);
                let level = clamp(simd, simd.mul(w, simd.splat(inverse)), -MAX_BYTE, MAX_BYTE);
                let error = simd.mul_add(level, simd.splat(-scale), w);
                sums = [simd.mul_add(w, w, sums[0]), simd.mul_add(error, error, sums[1])];
                max_error = simd.max(max_error, simd.max(error, simd.sub(simd.splat(0.0), error)));
                simd.store(&mut levels[start..], level);
            }
            let first = byte_place(self.row, block * BLOCK_LEN);
            for run in 0..BLOCK_LEN / 4 {
                for i in 0..4 {
                    let bits = (levels[4 * run + i] + (TO_INTEGER + 128.0)).to_bits();
                    self.out[first + run * RUN_STRIDE + i] = bits as u8;
                }
            }
        }
        put_row_scale(self.out, self.row, scale);
        PackError {
            squared_sum: f64::from(simd.sum(sums[0])),
            squared_error: f64::from(simd.sum(sums[1])),
            max_error: max_lane(simd, max_error),
            num_non_finite: 0,
        }
    }
}

impl PackByteRow<'_> {
    /// Pack the row with zeros for what is not finite.
    #[cold]
    fn without_non_finite<S: Simd>(self, simd: S) -> PackError {
        let finite: Vec<f32> = self.weights.iter().map(|&w| if w.is_finite() { w } else { 0.0 }).collect();
        let num_non_finite = self.weights.iter().filter(|w| !w.is_finite()).count();
        PackError { num_non_finite, ..PackByteRow { weights: &finite, ..self }.run(simd) }
    }
}

/// The scale with the least squared error for a row whose largest magnitude is `largest`.
#[inline(always)]
fn byte_scale<S: Simd>(simd: S, weights: &[f32], largest: f32) -> f32 {
    /// Scales tried: the largest weight at 127, and up to a tenth less range.
    const NUM_CANDIDATES: usize = 9;
    /// Candidates that share a load of the weights.
    const SIDE_BY_SIDE: usize = 3;
    let candidate = |index: usize| largest / MAX_BYTE * (1.0 - index as f32 / 80.0);
    let (mut best, mut least) = (candidate(0), f32::INFINITY);
    for first in (0..NUM_CANDIDATES).step_by(SIDE_BY_SIDE) {
        let scales: [f32; SIDE_BY_SIDE] = std::array::from_fn(|i| candidate(first + i));
        let mut vectors = [(simd.splat(0.0), simd.splat(0.0)); SIDE_BY_SIDE];
        for i in 0..SIDE_BY_SIDE {
            vectors[i] = (simd.splat(inverse(scales[i])), simd.splat(-scales[i]));
        }
        let mut sums = [simd.splat(0.0); SIDE_BY_SIDE];
        for weights in weights.chunks(S::LANES) {
            let whole = weights.len() == S::LANES;
            let w = if whole { simd.load(weights) } else { simd.load_part(weights, 0.0) };
            for i in 0..SIDE_BY_SIDE {
                let level = clamp(simd, simd.mul(w, vectors[i].0), -MAX_BYTE, MAX_BYTE);
                let error = simd.mul_add(level, vectors[i].1, w);
                sums[i] = simd.mul_add(error, error, sums[i]);
            }
        }
        for i in 0..SIDE_BY_SIDE {
            let error = simd.sum(sums[i]);
            if error < least {
                (best, least) = (scales[i], error);
            }
        }
    }
    if best >= f32::MIN_POSITIVE { best } else { 0.0 }
}

/// A W4A8 panel.
struct PackNibbles<'a> {
    rows: &'a [f32],
    cols: usize,
    out: &'a mut [u8],
}

/// One number for each of the weight rows that lie side by side.
type Lanes = [f32; HALF_ROWS];

impl SimdOp for PackNibbles<'_> {
    type Output = PackError;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> PackError {
        let mut error = PackError::default();
        for (index, out) in self.out.chunks_exact_mut(W4_BLOCK_BYTES).enumerate() {
            for half in 0..PANEL_ROWS / HALF_ROWS {
                let mut columns = Aligned([[0.0; HALF_ROWS]; BLOCK_LEN]);
                let rows = self.rows.chunks_exact(self.cols).skip(half * HALF_ROWS);
                for (lane, weights) in rows.take(HALF_ROWS).enumerate() {
                    let weights = &weights[index * BLOCK_LEN..(index + 1) * BLOCK_LEN];
                    for k in 0..BLOCK_LEN {
                        columns.0[k][lane] = weights[k];
                    }
                }
                error = error.merge(pack_half_block(simd, &mut columns.0, half, out));
            }
        }
        error
    }
}

/// Pack a quant block of each of half a panel's rows, `columns[column][row]`, into `out`, the block.
#[inline(always)]
fn pack_half_block<S: Simd>(simd: S, columns: &mut [Lanes; BLOCK_LEN], half: usize, out: &mut [u8]) -> PackError {
    let num_non_finite = clear_non_finite(columns);
    let mut scales = nibble_scales(simd, columns);
    for (row, scale) in scales.iter_mut().enumerate() {
        let stored = f16::from_f32(scale.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()));
        let place = 2 * (half * HALF_ROWS + row);
        out[place..place + 2].copy_from_slice(&stored.to_le_bytes());
        *scale = stored.to_f32();
    }
    let inverses = scales.map(inverse);
    let mut levels = [[0.0; HALF_ROWS]; BLOCK_LEN];
    let mut error = PackError { num_non_finite, ..PackError::default() };
    for start in (0..HALF_ROWS).step_by(S::LANES) {
        let (scale, inverse) = (simd.load(&scales[start..]), simd.load(&inverses[start..]));
        let mut sums = [simd.splat(0.0); 2];
        let mut max_error = simd.splat(0.0);
        for k in 0..BLOCK_LEN {
            let w = simd.load(&columns[k][start..]);
            let level = nibble_level(simd, w, inverse);
            let error = simd.sub(w, simd.mul(level, scale));
            sums = [simd.mul_add(w, w, sums[0]), simd.mul_add(error, error, sums[1])];
            max_error = simd.max(max_error, simd.max(error, simd.sub(simd.splat(0.0), error)));
            simd.store(&mut levels[k][start..], level);
        }
        error.squared_sum += f64::from(simd.sum(sums[0]));
        error.squared_error += f64::from(simd.sum(sums[1]));
        error.max_error = error.max_error.max(max_lane(simd, max_error));
    }
    for k in 0..BLOCK_LEN / 2 {
        let first = nibble_place(half * HALF_ROWS, k);
        for row in 0..HALF_ROWS {
            let nibble = |level: f32| (level + (TO_INTEGER + 8.0)).to_bits() as u8 & 15;
            out[first + 4 * row] = nibble(levels[k][row]) | nibble(levels[k + BLOCK_LEN / 2][row]) << 4;
        }
    }
    error
}

/// Levels tried for the largest weight of a quant block; among equals the first is taken. Twice as many would make the
/// error of Gaussian weights 0.02 % less.
const NIBBLE_CANDIDATES: [f32; 12] = [8.0, 7.0, 7.75, 8.25, 7.5, 8.5, 7.25, 8.75, 6.75, 9.0, 6.5, 6.25];

/// The best scale of the quant block of each row. It may be negative: -8 is a level, 8 is not, so the largest weight is
/// given a negative one.
#[inline(always)]
fn nibble_scales<S: Simd>(simd: S, columns: &[Lanes; BLOCK_LEN]) -> Lanes {
    /// Candidates that share a load of the weights.
    const SIDE_BY_SIDE: usize = 4;
    let mut scales = [0.0; HALF_ROWS];
    let mut gains = [0.0; HALF_ROWS];
    let covering = covering(simd, columns);
    for candidates in NIBBLE_CANDIDATES.as_chunks::<SIDE_BY_SIDE>().0 {
        let mut products = [[0.0; HALF_ROWS]; SIDE_BY_SIDE];
        let mut squares = [[0.0; HALF_ROWS]; SIDE_BY_SIDE];
        for start in (0..HALF_ROWS).step_by(S::LANES) {
            let covering = simd.load(&covering[start..]);
            let mut inverses = [covering; SIDE_BY_SIDE];
            for i in 0..SIDE_BY_SIDE {
                inverses[i] = simd.mul(simd.splat(candidates[i]), covering);
            }
            let mut product = [simd.splat(0.0); SIDE_BY_SIDE];
            let mut square = [simd.splat(0.0); SIDE_BY_SIDE];
            for column in columns {
                let w = simd.load(&column[start..]);
                for i in 0..SIDE_BY_SIDE {
                    let level = nibble_level(simd, w, inverses[i]);
                    product[i] = simd.mul_add(level, w, product[i]);
                    square[i] = simd.mul_add(level, level, square[i]);
                }
            }
            for i in 0..SIDE_BY_SIDE {
                simd.store(&mut products[i][start..], product[i]);
                simd.store(&mut squares[i][start..], square[i]);
            }
        }
        // The scale that least squares give takes `product^2 / square` off the squared error.
        for (product, square) in products.iter().zip(&squares) {
            for row in 0..HALF_ROWS {
                let scale = product[row] / square[row];
                let gain = product[row] * scale;
                scales[row] = if gain > gains[row] { scale } else { scales[row] };
                gains[row] = if gain > gains[row] { gain } else { gains[row] };
            }
        }
    }
    scales
}

/// For each row the inverse of the scale that would make its weight of largest magnitude -1; zero if all are zero.
#[inline(always)]
fn covering<S: Simd>(simd: S, columns: &[Lanes; BLOCK_LEN]) -> Lanes {
    let (mut highest, mut lowest) = ([0.0; HALF_ROWS], [0.0; HALF_ROWS]);
    for start in (0..HALF_ROWS).step_by(S::LANES) {
        let (mut high, mut low) = (simd.splat(0.0), simd.splat(0.0));
        for column in columns {
            let w = simd.load(&column[start..]);
            (high, low) = (simd.max(high, w), simd.min(low, w));
        }
        simd.store(&mut highest[start..], high);
        simd.store(&mut lowest[start..], low);
    }
    std::array::from_fn(|row| -inverse(if highest[row] >= -lowest[row] { highest[row] } else { lowest[row] }))
}

/// The level of each weight, -8 to 7.
#[inline(always)]
fn nibble_level<S: Simd>(simd: S, w: S::Vector, inverse_scale: S::Vector) -> S::Vector {
    clamp(simd, simd.mul(w, inverse_scale), -8.0, 7.0)
}

/// The nearest whole number between two.
#[inline(always)]
fn clamp<S: Simd>(simd: S, x: S::Vector, min: f32, max: f32) -> S::Vector {
    simd.min(simd.max(simd.round(x), simd.splat(min)), simd.splat(max))
}

/// `1 / scale`; zero where that would not be finite.
#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale.abs() >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 }
}

#[inline(always)]
fn max_lane<S: Simd>(simd: S, v: S::Vector) -> f32 {
    let mut lanes = [0.0; crate::simd::MAX_LANES];
    simd.store(&mut lanes, v);
    lanes.into_iter().fold(0.0, f32::max)
}

/// The largest magnitude; not finite if one is not.
#[inline(always)]
fn largest_magnitude(weights: &[f32]) -> f32 {
    /// Maxima side by side, so that the compiler can use registers.
    const LANES: usize = 16;
    let mut largest = [0u32; LANES];
    let (chunks, rest) = weights.as_chunks::<LANES>();
    // Magnitudes compare like their bits, and NaN is the largest of all.
    for chunk in chunks {
        for i in 0..LANES {
            largest[i] = largest[i].max(chunk[i].to_bits() & 0x7fff_ffff);
        }
    }
    let rest = rest.iter().map(|w| w.to_bits() & 0x7fff_ffff);
    f32::from_bits(largest.into_iter().chain(rest).fold(0, u32::max))
}

/// Put zeros where a weight is not finite, and count them.
#[inline(always)]
fn clear_non_finite(columns: &mut [Lanes; BLOCK_LEN]) -> usize {
    if largest_magnitude(columns.as_flattened()).is_finite() {
        return 0;
    }
    let bad = columns.as_flattened_mut().iter_mut().filter(|w| !w.is_finite());
    bad.map(|w| *w = 0.0).count()
}
/// The weights of row `row` of a panel.
pub(super) fn unpack_row(panel: &[u8], format: PackedFormat, row: usize, out: &mut [f32]) {
    match format {
        PackedFormat::W8A8 => {
            let place = panel.len() - W8_SCALE_BYTES + 4 * row;
            let scale = f32::from_le_bytes(std::array::from_fn(|i| panel[place + i]));
            for (col, out) in out.iter_mut().enumerate() {
                *out = scale * (f32::from(panel[byte_place(row, col)]) - 128.0);
            }
        }
        PackedFormat::W4A8 => {
            for (block, out) in panel.chunks_exact(W4_BLOCK_BYTES).zip(out.chunks_exact_mut(BLOCK_LEN)) {
                let place = 2 * row;
                let scale = f16::from_le_bytes([block[place], block[place + 1]]).to_f32();
                for col in 0..BLOCK_LEN / 2 {
                    let byte = block[nibble_place(row, col)];
                    out[col] = scale * (f32::from(byte & 15) - 8.0);
                    out[col + 16] = scale * (f32::from(byte >> 4) - 8.0);
                }
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
