//! All networks against PyTorch, layer by layer. `reference/make_goldens.py` makes the files.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use common::{CASES, Golden, logprobs, run_whole};
use moge_model::Precision;

/// Largest difference of a log-probability in f32. Both sides sum in f32 in different orders; against f64 the
/// recorded values are off by 1.1e-5 at most.
const F32_LOGPROB_TOLERANCE: f32 = 1e-4;

/// Largest difference of a number of the residual stream, which is of order one to ten.
const F32_HIDDEN_TOLERANCE: f32 = 1e-4;

/// bf16 activations against a simulation that rounds at the same points. Where f32 noise tips a value over a rounding
/// boundary, two right implementations differ: the simulation with f64 sums differs from itself by 0.05, rms 0.007.
const BF16_LOGPROB_TOLERANCE: f32 = 0.1;
const BF16_LOGPROB_RMS_TOLERANCE: f32 = 0.012;

/// bf16 activations against f32: the simulation itself is off by up to 0.136.
const BF16_TO_F32_LOGPROB_TOLERANCE: f32 = 0.25;

/// The largest difference of two numbers at the same place; NaN if one of them is NaN.
fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // Not `f32::max`, which loses NaN.
    let larger = |max: f32, d: f32| if max.is_nan() || max >= d { max } else { d };
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, larger)
}

fn rms_difference(a: &[f32], b: &[f32]) -> f32 {
    let sum: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    (sum / a.len() as f64).sqrt() as f32
}

#[test]
fn a_difference_that_is_no_number_is_not_lost_among_others() {
    assert_eq!(max_difference(&[1.0, 5.0, 3.0], &[1.5, 3.0, 3.0]), 2.0);
    for place in 0..3 {
        let mut numbers = [1.0; 3];
        numbers[place] = f32::NAN;
        assert!(max_difference(&numbers, &[0.0; 3]).is_nan());
    }
}

#[test]
fn logits_hidden_states_and_expert_choices_equal_pytorch_in_f32() {
    for case in CASES {
        let golden = Golden::load(case);
        let run = run_whole(&golden.model, &golden.tokens("tokens"), Precision::F32);
        let vocab = golden.model.config().vocab_size;
        let difference = max_difference(&logprobs(&run.logits, vocab), &logprobs(&golden.f32("logits"), vocab));
        assert!(difference <= F32_LOGPROB_TOLERANCE, "{case}: log-probabilities differ by {difference}");
        let difference = max_difference(&run.trace.hidden.concat(), &golden.f32("hidden"));
        assert!(difference <= F32_HIDDEN_TOLERANCE, "{case}: hidden states differ by {difference}");
        let routes = run.trace.routes.concat();
        let experts: Vec<i32> = routes.iter().map(|route| route.expert.0 as i32).collect();
        assert_eq!(experts, golden.i32_or_empty("expert_ids"), "{case}: expert choices");
        let weights: Vec<f32> = routes.iter().map(|route| route.weight).collect();
        let difference = max_difference(&weights, &golden.f32_or_empty("expert_weights"));
        assert!(difference <= 1e-5, "{case}: expert weights differ by {difference}");
    }
}

#[test]
fn bf16_activations_stay_close_to_their_simulation_and_to_f32() {
    for case in CASES {
        let golden = Golden::load(case);
        let run = run_whole(&golden.model, &golden.tokens("tokens"), Precision::Bf16);
        let vocab = golden.model.config().vocab_size;
        let ours = logprobs(&run.logits, vocab);
        let simulated = logprobs(&golden.f32("logits_bf16_activations"), vocab);
        let exact = logprobs(&golden.f32("logits"), vocab);
        let (max, rms) = (max_difference(&ours, &simulated), rms_difference(&ours, &simulated));
        println!("{case}: max {max}, rms {rms}, to f32 {}", max_difference(&ours, &exact));
        assert!(max <= BF16_LOGPROB_TOLERANCE, "{case}: {max} from the simulation");
        assert!(rms <= BF16_LOGPROB_RMS_TOLERANCE, "{case}: rms {rms} from the simulation");
        let max = max_difference(&ours, &exact);
        assert!(max <= BF16_TO_F32_LOGPROB_TOLERANCE, "{case}: {max} from f32");
    }
}

#[test]
fn sixty_four_greedy_tokens_equal_pytorch() {
    for case in CASES {
        let golden = Golden::load(case);
        let continuation = common::greedy(&golden.model, &golden.tokens("greedy_prompt"), 64);
        assert_eq!(continuation, golden.tokens("greedy_tokens"), "{case}");
    }
}
