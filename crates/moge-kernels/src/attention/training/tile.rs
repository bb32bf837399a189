//! Small matrices in scratch memory, and their causal products.

use std::ops::Range;

use super::Head;
use crate::elements::Accumulate;
use crate::simd::{Aligned, Simd, SimdOp};

/// Numbers of a cache line.
const LINE_LEN: usize = 16;

/// Rows of a register tile: with two registers of columns 12 sums, two loads and a factor fill 16 registers.
const TILE_ROWS: usize = 6;

/// A matrix in scratch memory. Numbers behind the columns of a row are unspecified, and there to be read.
#[derive(Debug)]
pub(super) struct Tile {
    lines: Vec<Aligned<[f32; LINE_LEN]>>,
    /// From one row to the next: an odd number of cache lines, so that the same column of different rows falls into
    /// different sets of the cache.
    stride: usize,
}

impl Tile {
    /// A matrix of zeros.
    pub(super) fn new(num_rows: usize, num_cols: usize) -> Tile {
        let lines_per_row = num_cols.div_ceil(LINE_LEN) | 1;
        Tile { lines: vec![Aligned([0.0; LINE_LEN]); num_rows * lines_per_row], stride: lines_per_row * LINE_LEN }
    }

    /// Make the first rows 0.
    pub(super) fn clear(&mut self, num_rows: usize) {
        self.lines[..num_rows * self.stride / LINE_LEN].fill(Aligned([0.0; LINE_LEN]));
    }

    /// All rows.
    #[inline(always)]
    pub(super) fn all(&self) -> Rows<'_> {
        // SAFETY: A line is an array and nothing else: it has the size of one, and its alignment is larger.
        let numbers = unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * LINE_LEN) };
        Rows { numbers, stride: self.stride }
    }

    /// All rows, to be changed.
    #[inline(always)]
    pub(super) fn all_mut(&mut self) -> RowsMut<'_> {
        // SAFETY: As in `all`.
        let numbers =
            unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len() * LINE_LEN) };
        RowsMut { numbers, stride: self.stride }
    }
}

/// Rows of a [`Tile`].
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    numbers: &'a [f32],
    stride: usize,
}

impl<'a> Rows<'a> {
    /// Those from `row` on.
    #[inline(always)]
    pub(super) fn from(self, row: usize) -> Rows<'a> {
        Rows { numbers: &self.numbers[row * self.stride..], stride: self.stride }
    }

    #[inline(always)]
    pub(super) fn row(self, row: usize) -> &'a [f32] {
        &self.numbers[row * self.stride..(row + 1) * self.stride]
    }
}

/// Rows of a [`Tile`], to be changed.
pub(super) struct RowsMut<'a> {
    numbers: &'a mut [f32],
    stride: usize,
}

impl<'a> RowsMut<'a> {
    /// Those from `row` on.
    #[inline(always)]
    pub(super) fn from(self, row: usize) -> RowsMut<'a> {
        RowsMut { numbers: &mut self.numbers[row * self.stride..], stride: self.stride }
    }

    #[inline(always)]
    pub(super) fn row(&mut self, row: usize) -> &mut [f32] {
        &mut self.numbers[row * self.stride..(row + 1) * self.stride]
    }
}

/// A tile of queries and a tile of keys of one piece, and which of them see each other.
///
/// The query heads of a KV head are stacked: query `i` is head `i % q_per_kv` of the tile's row `i / q_per_kv`. The rows
/// before `first_query` of the scores, `[num_keys, num_queries]`, do not see the key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Causal {
    pub(super) q_per_kv: usize,
    pub(super) num_queries: usize,
    pub(super) num_keys: usize,
    /// Positions in the piece of the first query and of the first key.
    pub(super) position: usize,
    pub(super) first_key: usize,
}

impl Causal {
    /// The first query that sees `key`.
    #[inline(always)]
    pub(super) fn first_query(self, key: usize) -> usize {
        ((self.first_key + key).saturating_sub(self.position) * self.q_per_kv).min(self.num_queries)
    }

    /// How many keys `query` sees.
    #[inline(always)]
    pub(super) fn num_keys(self, query: usize) -> usize {
        (self.position + query / self.q_per_kv + 1).saturating_sub(self.first_key).min(self.num_keys)
    }
}

/// Which product of tiles; `[keys, queries]` and so on are the shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// `[keys, head_dim]` times `[head_dim, queries]`; of queries that do not see a key some are left out.
    Scores,
    /// `[keys, queries]` times `[queries, head_dim]`.
    SumOverQueries,
    /// The transpose of `[keys, queries]` times `[keys, head_dim]`.
    SumOverKeys,
}

/// `out = a * b` or `out += a * b`, where sums leave out pairs of a query and a key that do not see each other, or add
/// their number of `a`, which must be zero.
pub(super) struct Product<'a> {
    pub(super) form: Form,
    pub(super) a: Rows<'a>,
    pub(super) b: Rows<'a>,
    pub(super) out: RowsMut<'a>,
    pub(super) store: Accumulate,
    pub(super) causal: Causal,
    pub(super) head_dim: usize,
}

impl SimdOp for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        self.check();
        let [_, _, num_cols] = self.shape();
        let num_cols = num_cols.next_multiple_of(S::LANES);
        let mut col = 0;
        while col + 2 * S::LANES <= num_cols {
            self.columns::<S, 2>(simd, col);
            col += 2 * S::LANES;
        }
        if col < num_cols {
            self.columns::<S, 1>(simd, col);
        }
    }
}

impl Product<'_> {
    /// Rows, inner dimension, columns.
    #[inline(always)]
    fn shape(&self) -> [usize; 3] {
        let Causal { num_queries, num_keys, .. } = self.causal;
        match self.form {
            Form::Scores => [num_keys, self.head_dim, num_queries],
            Form::SumOverQueries => [num_keys, num_queries, self.head_dim],
            Form::SumOverKeys => [num_queries, num_keys, self.head_dim],
        }
    }

    /// Look at the lengths on which all that follows relies.
    fn check(&self) {
        let [num_rows, inner, num_cols] = self.shape();
        let [a_rows, a_cols] = if self.form == Form::SumOverKeys { [inner, num_rows] } else { [num_rows, inner] };
        let out = Rows { numbers: self.out.numbers, stride: self.out.stride };
        for (rows, num_rows, num_cols) in
            [(self.a, a_rows, a_cols), (self.b, inner, num_cols), (out, num_rows, num_cols)]
        {
            assert!(num_rows * rows.stride <= rows.numbers.len() && num_cols <= rows.stride);
        }
    }

    /// All rows of `R` registers of columns.
    #[inline(always)]
    fn columns<S: Simd, const R: usize>(&mut self, simd: S, col: usize) {
        let [num_rows, inner, _] = self.shape();
        let mut row = 0;
        while row < num_rows {
            let rows = row..num_rows.min(row + TILE_ROWS);
            row = rows.end;
            let terms = match self.form {
                Form::Scores if self.causal.first_query(rows.start) >= col + R * S::LANES => continue,
                Form::Scores => 0..inner,
                Form::SumOverQueries => self.causal.first_query(rows.start)..inner,
                Form::SumOverKeys => 0..self.causal.num_keys(rows.end - 1),
            };
            // SAFETY: `check` looked at the lengths; rows, terms and columns are within the shape, the columns rounded
            // up to a register, which is within a row's stride.
            unsafe {
                match rows.len() {
                    1 => self.register_tile::<S, 1, R>(simd, rows.start, col, terms),
                    2 => self.register_tile::<S, 2, R>(simd, rows.start, col, terms),
                    3 => self.register_tile::<S, 3, R>(simd, rows.start, col, terms),
                    4 => self.register_tile::<S, 4, R>(simd, rows.start, col, terms),
                    5 => self.register_tile::<S, 5, R>(simd, rows.start, col, terms),
                    _ => self.register_tile::<S, TILE_ROWS, R>(simd, rows.start, col, terms),
                }
            }
        }
    }

    /// `M` rows from `row` and `R` registers from `col`, summed over `terms` of the inner dimension.
    ///
    /// # Safety
    /// All are within the tiles.
    #[inline(always)]
    unsafe fn register_tile<S: Simd, const M: usize, const R: usize>(
        &mut self,
        simd: S,
        row: usize,
        col: usize,
        terms: Range<usize>,
    ) {
        let mut sums = [[simd.splat(0.0); R]; M];
        // Where there are no terms, these may point behind the tiles, and nothing is read.
        let b = self.b.numbers.as_ptr().wrapping_add(terms.start * self.b.stride + col);
        let (a, a_stride) = (self.a.numbers.as_ptr(), self.a.stride);
        // SAFETY: The caller's promise.
        unsafe {
            if self.form == Form::SumOverKeys {
                let a = a.wrapping_add(terms.start * a_stride + row);
                add_products(simd, &mut sums, (a, 1, a_stride), (b, self.b.stride), terms.len());
            } else {
                let a = a.wrapping_add(row * a_stride + terms.start);
                add_products(simd, &mut sums, (a, a_stride, 1), (b, self.b.stride), terms.len());
            }
            let out_stride = self.out.stride;
            let out = self.out.numbers.as_mut_ptr().add(row * out_stride + col);
            for m in 0..M {
                for r in 0..R {
                    let out = out.add(m * out_stride + r * S::LANES);
                    let sum = match self.store {
                        Accumulate::Set => sums[m][r],
                        Accumulate::Add => simd.add(simd.load_f32(out), sums[m][r]),
                    };
                    simd.store_f32(out, sum);
                }
            }
        }
    }
}

/// `sums[m][r] += sum over k below num_terms of a[m, k] * b[k, r]`: `a` with its strides of `m` and `k`, `b` with that of
/// `k`, in the order of `k`.
///
/// # Safety
/// All these numbers are readable, of `b` a register each.
#[inline(always)]
unsafe fn add_products<S: Simd, const M: usize, const R: usize>(
    simd: S,
    sums: &mut [[S::Vector; R]; M],
    (a, row_stride, term_stride): (*const f32, usize, usize),
    (b, b_stride): (*const f32, usize),
    num_terms: usize,
) {
    for k in 0..num_terms {
        let mut b_lanes = [simd.splat(0.0); R];
        for r in 0..R {
            // SAFETY: The caller's promise.
            b_lanes[r] = unsafe { simd.load_f32(b.add(k * b_stride + r * S::LANES)) };
        }
        for m in 0..M {
            // SAFETY: The caller's promise.
            let factor = simd.splat(unsafe { *a.add(m * row_stride + k * term_stride) });
            for r in 0..R {
                sums[m][r] = simd.mul_add(factor, b_lanes[r], sums[m][r]);
            }
        }
    }
}

/// How many rows ahead [`PackRows`] and [`UnpackRow`] ask for numbers.
const ROWS_AHEAD: usize = 8;

/// Copy a KV head's numbers of rows to the rows of a tile, times `scale`, the heads of a row one below another.
pub(super) struct PackRows<'a> {
    pub(super) tile: &'a mut Tile,
    /// `[num_rows, row_len]`.
    pub(super) x: &'a [f32],
    pub(super) head: Head,
    pub(super) rows: Range<usize>,
    pub(super) scale: f32,
}

impl SimdOp for PackRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let head_dim = self.head.head_dim;
        let mut tile = self.tile.all_mut();
        let mut to = 0;
        for row in self.rows {
            let ahead = self.x.as_ptr().wrapping_add(self.head.numbers_of(row + ROWS_AHEAD).start);
            prefetch_run(simd, ahead, self.head.len);
            for x in self.x[self.head.numbers_of(row)].chunks_exact(head_dim) {
                for (out, x) in tile.row(to)[..head_dim].iter_mut().zip(x) {
                    *out = x * self.scale;
                }
                to += 1;
            }
        }
    }
}

/// `out[c][r] = x[r][c] * scale`.
pub(super) struct Transpose<'a> {
    pub(super) out: &'a mut Tile,
    pub(super) x: &'a Tile,
    pub(super) num_rows: usize,
    pub(super) num_cols: usize,
    pub(super) scale: f32,
}

/// Rows and columns of what [`Transpose`] turns at once.
const TURN: usize = 8;

impl SimdOp for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (mut out, x) = (self.out.all_mut(), self.x.all());
        for first_row in (0..self.num_rows).step_by(TURN) {
            let num_rows = TURN.min(self.num_rows - first_row);
            for first_col in (0..self.num_cols).step_by(TURN) {
                let mut square = [[0.0; TURN]; TURN];
                for (r, square) in square[..num_rows].iter_mut().enumerate() {
                    square.copy_from_slice(&x.row(first_row + r)[first_col..first_col + TURN]);
                }
                for c in 0..TURN.min(self.num_cols - first_col) {
                    let column: [f32; TURN] = std::array::from_fn(
                        #[inline(always)]
                        |r| square[r][c] * self.scale,
                    );
                    out.row(first_col + c)[first_row..first_row + TURN].copy_from_slice(&column);
                }
            }
        }
    }
}

/// Write or add the rows of a tile, times `scale`, to the numbers of a row and KV head, as [`PackRows`] read them.
pub(super) struct UnpackRow<'a> {
    /// The numbers.
    pub(super) out: &'a mut [f32],
    pub(super) x: Rows<'a>,
    pub(super) head: Head,
    pub(super) scale: f32,
    pub(super) store: Accumulate,
}

impl SimdOp for UnpackRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ahead = self.out.as_ptr().wrapping_add(ROWS_AHEAD * self.head.row_len);
        prefetch_run(simd, ahead, self.out.len());
        for (index, out) in self.out.chunks_exact_mut(self.head.head_dim).enumerate() {
            let x = &self.x.row(index)[..out.len()];
            for (out, x) in out.iter_mut().zip(x) {
                *out = match self.store {
                    Accumulate::Set => x * self.scale,
                    Accumulate::Add => *out + x * self.scale,
                };
            }
        }
    }
}

/// Ask for the `len` numbers at `x`, any address: runs of some hundred bytes are too short for the processor to foresee the
/// next one.
#[inline(always)]
fn prefetch_run<S: Simd>(simd: S, x: *const f32, len: usize) {
    for line in 0..=len / LINE_LEN {
        simd.prefetch(x.wrapping_add(line * LINE_LEN).cast());
    }
}
