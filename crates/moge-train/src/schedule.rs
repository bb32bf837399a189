//! Which phase a step belongs to, and its learning rate.

use std::f64::consts::PI;

use crate::config::{PhaseConfig, RunConfig};

/// The steps of a run, counted from 0 over all phases.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    phases: Vec<Span>,
}

/// The steps of one phase.
#[derive(Clone, Debug, PartialEq)]
struct Span {
    /// The step after its last.
    end: u64,
    num_steps: u64,
    warmup_steps: u64,
    learning_rate: [f64; 2],
}

impl RunConfig {
    /// The steps of all phases.
    pub fn schedule(&self) -> Schedule {
        Schedule::new(&self.phases)
    }
}

impl Schedule {
    pub(crate) fn new(phases: &[PhaseConfig]) -> Schedule {
        let mut end = 0;
        let span = |phase: &PhaseConfig| {
            end += phase.num_steps;
            let PhaseConfig { num_steps, warmup_steps, learning_rate, .. } = *phase;
            Span { end, num_steps, warmup_steps, learning_rate }
        };
        Schedule { phases: phases.iter().map(span).collect() }
    }

    /// Steps of all phases.
    pub fn num_steps(&self) -> u64 {
        self.phases.last().map_or(0, |span| span.end)
    }

    /// Index of the phase that `step` belongs to.
    ///
    /// # Panics
    /// If `step` is not below [`Schedule::num_steps`].
    pub fn phase_of(&self, step: u64) -> usize {
        assert!(step < self.num_steps(), "step {step} of {}", self.num_steps());
        self.phases.partition_point(|span| span.end <= step)
    }

    /// Learning rate of `step`: rises in equal parts during the warm-up, and then goes from the phase's first rate to its
    /// last, which the last step has, along half a cosine.
    ///
    /// # Panics
    /// If `step` is not below [`Schedule::num_steps`].
    pub fn learning_rate(&self, step: u64) -> f64 {
        let span = &self.phases[self.phase_of(step)];
        let step = step - (span.end - span.num_steps);
        let [first, last] = span.learning_rate;
        if step < span.warmup_steps {
            return first * (step + 1) as f64 / (span.warmup_steps + 1) as f64;
        }
        // A phase of one step after its warm-up has the first rate.
        let num_intervals = (span.num_steps - span.warmup_steps - 1).max(1);
        let progress = (step - span.warmup_steps) as f64 / num_intervals as f64;
        last + (first - last) * 0.5 * (1.0 + (PI * progress).cos())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn phase(num_steps: u64, warmup_steps: u64, learning_rate: [f64; 2]) -> PhaseConfig {
        PhaseConfig {
            name: "any".to_owned(),
            num_steps,
            sequence_length: 8,
            batch_tokens: 32,
            micro_batch_tokens: 16,
            learning_rate,
            warmup_steps,
            mixture: BTreeMap::new(),
        }
    }

    #[test]
    fn every_step_belongs_to_the_phase_whose_steps_it_is_among() {
        let schedule = Schedule::new(&[phase(3, 0, [1.0, 0.5]), phase(1, 0, [0.5, 0.25]), phase(2, 0, [0.25, 0.0])]);
        assert_eq!(schedule.num_steps(), 6);
        let phases: Vec<usize> = (0..6).map(|step| schedule.phase_of(step)).collect();
        assert_eq!(phases, [0, 0, 0, 1, 2, 2]);
    }

    #[test]
    fn the_rate_rises_in_equal_parts_and_then_follows_half_a_cosine_to_the_last_step() {
        let schedule = Schedule::new(&[phase(8, 3, [4.0, 2.0]), phase(3, 0, [2.0, 0.0]), phase(1, 0, [7.0, 5.0])]);
        let rates: Vec<f64> = (0..12).map(|step| schedule.learning_rate(step)).collect();
        let cosine = |part: f64| 3.0 + (part * PI).cos();
        let expected = [1.0, 2.0, 3.0, 4.0, cosine(0.25), 3.0, cosine(0.75), 2.0, 2.0, 1.0, 0.0, 7.0];
        for (step, (rate, expected)) in rates.iter().zip(expected).enumerate() {
            assert!((rate - expected).abs() < 1e-12, "step {step}: {rate}, should be {expected}");
        }
        // The ends are what the run file states, to the bit.
        assert_eq!([rates[3], rates[7], rates[10]], [4.0, 2.0, 0.0]);
    }

    #[test]
    #[should_panic(expected = "step 3 of 3")]
    fn a_step_after_the_last_has_no_phase() {
        Schedule::new(&[phase(3, 0, [1.0, 0.5])]).phase_of(3);
    }
}
