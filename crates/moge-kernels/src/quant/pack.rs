//! Weights to packed panels and back: rounding with the least squared error.

use half::f16;

use super::{PANEL_ROWS, PackedFormat, W4_BLOCK_BYTES, W8_SCALE_BYTES};
use crate::isa::Isa;
use crate::simd::{BLOCK_LEN, BYTE_BYTES, HALF_ROWS, NIBBLE_BYTES, RUN_STRIDE, Simd, SimdOp};

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
/// A scale is chosen among candidates near that which just covers the largest weight, each improved by least squares,
/// for the least squared error: over a quant block in W4A8, over a row in W8A8.
///
/// # Panics
/// If `rows` is longer than a panel or not whole rows, if the format does not allow `cols`, or if `out` does not
/// have [`PackedFormat::panel_bytes`].
pub fn pack_panel(isa: Isa, format: PackedFormat, rows: &[f32], cols: usize, out: &mut [u8]) -> PackError {
    assert!(format.allows_cols(cols), "{format:?} of {cols} columns");
    assert!(rows.len().is_multiple_of(cols) && rows.len() <= PANEL_ROWS * cols, "{} weights", rows.len());
    assert_eq!(out.len(), format.panel_bytes(cols), "bytes of a panel");
    // Zero weights, zero scales.
    match format {
        PackedFormat::W8A8 => {
            let num_weight_bytes = out.len() - W8_SCALE_BYTES;
            out[..num_weight_bytes].fill(128);
            out[num_weight_bytes..].fill(0);
        }
        PackedFormat::W4A8 => out.chunks_exact_mut(W4_BLOCK_BYTES).for_each(|block| {
            block[..NIBBLE_BYTES].fill(0x88);
            block[NIBBLE_BYTES..].fill(0);
        }),
    }
    let errors = rows.chunks_exact(cols).enumerate().map(|(row, weights)| match format {
        PackedFormat::W8A8 => isa.run(PackBytes { weights, row, out }),
        PackedFormat::W4A8 => isa.run(PackNibbles { weights, row, out }),
    });
    errors.fold(PackError::default(), PackError::merge)
}

/// Byte of row `row`, column `col` in a W8A8 panel.
fn byte_place(row: usize, col: usize) -> usize {
    let half = row / HALF_ROWS * (BYTE_BYTES / 2);
    col / BLOCK_LEN * BYTE_BYTES + half + col % BLOCK_LEN / 4 * RUN_STRIDE + row % HALF_ROWS * 4 + col % 4
}

/// Byte of row `row`, columns `col` and `col + 16` in the nibbles of a W4A8 block; `col` is below 16.
fn nibble_place(row: usize, col: usize) -> usize {
    row / HALF_ROWS * (NIBBLE_BYTES / 2) + col / 4 * RUN_STRIDE + row % HALF_ROWS * 4 + col % 4
}

/// One row of a W8A8 panel.
struct PackBytes<'a> {
    weights: &'a [f32],
    row: usize,
    out: &'a mut [u8],
}

impl SimdOp for PackBytes<'_> {
    type Output = PackError;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> PackError {
        /// Scales tried: the largest weight at 127, and up to a tenth less range.
        const NUM_CANDIDATES: usize = 9;
        let largest = largest_finite(self.weights);
        let mut best = Fit { scale: 0.0, gain: 0.0 };
        for candidate in 0..NUM_CANDIDATES {
            let scale = largest / 127.0 * (1.0 - candidate as f32 / 80.0);
            best = best.better(fit(self.weights, scale, 127.0));
        }
        let mut error = PackError::default();
        for (block, weights) in self.weights.chunks(BLOCK_LEN).enumerate() {
            for (k, &weight) in weights.iter().enumerate() {
                let level = level(weight, inverse(best.scale), 127.0);
                error = error.merge(error_of(weight, level * best.scale));
                self.out[byte_place(self.row, block * BLOCK_LEN + k)] = (level as i32 + 128) as u8;
            }
        }
        let place = self.out.len() - W8_SCALE_BYTES + 4 * self.row;
        self.out[place..place + 4].copy_from_slice(&best.scale.to_le_bytes());
        error
    }
}

/// One row of a W4A8 panel.
struct PackNibbles<'a> {
    weights: &'a [f32],
    row: usize,
    out: &'a mut [u8],
}

impl SimdOp for PackNibbles<'_> {
    type Output = PackError;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> PackError {
        let mut error = PackError::default();
        for (weights, out) in self.weights.chunks_exact(BLOCK_LEN).zip(self.out.chunks_exact_mut(W4_BLOCK_BYTES)) {
            let scale = nibble_scale(weights);
            let inverse = inverse(scale.to_f32());
            let mut nibbles = [0u8; BLOCK_LEN];
            for (nibble, &weight) in nibbles.iter_mut().zip(weights) {
                let level = level(weight, inverse, 7.0);
                error = error.merge(error_of(weight, level * scale.to_f32()));
                *nibble = (level as i32 + 8) as u8;
            }
            for col in 0..BLOCK_LEN / 2 {
                out[nibble_place(self.row, col)] = nibbles[col] | nibbles[col + 16] << 4;
            }
            let place = NIBBLE_BYTES + 2 * self.row;
            out[place..place + 2].copy_from_slice(&scale.to_le_bytes());
        }
        error
    }
}

/// The best scale of one quant block. It may be negative: -8 is a level, 8 is not.
#[inline(always)]
fn nibble_scale(weights: &[f32]) -> f16 {
    /// Levels tried for the largest weight; in steps of an eighth, -6 to -9.
    const NUM_CANDIDATES: usize = 25;
    let largest = largest_finite(weights);
    let sign = if weights.contains(&largest) { -1.0 } else { 1.0 };
    let mut best = Fit { scale: 0.0, gain: 0.0 };
    for candidate in 0..NUM_CANDIDATES {
        let scale = sign * largest / (6.0 + candidate as f32 / 8.0);
        best = best.better(fit(weights, scale, 7.0));
    }
    let limit = f16::MAX.to_f32();
    f16::from_f32(best.scale.clamp(-limit, limit))
}

/// The largest magnitude among the finite weights.
#[inline(always)]
fn largest_finite(weights: &[f32]) -> f32 {
    weights.iter().fold(0.0, |largest: f32, w| if w.is_finite() { largest.max(w.abs()) } else { largest })
}

/// `1 / scale`, or zero for a scale of zero.
#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The level of a weight, in `-max_level - 1..=max_level` for four bits and `-max_level..` for eight; zero if the weight is not finite.
#[inline(always)]
fn level(weight: f32, inverse_scale: f32, max_level: f32) -> f32 {
    let min_level = if max_level < 8.0 { -max_level - 1.0 } else { -max_level };
    let level = (weight * inverse_scale).round_ties_even().clamp(min_level, max_level);
    if weight.is_finite() { level } else { 0.0 }
}

/// A scale and how much of the squared sum it explains.
#[derive(Clone, Copy)]
struct Fit {
    scale: f32,
    gain: f32,
}

impl Fit {
    #[inline(always)]
    fn better(self, other: Fit) -> Fit {
        if other.gain > self.gain { other } else { self }
    }
}

/// Round with `scale`; then the scale that fits these levels best, and its gain: with levels `q`, the squared error is
/// `sum(w^2) - sum(w q)^2 / sum(q^2)` at the scale `sum(w q) / sum(q^2)`.
#[inline(always)]
fn fit(weights: &[f32], scale: f32, max_level: f32) -> Fit {
    /// Sums side by side, so that the compiler can use registers.
    const LANES: usize = 16;
    let inverse = inverse(scale);
    let (mut products, mut squares) = ([0.0f32; LANES], [0.0f32; LANES]);
    let mut chunks = weights.chunks_exact(LANES);
    for chunk in &mut chunks {
        for i in 0..LANES {
            let level = level(chunk[i], inverse, max_level);
            products[i] += if chunk[i].is_finite() { chunk[i] * level } else { 0.0 };
            squares[i] += level * level;
        }
    }
    for (i, &weight) in chunks.remainder().iter().enumerate() {
        let level = level(weight, inverse, max_level);
        products[i] += if weight.is_finite() { weight * level } else { 0.0 };
        squares[i] += level * level;
    }
    let (product, square): (f32, f32) = (products.iter().sum(), squares.iter().sum());
    if square == 0.0 {
        Fit { scale: 0.0, gain: 0.0 }
    } else {
        Fit { scale: product / square, gain: product * product / square }
    }
}

#[inline(always)]
fn error_of(weight: f32, packed: f32) -> PackError {
    if !weight.is_finite() {
        return PackError { num_non_finite: 1, ..PackError::default() };
    }
    let error = weight - packed;
    PackError {
        squared_sum: f64::from(weight) * f64::from(weight),
        squared_error: f64::from(error) * f64::from(error),
        max_error: error.abs(),
        num_non_finite: 0,
    }
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
                let place = NIBBLE_BYTES + 2 * row;
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
