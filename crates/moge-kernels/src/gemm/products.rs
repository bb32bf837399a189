//! The three products of training with one weight or one per expert: forward, and the gradients of input and weight.
//!
//! Each output is cut into parts, runs of rows and columns of one expert, and a part is computed by one thread, panel by
//! panel (`panel.rs`). How it is cut decides who computes a number and never how it is summed.

#[cfg(all(test, not(loom)))]
mod tests;

use std::ops::Range;

use super::panel::{
    BLOCK_ROWS, LINE_LEN, MAX_PIECE_LEN, PACK_SLACK, Packed, Strided, multiply_block, pack_rows, pack_steps,
    panel_cols, piece_len, tile_rows,
};
use crate::cpu::{Cpu, SharedMut};
use crate::elements::{Accumulate, Precision};
use crate::simd::{Aligned, Simd, SimdOp, map};

/// Most output rows of a part: each panel that is packed serves so many.
const PART_ROWS: usize = 1008;
/// Most output columns of a part: each tile that is packed serves so many.
const PART_COLS: usize = 528;
/// Parts for each thread, if they are large, so that the last ones to finish wait little.
const PARTS_PER_THREAD: usize = 4;
const LARGE_PART: usize = 128 * 256;

/// Rows that a product reads.
#[derive(Clone, Copy, Debug)]
pub struct ProductRows<'a> {
    /// `[num_rows, width]`.
    pub numbers: &'a [f32],
    /// Numbers of a row.
    pub width: usize,
    /// Which row each dispatched row is, `[num_dispatched]`; `None`: the numbers are the dispatched rows.
    pub source_rows: Option<&'a [u32]>,
}

impl<'a> ProductRows<'a> {
    /// Rows as they lie.
    pub fn new(numbers: &'a [f32], width: usize) -> ProductRows<'a> {
        ProductRows { numbers, width, source_rows: None }
    }

    /// Check that there are `num_dispatched` rows of `width`.
    fn check(self, num_dispatched: usize, width: usize) {
        assert_eq!(self.width, width, "width of the rows");
        match self.source_rows {
            None => assert_eq!(self.numbers.len(), num_dispatched * width, "{num_dispatched} rows of {width}"),
            Some(rows) => {
                assert_eq!(rows.len(), num_dispatched, "number of source rows");
                let num_rows = self.numbers.len().checked_div(width).unwrap_or(usize::MAX);
                assert!(rows.iter().all(|&row| (row as usize) < num_rows), "a source row is not below {num_rows}");
            }
        }
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &'a [f32] {
        let source = self.source_rows.map_or(row, |rows| rows[row] as usize);
        &self.numbers[source * self.width..(source + 1) * self.width]
    }
}

/// Which weight meets which rows: expert `e` has the dispatched rows `offsets[e]..offsets[e + 1]`, and its weight
/// `[rows, cols]` begins at `starts[e]` of a flat slice. A single weight is an expert that has all rows.
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<'a> {
    /// `[num_experts + 1]`, from 0, never falling.
    pub offsets: &'a [usize],
    /// `[num_experts]`.
    pub starts: &'a [usize],
    /// Output width.
    pub rows: usize,
    /// Input width.
    pub cols: usize,
}

impl ExpertWeights<'_> {
    fn num_dispatched(self) -> usize {
        self.offsets[self.starts.len()]
    }

    /// Check that a flat slice of `len` numbers holds every weight.
    fn check(self, len: usize) {
        assert_eq!(self.offsets.len(), self.starts.len() + 1, "offsets of {} experts", self.starts.len());
        assert_eq!(self.offsets[0], 0, "offsets start at 0");
        assert!(self.offsets.is_sorted(), "offsets never fall");
        let weight_len = self.rows * self.cols;
        assert!(self.starts.iter().all(|start| start + weight_len <= len), "a weight ends beyond {len}");
    }
}

/// Computes the products; holds the memory in which its threads pack pieces of the factors.
#[derive(Debug)]
pub struct TrainGemm {
    activation: Precision,
    /// One for each worker, in cache lines, so that registers do not straddle two.
    scratch: Vec<Vec<Aligned<[f32; LINE_LEN]>>>,
}

/// Lines of a worker's panels and tiles.
const PANELS_LINES: usize = (MAX_PIECE_LEN * PART_COLS + PACK_SLACK).div_ceil(LINE_LEN);
const TILES_LINES: usize = (MAX_PIECE_LEN * BLOCK_ROWS + PACK_SLACK).div_ceil(LINE_LEN);

impl TrainGemm {
    /// Products on the threads of `cpu`. With bf16 both factors are rounded to it; sums stay f32.
    pub fn new(cpu: &Cpu, activation: Precision) -> TrainGemm {
        let scratch = vec![Aligned([0.0; LINE_LEN]); PANELS_LINES + TILES_LINES];
        TrainGemm { activation, scratch: vec![scratch; cpu.num_threads()] }
    }

    /// `out[d, n] = bias[n] + sum over k of x[d, k] * w[n, k]`, with the weight `w` of the expert that row `d` belongs to.
    ///
    /// Shapes: `out` `[num_dispatched, weights.rows]`, `x` `[num_dispatched, weights.cols]`, `bias` `[weights.rows]`;
    /// `numbers` are the flat slice of the weights.
    ///
    /// # Panics
    /// If a length does not fit, offsets fall, or a row or a weight is out of bounds; the other products do the same.
    pub fn forward(
        &mut self,
        cpu: &Cpu,
        out: &mut [f32],
        x: ProductRows<'_>,
        (numbers, weights): (&[f32], ExpertWeights<'_>),
        bias: Option<&[f32]>,
    ) {
        let ExpertWeights { rows, cols, .. } = weights;
        weights.check(numbers.len());
        x.check(weights.num_dispatched(), cols);
        assert_eq!(out.len(), weights.num_dispatched() * rows, "length of out");
        assert!(bias.is_none_or(|bias| bias.len() == rows), "length of the bias");
        let out = SharedMut::new(out);
        let part = |expert: usize, m: Range<usize>, n: Range<usize>| {
            let w = &numbers[weights.starts[expert]..][..rows * cols];
            let first_row = weights.offsets[expert] + m.start;
            Part {
                left: Factor::Rows(x, first_row),
                right: Factor::Rows(ProductRows::new(w, cols), n.start),
                depth: cols,
                begin: bias.map_or(SumStart::Zero, |bias| SumStart::Row(&bias[n.clone()])),
                // SAFETY: Parts are disjoint in rows or in columns.
                out: unsafe { Block::new(&out, first_row * rows, rows, [m, n]) },
            }
        };
        self.run(cpu, &Grid::of_rows(cpu, weights, rows), &part);
    }

    /// `dx[d, k] = sum over n of dy[d, n] * w[n, k]`, or added to what is there.
    ///
    /// Shapes: `dx` `[num_dispatched, weights.cols]`, `dy` `[num_dispatched, weights.rows]`.
    pub fn backward_input(
        &mut self,
        cpu: &Cpu,
        dx: &mut [f32],
        dy: ProductRows<'_>,
        (numbers, weights): (&[f32], ExpertWeights<'_>),
        store: Accumulate,
    ) {
        let ExpertWeights { rows, cols, .. } = weights;
        weights.check(numbers.len());
        dy.check(weights.num_dispatched(), rows);
        assert_eq!(dx.len(), weights.num_dispatched() * cols, "length of dx");
        let dx = SharedMut::new(dx);
        let part = |expert: usize, m: Range<usize>, n: Range<usize>| {
            let w = &numbers[weights.starts[expert]..][..rows * cols];
            let first_row = weights.offsets[expert] + m.start;
            Part {
                left: Factor::Rows(dy, first_row),
                right: Factor::Steps(ProductRows::new(w, cols), [0, n.start]),
                depth: rows,
                begin: SumStart::of(store),
                // SAFETY: Parts are disjoint in rows or in columns.
                out: unsafe { Block::new(&dx, first_row * cols, cols, [m, n]) },
            }
        };
        self.run(cpu, &Grid::of_rows(cpu, weights, cols), &part);
    }

    /// `dw[n, k] = sum over d of dy[d, n] * x[d, k]` over the rows `d` of each expert, or added to what is there.
    ///
    /// Shapes: `dy` `[num_dispatched, weights.rows]`, `x` `[num_dispatched, weights.cols]`; `dw` is laid out as the
    /// weights, which do not overlap.
    pub fn backward_weight(
        &mut self,
        cpu: &Cpu,
        (dw, weights): (&mut [f32], ExpertWeights<'_>),
        dy: ProductRows<'_>,
        x: ProductRows<'_>,
        store: Accumulate,
    ) {
        let ExpertWeights { rows, cols, .. } = weights;
        weights.check(dw.len());
        assert!(weights.starts.windows(2).all(|pair| pair[0] + rows * cols <= pair[1]), "weights overlap");
        dy.check(weights.num_dispatched(), rows);
        x.check(weights.num_dispatched(), cols);
        let dw = SharedMut::new(dw);
        let part = |expert: usize, m: Range<usize>, n: Range<usize>| {
            let dispatched = weights.offsets[expert]..weights.offsets[expert + 1];
            Part {
                left: Factor::Steps(dy, [dispatched.start, m.start]),
                right: Factor::Steps(x, [dispatched.start, n.start]),
                depth: dispatched.len(),
                begin: SumStart::of(store),
                // SAFETY: Parts are disjoint in experts, in rows or in columns.
                out: unsafe { Block::new(&dw, weights.starts[expert] + m.start * cols, cols, [m, n]) },
            }
        };
        self.run(cpu, &Grid::of_weights(cpu, weights), &part);
    }

    /// Compute the parts of `grid`; `part(expert, rows, columns)` says what one is.
    fn run<'a>(
        &mut self,
        cpu: &Cpu,
        grid: &Grid<'_>,
        part: &(dyn Fn(usize, Range<usize>, Range<usize>) -> Part<'a> + Sync),
    ) {
        let (isa, activation) = (cpu.isa(), self.activation);
        let scratch = SharedMut::new(&mut self.scratch);
        cpu.for_each_with_worker(grid.num_parts(), |worker, index| {
            // SAFETY: A worker computes one part at a time.
            let scratch = unsafe { &mut scratch.slice(worker..worker + 1)[0] };
            let (panels, tiles) = scratch.split_at_mut(PANELS_LINES);
            let (panels, tiles) = (panels.as_mut_ptr().cast(), tiles.as_mut_ptr().cast());
            let (expert, m, n) = grid.part(index);
            isa.run(MultiplyPart { part: part(expert, m, n), activation, panels, tiles });
        });
    }
}

/// How an output is cut into parts.
struct Grid<'a> {
    /// Expert `e` has the output rows `offsets[e]..offsets[e + 1]`; `None`: each has `num_rows`.
    offsets: Option<&'a [usize]>,
    num_experts: usize,
    num_rows: usize,
    num_cols: usize,
    /// Rows of a part, at most.
    part_rows: usize,
    /// Columns of a part, at most.
    part_cols: usize,
}

impl<'a> Grid<'a> {
    /// Of an output that has dispatched rows of `num_cols`.
    fn of_rows(cpu: &Cpu, weights: ExpertWeights<'a>, num_cols: usize) -> Grid<'a> {
        let num_rows = weights.offsets.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
        Grid::new(cpu, Some(weights.offsets), weights.starts.len(), [num_rows, num_cols])
    }

    /// Of an output that is laid out as the weights.
    fn of_weights(cpu: &Cpu, weights: ExpertWeights<'_>) -> Grid<'a> {
        Grid::new(cpu, None, weights.starts.len(), [weights.rows, weights.cols])
    }

    /// The longer side is halved until parts are small enough and there are enough of them.
    fn new(cpu: &Cpu, offsets: Option<&'a [usize]>, num_experts: usize, [num_rows, num_cols]: [usize; 2]) -> Grid<'a> {
        let [tile_rows, panel_cols] = cpu.isa().run(TileSize);
        let (part_rows, part_cols) = (num_rows.max(1), num_cols.max(1));
        let mut grid = Grid { offsets, num_experts, num_rows, num_cols, part_rows, part_cols };
        loop {
            let Grid { part_rows, part_cols, .. } = grid;
            let parts_per_thread = if part_rows * part_cols >= LARGE_PART { PARTS_PER_THREAD } else { 1 };
            let is_enough = grid.num_parts() >= parts_per_thread * cpu.num_threads();
            if part_cols > PART_COLS || !is_enough && part_cols > part_rows.max(panel_cols) {
                grid.part_cols = part_cols.div_ceil(2).next_multiple_of(panel_cols);
            } else if part_rows > PART_ROWS || !is_enough && part_rows > tile_rows {
                grid.part_rows = part_rows.div_ceil(2).next_multiple_of(tile_rows);
            } else {
                return grid;
            }
        }
    }

    fn num_rows(&self, expert: usize) -> usize {
        self.offsets.map_or(self.num_rows, |offsets| offsets[expert + 1] - offsets[expert])
    }

    /// Parts of an expert.
    fn expert_parts(&self, expert: usize) -> usize {
        self.num_rows(expert).div_ceil(self.part_rows) * self.num_cols.div_ceil(self.part_cols)
    }

    fn num_parts(&self) -> usize {
        (0..self.num_experts).map(|expert| self.expert_parts(expert)).sum()
    }

    /// The expert of a part, its rows among those of the expert, and its columns.
    fn part(&self, mut index: usize) -> (usize, Range<usize>, Range<usize>) {
        let mut expert = 0;
        while index >= self.expert_parts(expert) {
            index -= self.expert_parts(expert);
            expert += 1;
        }
        let num_col_parts = self.num_cols.div_ceil(self.part_cols);
        let (row, col) = (index / num_col_parts * self.part_rows, index % num_col_parts * self.part_cols);
        let rows = row..self.num_rows(expert).min(row + self.part_rows);
        (expert, rows, col..self.num_cols.min(col + self.part_cols))
    }
}

/// Asks an ISA for the rows and columns of a register tile.
struct TileSize;

impl SimdOp for TileSize {
    type Output = [usize; 2];

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> [usize; 2] {
        [tile_rows::<S>(), panel_cols::<S>()]
    }
}

/// One part: `out[m, n] = begin + sum over k below depth of left[m, k] * right[k, n]`.
struct Part<'a> {
    left: Factor<'a>,
    right: Factor<'a>,
    depth: usize,
    begin: SumStart<'a>,
    out: Block,
}

/// A factor: the left one's members are the rows of the output, the right one's the columns.
#[derive(Clone, Copy)]
enum Factor<'a> {
    /// Member `i` is dispatched row `first + i`.
    Rows(ProductRows<'a>, usize),
    /// Step `k` is dispatched row `first_row + k`, from its column `first_col` on.
    Steps(ProductRows<'a>, [usize; 2]),
}

/// What the sums are added to.
#[derive(Clone, Copy)]
enum SumStart<'a> {
    Zero,
    /// What the output holds.
    Output,
    /// The same numbers in every row.
    Row(&'a [f32]),
}

impl SumStart<'_> {
    fn of(store: Accumulate) -> Self {
        match store {
            Accumulate::Set => SumStart::Zero,
            Accumulate::Add => SumStart::Output,
        }
    }
}

/// The numbers of a part in its output.
struct Block {
    numbers: Strided<*mut f32>,
    num_rows: usize,
    num_cols: usize,
}

impl Block {
    /// Rows `m` and columns `n` of the matrix of rows of `stride` whose row `m.start` begins at `start`.
    ///
    /// # Safety
    /// Nobody else reads or writes these numbers while the block is in use.
    unsafe fn new(out: &SharedMut<'_, f32>, start: usize, stride: usize, [m, n]: [Range<usize>; 2]) -> Block {
        let len = if m.is_empty() || n.is_empty() { 0 } else { (m.len() - 1) * stride + n.len() };
        // SAFETY: `pointer` checks the bounds; of the numbers between, only those of the block are touched.
        let start = unsafe { out.pointer(start + n.start..start + n.start + len) };
        Block { numbers: Strided { start, stride }, num_rows: m.len(), num_cols: n.len() }
    }
}

/// The body of a part, with a worker's memory for packed factors.
struct MultiplyPart<'a> {
    part: Part<'a>,
    activation: Precision,
    panels: *mut f32,
    tiles: *mut f32,
}

impl SimdOp for MultiplyPart<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Block { numbers: out, num_rows, num_cols } = self.part.out;
        let mut addend = match self.part.begin {
            SumStart::Zero => None,
            SumStart::Output => Some(Strided { start: out.start.cast_const(), stride: out.stride }),
            SumStart::Row(numbers) => Some(Strided { start: numbers.as_ptr(), stride: 0 }),
        };
        // Without a step there is still one piece, which writes what the sums are added to.
        for start in (0..self.part.depth.max(1)).step_by(piece_len::<S>()) {
            let piece = start..self.part.depth.min(start + piece_len::<S>());
            // SAFETY: The memory has room for PART_COLS columns and BLOCK_ROWS rows; the block is the part's own.
            unsafe {
                self.pack(simd, self.part.right, [0..num_cols, piece.clone()], panel_cols::<S>(), self.panels);
                let right = Packed { start: self.panels, count: num_cols, len: piece.len() };
                for row in (0..num_rows).step_by(BLOCK_ROWS) {
                    let rows = row..num_rows.min(row + BLOCK_ROWS);
                    self.pack(simd, self.part.left, [rows.clone(), piece.clone()], tile_rows::<S>(), self.tiles);
                    let left = Packed { start: self.tiles, count: rows.len(), len: piece.len() };
                    let out = Strided { start: out.start.add(row * out.stride), ..out };
                    let addend = addend.map(|a| Strided { start: a.start.add(row * a.stride), ..a });
                    multiply_block(simd, left, right, out, addend);
                }
            }
            addend = Some(Strided { start: out.start.cast_const(), stride: out.stride });
        }
    }
}

impl MultiplyPart<'_> {
    /// Pack members `members` and steps `piece` of `factor` in strips of `width` members.
    ///
    /// # Safety
    /// As for [`pack_rows`].
    #[inline(always)]
    unsafe fn pack<S: Simd>(
        &self,
        simd: S,
        factor: Factor<'_>,
        [members, piece]: [Range<usize>; 2],
        width: usize,
        out: *mut f32,
    ) {
        let len = piece.len();
        // SAFETY: The caller's promise.
        unsafe {
            match factor {
                Factor::Rows(x, first) => {
                    pack_rows(simd, |i| &x.row(first + i)[piece.clone()], members.clone(), len, width, out);
                }
                Factor::Steps(x, [first_row, first_col]) => {
                    let cols = first_col + members.start..first_col + members.end;
                    let step = |k: usize| &x.row(first_row + piece.start + k)[cols.clone()];
                    pack_steps(simd, step, members.len(), len, width, out);
                }
            }
            if self.activation == Precision::Bf16 {
                let packed = std::slice::from_raw_parts_mut(out, members.len().next_multiple_of(width) * len);
                map(
                    simd,
                    packed,
                    #[inline(always)]
                    |x| simd.round_to_bf16(x),
                );
            }
        }
    }
}
