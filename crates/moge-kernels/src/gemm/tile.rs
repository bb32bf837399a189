//! The inner loops: dot products of a few input rows with a few weight rows.
//!
//! **Order of a sum.** The inner dimension is cut into pieces of [`PIECE_LEN`]. Inside a piece, lane `i` of one
//! register sums the products at `i`, `i + LANES`, ... in order, and a fixed tree sums the lanes. Pieces
//! are added in order. Neither the number of rows nor their place enters, so one row alone gives the same
//! bits as the same row among many.
//!
//! **Blocking.** A register tile of 3 x 4 sums needs 7 loads for 12 multiply-adds. Four weight rows of one piece
//! stay in the L1 cache while all input rows of a block go by; the block's piece, 48 rows of 4 KiB, stays in L2.

use std::ops::Range;

use crate::elements::{Elements, Matrix};
use crate::isa::Isa;
use crate::simd::{MAX_LANES, Simd, SimdOp, Stored};

/// Inner dimension that one register sums: 1024 f32 are 4 KiB, so 3 input and 4 weight rows fill 28 KiB of L1.
const PIECE_LEN: usize = 1024;
/// Most input rows of a block: 48 rows of one piece are 192 KiB, within a 512 KiB L2.
pub(super) const BLOCK_ROWS: usize = 48;
/// Most weight rows of a block: so often is a piece of the input used once it is in L2.
pub(super) const BLOCK_COLS: usize = 64;
/// Up to this many input rows the weights come from memory as one stream per weight row; with more, the inner
/// dimension is the outer loop, which keeps the input in L2.
const FEW_ROWS: usize = 12;

/// Input rows of a register tile.
const TILE_ROWS: usize = 3;
/// Weight rows of a register tile.
pub(crate) const TILE_COLS: usize = 4;

/// Products of one block, `[BLOCK_ROWS, BLOCK_COLS]`; the used part is its upper left corner.
pub(super) type Block = [[f32; BLOCK_COLS]; BLOCK_ROWS];

/// Rows of an input matrix, directly or by index.
#[derive(Clone, Copy)]
pub(super) struct InputRows<'a> {
    /// `[num_rows, width]`.
    pub(super) x: &'a [f32],
    pub(super) width: usize,
    /// Row of `x` for each row here; `None`: the same.
    pub(super) source_rows: Option<&'a [u32]>,
}

impl<'a> InputRows<'a> {
    #[inline(always)]
    fn row(self, row: usize) -> &'a [f32] {
        let source = self.source_rows.map_or(row, |rows| rows[row] as usize);
        &self.x[source * self.width..(source + 1) * self.width]
    }
}

/// `out[r][n] = sum over k of x[rows.start + r, k] * w[n, k]`, for at most [`BLOCK_ROWS`] rows and
/// [`BLOCK_COLS`] weight rows. Other numbers of `out` become unspecified.
pub(super) fn multiply_block(isa: Isa, x: InputRows<'_>, rows: Range<usize>, w: Matrix<'_>, out: &mut Block) {
    assert!(rows.len() <= BLOCK_ROWS && w.rows() <= BLOCK_COLS && w.cols() == x.width);
    let mut x_rows = [x.x.as_ptr(); BLOCK_ROWS];
    for (x_row, row) in x_rows.iter_mut().zip(rows.clone()) {
        *x_row = x.row(row).as_ptr();
    }
    let (x, width, num_cols) = (&x_rows[..rows.len()], x.width, w.rows());
    match w.elements() {
        Elements::F32(w) => isa.run(MultiplyBlock { x, w, width, num_cols, out }),
        Elements::F16(w) => isa.run(MultiplyBlock { x, w, width, num_cols, out }),
        Elements::Bf16(w) => isa.run(MultiplyBlock { x, w, width, num_cols, out }),
    }
}

struct MultiplyBlock<'a, W> {
    /// Where each input row begins; `width` numbers are readable there.
    x: &'a [*const f32],
    /// `[num_cols, width]`.
    w: &'a [W],
    width: usize,
    num_cols: usize,
    out: &'a mut Block,
}

impl<W: Stored> SimdOp for MultiplyBlock<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let cols_at_once = if self.x.len() <= FEW_ROWS { TILE_COLS } else { BLOCK_COLS };
        for first_col in (0..self.num_cols).step_by(cols_at_once) {
            let last_col = self.num_cols.min(first_col + cols_at_once);
            // An empty sum is a sum too: one piece of length 0.
            for start in (0..self.width.max(1)).step_by(PIECE_LEN) {
                let piece = start..self.width.min(start + PIECE_LEN);
                for col in (first_col..last_col).step_by(TILE_COLS) {
                    self.add_piece(simd, col, piece.clone());
                }
            }
        }
    }
}

impl<W: Stored> MultiplyBlock<'_, W> {
    /// Add `piece` of the inner dimension to the sums of columns `col..col + TILE_COLS`.
    #[inline(always)]
    fn add_piece<S: Simd>(&mut self, simd: S, col: usize, piece: Range<usize>) {
        let mut w = [self.w.as_ptr(); TILE_COLS];
        for (n, w) in w.iter_mut().enumerate() {
            // Past the last weight row the last one is used again; nobody reads its sums.
            let row = (col + n).min(self.num_cols - 1);
            *w = self.w[row * self.width..(row + 1) * self.width][piece.clone()].as_ptr();
        }
        let mut row = 0;
        while row < self.x.len() {
            // SAFETY: `piece` is within the width of every row, and each `w` has its length.
            row += unsafe {
                match self.x.len() - row {
                    1 => self.add_tile::<S, 1>(simd, [row, col], w, piece.clone()),
                    2 => self.add_tile::<S, 2>(simd, [row, col], w, piece.clone()),
                    _ => self.add_tile::<S, TILE_ROWS>(simd, [row, col], w, piece.clone()),
                }
            };
        }
    }

    /// Add `piece` to the sums of `M` rows and [`TILE_COLS`] columns from `[row, col]`; returns `M`.
    ///
    /// # Safety
    /// `piece` is within `width`, and its length is readable at each `w`.
    #[inline(always)]
    unsafe fn add_tile<S: Simd, const M: usize>(
        &mut self,
        simd: S,
        [row, col]: [usize; 2],
        w: [*const W; TILE_COLS],
        piece: Range<usize>,
    ) -> usize {
        // Loops over indices, here and below: in a body this large, iterators' own functions are not always inlined.
        let mut x = [self.x[row]; M];
        for m in 0..M {
            // SAFETY: `width` numbers are readable at the row.
            x[m] = unsafe { self.x[row + m].add(piece.start) };
        }
        // SAFETY: The length of the piece is readable at each pointer.
        let sums = unsafe { dot_tile(simd, x, w, piece.len()) };
        for m in 0..M {
            let out = &mut self.out[row + m];
            for n in 0..TILE_COLS {
                out[col + n] = if piece.start == 0 { sums[m][n] } else { out[col + n] + sums[m][n] };
            }
        }
        M
    }
}

/// `sum over k of x[m][k] * w[n][k]` for `M` x [`TILE_COLS`] pairs of rows.
///
/// # Safety
/// `len` numbers are readable at each pointer.
#[inline(always)]
pub(crate) unsafe fn dot_tile<S: Simd, W: Stored, const M: usize>(
    simd: S,
    x: [*const f32; M],
    w: [*const W; TILE_COLS],
    len: usize,
) -> [[f32; TILE_COLS]; M] {
    let mut sums = [[simd.splat(0.0); TILE_COLS]; M];
    let mut k = 0;
    while k + S::LANES <= len {
        // SAFETY: `LANES` numbers at `k` are within `len`.
        unsafe { add_products(simd, x, w, k, &mut sums) };
        k += S::LANES;
    }
    if k < len {
        // The rest, followed by zeros.
        let mut x_rest = [[0.0; MAX_LANES]; M];
        let mut w_rest = [[W::ZERO; MAX_LANES]; TILE_COLS];
        let (mut x_start, mut w_start) = ([x[0]; M], [w[0]; TILE_COLS]);
        for m in 0..M {
            // SAFETY: `k..len` is readable, and shorter than a register.
            unsafe { std::ptr::copy_nonoverlapping(x[m].add(k), x_rest[m].as_mut_ptr(), len - k) };
            x_start[m] = x_rest[m].as_ptr();
        }
        for n in 0..TILE_COLS {
            // SAFETY: As for `x`.
            unsafe { std::ptr::copy_nonoverlapping(w[n].add(k), w_rest[n].as_mut_ptr(), len - k) };
            w_start[n] = w_rest[n].as_ptr();
        }
        // SAFETY: Each rest is MAX_LANES long.
        unsafe { add_products(simd, x_start, w_start, 0, &mut sums) };
    }
    let mut out = [[0.0; TILE_COLS]; M];
    for m in 0..M {
        out[m] = simd.sum4(sums[m]);
    }
    out
}

/// Add the products of one register's length at `k`.
///
/// # Safety
/// `S::LANES` numbers are readable at `k` after each pointer.
#[inline(always)]
unsafe fn add_products<S: Simd, W: Stored, const M: usize>(
    simd: S,
    x: [*const f32; M],
    w: [*const W; TILE_COLS],
    k: usize,
    sums: &mut [[S::Vector; TILE_COLS]; M],
) {
    let mut x_lanes = [simd.splat(0.0); M];
    for m in 0..M {
        // SAFETY: The caller's promise.
        x_lanes[m] = unsafe { simd.load_f32(x[m].add(k)) };
    }
    for n in 0..TILE_COLS {
        // SAFETY: The caller's promise.
        let w_lanes = unsafe { W::load(simd, w[n].add(k)) };
        for m in 0..M {
            sums[m][n] = simd.mul_add(x_lanes[m], w_lanes, sums[m][n]);
        }
    }
}
