//! How much a step computes and how much it reads: what its time is compared with.

use moge_model::{Batch, LayerConfig, MlpConfig, ModelConfig, WeightBytes};

/// Operations of a step, two for each multiply-accumulate: the products of every row with the weights that it really
/// goes through, and attention's scores and weighted sums. The last layer's MLP and the head count for rows whose logits
/// are wanted.
pub(crate) fn step_ops(config: &ModelConfig, batch: &Batch) -> u64 {
    let (layers, hidden) = (config.num_layers() as u64, config.hidden_size as u64);
    let (rows, wanted) = (batch.num_rows() as u64, batch.logit_rows.len() as u64);
    let projections = 2 * hidden * (config.q_size() + config.kv_size()) as u64;
    // Every query head takes one product with each key and one with each value it sees.
    let attention = 2 * config.q_size() as u64 * keys_seen(batch);
    let in_layers = layers * (rows * projections + attention);
    let mlp: u64 = (1..=layers)
        .zip(&config.layers)
        .map(|(number, layer)| if number == layers { wanted } else { rows } * mlp_products(config, layer))
        .sum();
    let head = wanted * hidden * config.vocab_size as u64;
    2 * (in_layers + mlp + head)
}

/// Bytes that a step reads: each weight that any row goes through once, and the keys and values of every sequence, which
/// take `kv_token_bytes` over all layers. `experts_hit` is that of the step's workspace.
pub(crate) fn step_bytes(weights: &WeightBytes, kv_token_bytes: u64, batch: &Batch, experts_hit: &[usize]) -> u64 {
    let mut experts_hit = experts_hit.iter();
    let layers = weights.layers.iter().map(|layer| {
        let is_routed = layer.expert > 0;
        let num_experts = is_routed.then(|| experts_hit.next()).flatten().map_or(0, |&num_experts| num_experts as u64);
        layer.attention + layer.shared_mlp + num_experts * layer.expert
    });
    let tokens: usize = batch.sequences.iter().map(|sequence| sequence.first_position + sequence.num_rows).sum();
    layers.sum::<u64>() + weights.head + kv_token_bytes * tokens as u64
}

/// Multiply-accumulates of one row in one layer's MLP.
fn mlp_products(config: &ModelConfig, layer: &LayerConfig) -> u64 {
    let routed = match &layer.mlp {
        MlpConfig::Dense { .. } => 0,
        MlpConfig::Experts(moe) => 3 * moe.experts_per_token() * moe.expert_intermediate_size + moe.num_experts,
    };
    ((3 * layer.dense_width() + routed) * config.hidden_size) as u64
}

/// Keys that the rows of a step attend to: as many as each row's position, and its own.
fn keys_seen(batch: &Batch) -> u64 {
    let sum = |first: u64, rows: u64| rows * first + rows * (rows + 1) / 2;
    batch.sequences.iter().map(|sequence| sum(sequence.first_position as u64, sequence.num_rows as u64)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use moge_model::synth::presets;
    use moge_model::{BlockId, LayerBytes, SequenceRows, TokenId};

    /// Two sequences: rows at positions 3, 4 and at position 10; logits wanted of the last row.
    fn batch() -> Batch {
        let sequence =
            |num_rows, first_position| SequenceRows { num_rows, first_position, block_table: vec![BlockId(0)] };
        Batch {
            tokens: vec![TokenId(1); 3],
            sequences: vec![sequence(2, 3), sequence(1, 10)],
            logit_rows: vec![2],
            ..Batch::default()
        }
    }

    fn config(architecture: &str) -> ModelConfig {
        let preset = presets()
            .find(|preset| preset.name == "tiny" && format!("{:?}", preset.config.architecture) == architecture);
        let dir = tempfile::tempdir().unwrap();
        moge_model::synth::write_checkpoint(dir.path(), &preset.unwrap().config, &mut |_, _| ()).unwrap();
        ModelConfig::load(dir.path()).unwrap()
    }

    #[test]
    fn operations_are_those_of_a_loop_over_rows_and_layers() {
        for architecture in ["PanguProMoe", "Qwen3"] {
            let config = config(architecture);
            let (hidden, layers) = (config.hidden_size, config.num_layers());
            let mlp: usize = match &config.layers[0].mlp {
                MlpConfig::Dense { intermediate_size } => hidden * intermediate_size * 3,
                MlpConfig::Experts(moe) => {
                    let width = |inner: usize| hidden * inner * 3;
                    hidden * moe.num_experts
                        + width(moe.shared_intermediate_size.unwrap())
                        + width(moe.expert_intermediate_size) * moe.experts_per_token()
                }
            };
            let mut expected = 0;
            for (position, wanted) in [(3, false), (4, false), (10, true)] {
                for layer in 0..layers {
                    let heads = config.num_q_heads * config.head_dim;
                    let kv = config.num_kv_heads * config.head_dim;
                    expected += hidden * heads + hidden * kv + hidden * kv + heads * hidden;
                    expected += (position + 1) * heads * 2;
                    expected += if layer < layers - 1 || wanted { mlp } else { 0 };
                }
                expected += if wanted { hidden * config.vocab_size } else { 0 };
            }
            assert_eq!(step_ops(&config, &batch()), 2 * expected as u64, "{architecture}");
        }
    }

    #[test]
    fn bytes_are_the_weights_touched_and_the_context_of_each_sequence() {
        let layer = |expert| LayerBytes { attention: 1000, shared_mlp: 200, expert };
        let weights = WeightBytes { layers: vec![layer(30), layer(70)], head: 5 };
        assert_eq!(step_bytes(&weights, 11, &batch(), &[2, 3]), 2 * 1200 + 2 * 30 + 3 * 70 + 5 + 11 * (5 + 11));
        let dense = WeightBytes { layers: vec![layer(0), layer(0)], head: 5 };
        assert_eq!(step_bytes(&dense, 11, &batch(), &[]), 2 * 1200 + 5 + 11 * (5 + 11));
    }
}
