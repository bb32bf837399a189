//! What a report shows of all steps, gathered in one pass over `metrics.jsonl` and in memory that does not grow with the
//! experts' loads.

use moge_model::MoeConfig;

use crate::metrics::StepMetrics;

/// Columns that the pictures of loads over time have at least, once there are as many steps; at most twice as many.
const MIN_BINS: usize = 32;

/// All steps.
#[derive(Debug, Default)]
pub(super) struct History {
    /// Steps without their loads.
    pub(super) steps: Vec<StepMetrics>,
    /// The phases in the order in which they came.
    pub(super) phases: Vec<PhaseSpan>,
    /// Imbalance score of each step, the mean over the layers; none without routed experts.
    pub(super) imbalance: Vec<f64>,
    /// Loads of runs of `steps_per_bin` steps; the last run may be shorter.
    pub(super) bins: Vec<LoadBin>,
    steps_per_bin: u64,
}

/// The steps of a phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PhaseSpan {
    pub(super) name: String,
    pub(super) first_step: u64,
    /// Its steps in [`History::steps`].
    pub(super) range: std::ops::Range<usize>,
}

/// Loads of several steps together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LoadBin {
    pub(super) first_step: u64,
    pub(super) last_step: u64,
    num_steps: u64,
    /// `[routed layer][expert]`
    pub(super) load: Vec<Vec<u64>>,
}

impl History {
    /// Add the next step.
    ///
    /// # Errors
    /// If its loads are not those of `moe`, or of as many layers as the step's before.
    pub(super) fn add(
        &mut self,
        mut step: StepMetrics,
        moe: Option<&MoeConfig>,
        num_devices: usize,
    ) -> Result<(), String> {
        let load = std::mem::take(&mut step.expert_load);
        let num_experts = moe.map_or(0, |moe| moe.num_experts);
        let num_layers = self.bins.first().map_or(load.len(), |bin| bin.load.len());
        if load.len() != num_layers || load.iter().any(|experts| experts.len() != num_experts) {
            return Err(format!("expert_load: not {num_layers} layers of {num_experts} experts"));
        }
        if let Some(moe) = moe.filter(|_| !load.is_empty()) {
            self.imbalance.push(imbalance_score(&load, num_devices, moe.experts_per_token()));
            self.add_load(step.step, load);
        }
        match self.phases.last_mut() {
            Some(phase) if phase.name == step.phase => phase.range.end += 1,
            _ => self.phases.push(PhaseSpan {
                name: step.phase.clone(),
                first_step: step.step,
                range: self.steps.len()..self.steps.len() + 1,
            }),
        }
        self.steps.push(step);
        Ok(())
    }

    fn add_load(&mut self, step: u64, load: Vec<Vec<u64>>) {
        if let Some(bin) = self.bins.last_mut().filter(|bin| bin.num_steps < self.steps_per_bin) {
            bin.absorb(&LoadBin { first_step: step, last_step: step, num_steps: 1, load });
            return;
        }
        if self.bins.len() == 2 * MIN_BINS {
            self.steps_per_bin *= 2;
            let mut bins = std::mem::take(&mut self.bins).into_iter();
            while let Some(mut bin) = bins.next() {
                if let Some(next) = bins.next() {
                    bin.absorb(&next);
                }
                self.bins.push(bin);
            }
        }
        self.steps_per_bin = self.steps_per_bin.max(1);
        self.bins.push(LoadBin { first_step: step, last_step: step, num_steps: 1, load });
    }

    /// The last tenth of the bins as one.
    pub(super) fn end(&self) -> Option<LoadBin> {
        let start = self.bins.len() - self.bins.len().div_ceil(10);
        let (first, rest) = self.bins[start..].split_first()?;
        let mut end = first.clone();
        rest.iter().for_each(|bin| end.absorb(bin));
        Some(end)
    }
}

impl LoadBin {
    fn absorb(&mut self, next: &LoadBin) {
        self.last_step = next.last_step;
        self.num_steps += next.num_steps;
        for (sum, load) in self.load.iter_mut().flatten().zip(next.load.iter().flatten()) {
            *sum = sum.saturating_add(*load);
        }
    }
}

/// `(max_i T_i - min_i T_i) / |X|`, the mean over the layers, where `T_i` are the expert computations on device `i`, which
/// holds the `i`-th of `num_devices` equal runs of experts, and `|X|` are the tokens, each of which takes
/// `experts_per_token`. Source: arXiv 2505.21411 §2.2.
fn imbalance_score(load: &[Vec<u64>], num_devices: usize, experts_per_token: usize) -> f64 {
    let score = |experts: &Vec<u64>| {
        let devices = experts.chunks(experts.len().div_ceil(num_devices).max(1));
        let sums: Vec<f64> = devices.map(|device| device.iter().map(|&load| load as f64).sum()).collect();
        let spread = sums.iter().fold(0.0, |max, &sum| f64::max(max, sum))
            - sums.iter().fold(f64::INFINITY, |min, &sum| min.min(sum));
        let num_tokens = sums.iter().sum::<f64>() / experts_per_token as f64;
        if num_tokens > 0.0 { spread / num_tokens } else { 0.0 }
    };
    load.iter().map(score).sum::<f64>() / load.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::metrics;

    fn moe() -> MoeConfig {
        MoeConfig {
            num_experts: 3,
            router: moge_model::Router::GroupedSoftmax { num_expert_groups: 1, top_k_per_group: 2 },
            router_scale: true,
            expert_intermediate_size: 5,
            shared_intermediate_size: None,
        }
    }

    #[test]
    fn imbalance_is_the_spread_of_the_devices_by_the_tokens() {
        // Devices hold 2 experts each: 10, 20, 10 and 0, 7, 5 computations, of 20 and 6 tokens.
        let load = [vec![4, 6, 11, 9, 0, 10], vec![0, 0, 7, 0, 5, 0]];
        assert_eq!(imbalance_score(&load, 3, 2), (10.0 / 20.0 + 7.0 / 6.0) / 2.0);
        assert_eq!(imbalance_score(&load, 1, 2), 0.0);
        assert_eq!(imbalance_score(&[vec![0; 6]], 3, 2), 0.0);
    }

    #[test]
    fn loads_of_many_steps_stay_in_few_bins_that_lose_nothing() {
        let mut history = History::default();
        let num_steps = 1000;
        for step in 1..=num_steps {
            history.add(metrics(step), Some(&moe()), 3).unwrap();
        }
        let num_bins = history.bins.len();
        assert!((MIN_BINS..=2 * MIN_BINS).contains(&num_bins), "{num_bins}");
        let total: u64 = history.bins.iter().map(|bin| bin.load[0][0]).sum();
        assert_eq!(total, 10 * num_steps + num_steps * (num_steps + 1) / 2);
        assert!(history.bins.windows(2).all(|pair| pair[0].last_step + 1 == pair[1].first_step));
        let end = history.end().unwrap();
        assert_eq!((end.first_step, end.last_step), (897, 1000));
        assert_eq!(end.load[0][1], 50 * 104);
        assert_eq!(history.imbalance.len(), 1000);
    }

    #[test]
    fn phases_are_runs_of_steps_and_other_loads_are_refused() {
        let mut history = History::default();
        for step in 1..=7 {
            history.add(metrics(step), Some(&moe()), 3).unwrap();
        }
        let span = |name: &str, first_step, range| PhaseSpan { name: name.to_string(), first_step, range };
        assert_eq!(history.phases, [span("general", 1, 0..5), span("annealing", 6, 5..7)]);
        let error = history.add(metrics(8), None, 3).unwrap_err();
        assert!(error.contains("not 2 layers of 0 experts"), "{error}");
        let other = StepMetrics { expert_load: vec![vec![1, 2, 3]], ..metrics(8) };
        assert!(history.add(other, Some(&moe()), 3).unwrap_err().contains("not 2 layers of 3 experts"));
    }
}
