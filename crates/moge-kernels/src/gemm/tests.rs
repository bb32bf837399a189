use half::{bf16, f16};

use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu};
use crate::{Cpu, Elements, GroupedRows, Isa, Matrix, Precision, gemm, grouped_gemm, grouped_swiglu, round_to_bf16};

/// A weight in every stored type, all of the same numbers.
struct Weight {
    f32: Vec<f32>,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
    rows: usize,
    cols: usize,
}

impl Weight {
    /// Numbers that bf16 and f16 both hold exactly.
    fn new(numbers: &mut Numbers, rows: usize, cols: usize) -> Weight {
        let f32: Vec<f32> = numbers.vec(rows * cols).iter().map(|x| (x * 128.0).round() / 128.0).collect();
        let f16 = f32.iter().map(|&x| f16::from_f32(x)).collect();
        let bf16 = f32.iter().map(|&x| bf16::from_f32(x)).collect();
        Weight { f32, f16, bf16, rows, cols }
    }

    fn views(&self) -> [Matrix<'_>; 3] {
        [Elements::F32(&self.f32), Elements::F16(&self.f16), Elements::Bf16(&self.bf16)]
            .map(|elements| Matrix::new(elements, self.rows, self.cols))
    }

    /// `sum over k of x[k] * w[row, k]` and the sum of the magnitudes.
    fn dot(&self, x: &[f32], row: usize) -> (f64, f64) {
        let w = &self.f32[row * self.cols..(row + 1) * self.cols];
        let products = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
        products.fold((0.0, 0.0), |(sum, size), product| (sum + product, size + product.abs()))
    }
}

/// Error of a sum relative to the sum of magnitudes: the scalar ISA adds up to 1024 numbers one after another, so the
/// error may reach 1024 half units in theory; rounding errors of both signs leave far less.
const SUM_TOLERANCE: f64 = 1e-6;

#[test]
fn gemm_matches_f64_on_every_isa_type_and_awkward_size() {
    for cpu in every_cpu() {
        for (num_rows, n, k) in
            [(1, 1, 1), (1, 5, 7), (2, 3, 8), (3, 33, 17), (4, 31, 64), (5, 70, 129), (50, 37, 1031), (13, 4, 2100)]
        {
            let mut numbers = Numbers::new((num_rows * 100 + n) as u64);
            let weight = Weight::new(&mut numbers, n, k);
            let (x, bias) = (numbers.vec(num_rows * k), numbers.vec(n));
            for w in weight.views() {
                for bias in [None, Some(&bias[..])] {
                    let mut out = vec![f32::NAN; num_rows * n];
                    gemm(&cpu, &mut out, &x, w, bias);
                    for (i, &found) in out.iter().enumerate() {
                        let (row, col) = (i / n, i % n);
                        let (sum, size) = weight.dot(&x[row * k..(row + 1) * k], col);
                        let expected = sum + bias.map_or(0.0, |bias| f64::from(bias[col]));
                        assert_close(&[found], &[expected], 1e-7, SUM_TOLERANCE * size);
                    }
                }
            }
        }
    }
}

#[test]
fn an_empty_inner_dimension_gives_the_bias_and_no_rows_give_nothing() {
    for cpu in every_cpu() {
        let w = Matrix::new(Elements::F32(&[]), 3, 0);
        let mut out = [9.0; 6];
        gemm(&cpu, &mut out, &[], w, None);
        assert_eq!(out, [0.0; 6]);
        gemm(&cpu, &mut out, &[], w, Some(&[1.0, 2.0, 3.0]));
        assert_eq!(out, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
        gemm(&cpu, &mut [], &[], w, None);
        gemm(&cpu, &mut [], &[1.0], Matrix::new(Elements::F32(&[]), 0, 1), None);
    }
}

#[test]
fn a_row_gives_the_same_bits_alone_among_many_grouped_and_at_any_thread_count() {
    for isa in Isa::available() {
        let (num_rows, n, k) = (101, 67, 2051);
        let mut numbers = Numbers::new(23);
        let weight = Weight::new(&mut numbers, n, k);
        let x = numbers.vec(num_rows * k);
        // The rows backwards, in two experts that have the same weight, with an empty one between.
        let source_rows: Vec<u32> = (0..num_rows as u32).rev().collect();
        let rows = GroupedRows { offsets: &[0, 19, 19, num_rows], source_rows: Some(&source_rows) };
        let mut by_type: Vec<Vec<f32>> = Vec::new();
        for w in weight.views() {
            let cpu = Cpu::new(isa, 1);
            let mut alone = vec![0.0; num_rows * n];
            for (out, x) in alone.chunks_exact_mut(n).zip(x.chunks_exact(k)) {
                gemm(&cpu, out, x, w, None);
            }
            for num_threads in [1, 2, 3] {
                let cpu = Cpu::new(isa, num_threads);
                let mut out = vec![0.0; num_rows * n];
                gemm(&cpu, &mut out, &x, w, None);
                assert_same_bits(&out, &alone);
                grouped_gemm(&cpu, &mut out, &x, rows, &|expert| {
                    assert_ne!(expert, 1, "an expert without rows is not asked for");
                    w
                });
                for (found, expected) in out.chunks_exact(n).rev().zip(alone.chunks_exact(n)) {
                    assert_same_bits(found, expected);
                }
            }
            by_type.push(alone);
        }
        assert_same_bits(&by_type[1], &by_type[0]);
        assert_same_bits(&by_type[2], &by_type[0]);
    }
}

#[test]
fn grouped_swiglu_applies_each_experts_gate_and_up_to_its_rows() {
    for cpu in every_cpu() {
        let (num_rows, inter, hidden) = (7, 45, 83);
        let mut numbers = Numbers::new(29);
        let weights: Vec<[Weight; 2]> = (0..5)
            .map(|_| [Weight::new(&mut numbers, inter, hidden), Weight::new(&mut numbers, inter, hidden)])
            .collect();
        let x = numbers.vec(num_rows * hidden);
        let offsets = [0, 2, 2, 55, 56, 60];
        let source_rows: Vec<u32> = (0..60).map(|_| numbers.below(num_rows) as u32).collect();
        let rows = GroupedRows { offsets: &offsets, source_rows: Some(&source_rows) };
        for dtype in 0..3 {
            let gate_up = |expert: usize| {
                assert_ne!(expert, 1, "an expert without rows is not asked for");
                // Gate and up need not have the same type.
                [weights[expert][0].views()[dtype], weights[expert][1].views()[(dtype + 1) % 3]]
            };
            let mut out = vec![f32::NAN; 60 * inter];
            grouped_swiglu(&cpu, &mut out, &x, rows, &gate_up, Precision::F32);
            for (i, &found) in out.iter().enumerate() {
                let (dispatched, col) = (i / inter, i % inter);
                let expert = offsets.windows(2).position(|pair| (pair[0]..pair[1]).contains(&dispatched)).unwrap();
                let source = source_rows[dispatched] as usize;
                let x = &x[source * hidden..(source + 1) * hidden];
                let [gate, up] = [0, 1].map(|which: usize| weights[expert][which].dot(x, col).0);
                assert_close(&[found], &[gate / (1.0 + (-gate).exp()) * up], 1e-5, 2e-5);
            }
            let mut rounded = vec![0.0; out.len()];
            grouped_swiglu(&cpu, &mut rounded, &x, rows, &gate_up, Precision::Bf16);
            assert!(rounded.iter().zip(&out).all(|(&rounded, &y)| rounded == round_to_bf16(y)));
        }
    }
}

#[test]
fn no_dispatched_rows_ask_for_no_weight() {
    let cpu = Cpu::new(Isa::best(), 1);
    let rows = GroupedRows { offsets: &[0, 0, 0], source_rows: None };
    grouped_gemm(&cpu, &mut [], &[], rows, &|_| unreachable!());
    grouped_swiglu(&cpu, &mut [], &[], rows, &|_| unreachable!(), Precision::F32);
}

#[test]
fn a_nan_or_infinity_stays_in_its_row() {
    for cpu in every_cpu() {
        let (num_rows, n, k) = (5, 6, 19);
        let mut numbers = Numbers::new(31);
        let weight = Weight::new(&mut numbers, n, k);
        let x = numbers.vec(num_rows * k);
        let mut clean = vec![0.0; num_rows * n];
        gemm(&cpu, &mut clean, &x, weight.views()[2], None);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = x.clone();
            x[2 * k + 18] = bad;
            let mut out = vec![0.0; num_rows * n];
            gemm(&cpu, &mut out, &x, weight.views()[2], None);
            assert!(out[2 * n..3 * n].iter().all(|x| !x.is_finite()));
            assert_same_bits(&out[..2 * n], &clean[..2 * n]);
            assert_same_bits(&out[3 * n..], &clean[3 * n..]);
        }
    }
}

#[test]
#[should_panic(expected = "a source row is not below 2")]
fn a_source_row_out_of_bounds_is_refused() {
    let cpu = Cpu::new(Isa::scalar(), 1);
    let rows = GroupedRows { offsets: &[0, 1], source_rows: Some(&[2]) };
    let w = [1.0; 3];
    grouped_gemm(&cpu, &mut [0.0], &[0.0; 6], rows, &|_| Matrix::new(Elements::F32(&w), 1, 3));
}
