use super::*;
use crate::network::config::MlpConfig;
use crate::synth::{Preset, presets};
use crate::{BlockId, SequenceRows, TokenId};

/// Two sequences: rows at positions 3, 4 and at position 10; logits wanted of the last row.
fn batch() -> Batch {
    let sequence = |num_rows, first_position| SequenceRows { num_rows, first_position, block_table: vec![BlockId(0)] };
    Batch {
        tokens: vec![TokenId(1); 3],
        sequences: vec![sequence(2, 3), sequence(1, 10)],
        logit_rows: vec![2],
        ..Batch::default()
    }
}

fn preset(name: &str) -> ModelConfig {
    let named: Vec<&Preset> = presets().filter(|preset| preset.name == name).collect();
    named[0].config.model_config().unwrap()
}

/// The tiny presets, and a network with dense layers among routed ones.
fn configs() -> Vec<ModelConfig> {
    let tiny = presets().filter(|preset| preset.name == "tiny");
    let mut configs: Vec<ModelConfig> = tiny.map(|preset| preset.config.model_config().unwrap()).collect();
    let mut mixed = configs.iter().find(|config| config.moe().is_some()).unwrap().clone();
    for layer in [1, 3] {
        mixed.layers[layer].mlp = MlpConfig::Dense { intermediate_size: 72 };
    }
    configs.push(mixed);
    configs
}

fn mlp_weights(hidden: usize, mlp: &MlpConfig) -> usize {
    match mlp {
        MlpConfig::Dense { intermediate_size } => hidden * intermediate_size * 3,
        MlpConfig::Experts(moe) => {
            let width = |inner: usize| hidden * inner * 3;
            hidden * moe.num_experts
                + width(moe.shared_intermediate_size.unwrap_or(0))
                + width(moe.expert_intermediate_size) * moe.experts_per_token()
        }
    }
}

#[test]
fn operations_are_those_of_a_loop_over_rows_and_layers() {
    for config in configs() {
        let (hidden, last) = (config.hidden_size, config.num_layers() - 1);
        let (heads, kv) = (config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let (mut expected, mut per_token) = (0, 6 * hidden * config.vocab_size);
        for layer in &config.layers {
            per_token += 6 * (2 * hidden * (heads + kv) + mlp_weights(hidden, &layer.mlp));
        }
        for (position, wanted) in [(3, false), (4, false), (10, true)] {
            for (index, layer) in config.layers.iter().enumerate() {
                expected += hidden * heads + hidden * kv + hidden * kv + heads * hidden;
                expected += (position + 1) * heads * 2;
                expected += if index < last || wanted { mlp_weights(hidden, &layer.mlp) } else { 0 };
            }
            expected += if wanted { hidden * config.vocab_size } else { 0 };
        }
        let cost = NetworkCost::of(&config);
        assert_eq!(cost.step_ops(&config, &batch()), 2 * expected as u64, "{:?}", config.architecture);
        assert_eq!(cost.training_ops_per_token(), per_token as u64, "{:?}", config.architecture);
    }
}

#[test]
fn bytes_are_the_weights_touched_and_the_context_of_each_sequence() {
    let matrix = |bytes| MatrixCost { num_weights: bytes, bytes };
    let layer =
        |expert| LayerCost { attention: matrix(1000), dense: matrix(150), router: matrix(50), expert: matrix(expert) };
    let cost = |experts: [u64; 3]| NetworkCost {
        layers: experts.map(layer).to_vec(),
        head: matrix(5),
        embedding: matrix(5),
        total: matrix(0),
        experts_per_token: 1,
        num_experts: 4,
    };
    let read = cost([30, 0, 70]).step_bytes(11, &batch(), &[2, 3]);
    assert_eq!(read, 3 * 1200 + 2 * 30 + 3 * 70 + 5 + 11 * (5 + 11), "the dense layer is not counted among the routed");
    assert_eq!(cost([0; 3]).step_bytes(11, &batch(), &[]), 3 * 1200 + 5 + 11 * (5 + 11));
}

#[test]
fn published_networks_have_the_parameters_that_their_makers_state() {
    for (name, billions, active) in [
        ("pangu-pro-moe", 72.0, 16.5),
        ("qwen3-30b-a3b", 30.5, 3.3),
        ("qwen3-32b", 32.8, 32.8),
        ("glm-z1-32b", 32.6, 32.6),
        ("llama-3.1-8b", 8.03, 8.03),
    ] {
        let cost = NetworkCost::of(&preset(name));
        let near = |found: u64, stated: f64| (found as f64 / 1e9 / stated - 1.0).abs() < 0.02;
        assert!(near(cost.total.num_weights, billions), "{name}: {}", cost.total.num_weights);
        assert!(near(cost.active_per_token(), active), "{name}: {} active", cost.active_per_token());
    }
}

#[test]
fn the_total_is_that_of_the_tensors_in_every_format() {
    use crate::checkpoint::quant_scheme::QuantScheme;
    use crate::network::weights::expected_tensors;
    for config in configs() {
        let weights: u64 = expected_tensors(&config).iter().map(|spec| spec.num_elements()).sum();
        assert_eq!(NetworkCost::of(&config).total.num_weights, weights);
        let packed = ModelConfig { quant: QuantScheme::uniform(moge_kernels::PackedFormat::W8A8), ..config };
        let specs = expected_tensors(&packed);
        let bytes = specs.iter().map(|spec| match spec.packed {
            Some(_) => spec.stored_shape().iter().product::<usize>() as u64,
            None => 2 * spec.num_elements(),
        });
        assert_eq!(NetworkCost::of(&packed).total.bytes, bytes.sum::<u64>());
    }
}
