//! Quantised weights and what is computed with them.
//!
//! **Packed layout**, version [`PACKED_LAYOUT_VERSION`]; `docs/formats.md` describes it for other programs. A weight
//! `[rows, cols]` is a run of panels of [`PANEL_ROWS`] rows, the last one filled up with zero rows. A panel is a run of
//! blocks of 32 columns (the last one of W8A8 filled up with zero columns); columns go in runs of four, so that a lane of
//! a register, which is a weight row, gets four columns with one load.
//!
//! - W4A8 block, 576 bytes: 32 scales, f16, one per row; then for each half of the panel (16 rows), for `j` in 0..4, for
//!   each of its rows, 4 bytes, of which byte `i` has column `4 * j + i` in its low nibble and column `16 + 4 * j + i` in
//!   its high one, both plus 8. Weight = scale * (nibble - 8).
//! - W8A8 block, 1024 bytes: for each half, for `j` in 0..8, for each of its rows, 4 bytes: columns `4 * j..`, plus 128. After
//!   the last block of a panel, 32 scales, f32, one per row. Weight = scale * (byte - 128).
//!
//! **Arithmetic.** Inputs are quantised to -127..=127 with one f32 scale per row. Products and sums inside a block (W4A8)
//! or over a whole row (W8A8) are exact integers; W4A8 adds a block's sum times its scale to an f32 sum, blocks in
//! order; the input's scale comes last. So a row's result does not depend on the rows beside it.

mod pack;
mod product;
mod rows;
#[cfg(all(test, not(loom)))]
mod tests;
mod tile;

pub use pack::{PackError, pack_int8, pack_panel};
pub use product::{ExpertsDown, PackedProduct, packed_experts_down, packed_gemm, packed_swiglu};
pub use rows::QuantizedRows;

use crate::roofline::Int8Product;
use crate::simd::{BLOCK_LEN, BYTE_BYTES, NIBBLE_BYTES, SCALE_BYTES};

/// Version of the packed layout. A file of another version is not read.
pub const PACKED_LAYOUT_VERSION: u64 = 1;

/// Weight rows of a panel.
pub const PANEL_ROWS: usize = crate::simd::PANEL_ROWS;

/// Columns that share a scale in W4A8.
pub const QUANT_BLOCK_LEN: usize = BLOCK_LEN;

/// Bytes of a W4A8 block with its scales.
const W4_BLOCK_BYTES: usize = SCALE_BYTES + NIBBLE_BYTES;
/// Bytes of the scales at the end of a W8A8 panel.
const W8_SCALE_BYTES: usize = 4 * PANEL_ROWS;

/// How a weight is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PackedFormat {
    /// Eight-bit weights, one f32 scale per weight row; eight-bit inputs.
    W8A8,
    /// Four-bit weights, one f16 scale per weight row and [`QUANT_BLOCK_LEN`] columns; eight-bit inputs.
    W4A8,
}

/// The facts of a format.
struct FormatSpec {
    name: &'static str,
    about: &'static str,
    /// Bytes of 32 rows by 32 columns, and what a panel has beside them.
    block_bytes: usize,
    tail_bytes: usize,
    max_cols: usize,
    /// What divides the number of columns.
    col_multiple: usize,
    /// The multiply-adds of its products.
    product: Int8Product,
}

impl PackedFormat {
    /// All of them.
    pub const ALL: [PackedFormat; 2] = [PackedFormat::W8A8, PackedFormat::W4A8];

    /// The one table of formats.
    const fn spec(self) -> FormatSpec {
        match self {
            PackedFormat::W8A8 => FormatSpec {
                name: "w8a8",
                about: "Eight bits, a scale for each output",
                block_bytes: BYTE_BYTES,
                tail_bytes: W8_SCALE_BYTES,
                max_cols: MAX_COLS,
                col_multiple: 1,
                product: Int8Product::I8xI8,
            },
            PackedFormat::W4A8 => FormatSpec {
                name: "w4a8",
                about: "Four bits, a scale for each output and 32 inputs",
                block_bytes: W4_BLOCK_BYTES,
                tail_bytes: 0,
                max_cols: usize::MAX,
                col_multiple: BLOCK_LEN,
                product: Int8Product::U4xI8,
            },
        }
    }

    /// Its name in files and on the command line.
    pub fn name(self) -> &'static str {
        self.spec().name
    }

    /// A description for people.
    pub fn about(self) -> &'static str {
        self.spec().about
    }

    /// The format of this name.
    pub fn from_name(name: &str) -> Option<PackedFormat> {
        PackedFormat::ALL.into_iter().find(|format| format.name() == name)
    }

    /// The multiply-adds that bound its products.
    pub fn int8_product(self) -> Int8Product {
        self.spec().product
    }

    /// True if weights of `cols` columns can be packed: W4A8 needs whole quant blocks.
    pub fn allows_cols(self, cols: usize) -> bool {
        let FormatSpec { max_cols, col_multiple, .. } = self.spec();
        (1..=max_cols).contains(&cols) && cols.is_multiple_of(col_multiple)
    }

    /// Number of blocks of 32 columns in a panel of `panel_bytes`.
    fn num_blocks(self, panel_bytes: usize) -> usize {
        let FormatSpec { block_bytes, tail_bytes, .. } = self.spec();
        (panel_bytes - tail_bytes) / block_bytes
    }

    /// Bytes of a panel of `cols` columns.
    pub fn panel_bytes(self, cols: usize) -> usize {
        let FormatSpec { block_bytes, tail_bytes, .. } = self.spec();
        cols.div_ceil(BLOCK_LEN) * block_bytes + tail_bytes
    }

    /// Panels of `rows` rows.
    pub fn num_panels(rows: usize) -> usize {
        rows.div_ceil(PANEL_ROWS)
    }

    /// Bytes of a weight `[rows, cols]`.
    pub fn weight_bytes(self, rows: usize, cols: usize) -> usize {
        PackedFormat::num_panels(rows) * self.panel_bytes(cols)
    }
}

/// Most columns of a W8A8 weight: more products of 255 * 127 could overflow an i32.
const MAX_COLS: usize = 65_536;

/// A borrowed packed weight `[rows, cols]`: output width, input width.
#[derive(Clone, Copy, Debug)]
pub struct PackedMatrix<'a> {
    bytes: &'a [u8],
    format: PackedFormat,
    rows: usize,
    cols: usize,
}

impl<'a> PackedMatrix<'a> {
    /// View `bytes`, in the packed layout, as a weight `[rows, cols]`.
    ///
    /// # Panics
    /// If the format does not allow `cols`, or the number of bytes is not [`PackedFormat::weight_bytes`].
    pub fn new(bytes: &'a [u8], format: PackedFormat, rows: usize, cols: usize) -> PackedMatrix<'a> {
        assert!(format.allows_cols(cols), "{format:?} of {cols} columns");
        assert_eq!(bytes.len(), format.weight_bytes(rows, cols), "{format:?} weight of {rows} x {cols}");
        PackedMatrix { bytes, format, rows, cols }
    }

    /// How it is quantised.
    pub fn format(self) -> PackedFormat {
        self.format
    }

    /// Number of rows: the output width.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Number of columns: the input width.
    pub fn cols(self) -> usize {
        self.cols
    }

    /// Bytes that it takes.
    pub fn num_bytes(self) -> usize {
        self.bytes.len()
    }

    /// The weights of one row, as f32.
    ///
    /// # Panics
    /// If `row` is out of bounds or `out` does not have `cols` numbers.
    pub fn dequantize_row(self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {}, {} columns", self.rows, self.cols);
        pack::unpack_row(self.panel(row / PANEL_ROWS).bytes, self.format, row % PANEL_ROWS, out);
    }

    /// One panel.
    fn panel(self, panel: usize) -> Panel<'a> {
        let len = self.format.panel_bytes(self.cols);
        Panel { format: self.format, bytes: &self.bytes[panel * len..(panel + 1) * len] }
    }

    /// Panels that there are.
    fn num_panels(self) -> usize {
        PackedFormat::num_panels(self.rows)
    }
}

/// One panel of a packed weight.
#[derive(Clone, Copy)]
struct Panel<'a> {
    format: PackedFormat,
    bytes: &'a [u8],
}
