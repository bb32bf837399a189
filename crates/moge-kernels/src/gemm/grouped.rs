//! Products with one weight per expert, each over the rows that were dispatched to it.

use std::ops::Range;

use super::tile::{BLOCK_COLS, BLOCK_ROWS, Block, InputRows, TILE_COLS, multiply_block};
use crate::cpu::{Cpu, SharedMut};
use crate::elements::{Matrix, Precision};
use crate::swiglu::swiglu;

/// Parts of the work for each thread, so that the last ones to finish wait little.
const PARTS_PER_THREAD: usize = 4;

/// Dispatched rows: rows of a step, once per expert that they use, in the order of the experts.
#[derive(Clone, Copy, Debug)]
pub struct GroupedRows<'a> {
    /// Expert `e` has the dispatched rows `offsets[e]..offsets[e + 1]`, `[num_experts + 1]`, from 0, never falling.
    pub offsets: &'a [usize],
    /// Input row of each dispatched row, `[num_dispatched]`; `None`: the input has the dispatched rows themselves.
    pub source_rows: Option<&'a [u32]>,
}

impl<'a> GroupedRows<'a> {
    /// Number of dispatched rows.
    pub(crate) fn num_dispatched(self) -> usize {
        self.offsets.last().copied().unwrap_or(0)
    }

    /// Input row of dispatched row `row`.
    pub(crate) fn source_row(self, row: usize) -> usize {
        self.source_rows.map_or(row, |rows| rows[row] as usize)
    }

    /// Check that the offsets begin at 0 and never fall, and that an input of `x_len` numbers has every source row.
    pub(crate) fn check(self, x_len: usize, width: usize) {
        assert_eq!(self.offsets.first(), Some(&0), "offsets start at 0");
        assert!(self.offsets.is_sorted(), "offsets never fall");
        let num_dispatched = self.num_dispatched();
        match self.source_rows {
            None => assert_eq!(x_len, num_dispatched * width, "x of {num_dispatched} x {width}"),
            Some(source_rows) => {
                assert_eq!(source_rows.len(), num_dispatched, "number of source rows");
                let num_rows = x_len.checked_div(width).unwrap_or(usize::MAX);
                assert!(source_rows.iter().all(|&r| (r as usize) < num_rows), "a source row is not below {num_rows}");
            }
        }
    }

    /// The input rows, of `width` numbers each.
    fn input(self, x: &'a [f32], width: usize) -> InputRows<'a> {
        InputRows { x, width, source_rows: self.source_rows }
    }
}

/// `out[d, i] = silu(gate[i] . x[s]) * (up[i] . x[s])`, rounded if `activation` says so, where `silu(a) = a / (1 + exp(-a))`,
/// `[gate, up] = gate_up(e)` of the expert `e` whose dispatched rows hold `d`, and `s` is the input row of `d`.
///
/// Shapes: `out` `[num_dispatched, inter]`, `x` `[num_rows, hidden]`, gate and up `[inter, hidden]`, the same for every
/// expert. Sums as in [`super::gemm`]. `gate_up` is not asked about experts without rows.
///
/// # Panics
/// If a length does not fit, if `offsets` falls, or if a source row is out of bounds.
pub fn grouped_swiglu<'w>(
    cpu: &Cpu,
    out: &mut [f32],
    x: &[f32],
    rows: GroupedRows<'_>,
    gate_up: &(dyn Fn(usize) -> [Matrix<'w>; 2] + Sync),
    activation: Precision,
) {
    let Some(first) = first_expert(rows.offsets) else {
        return assert!(out.is_empty(), "out has {} numbers for no row", out.len());
    };
    let [gate, _] = gate_up(first);
    let (inter, hidden) = (gate.rows(), gate.cols());
    let input = rows.input(x, hidden);
    check(out.len(), input, rows.offsets, inter);
    let out = SharedMut::new(out);
    let isa = cpu.isa();
    for_each_part(cpu, rows.offsets, inter, |expert, segment, cols| {
        let [gate, up] = gate_up(expert);
        for weight in [gate, up] {
            assert_eq!((weight.rows(), weight.cols()), (inter, hidden), "gate or up of expert {expert}");
        }
        let [gate, up] = [gate, up].map(|weight| weight.slice_rows(cols.clone()));
        let (mut gate_block, mut up_block) = ([[0.0; BLOCK_COLS]; BLOCK_ROWS], [[0.0; BLOCK_COLS]; BLOCK_ROWS]);
        for block in blocks(segment) {
            multiply_block(isa, input, block.clone(), gate, &mut gate_block);
            multiply_block(isa, input, block.clone(), up, &mut up_block);
            for (row, (gate, up)) in block.zip(gate_block.iter().zip(&up_block)) {
                // SAFETY: Parts are disjoint in expert, hence in rows, or in columns.
                let out = unsafe { out.slice(row * inter + cols.start..row * inter + cols.end) };
                swiglu(isa, out, &gate[..cols.len()], &up[..cols.len()], activation);
            }
        }
    });
}

/// `out[d, n] = sum over k of x[s, k] * w[n, k]`, where `w = weight(e)` of the expert `e` whose dispatched rows hold `d`,
/// and `s` is the input row of `d`.
///
/// Shapes: `out` `[num_dispatched, n]`, `x` `[num_rows, k]`, `w` `[n, k]`, the same for every expert. Sums as in
/// [`super::gemm`]. `weight` is not asked about experts without rows.
///
/// # Panics
/// If a length does not fit, if `offsets` falls, or if a source row is out of bounds.
pub fn grouped_gemm<'w>(
    cpu: &Cpu,
    out: &mut [f32],
    x: &[f32],
    rows: GroupedRows<'_>,
    weight: &(dyn Fn(usize) -> Matrix<'w> + Sync),
) {
    let Some(first) = first_expert(rows.offsets) else {
        return assert!(out.is_empty(), "out has {} numbers for no row", out.len());
    };
    let input = rows.input(x, weight(first).cols());
    multiply(cpu, out, input, rows.offsets, weight, None);
}

/// The body of [`super::gemm`] and [`grouped_gemm`].
pub(super) fn multiply<'w>(
    cpu: &Cpu,
    out: &mut [f32],
    input: InputRows<'_>,
    offsets: &[usize],
    weight: &(dyn Fn(usize) -> Matrix<'w> + Sync),
    bias: Option<&[f32]>,
) {
    let num_cols = first_expert(offsets).map_or(0, |first| weight(first).rows());
    check(out.len(), input, offsets, num_cols);
    if let Some(bias) = bias {
        assert_eq!(bias.len(), num_cols, "length of the bias");
    }
    let out = SharedMut::new(out);
    let isa = cpu.isa();
    for_each_part(cpu, offsets, num_cols, |expert, segment, cols| {
        let w = weight(expert);
        assert_eq!((w.rows(), w.cols()), (num_cols, input.width), "weight of expert {expert}");
        let w = w.slice_rows(cols.clone());
        let mut sums = [[0.0; BLOCK_COLS]; BLOCK_ROWS];
        for block in blocks(segment) {
            multiply_block(isa, input, block.clone(), w, &mut sums);
            for (row, sums) in block.zip(&sums as &Block) {
                // SAFETY: Parts are disjoint in expert, hence in rows, or in columns.
                let out = unsafe { out.slice(row * num_cols + cols.start..row * num_cols + cols.end) };
                match bias {
                    Some(bias) => {
                        for (out, (bias, sum)) in out.iter_mut().zip(bias[cols.clone()].iter().zip(sums)) {
                            *out = bias + sum;
                        }
                    }
                    None => out.copy_from_slice(&sums[..cols.len()]),
                }
            }
        }
    });
}

/// The first expert that has rows.
fn first_expert(offsets: &[usize]) -> Option<usize> {
    offsets.windows(2).position(|pair| pair[0] != pair[1])
}

/// Check what a product is given: `out_len` numbers, in rows of `num_cols`.
fn check(out_len: usize, input: InputRows<'_>, offsets: &[usize], num_cols: usize) {
    assert_eq!(offsets.first(), Some(&0), "offsets start at 0");
    assert!(offsets.is_sorted(), "offsets never fall");
    let num_dispatched = offsets[offsets.len() - 1];
    assert_eq!(out_len, num_dispatched * num_cols, "out of {num_dispatched} x {num_cols}");
    match input.source_rows {
        None => assert_eq!(input.x.len(), num_dispatched * input.width, "x of {num_dispatched} x {}", input.width),
        Some(source_rows) => {
            assert_eq!(source_rows.len(), num_dispatched, "number of source rows");
            let num_rows = input.x.len().checked_div(input.width).unwrap_or(usize::MAX);
            assert!(source_rows.iter().all(|&row| (row as usize) < num_rows), "a source row is not below {num_rows}");
        }
    }
}

/// Call `body(expert, dispatched rows, output columns)` for every expert that has rows and every run of its columns.
/// Runs are short enough to keep all threads busy, and at most [`BLOCK_COLS`] long.
fn for_each_part(
    cpu: &Cpu,
    offsets: &[usize],
    num_cols: usize,
    body: impl Fn(usize, Range<usize>, Range<usize>) + Sync,
) {
    let with_rows = || offsets.windows(2).enumerate().filter(|(_, pair)| pair[0] != pair[1]);
    let num_experts = with_rows().count();
    let wanted_cols = (num_experts * num_cols).div_ceil(PARTS_PER_THREAD * cpu.num_threads());
    let part_cols = wanted_cols.next_multiple_of(TILE_COLS).clamp(2 * TILE_COLS, BLOCK_COLS);
    let parts_per_expert = num_cols.div_ceil(part_cols);
    cpu.for_each(num_experts * parts_per_expert, |chunk| {
        let (nth, part) = (chunk / parts_per_expert, chunk % parts_per_expert);
        if let Some((expert, pair)) = with_rows().nth(nth) {
            let first_col = part * part_cols;
            body(expert, pair[0]..pair[1], first_col..num_cols.min(first_col + part_cols));
        }
    });
}

/// `rows` in runs of at most [`BLOCK_ROWS`].
fn blocks(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    rows.clone().step_by(BLOCK_ROWS).map(move |start| start..rows.end.min(start + BLOCK_ROWS))
}
