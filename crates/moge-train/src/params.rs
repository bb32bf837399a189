//! Where each tensor of a network lies in the flat vectors of parameters, gradients and moments.

use std::ops::Range;

use moge_model::{ModelConfig, expected_tensors};

/// A tensor and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamTensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its dimensions, slowest first.
    pub shape: Vec<usize>,
    /// Its numbers in the flat vector.
    pub range: Range<usize>,
}

/// All tensors of a network, one after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The tensors, in the order of their ranges.
    pub tensors: Vec<ParamTensor>,
    /// Numbers in all.
    pub len: usize,
}

impl Layout {
    /// The layout of the network that `config` describes.
    pub fn new(config: &ModelConfig) -> Layout {
        let mut len = 0;
        let tensor = |spec: moge_model::TensorSpec| {
            let start = len;
            len += spec.shape.iter().product::<usize>();
            ParamTensor { name: spec.name, shape: spec.shape, range: start..len }
        };
        let tensors = expected_tensors(config).into_iter().map(tensor).collect();
        Layout { tensors, len }
    }

    /// Runs of parameters one after another that weight decay takes, or not: matrices always, norms, biases and
    /// `router_scale` if `decay_vectors`.
    pub(crate) fn decay_runs(&self, decay_vectors: bool) -> Vec<(Range<usize>, bool)> {
        let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
        for ParamTensor { shape, range, .. } in &self.tensors {
            // `router_scale` has a first dimension of 1.
            let decays = decay_vectors || (shape.len() > 1 && shape[0] > 1);
            match runs.last_mut() {
                Some((run, same)) if *same == decays => run.end = range.end,
                _ => runs.push((range.clone(), decays)),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::Layout;
    use crate::testing::SYNTH;

    #[test]
    fn weight_decay_takes_matrices_and_norms_and_biases_only_if_asked() {
        let layout = Layout::new(&SYNTH.model_config().unwrap());
        assert_eq!(layout.decay_runs(true), [(0..layout.len, true)]);
        let runs = layout.decay_runs(false);
        for tensor in &layout.tensors {
            let (run, decays) = runs.iter().find(|(run, _)| run.contains(&tensor.range.start)).unwrap();
            assert!(tensor.range.end <= run.end);
            let is_vector = ["norm.weight", ".bias", ".router_scale"].iter().any(|end| tensor.name.ends_with(end));
            assert_eq!(*decays, !is_vector, "{}", tensor.name);
        }
        assert!(runs.windows(2).all(|pair| pair[0].0.end == pair[1].0.start && pair[0].1 != pair[1].1));
    }
}
