//! Every ISA against plain loops in f64, and against each other.

use super::{
    ExpertsDown, PackedFormat, PackedMatrix, PackedProduct, QUANT_BLOCK_LEN, QuantizedRows, pack_panel,
    packed_experts_down, packed_gemm, packed_swiglu,
};
use crate::simd::PANEL_ROWS;
use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu};
use crate::{Begin, Cpu, GroupedRows, Isa, Precision, RmsNormParams, rms_norm};

const FORMATS: [PackedFormat; 2] = [PackedFormat::W8A8, PackedFormat::W4A8];

/// A packed weight and its numbers after packing.
struct Weight {
    bytes: Vec<u8>,
    format: PackedFormat,
    rows: usize,
    cols: usize,
    numbers: Vec<f32>,
}

impl Weight {
    fn random(numbers: &mut Numbers, format: PackedFormat, rows: usize, cols: usize) -> Weight {
        Weight::of(&numbers.vec(rows * cols), format, rows, cols)
    }

    fn of(weights: &[f32], format: PackedFormat, rows: usize, cols: usize) -> Weight {
        let mut bytes = vec![0; format.weight_bytes(rows, cols)];
        let panels = bytes.chunks_mut(format.panel_bytes(cols));
        for (rows, panel) in weights.chunks(PANEL_ROWS * cols).zip(panels) {
            pack_panel(Isa::best(), format, rows, cols, panel);
        }
        let mut weight = Weight { bytes, format, rows, cols, numbers: vec![0.0; rows * cols] };
        let mut numbers = std::mem::take(&mut weight.numbers);
        for (row, out) in numbers.chunks_mut(cols).enumerate() {
            weight.matrix().dequantize_row(row, out);
        }
        Weight { numbers, ..weight }
    }

    fn matrix(&self) -> PackedMatrix<'_> {
        PackedMatrix::new(&self.bytes, self.format, self.rows, self.cols)
    }

    /// `w . x` for every weight row, in f64.
    fn times(&self, x: &[f64]) -> Vec<f64> {
        let dot = |w: &[f32]| w.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
        self.numbers.chunks(self.cols).map(dot).collect()
    }
}

/// `x` after quantisation, by the definition: the largest magnitude is 127 levels.
fn quantized(x: &[f32]) -> Vec<f64> {
    let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let scale = largest / 127.0;
    x.iter().map(|x| f64::from((x * (1.0 / scale)).round_ties_even()) * f64::from(scale)).collect()
}

fn quantize(cpu: &Cpu, x: &[f32], width: usize, rows: GroupedRows<'_>) -> QuantizedRows {
    let mut quantized = QuantizedRows::default();
    quantized.quantize(cpu, x, width, rows);
    quantized
}

fn gemm(cpu: &Cpu, out: &mut [f32], x: &QuantizedRows, weight: &Weight, bias: Option<&[f32]>) {
    packed_gemm(cpu, x, [PackedProduct { out, weight: weight.matrix(), bias }]);
}

fn one_expert(offsets: &[usize; 2]) -> GroupedRows<'_> {
    GroupedRows { offsets, source_rows: None }
}

#[test]
fn a_product_is_that_of_the_rounded_numbers_on_every_isa_at_awkward_sizes() {
    for cpu in every_cpu() {
        for format in FORMATS {
            for (num_rows, out_width, width) in [(1, 1, 32), (2, 31, 64), (3, 33, 96), (5, 65, 352), (67, 70, 160)] {
                // W8A8 takes any width.
                let width = if format == PackedFormat::W8A8 { width - 5 } else { width };
                let mut numbers = Numbers::new((num_rows * width) as u64);
                let weight = Weight::random(&mut numbers, format, out_width, width);
                let (x, bias) = (numbers.vec(num_rows * width), numbers.vec(out_width));
                let mut out = vec![f32::NAN; num_rows * out_width];
                let rows = quantize(&cpu, &x, width, one_expert(&[0, num_rows]));
                gemm(&cpu, &mut out, &rows, &weight, Some(&bias));
                for (out, x) in out.chunks(out_width).zip(x.chunks(width)) {
                    let sums = weight.times(&quantized(x));
                    let expected: Vec<f64> = sums.iter().zip(&bias).map(|(sum, &bias)| sum + f64::from(bias)).collect();
                    assert_close(out, &expected, 1e-5, 1e-5);
                }
            }
        }
    }
}

#[test]
fn integer_sums_are_the_same_bits_on_every_isa() {
    let (num_rows, out_width, width) = (9, 45, 224);
    let mut numbers = Numbers::new(3);
    for format in FORMATS {
        // Scales of one: the products are the integer sums.
        let levels = |count: usize, range: usize, numbers: &mut Numbers| -> Vec<f32> {
            (0..count).map(|_| numbers.below(2 * range + 1) as f32 - range as f32).collect()
        };
        let (lowest, highest) = if format == PackedFormat::W4A8 { (-8.0, 7.0) } else { (-127.0, 127.0) };
        let mut w = levels(out_width * width, highest as usize, &mut numbers);
        let mut x = levels(num_rows * width, 127, &mut numbers);
        // The extremes, in every sign, where saturation would show.
        for (i, (w, x)) in w[..4 * width].iter_mut().zip(&mut x[..4 * width]).enumerate() {
            *w = if i / width % 2 == 0 { lowest } else { highest };
            *x = if i / width < 2 { 127.0 } else { -127.0 };
        }
        // Every quant block has the lowest and the highest level, so that its scale can only be one.
        for block in w.chunks_exact_mut(QUANT_BLOCK_LEN) {
            (block[0], block[1]) = (lowest, highest);
        }
        x.iter_mut().step_by(width).for_each(|x| *x = 127.0);
        let weight = Weight::of(&w, format, out_width, width);
        assert!(weight.numbers == w, "{format:?}: packed without loss");
        let results: Vec<Vec<f32>> = every_cpu()
            .map(|cpu| {
                let mut out = vec![0.0; num_rows * out_width];
                let rows = quantize(&cpu, &x, width, one_expert(&[0, num_rows]));
                gemm(&cpu, &mut out, &rows, &weight, None);
                out
            })
            .collect();
        for (row, out) in results[0].chunks(out_width).enumerate().take(4) {
            let dot = |n: usize| -> i64 { (0..width).map(|k| (w[n * width + k] * x[row * width + k]) as i64).sum() };
            assert!((0..4).all(|n| out[n] == dot(n) as f32), "{format:?} row {row}");
        }
        for result in &results[1..] {
            assert_same_bits(result, &results[0]);
        }
    }
}

#[test]
fn a_row_among_many_gives_the_same_bits_as_alone_at_any_number_of_threads() {
    let (num_rows, out_width, width) = (131, 77, 192);
    for isa in Isa::available() {
        for format in FORMATS {
            let mut numbers = Numbers::new(7);
            let weight = Weight::random(&mut numbers, format, out_width, width);
            let x = numbers.vec(num_rows * width);
            let product = |cpu: &Cpu, x: &[f32]| {
                let num_rows = x.len() / width;
                let mut out = vec![0.0; num_rows * out_width];
                let rows = quantize(cpu, x, width, one_expert(&[0, num_rows]));
                gemm(cpu, &mut out, &rows, &weight, None);
                out
            };
            let all = product(&Cpu::new(isa, 3), &x);
            let cpu = Cpu::new(isa, 1);
            for count in [1, 2, 3, 5, 64, 65] {
                assert_same_bits(&product(&cpu, &x[..count * width]), &all[..count * out_width]);
            }
        }
    }
}

#[test]
fn weights_that_share_an_input_give_the_same_bits_together_as_one_by_one() {
    let (num_rows, width, widths) = (7, 96, [130, 33, 64]);
    for cpu in every_cpu() {
        let mut numbers = Numbers::new(23);
        let weights = widths.map(|out_width| Weight::random(&mut numbers, PackedFormat::W4A8, out_width, width));
        let bias = numbers.vec(widths[1]);
        let rows = quantize(&cpu, &numbers.vec(num_rows * width), width, one_expert(&[0, num_rows]));
        let biases = [None, Some(&bias[..]), None];
        let mut outs = widths.map(|out_width| vec![f32::NAN; num_rows * out_width]);
        let mut products = outs.iter_mut().zip(weights.iter().zip(biases));
        packed_gemm(
            &cpu,
            &rows,
            [0; 3].map(|_| {
                let (out, (weight, bias)) = products.next().unwrap();
                PackedProduct { out, weight: weight.matrix(), bias }
            }),
        );
        for (out, (weight, bias)) in outs.iter().zip(weights.iter().zip(biases)) {
            let mut alone = vec![0.0; out.len()];
            gemm(&cpu, &mut alone, &rows, weight, bias);
            assert_same_bits(out, &alone);
        }
    }
}

#[test]
fn experts_get_their_own_rows_and_are_added_in_their_order() {
    let (hidden, inter, num_rows) = (96, 64, 6);
    let offsets = [0, 3, 3, 4, 10];
    let source_rows = [5, 0, 2, 2, 4, 1, 0, 3, 2, 5];
    for cpu in every_cpu() {
        for format in FORMATS {
            let mut numbers = Numbers::new(11);
            let gate_up: Vec<[Weight; 2]> =
                (0..4).map(|_| [0; 2].map(|_| Weight::random(&mut numbers, format, inter, hidden))).collect();
            let down: Vec<Weight> = (0..4).map(|_| Weight::random(&mut numbers, format, hidden, inter)).collect();
            let (x, before) = (numbers.vec(num_rows * hidden), numbers.vec(num_rows * hidden));
            let weights = numbers.vec(source_rows.len());
            let rows = GroupedRows { offsets: &offsets, source_rows: Some(&source_rows) };
            let dispatched = quantize(&cpu, &x, hidden, rows);
            let mut inner = vec![f32::NAN; source_rows.len() * inter];
            packed_swiglu(&cpu, &mut inner, &dispatched, &|e| {
                assert_ne!(e, 1, "an expert without rows");
                gate_up[e].each_ref().map(Weight::matrix)
            });
            let expert_of = |row: usize| (0..4).find(|&e| row < offsets[e + 1]).unwrap();
            for (row, inner) in inner.chunks(inter).enumerate() {
                let x = quantized(&x[source_rows[row] as usize * hidden..][..hidden]);
                let [gate, up] = gate_up[expert_of(row)].each_ref().map(|weight| weight.times(&x));
                let expected: Vec<f64> =
                    gate.iter().zip(&up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
                assert_close(inner, &expected, 2e-5, 2e-5);
            }
            let quantized_inner = quantize(&cpu, &inner, inter, GroupedRows { source_rows: None, ..rows });
            let mut residual = before.clone();
            let down_of = |e: usize| down[e].matrix();
            let experts = ExpertsDown {
                inner: &quantized_inner,
                down: &down_of,
                source_rows: &source_rows,
                row_weights: &weights,
            };
            packed_experts_down(&cpu, &mut residual, Begin::Residual, hidden, experts);
            let mut sum = vec![f32::NAN; residual.len()];
            packed_experts_down(&cpu, &mut sum, Begin::Zero, hidden, experts);
            let mut expected: Vec<f64> = before.iter().map(|&x| f64::from(x)).collect();
            for (row, inner) in inner.chunks(inter).enumerate() {
                let products = down[expert_of(row)].times(&quantized(inner));
                let start = source_rows[row] as usize * hidden;
                for (expected, product) in expected[start..start + hidden].iter_mut().zip(products) {
                    *expected += f64::from(weights[row]) * product;
                }
            }
            assert_close(&residual, &expected, 1e-4, 1e-4);
            let expected: Vec<f64> =
                expected.iter().zip(&before).map(|(sum, &before)| sum - f64::from(before)).collect();
            assert_close(&sum, &expected, 1e-4, 1e-4);
        }
    }
}

#[test]
fn rows_that_are_zero_tiny_or_not_finite_keep_to_themselves() {
    let width = 64;
    let mut x = vec![0.0; 5 * width];
    x[width] = f32::NAN;
    x[2 * width + 3] = f32::INFINITY;
    x[3 * width..4 * width].fill(1e-42);
    x[4 * width..].fill(0.5);
    let weight = Weight::of(&vec![1.0; 3 * width], PackedFormat::W8A8, 3, width);
    for cpu in every_cpu() {
        let mut out = vec![0.0; 15];
        gemm(&cpu, &mut out, &quantize(&cpu, &x, width, one_expert(&[0, 5])), &weight, None);
        assert_eq!(out[..3], [0.0; 3]);
        assert!(out[3..9].iter().all(|out| out.is_nan()));
        assert_eq!(out[9..12], [0.0; 3]);
        assert!(out[12..].iter().all(|out| (out - 32.0).abs() < 1e-4), "{out:?}");
    }
}

#[test]
fn rows_that_are_normed_and_quantised_in_one_go_are_those_of_two() {
    let (num_rows, width) = (70, 160);
    for cpu in every_cpu() {
        let mut numbers = Numbers::new(13);
        let (x, norm_weight) = (numbers.vec(num_rows * width), numbers.vec(width));
        let weight = Weight::random(&mut numbers, PackedFormat::W4A8, 48, width);
        let norm = RmsNormParams { weight: &norm_weight, eps: 1e-5, activation: Precision::Bf16 };
        let (mut normed, mut expected) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        rms_norm(&cpu, &mut expected, &x, norm);
        let mut rows = QuantizedRows::default();
        rows.quantize_normed(&cpu, &mut normed, &x, norm);
        assert_same_bits(&normed, &expected);
        let [mut once, mut twice] = [0; 2].map(|_| vec![0.0; num_rows * 48]);
        gemm(&cpu, &mut once, &rows, &weight, None);
        let rows = quantize(&cpu, &expected, width, one_expert(&[0, num_rows]));
        gemm(&cpu, &mut twice, &rows, &weight, None);
        assert_same_bits(&once, &twice);
    }
}

#[test]
fn no_row_at_all_is_fine() {
    let weight = Weight::random(&mut Numbers::new(1), PackedFormat::W4A8, 40, 32);
    for cpu in every_cpu() {
        let none = quantize(&cpu, &[], 32, one_expert(&[0, 0]));
        gemm(&cpu, &mut [], &none, &weight, None);
        packed_swiglu(&cpu, &mut [], &none, &|_| [weight.matrix(); 2]);
        let none_down = ExpertsDown { inner: &none, down: &|_| weight.matrix(), source_rows: &[], row_weights: &[] };
        packed_experts_down(&cpu, &mut [], Begin::Zero, 40, none_down);
    }
}
