use std::ops::Range;

use super::{ExpertWeights, Grid, ProductRows, TrainGemm};
use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu};
use crate::{Accumulate, Cpu, Isa, Precision, round_to_bf16};

/// Error of a sum relative to the sum of magnitudes, as for the other products.
const SUM_TOLERANCE: f64 = 1e-6;
/// Numbers before, between and after the weights, which belong to other tensors.
const GAP: usize = 3;

/// Factors of all three products, and what their outputs hold before.
struct Case {
    offsets: Vec<usize>,
    starts: Vec<usize>,
    rows: usize,
    cols: usize,
    /// `x` is gathered by `x_rows`, `dy` by `dy_rows`; the others lie as they are dispatched.
    x: Vec<f32>,
    dy: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    x_rows: Option<Vec<u32>>,
    dy_rows: Option<Vec<u32>>,
}

impl Case {
    /// A case of `expert_rows.len()` experts; gathered rows come from as many and two more.
    fn new(expert_rows: &[usize], [rows, cols]: [usize; 2], is_gathered: bool) -> Case {
        let mut offsets = vec![0];
        offsets.extend(expert_rows.iter().scan(0, |end, num_rows| {
            *end += num_rows;
            Some(*end)
        }));
        let num_dispatched = offsets[expert_rows.len()];
        let num_sources = if is_gathered { num_dispatched + 2 } else { num_dispatched };
        let mut numbers = Numbers::new((num_dispatched * 1000 + rows * 10 + cols) as u64);
        let mut source_rows = || {
            let row = |_| numbers.below(num_sources) as u32;
            is_gathered.then(|| (0..num_dispatched).map(row).collect())
        };
        let (x_rows, dy_rows) = (source_rows(), source_rows());
        let stride = GAP + rows * cols;
        Case {
            starts: (0..expert_rows.len()).map(|expert| GAP + expert * stride).collect(),
            offsets,
            rows,
            cols,
            x: numbers.vec(num_sources * cols),
            dy: numbers.vec(num_sources * rows),
            w: numbers.vec(GAP + expert_rows.len() * stride),
            bias: numbers.vec(rows),
            x_rows,
            dy_rows,
        }
    }

    fn num_dispatched(&self) -> usize {
        self.offsets[self.starts.len()]
    }

    fn weights(&self) -> ExpertWeights<'_> {
        ExpertWeights { offsets: &self.offsets, starts: &self.starts, rows: self.rows, cols: self.cols }
    }

    fn x(&self) -> ProductRows<'_> {
        ProductRows { source_rows: self.x_rows.as_deref(), ..ProductRows::new(&self.x, self.cols) }
    }

    fn dy(&self) -> ProductRows<'_> {
        ProductRows { source_rows: self.dy_rows.as_deref(), ..ProductRows::new(&self.dy, self.rows) }
    }

    /// What the outputs hold before: as many numbers as dispatched rows of `width`.
    fn before(&self, width: usize) -> Vec<f32> {
        Numbers::new(width as u64).vec(self.num_dispatched() * width)
    }

    fn forward(&self, cpu: &Cpu, activation: Precision, bias: Option<&[f32]>) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.num_dispatched() * self.rows];
        TrainGemm::new(cpu, activation).forward(cpu, &mut out, self.x(), (&self.w, self.weights()), bias);
        out
    }

    fn backward_input(&self, cpu: &Cpu, activation: Precision, store: Accumulate) -> Vec<f32> {
        let mut dx = self.before(self.cols);
        TrainGemm::new(cpu, activation).backward_input(cpu, &mut dx, self.dy(), (&self.w, self.weights()), store);
        dx
    }

    fn backward_weight(&self, cpu: &Cpu, activation: Precision, store: Accumulate) -> Vec<f32> {
        let mut dw = self.w.clone();
        TrainGemm::new(cpu, activation).backward_weight(cpu, (&mut dw, self.weights()), self.dy(), self.x(), store);
        dw
    }

    /// All outputs, one after another.
    fn outputs(&self, cpu: &Cpu, activation: Precision) -> Vec<f32> {
        let mut outputs = self.forward(cpu, activation, None);
        outputs.extend(self.forward(cpu, activation, Some(&self.bias)));
        for store in [Accumulate::Set, Accumulate::Add] {
            outputs.extend(self.backward_input(cpu, activation, store));
            outputs.extend(self.backward_weight(cpu, activation, store));
        }
        outputs
    }

    /// Compare all outputs with plain loops.
    #[track_caller]
    fn check(&self, cpu: &Cpu, activation: Precision) {
        let (x, dy) = (Plain::new(self.x(), activation), Plain::new(self.dy(), activation));
        let w = Plain::new(ProductRows::new(&self.w, 1), activation);
        let out = [self.forward(cpu, activation, None), self.forward(cpu, activation, Some(&self.bias))];
        let dx = [Accumulate::Set, Accumulate::Add].map(|store| self.backward_input(cpu, activation, store));
        let dw = [Accumulate::Set, Accumulate::Add].map(|store| self.backward_weight(cpu, activation, store));
        let before = self.before(self.cols);
        let mut untouched = 0;
        for (expert, &start) in self.starts.iter().enumerate() {
            let rows = self.offsets[expert]..self.offsets[expert + 1];
            let w = |n: usize, k: usize| w.number(start + n * self.cols + k, 0);
            for d in rows.clone() {
                for n in 0..self.rows {
                    let terms = sum((0..self.cols).map(|k| x.number(d, k) * w(n, k)));
                    check_pair([&out[0], &out[1]].map(|out| out[d * self.rows + n]), terms, self.bias[n]);
                }
                for k in 0..self.cols {
                    let terms = sum((0..self.rows).map(|n| dy.number(d, n) * w(n, k)));
                    let i = d * self.cols + k;
                    check_pair([dx[0][i], dx[1][i]], terms, before[i]);
                }
            }
            for (i, (n, k)) in (0..self.rows).flat_map(|n| (0..self.cols).map(move |k| (n, k))).enumerate() {
                let terms = sum(rows.clone().map(|d| dy.number(d, n) * x.number(d, k)));
                check_pair([dw[0][start + i], dw[1][start + i]], terms, self.w[start + i]);
            }
            self.check_untouched(&dw, untouched..start);
            untouched = start + self.rows * self.cols;
        }
        self.check_untouched(&dw, untouched..self.w.len());
    }

    /// Numbers of other tensors are what they were.
    fn check_untouched(&self, dw: &[Vec<f32>; 2], range: Range<usize>) {
        for dw in dw {
            assert_same_bits(&dw[range.clone()], &self.w[range.clone()]);
        }
    }
}

/// Dispatched rows as the products should read them.
struct Plain {
    numbers: Vec<f64>,
    width: usize,
}

impl Plain {
    fn new(rows: ProductRows<'_>, activation: Precision) -> Plain {
        let num_rows = rows.source_rows.map_or(rows.numbers.len() / rows.width, <[u32]>::len);
        let numbers = (0..num_rows).flat_map(|row| rows.row(row)).map(|&x| match activation {
            Precision::F32 => f64::from(x),
            Precision::Bf16 => f64::from(round_to_bf16(x)),
        });
        Plain { numbers: numbers.collect(), width: rows.width }
    }

    fn number(&self, row: usize, col: usize) -> f64 {
        self.numbers[row * self.width + col]
    }
}

/// The sum of the terms and of their magnitudes.
fn sum(terms: impl Iterator<Item = f64>) -> [f64; 2] {
    terms.fold([0.0; 2], |[sum, size], term| [sum + term, size + term.abs()])
}

/// The first number is the sum, the second the sum and `more`.
#[track_caller]
fn check_pair(found: [f32; 2], [sum, size]: [f64; 2], more: f32) {
    assert_close(&found, &[sum, sum + f64::from(more)], 1e-7, SUM_TOLERANCE * (size + f64::from(more.abs())));
}

#[test]
fn all_products_match_f64_on_every_isa_and_awkward_size() {
    let sizes = [
        (1, [5, 17]),
        (5, [17, 1]),
        (17, [1, 5]),
        (31, [97, 257]),
        (97, [257, 31]),
        (257, [31, 300]),
        (300, [1100, 5]),
        (1100, [31, 97]),
        (5, [300, 1100]),
    ];
    for cpu in every_cpu() {
        for (num_rows, weight) in sizes {
            for activation in [Precision::F32, Precision::Bf16] {
                Case::new(&[num_rows], weight, false).check(&cpu, activation);
            }
        }
    }
}

#[test]
fn experts_gather_their_rows_and_those_without_rows_have_no_gradient() {
    for cpu in every_cpu() {
        for activation in [Precision::F32, Precision::Bf16] {
            for is_gathered in [false, true] {
                Case::new(&[0, 31, 1, 0, 0, 97, 300, 0], [17, 43], is_gathered).check(&cpu, activation);
                Case::new(&[5, 0, 257], [300, 7], is_gathered).check(&cpu, activation);
            }
        }
    }
}

#[test]
fn no_rows_and_no_columns_give_zeros_the_bias_or_nothing() {
    for cpu in every_cpu() {
        let sizes: [(&[usize], [usize; 2]); 5] =
            [(&[], [2, 3]), (&[0, 0], [2, 3]), (&[4], [0, 3]), (&[4], [3, 0]), (&[4], [0, 0])];
        for (expert_rows, weight) in sizes {
            let case = Case::new(expert_rows, weight, false);
            // Rows of no width cannot be counted, so that only what the outputs hold is looked at.
            let out = case.forward(&cpu, Precision::F32, Some(&case.bias));
            assert_same_bits(&out, &case.bias.repeat(case.num_dispatched()));
            let dx = case.backward_input(&cpu, Precision::F32, Accumulate::Set);
            assert_eq!(dx, vec![0.0; dx.len()]);
            let dw = case.backward_weight(&cpu, Precision::F32, Accumulate::Set);
            for &start in &case.starts {
                assert!(dw[start..start + case.rows * case.cols].iter().all(|&x| x == 0.0));
            }
        }
    }
}

#[test]
fn all_products_have_the_same_bits_at_any_number_of_threads() {
    for isa in Isa::available() {
        for activation in [Precision::F32, Precision::Bf16] {
            for (expert_rows, weight) in [(&[1100][..], [97, 131]), (&[31, 0, 300, 5], [257, 97])] {
                let case = Case::new(expert_rows, weight, true);
                let expected = case.outputs(&Cpu::new(isa, 1), activation);
                for num_threads in [2, 3, 5] {
                    assert_same_bits(&case.outputs(&Cpu::new(isa, num_threads), activation), &expected);
                }
            }
        }
    }
}

#[test]
fn every_output_is_cut_into_parts_that_cover_it_once_at_any_number_of_threads() {
    for num_threads in [1, 2, 3, 7, 17] {
        let cpu = Cpu::new(Isa::best(), num_threads);
        for num_rows in (1..=60).chain([1007, 3000]) {
            for num_cols in (1..=60).chain([527, 1500]) {
                let grid = Grid::new(&cpu, None, 2, [num_rows, num_cols]);
                let mut num_covered = 0;
                for index in 0..grid.num_parts() {
                    let (expert, rows, cols) = grid.part(index);
                    assert!(expert < 2 && !rows.is_empty() && rows.end <= num_rows && cols.end <= num_cols);
                    num_covered += rows.len() * cols.len();
                }
                assert_eq!(num_covered, 2 * num_rows * num_cols, "{num_rows} x {num_cols} on {num_threads}");
            }
        }
    }
}
