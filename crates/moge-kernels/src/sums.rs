//! Sums over rows and over all numbers, in an order that the shape alone sets.

use crate::cpu::Cpu;
use crate::elements::Accumulate;
use crate::simd::{Simd, SimdOp};

/// Columns that a thread should at least have: one cache line.
const MIN_COLUMNS: usize = 16;

/// Numbers of which [`sum_of_squares`] makes one partial sum.
const SQUARES_PER_PARTIAL: usize = 1 << 16;

/// `out[c] (= or +=) sum over r of x[r, c]`, the rows in order: the gradient of a bias.
///
/// Shapes: `out` `[width]`, `x` `[num_rows, width]`. The order does not depend on the ISA either.
///
/// # Panics
/// If a length does not fit.
pub fn column_sums(cpu: &Cpu, out: &mut [f32], x: &[f32], store: Accumulate) {
    let width = out.len();
    assert!(x.is_empty() || x.len().is_multiple_of(width), "{} numbers are not rows of {width}", x.len());
    let columns = columns_per_chunk(cpu, width);
    let isa = cpu.isa();
    cpu.for_each_slice(out, columns, |chunk, out| {
        if store == Accumulate::Set {
            out.fill(0.0);
        }
        isa.run(ColumnSums { out, x, width, start: chunk * columns });
    });
}

/// How many of `width` columns a thread takes: whole cache lines, so that threads rarely write to the same one.
pub(crate) fn columns_per_chunk(cpu: &Cpu, width: usize) -> usize {
    width.div_ceil(cpu.num_threads()).next_multiple_of(MIN_COLUMNS).max(MIN_COLUMNS)
}

/// Add to `out` the columns from `start` on.
struct ColumnSums<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
    width: usize,
    start: usize,
}

impl SimdOp for ColumnSums<'_> {
    type Output = ();

    /// Four rows at once, still one after another in each sum, so that the sums are loaded and stored less often.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let columns = self.start..self.start + self.out.len();
        let mut runs = self.x.chunks_exact(4 * self.width);
        for run in &mut runs {
            let row = |i: usize| &run[i * self.width..][columns.clone()];
            add_rows(self.out, row(0), row(1), row(2), row(3));
        }
        for x in runs.remainder().chunks_exact(self.width) {
            let x = &x[columns.clone()];
            for i in 0..x.len() {
                self.out[i] += x[i];
            }
        }
    }
}

/// `out = out + a + b + c + d`, in this order.
#[inline(always)]
fn add_rows(out: &mut [f32], a: &[f32], b: &[f32], c: &[f32], d: &[f32]) {
    let len = out.len();
    let (a, b, c, d) = (&a[..len], &b[..len], &c[..len], &d[..len]);
    for i in 0..len {
        out[i] = out[i] + a[i] + b[i] + c[i] + d[i];
    }
}

/// Partial sums that [`sum_of_squares`] of `len` numbers needs room for.
pub fn sum_of_squares_scratch_len(len: usize) -> usize {
    len.div_ceil(SQUARES_PER_PARTIAL)
}

/// The sum of the squares of `x`, in f64: partial sums of fixed parts of `x`, added in order. No ISA changes a bit of it.
///
/// Shapes: `scratch` at least [`sum_of_squares_scratch_len`] of `x.len()`.
///
/// # Panics
/// If `scratch` is too short.
pub fn sum_of_squares(cpu: &Cpu, x: &[f32], scratch: &mut [f64]) -> f64 {
    let partials = &mut scratch[..sum_of_squares_scratch_len(x.len())];
    let isa = cpu.isa();
    cpu.for_each_slice(partials, 1, |chunk, partial| {
        let start = chunk * SQUARES_PER_PARTIAL;
        partial[0] = isa.run(SumOfSquares(&x[start..x.len().min(start + SQUARES_PER_PARTIAL)]));
    });
    partials.iter().sum()
}

struct SumOfSquares<'a>(&'a [f32]);

impl SimdOp for SumOfSquares<'_> {
    type Output = f64;

    /// Plain loops over a run of numbers, whose sums the compiler keeps in registers.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f64 {
        const RUN: usize = 32;
        let mut sums = [0.0; RUN];
        let mut add_squares = |x: &[f32]| {
            for i in 0..x.len() {
                sums[i] += f64::from(x[i]) * f64::from(x[i]);
            }
        };
        let (runs, rest) = self.0.as_chunks::<RUN>();
        for run in runs {
            add_squares(run);
        }
        add_squares(rest);
        sums.iter().sum()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{column_sums, sum_of_squares, sum_of_squares_scratch_len};
    use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu};
    use crate::{Accumulate, Cpu, Isa};

    #[test]
    fn column_sums_match_f64_on_every_isa_and_replace_or_add() {
        for cpu in every_cpu() {
            for (num_rows, width) in [(1, 1), (3, 15), (5, 16), (4, 33), (129, 71), (0, 5)] {
                let mut numbers = Numbers::new(width as u64);
                let (x, before) = (numbers.vec(num_rows * width), numbers.vec(width));
                let sum = |column: usize| x.iter().skip(column).step_by(width).copied().map(f64::from).sum::<f64>();
                let mut out = vec![f32::NAN; width];
                column_sums(&cpu, &mut out, &x, Accumulate::Set);
                assert_close(&out, &(0..width).map(sum).collect::<Vec<_>>(), 1e-6, 2e-6);
                out.copy_from_slice(&before);
                column_sums(&cpu, &mut out, &x, Accumulate::Add);
                let expected: Vec<f64> = (0..width).map(|column| f64::from(before[column]) + sum(column)).collect();
                assert_close(&out, &expected, 1e-6, 2e-6);
            }
        }
    }

    #[test]
    fn column_sums_have_the_same_bits_at_any_number_of_threads_and_on_any_isa() {
        let (num_rows, width) = (67, 131);
        let x = Numbers::new(2).vec(num_rows * width);
        let mut expected = vec![0.0; width];
        column_sums(&Cpu::new(Isa::scalar(), 1), &mut expected, &x, Accumulate::Set);
        for (isa, num_threads) in Isa::available().flat_map(|isa| [1, 2, 5].map(|num_threads| (isa, num_threads))) {
            let mut out = vec![0.0; width];
            column_sums(&Cpu::new(isa, num_threads), &mut out, &x, Accumulate::Set);
            assert_same_bits(&out, &expected);
        }
    }

    #[test]
    fn sum_of_squares_matches_f64_and_has_the_same_bits_at_any_number_of_threads_and_on_any_isa() {
        for len in [0, 1, 31, 33, 65_535, 65_537, 200_003] {
            let x = Numbers::new(len as u64).vec(len);
            let expected: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let mut scratch = vec![f64::NAN; sum_of_squares_scratch_len(len)];
            let first = sum_of_squares(&Cpu::new(Isa::scalar(), 1), &x, &mut scratch);
            assert!((first - expected).abs() <= 1e-12 * expected, "{first} for {expected}");
            for (isa, num_threads) in Isa::available().flat_map(|isa| [1, 2, 3].map(|num_threads| (isa, num_threads))) {
                let again = sum_of_squares(&Cpu::new(isa, num_threads), &x, &mut scratch);
                assert_eq!(again.to_bits(), first.to_bits());
            }
        }
    }

    #[test]
    fn sum_of_squares_of_large_numbers_does_not_overflow_and_nan_stays() {
        for cpu in every_cpu() {
            assert_eq!(sum_of_squares(&cpu, &[1e30, 0.0], &mut [0.0]), f64::from(1e30f32) * f64::from(1e30f32));
            assert!(sum_of_squares(&cpu, &[f32::NAN, 1.0], &mut [0.0]).is_nan());
        }
    }
}
