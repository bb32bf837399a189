//! The inner loops of products of packed factors: `out[m, n] += sum over k of left[m, k] * right[k, n]`.
//!
//! **Blocking.** The depth is cut into pieces. Of a piece the right factor is packed into panels of a register tile's width,
//! and [`BLOCK_ROWS`] rows of the left one into tiles of its height, both step by step of `k`. A panel stays in L1 while all
//! tiles of the block come by from L2. Read where they lie, rows whose distance is a multiple of a cache line would be in
//! the same bank of L1, which gives one of them per cycle.
//! A register tile of 6 x 2 registers needs 8 loads for 12 multiply-adds, one of 8 x 3, where there are 32 registers, 11
//! for 24. With 4 x 3 of 16 registers the compiler keeps a sum in memory.
//!
//! **Order of a sum.** Inside a piece the products of one sum are added one after another, then the piece is added to the
//! output. Rows, columns and threads do not enter.

use std::ops::Range;

use crate::simd::{MAX_LANES, Simd};

/// Steps of a piece at most.
pub(crate) const MAX_PIECE_LEN: usize = 256;
/// Rows of the left factor that are packed together, a multiple of every tile's: with 256 steps 240 KiB, half of an L2.
pub(crate) const BLOCK_ROWS: usize = 240;
/// Numbers that [`pack_rows`] may write past the last strip.
pub(crate) const PACK_SLACK: usize = STEPS;
/// Numbers of a cache line.
pub(crate) const LINE_LEN: usize = 16;
/// Columns of a panel at most.
const MAX_PANEL_COLS: usize = 3 * MAX_LANES;
/// Steps, and rows, that are packed at once.
const STEPS: usize = 8;

/// Columns of a panel, and of a register tile.
#[inline(always)]
pub(crate) const fn panel_cols<S: Simd>() -> usize {
    if S::LANES == 16 { 3 * S::LANES } else { 2 * S::LANES }
}

/// Rows of a register tile.
#[inline(always)]
pub(crate) const fn tile_rows<S: Simd>() -> usize {
    if S::LANES == 16 { 8 } else { 6 }
}

/// Steps of `k` that one register sums: a panel is 16 KiB then with AVX2 and 24 KiB with AVX-512, and L1 at least 32.
#[inline(always)]
pub(crate) const fn piece_len<S: Simd>() -> usize {
    if S::LANES == 16 { MAX_PIECE_LEN / 2 } else { MAX_PIECE_LEN }
}

/// Rows or columns of a packed factor: strips of [`tile_rows`] or [`panel_cols`] of them, which hold `len` steps each, one
/// after another. Those of the last strip beyond `count` are whatever the memory holds; their sums are dropped.
#[derive(Clone, Copy)]
pub(crate) struct Packed {
    pub(crate) start: *const f32,
    pub(crate) count: usize,
    pub(crate) len: usize,
}

/// Numbers of a matrix: row `m`, column `n` at `start + m * stride + n`.
#[derive(Clone, Copy)]
pub(crate) struct Strided<P> {
    pub(crate) start: P,
    pub(crate) stride: usize,
}

/// `out = addend + left * right`; no addend is zero.
///
/// # Safety
/// The factors are packed as they say, with equally many steps. All numbers of `out` are writable, those of `addend`
/// readable, and nobody else writes them.
#[inline(always)]
pub(crate) unsafe fn multiply_block<S: Simd>(
    simd: S,
    left: Packed,
    right: Packed,
    out: Strided<*mut f32>,
    addend: Option<Strided<*const f32>>,
) {
    for col in (0..right.count).step_by(panel_cols::<S>()) {
        // SAFETY: The caller's promise; panels before this one have `len` rows of its columns each.
        unsafe {
            let panel = Packed {
                start: right.start.add(col * right.len),
                count: panel_cols::<S>().min(right.count - col),
                len: right.len,
            };
            let out = Strided { start: out.start.add(col), ..out };
            let addend = addend.map(|addend| Strided { start: addend.start.add(col), ..addend });
            if S::LANES == 16 {
                match panel.count.div_ceil(S::LANES) {
                    1 => multiply_panel::<S, 8, 1>(simd, left, panel, out, addend),
                    2 => multiply_panel::<S, 8, 2>(simd, left, panel, out, addend),
                    _ => multiply_panel::<S, 8, 3>(simd, left, panel, out, addend),
                }
            } else {
                match panel.count.div_ceil(S::LANES) {
                    1 => multiply_panel::<S, 6, 1>(simd, left, panel, out, addend),
                    _ => multiply_panel::<S, 6, 2>(simd, left, panel, out, addend),
                }
            }
        }
    }
}

/// [`multiply_block`] for one panel, by tiles of `M` rows and `N` registers.
#[inline(always)]
unsafe fn multiply_panel<S: Simd, const M: usize, const N: usize>(
    simd: S,
    left: Packed,
    panel: Packed,
    out: Strided<*mut f32>,
    addend: Option<Strided<*const f32>>,
) {
    for first in (0..left.count).step_by(M) {
        let num_rows = M.min(left.count - first);
        // SAFETY: The caller's promise; tiles before this one have `len` columns of its rows each. Of the output only rows
        // below `count` and columns of the panel are touched; beyond them nothing but a prefetch is computed.
        unsafe {
            let out = Strided { start: out.start.add(first * out.stride), ..out };
            let addend = addend.map(|addend| Strided { start: addend.start.add(first * addend.stride), ..addend });
            for m in 0..M {
                simd.prefetch(out.start.wrapping_add(m * out.stride).cast());
            }
            let sums = tile::<S, M, N>(simd, left.start.add(first * left.len), panel);
            if num_rows == M && panel.count == N * S::LANES {
                store_tile(simd, sums, out, addend);
            } else {
                store_edge(simd, sums, [num_rows, panel.count], out, addend);
            }
        }
    }
}

/// Write a tile's sums plus the addend.
#[inline(always)]
unsafe fn store_tile<S: Simd, const M: usize, const N: usize>(
    simd: S,
    mut sums: [[S::Vector; N]; M],
    out: Strided<*mut f32>,
    addend: Option<Strided<*const f32>>,
) {
    // SAFETY: The caller's promise for every row and register.
    unsafe {
        if let Some(addend) = addend {
            for m in 0..M {
                for n in 0..N {
                    let numbers = simd.load_f32(addend.start.add(m * addend.stride + n * S::LANES));
                    sums[m][n] = simd.add(numbers, sums[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                simd.store_f32(out.start.add(m * out.stride + n * S::LANES), sums[m][n]);
            }
        }
    }
}

/// [`store_tile`] where only the first `num_rows` rows and `num_cols` columns count.
#[inline(always)]
unsafe fn store_edge<S: Simd, const M: usize, const N: usize>(
    simd: S,
    sums: [[S::Vector; N]; M],
    [num_rows, num_cols]: [usize; 2],
    out: Strided<*mut f32>,
    addend: Option<Strided<*const f32>>,
) {
    for m in 0..M {
        let mut row = [0.0; MAX_PANEL_COLS];
        for n in 0..N {
            simd.store(&mut row[n * S::LANES..], sums[m][n]);
        }
        let num_cols = if m < num_rows { num_cols } else { 0 };
        for (n, &sum) in row[..num_cols].iter().enumerate() {
            // SAFETY: The row and the column are among those that count.
            unsafe {
                let numbers = addend.map(|addend| *addend.start.add(m * addend.stride + n));
                *out.start.add(m * out.stride + n) = numbers.map_or(sum, |x| x + sum);
            }
        }
    }
}

/// `sum over k of left[m, k] * panel[k, n]`.
#[inline(always)]
unsafe fn tile<S: Simd, const M: usize, const N: usize>(
    simd: S,
    left: *const f32,
    panel: Packed,
) -> [[S::Vector; N]; M] {
    let mut sums = [[simd.splat(0.0); N]; M];
    // SAFETY: The steps of both.
    unsafe {
        // Two at a time, so that the loop's own instructions do not count.
        let even = panel.len / 2 * 2;
        for k in (0..even).step_by(2) {
            add_step(simd, &mut sums, left, panel.start, k);
            add_step(simd, &mut sums, left, panel.start, k + 1);
        }
        if even < panel.len {
            add_step(simd, &mut sums, left, panel.start, even);
        }
    }
    sums
}

/// Add the products of step `k` to a tile's sums.
#[inline(always)]
unsafe fn add_step<S: Simd, const M: usize, const N: usize>(
    simd: S,
    sums: &mut [[S::Vector; N]; M],
    left: *const f32,
    panel: *const f32,
    k: usize,
) {
    // SAFETY: Both hold step `k`.
    unsafe {
        let mut right = [simd.splat(0.0); N];
        for n in 0..N {
            right[n] = simd.load_f32(panel.add(k * panel_cols::<S>() + n * S::LANES));
        }
        for m in 0..M {
            let x = simd.splat(*left.add(k * M + m));
            for n in 0..N {
                sums[m][n] = simd.mul_add(x, right[n], sums[m][n]);
            }
        }
    }
}

/// Pack members `members` of a factor into strips of `width` of them; step `k` of the `i`th is number `k` of `row(i)`, and
/// all rows have `len` numbers.
///
/// # Safety
/// `members.len()` rounded up to whole strips, times `len`, and [`PACK_SLACK`] numbers are writable at `out`.
#[inline(always)]
pub(crate) unsafe fn pack_rows<'a, S: Simd>(
    simd: S,
    row: impl Fn(usize) -> &'a [f32],
    members: Range<usize>,
    len: usize,
    width: usize,
    out: *mut f32,
) {
    assert!(width <= STEPS || width.is_multiple_of(STEPS), "a strip of {width} would be written over by its last step");
    for first in members.clone().step_by(width) {
        for next in first + width..members.end.min(first + 2 * width) {
            prefetch_row(simd, row(next));
        }
        for i in (0..width).step_by(STEPS) {
            // Beyond the last member it is copied again. Where a strip is narrower than STEPS, a step is written over the
            // surplus of the one before.
            let rows: [&[f32]; STEPS] = std::array::from_fn(|j| row((first + i + j).min(members.end - 1)));
            assert!(rows.iter().all(|row| row.len() == len));
            // SAFETY: The strip is one of those that the caller promises.
            unsafe {
                let out = out.add((first - members.start) * len + i);
                let whole = len / STEPS * STEPS;
                for k in (0..whole).step_by(STEPS) {
                    simd.transpose_8x8(rows.map(|row| row.as_ptr().add(k)), out.add(k * width), width);
                }
                for k in whole..len {
                    for j in 0..STEPS.min(width) {
                        *out.add(k * width + j) = rows[j][k];
                    }
                }
            }
        }
    }
}

/// Pack `count` members of a factor into strips of `width` of them; step `k` of the `i`th is number `i` of `step(k)`.
///
/// # Safety
/// `count` rounded up to whole strips, times `len`, numbers are writable at `out`.
#[inline(always)]
pub(crate) unsafe fn pack_steps<'a, S: Simd>(
    simd: S,
    step: impl Fn(usize) -> &'a [f32],
    count: usize,
    len: usize,
    width: usize,
    out: *mut f32,
) {
    // Some steps at a time: by strips alone, each number would be in another page than the one before.
    for first in (0..len).step_by(STEPS) {
        let num_steps = STEPS.min(len - first);
        let steps: [&[f32]; STEPS] = std::array::from_fn(|j| step(first + j.min(num_steps - 1)));
        assert!(steps.iter().all(|step| step.len() == count));
        for next in first + STEPS..len.min(first + 2 * STEPS) {
            prefetch_row(simd, step(next));
        }
        for i in (0..count).step_by(width) {
            for j in 0..num_steps {
                // SAFETY: The numbers are within the step, whose length was checked, and within the strip.
                unsafe {
                    let (x, out) = (steps[j].as_ptr().add(i), out.add(i * len + (first + j) * width));
                    if i + width <= count {
                        std::ptr::copy_nonoverlapping(x, out, width);
                    } else {
                        std::ptr::copy_nonoverlapping(x, out, count - i);
                    }
                }
            }
        }
    }
}

/// Ask for all cache lines of a row, which is read soon: rows of a part do not follow one another in memory.
#[inline(always)]
fn prefetch_row<S: Simd>(simd: S, row: &[f32]) {
    for number in row.iter().step_by(LINE_LEN) {
        simd.prefetch(std::ptr::from_ref(number).cast());
    }
}
