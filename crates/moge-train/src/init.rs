//! Weights before the first step.

use moge_model::ModelConfig;
use moge_model::synth::{TensorRng, Uniform};

use crate::params::{Layout, ParamTensor};

/// Random weights for the network that `config` describes, a function of the seed.
///
/// Matrices have the standard deviation `sqrt(2 / (5 * hidden_size))`, those that add to the residual stream `1 / sqrt(2 *
/// num_layers)` of it, so that the stream does not grow with the number of layers (arXiv 1910.05895; arXiv 1901.09321 for the
/// idea). Norms and the router's scale are 1, biases 0.
pub fn initial_weights(config: &ModelConfig, layout: &Layout, seed: u64) -> Vec<f32> {
    let mut weights = vec![0.0; layout.len];
    for tensor in &layout.tensors {
        fill(&mut weights[tensor.range.clone()], tensor, config, seed);
    }
    weights
}

fn fill(weights: &mut [f32], ParamTensor { name, .. }: &ParamTensor, config: &ModelConfig, seed: u64) {
    let ends_with = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    if ends_with(&["norm.weight", "layernorm.weight", ".router_scale"]) {
        return weights.fill(1.0);
    }
    if ends_with(&[".bias"]) {
        return weights.fill(0.0);
    }
    let mut deviation = (0.4 / config.hidden_size as f32).sqrt();
    if ends_with(&["o_proj.weight", "down_proj.weight"]) {
        deviation /= (2.0 * config.num_layers() as f32).sqrt();
    }
    weights.copy_from_slice(&TensorRng::new(seed, name).numbers(Uniform::with_deviation(deviation), weights.len()));
}

#[cfg(test)]
mod tests {
    use super::initial_weights;
    use crate::params::Layout;
    use crate::testing::SYNTH;

    #[test]
    fn weights_have_their_deviations_and_follow_the_seed() {
        let config = SYNTH.model_config().unwrap();
        let layout = Layout::new(&config);
        let weights = initial_weights(&config, &layout, 5);
        assert_eq!(weights, initial_weights(&config, &layout, 5));
        assert_ne!(weights, initial_weights(&config, &layout, 6));
        let hidden = config.hidden_size as f64;
        for tensor in &layout.tensors {
            let numbers = weights[tensor.range.clone()].iter().map(|&x| f64::from(x));
            let deviation = (numbers.map(|x| x * x).sum::<f64>() / tensor.range.len() as f64).sqrt();
            let expected = match tensor.name.as_str() {
                name if name.ends_with("bias") => 0.0,
                name if name.contains("norm") || name.ends_with("router_scale") => 1.0,
                name if name.contains("o_proj") || name.contains("down_proj") => (0.4 / hidden / 4.0).sqrt(),
                _ => (0.4 / hidden).sqrt(),
            };
            // Five standard errors of the smallest matrix.
            assert!((deviation - expected).abs() <= 0.2 * expected, "{}: {deviation} for {expected}", tensor.name);
        }
    }
}
