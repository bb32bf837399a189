use super::{
    RmsNormBackward, RmsNormParams, add, rms_norm, rms_norm_backward, rms_norm_in_place, rms_norm_scratch_len,
};
use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu, finite_differences};
use crate::{Accumulate, Cpu, Isa, Precision, round_to_bf16};

const EPS: f32 = 1e-5;

#[test]
fn rms_norm_matches_f64_on_every_isa_and_awkward_width() {
    for cpu in every_cpu() {
        for width in [1, 2, 7, 8, 9, 31, 33, 63, 64, 65, 128, 1343] {
            let num_rows = 11;
            let mut numbers = Numbers::new(width as u64);
            let (x, weight) = (numbers.vec(num_rows * width), numbers.vec(width));
            let mut expected = Vec::new();
            for x in x.chunks_exact(width) {
                let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / width as f64;
                let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
                expected.extend(x.iter().zip(&weight).map(|(&x, &w)| f64::from(x) * scale * f64::from(w)));
            }
            let mut out = vec![0.0; x.len()];
            let params = RmsNormParams { weight: &weight, eps: EPS, activation: Precision::F32 };
            rms_norm(&cpu, &mut out, &x, params);
            assert_close(&out, &expected, 2e-6, 0.0);
            let mut in_place = x.clone();
            rms_norm_in_place(&cpu, &mut in_place, &weight, EPS, Precision::F32);
            assert_same_bits(&in_place, &out);
            rms_norm(&cpu, &mut in_place, &x, RmsNormParams { activation: Precision::Bf16, ..params });
            assert!(in_place.iter().zip(&out).all(|(&rounded, &y)| rounded == round_to_bf16(y)));
        }
    }
}

#[test]
fn a_row_among_many_is_normed_to_the_same_bits_as_alone() {
    for cpu in every_cpu() {
        let (num_rows, width) = (37, 1029);
        let mut numbers = Numbers::new(5);
        let (x, weight) = (numbers.vec(num_rows * width), numbers.vec(width));
        let mut all = vec![0.0; x.len()];
        let params = RmsNormParams { weight: &weight, eps: EPS, activation: Precision::F32 };
        rms_norm(&cpu, &mut all, &x, params);
        for (all, x) in all.chunks_exact(width).zip(x.chunks_exact(width)) {
            let mut alone = vec![0.0; width];
            rms_norm(&cpu, &mut alone, x, params);
            assert_same_bits(&alone, all);
        }
    }
}

#[test]
fn a_nan_row_leaves_the_other_rows_alone() {
    for cpu in every_cpu() {
        let mut x = [1.0, 1.0, f32::NAN, 1.0, f32::INFINITY, 1.0];
        rms_norm_in_place(&cpu, &mut x, &[1.0, 2.0], 0.0, Precision::F32);
        assert_eq!(x[..2], [1.0, 2.0]);
        assert!(x[2].is_nan() && x[3].is_nan() && x[4].is_nan());
        assert_eq!(x[5], 0.0);
    }
}

#[test]
fn add_covers_every_number_at_any_length() {
    for cpu in every_cpu() {
        for len in [0, 1, 17, 20_011] {
            let mut numbers = Numbers::new(9);
            let (before, y) = (numbers.vec(len), numbers.vec(len));
            let mut x = before.clone();
            add(&cpu, &mut x, &y);
            assert!(x.iter().zip(before.iter().zip(&y)).all(|(&x, (a, b))| x == a + b));
        }
    }
}

/// `rms_norm` in f64.
fn forward(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let norm_row = |x: &[f64]| {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
        x.iter().zip(weight).map(|(x, w)| x * scale * w).collect::<Vec<f64>>()
    };
    x.chunks_exact(weight.len()).flat_map(norm_row).collect()
}

/// The gradients of x and of the weight, replacing what was there if `store` says so, else added to `before`.
fn backward(cpu: &Cpu, [dy, x, weight]: [&[f32]; 3], before: f32, store: Accumulate) -> [Vec<f32>; 2] {
    let (mut dx, mut dweight) = (vec![before; x.len()], vec![before; weight.len()]);
    let mut scratch = vec![f32::NAN; rms_norm_scratch_len(x.len() / weight.len(), weight.len())];
    let out = RmsNormBackward {
        dx: &mut dx,
        dx_store: store,
        dweight: &mut dweight,
        dweight_store: store,
        scratch: &mut scratch,
    };
    rms_norm_backward(cpu, out, dy, x, weight, EPS);
    [dx, dweight]
}

#[test]
fn rms_norm_backward_matches_finite_differences_on_every_isa_and_awkward_width() {
    for cpu in every_cpu() {
        for (num_rows, width) in [(3, 1), (1, 7), (5, 8), (2, 33), (3, 67), (66, 3)] {
            let mut numbers = Numbers::new(width as u64);
            let (dy, x, weight) = (numbers.vec(num_rows * width), numbers.vec(num_rows * width), numbers.vec(width));
            let dot = |y: &[f64]| y.iter().zip(&dy).map(|(y, &dy)| y * f64::from(dy)).sum::<f64>();
            let (x64, weight64): (Vec<f64>, Vec<f64>) =
                (x.iter().map(|&x| x.into()).collect(), weight.iter().map(|&w| w.into()).collect());
            let expected_dx = finite_differences(&x, |x| dot(&forward(x, &weight64)));
            let expected_dweight = finite_differences(&weight, |weight| dot(&forward(&x64, weight)));
            let [dx, dweight] = backward(&cpu, [&dy, &x, &weight], f32::NAN, Accumulate::Set);
            assert_close(&dx, &expected_dx, 2e-5, 2e-6);
            assert_close(&dweight, &expected_dweight, 2e-6, 2e-6);
            let [dx_added, dweight_added] = backward(&cpu, [&dy, &x, &weight], 0.5, Accumulate::Add);
            assert!(dx_added.iter().zip(&dx).all(|(added, dx)| *added == 0.5 + dx));
            assert_close(&dweight_added, &dweight.iter().map(|&x| 0.5 + f64::from(x)).collect::<Vec<_>>(), 1e-6, 2e-6);
        }
    }
}

#[test]
fn rms_norm_backward_has_the_same_bits_at_any_number_of_threads() {
    let (num_rows, width) = (331, 45);
    let mut numbers = Numbers::new(4);
    let (dy, x, weight) = (numbers.vec(num_rows * width), numbers.vec(num_rows * width), numbers.vec(width));
    for isa in Isa::available() {
        let expected = backward(&Cpu::new(isa, 1), [&dy, &x, &weight], 0.0, Accumulate::Set);
        for num_threads in [2, 3, 7] {
            let found = backward(&Cpu::new(isa, num_threads), [&dy, &x, &weight], 0.0, Accumulate::Set);
            assert_same_bits(&found[0], &expected[0]);
            assert_same_bits(&found[1], &expected[1]);
        }
    }
}
