//! One step of the optimiser AdamW (arXiv 1711.05101).

use crate::cpu::Cpu;
use crate::simd::{Simd, SimdOp};

/// Parameters that a chunk holds: some microseconds of work.
const CHUNK_LEN: usize = 1 << 14;

/// What a step of [`adamw`] needs to know. In f64, since `1 - beta2` of an f32 has few right digits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// How much of the mean of the gradients stays.
    pub beta1: f64,
    /// How much of the mean of their squares stays.
    pub beta2: f64,
    /// Added to the root of that.
    pub eps: f64,
    /// How much of a parameter is taken off it, in units of the learning rate.
    pub weight_decay: f64,
    /// `1 - beta1^step`, where steps count from 1.
    pub bias_correction1: f64,
    /// `1 - beta2^step`.
    pub bias_correction2: f64,
    /// What gradients are multiplied with first.
    pub grad_scale: f64,
}

/// With `g = grad_scale * grads`, elementwise: `m += (1 - beta1) (g - m)`, `v = beta2 v + (1 - beta2) g^2`,
/// `params = (1 - lr weight_decay) params - lr / bias_correction1 * m / (sqrt(v / bias_correction2) + eps)`.
///
/// Shapes: all of one length. The arithmetic is f32 and the same on every ISA; it follows `torch.optim.AdamW`.
///
/// # Panics
/// If the lengths differ.
pub fn adamw(cpu: &Cpu, step: AdamW, params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32]) {
    let len = params.len();
    assert!(grads.len() == len && m.len() == len && v.len() == len, "gradients and moments of {len} parameters");
    let isa = cpu.isa();
    cpu.for_each_slices([params, m, v], [CHUNK_LEN; 3], |chunk, [params, m, v]| {
        let grads = &grads[chunk * CHUNK_LEN..][..params.len()];
        isa.run(Update { step, params, grads, m, v });
    });
}

struct Update<'a> {
    step: AdamW,
    params: &'a mut [f32],
    grads: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
}

impl SimdOp for Update<'_> {
    type Output = ();

    /// A plain loop: the compiler vectorises it, and memory is what it waits for.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let AdamW { lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2, grad_scale } = self.step;
        let (m_share, v_share) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
        let (keep, step_size) = ((1.0 - lr * weight_decay) as f32, (lr / bias_correction1) as f32);
        let root_scale = (1.0 / bias_correction2.sqrt()) as f32;
        let (beta2, eps, grad_scale) = (beta2 as f32, eps as f32, grad_scale as f32);
        for (((p, g), m), v) in self.params.iter_mut().zip(self.grads).zip(self.m).zip(self.v) {
            let g = g * grad_scale;
            *m += m_share * (g - *m);
            *v = beta2 * *v + v_share * g * g;
            *p = keep * *p - step_size * *m / (v.sqrt() * root_scale + eps);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{AdamW, adamw};
    use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu};
    use crate::{Cpu, Isa};

    const FIRST_STEP: AdamW = AdamW {
        lr: 0.01,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        bias_correction1: 0.1,
        bias_correction2: 0.05,
        grad_scale: 0.5,
    };

    /// The numbers of step `step`, from 1.
    fn nth_step(step: i32) -> AdamW {
        let (bias_correction1, bias_correction2) = (1.0 - 0.9f64.powi(step), 1.0 - 0.95f64.powi(step));
        AdamW { bias_correction1, bias_correction2, ..FIRST_STEP }
    }

    #[test]
    fn ten_steps_match_f64_on_every_isa_and_awkward_length() {
        for cpu in every_cpu() {
            for len in [0, 1, 7, 9, 16_385] {
                let mut numbers = Numbers::new(len as u64);
                let mut params = numbers.vec(len);
                let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
                let mut expected: Vec<[f64; 3]> = params.iter().map(|&p| [p.into(), 0.0, 0.0]).collect();
                for step in (1..=10).map(nth_step) {
                    let grads = numbers.vec(len);
                    adamw(&cpu, step, &mut params, &grads, &mut m, &mut v);
                    for ([p, m, v], &g) in expected.iter_mut().zip(&grads) {
                        let g = f64::from(g) * step.grad_scale;
                        *m = step.beta1 * *m + (1.0 - step.beta1) * g;
                        *v = step.beta2 * *v + (1.0 - step.beta2) * g * g;
                        let (m_hat, v_hat) = (*m / step.bias_correction1, *v / step.bias_correction2);
                        *p -= step.lr * (step.weight_decay * *p + m_hat / (v_hat.sqrt() + step.eps));
                    }
                }
                for (found, place) in [(&params, 0), (&m, 1), (&v, 2)] {
                    assert_close(found, &expected.iter().map(|x| x[place]).collect::<Vec<_>>(), 2e-6, 2e-7);
                }
            }
        }
    }

    #[test]
    fn the_first_step_goes_by_the_learning_rate_against_the_sign_of_the_gradient() {
        for cpu in every_cpu() {
            let (mut params, mut m, mut v) = ([1.0, 2.0, 3.0], [0.0; 3], [0.0; 3]);
            let step = AdamW { weight_decay: 0.0, ..FIRST_STEP };
            adamw(&cpu, step, &mut params, &[1e-3, -20.0, 0.0], &mut m, &mut v);
            assert_close(&params, &[0.99, 2.01, 3.0], 1e-6, 0.0);
        }
    }

    #[test]
    fn a_step_has_the_same_bits_at_any_number_of_threads_and_on_any_isa() {
        let len = 40_001;
        let mut numbers = Numbers::new(1);
        let (params, grads, m) = (numbers.vec(len), numbers.vec(len), numbers.vec(len));
        let v: Vec<f32> = numbers.vec(len).iter().map(|x| x.abs()).collect();
        let step = |cpu: &Cpu| {
            let (mut params, mut m, mut v) = (params.clone(), m.clone(), v.clone());
            adamw(cpu, nth_step(3), &mut params, &grads, &mut m, &mut v);
            [params, m, v]
        };
        let expected = step(&Cpu::new(Isa::scalar(), 1));
        for (isa, num_threads) in Isa::available().flat_map(|isa| [1, 2, 3].map(|num_threads| (isa, num_threads))) {
            for (found, expected) in step(&Cpu::new(isa, num_threads)).iter().zip(&expected) {
                assert_same_bits(found, expected);
            }
        }
    }
}
