//! Cross-entropy of logits and its gradient in one pass.

use crate::cpu::Cpu;
use crate::simd::{Simd, SimdOp, map};
use crate::softmax::exp_minus_max;

/// The target of a row that has none.
pub const IGNORED_TARGET: u32 = u32::MAX;

/// Logits that a chunk should at least hold, of all its rows: some microseconds of work.
const MIN_CHUNK_LEN: usize = 4096;

/// `losses[r] = -ln softmax(logits[r])[targets[r]]`, and `logits[r]` becomes the gradient of `scales[r] * losses[r]`:
/// `scales[r] * softmax(logits[r])`, less `scales[r]` at the target. Both are 0 where the target is [`IGNORED_TARGET`].
///
/// Shapes: `logits` `[num_rows, vocab_size]`, `targets`, `scales` and `losses` `[num_rows]`. The order of a row's sum depends on the
/// ISA alone. A NaN or +inf among a row's logits makes its loss NaN.
///
/// # Panics
/// If a length does not fit or a target is not below `vocab_size`.
pub fn cross_entropy(cpu: &Cpu, logits: &mut [f32], targets: &[u32], scales: &[f32], losses: &mut [f32]) {
    assert_eq!(losses.len(), targets.len(), "losses and targets");
    assert_eq!(scales.len(), targets.len(), "scales and targets");
    if targets.is_empty() {
        return assert!(logits.is_empty(), "{} logits for no target", logits.len());
    }
    let vocab_size = logits.len() / targets.len();
    let whole = vocab_size > 0 && logits.len() == targets.len() * vocab_size;
    assert!(whole, "{} logits for {} targets", logits.len(), targets.len());
    let isa = cpu.isa();
    let rows_per_chunk = MIN_CHUNK_LEN.div_ceil(vocab_size);
    let chunk_lens = [rows_per_chunk * vocab_size, rows_per_chunk];
    cpu.for_each_slices([logits, losses], chunk_lens, |chunk, [logits, losses]| {
        let targets = targets[chunk * rows_per_chunk..].iter().zip(&scales[chunk * rows_per_chunk..]);
        for ((logits, loss), (&target, &scale)) in logits.chunks_exact_mut(vocab_size).zip(losses).zip(targets) {
            if target == IGNORED_TARGET {
                logits.fill(0.0);
                *loss = 0.0;
            } else {
                *loss = isa.run(CrossEntropy { logits, target: target as usize, scale });
            }
        }
    });
}

/// One row; returns its loss.
struct CrossEntropy<'a> {
    logits: &'a mut [f32],
    target: usize,
    scale: f32,
}

impl SimdOp for CrossEntropy<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let CrossEntropy { logits, target, scale } = self;
        assert!(target < logits.len(), "target {target} is not below {}", logits.len());
        let logit = logits[target];
        let (max, sum) = exp_minus_max(simd, logits);
        let factor = simd.splat(scale / sum);
        map(
            simd,
            logits,
            #[inline(always)]
            |power| simd.mul(power, factor),
        );
        logits[target] -= scale;
        sum.ln() - (logit - max)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{IGNORED_TARGET, cross_entropy};
    use crate::Cpu;
    use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu, finite_differences};

    /// The loss of one row, in f64.
    fn loss(logits: &[f64], target: u32) -> f64 {
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        logits.iter().map(|x| (x - max).exp()).sum::<f64>().ln() + max - logits[target as usize]
    }

    #[test]
    fn cross_entropy_matches_f64_and_finite_differences_on_every_isa_and_awkward_width() {
        let scale = 0.25;
        for cpu in every_cpu() {
            for (num_rows, vocab_size) in [(0, 3), (1, 1), (3, 2), (2, 7), (5, 8), (3, 67), (2, 4099)] {
                let mut numbers = Numbers::new(vocab_size as u64);
                let logits: Vec<f32> = numbers.vec(num_rows * vocab_size).iter().map(|x| 5.0 * x).collect();
                let targets: Vec<u32> = (0..num_rows).map(|_| numbers.below(vocab_size) as u32).collect();
                let (mut dlogits, mut losses) = (logits.clone(), vec![f32::NAN; num_rows]);
                cross_entropy(&cpu, &mut dlogits, &targets, &vec![scale; num_rows], &mut losses);
                for (row, &target) in targets.iter().enumerate() {
                    let logits = &logits[row * vocab_size..][..vocab_size];
                    let wide: Vec<f64> = logits.iter().map(|&x| x.into()).collect();
                    assert_close(&losses[row..=row], &[loss(&wide, target)], 1e-6, 1e-6);
                    let gradient = &dlogits[row * vocab_size..][..vocab_size];
                    if vocab_size < 100 {
                        let expected = finite_differences(logits, |x| f64::from(scale) * loss(x, target));
                        assert_close(gradient, &expected, 2e-6, 1e-7);
                    }
                    let sum: f64 = gradient.iter().copied().map(f64::from).sum();
                    assert!(sum.abs() < 1e-6, "a gradient sums to {sum}");
                }
            }
        }
    }

    #[test]
    fn a_row_without_a_target_has_no_loss_and_no_gradient() {
        for cpu in every_cpu() {
            let mut logits = Numbers::new(1).vec(3 * 9);
            logits[10] = f32::NAN;
            let mut losses = [f32::NAN; 3];
            cross_entropy(&cpu, &mut logits, &[4, IGNORED_TARGET, 8], &[1.0; 3], &mut losses);
            assert!(losses[0] > 0.0 && losses[1] == 0.0 && losses[2] > 0.0);
            assert_eq!(logits[9..18], [0.0; 9]);
            assert!(logits[4] < 0.0 && logits[26] < 0.0);
        }
    }

    #[test]
    fn extreme_logits_have_the_loss_they_should_and_nan_stays_in_its_row() {
        for cpu in every_cpu() {
            let mut logits = [3e4, -3e4, 3e4, -3e4, 1.0, f32::NAN];
            let mut losses = [0.0; 3];
            cross_entropy(&cpu, &mut logits, &[0, 1, 0], &[2.0; 3], &mut losses);
            assert_eq!((losses[0], losses[1]), (0.0, 6e4));
            assert_eq!(logits[..4], [0.0, 0.0, 2.0, -2.0]);
            assert!(losses[2].is_nan());
        }
    }

    #[test]
    fn losses_have_the_same_bits_at_any_number_of_threads() {
        for cpu in every_cpu() {
            let (num_rows, vocab_size) = (53, 401);
            let logits = Numbers::new(7).vec(num_rows * vocab_size);
            let targets: Vec<u32> = (0..num_rows as u32).collect();
            let run = |cpu: &Cpu| {
                let (mut logits, mut losses) = (logits.clone(), vec![0.0; num_rows]);
                cross_entropy(cpu, &mut logits, &targets, &vec![0.5; targets.len()], &mut losses);
                [logits, losses]
            };
            let expected = run(&Cpu::new(cpu.isa(), 1));
            for (found, expected) in run(&cpu).iter().zip(&expected) {
                assert_same_bits(found, expected);
            }
        }
    }

    #[test]
    #[should_panic(expected = "target 9 is not below 9")]
    fn a_target_outside_of_the_vocabulary_panics() {
        let cpu = Cpu::new(crate::Isa::scalar(), 1);
        cross_entropy(&cpu, &mut [0.0; 18], &[8, 9], &[1.0; 2], &mut [0.0; 2]);
    }
}
