use std::path::Path;

use moge_kernels::{Begin, Cpu, Isa, KvType, Precision, SequenceRows};

use super::*;
use crate::checkpoint::reader::{Checkpoint, LoadMode};
use crate::network::decoder::decode;
use crate::network::load::load;
use crate::network::weights::{Network, Share};
use crate::{BLOCK_SIZE, BlockId, TokenId};

/// What ranks add up in another order than one rank alone, on logits of order one to ten.
const SHARED_TOLERANCE: f32 = 1e-4;

/// A rank: its part of a network, and all that a step of it needs.
struct Rank {
    config: ModelConfig,
    network: Network,
    kv_cache: KvCache,
    work: Workspace,
    output: StepOutput,
}

impl Rank {
    fn new(case: &str, share: Share, num_rows: usize) -> Rank {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens").join(case);
        let whole = ModelConfig::load(&dir).unwrap();
        let checkpoint = Checkpoint::open(&dir, LoadMode::Mmap, &|_, _| ()).unwrap();
        let network = load(&whole, share, &checkpoint).unwrap();
        let config = share.of_config(&whole);
        let limits =
            StepLimits { max_rows: num_rows, max_logit_rows: num_rows, max_context: BLOCK_SIZE, num_threads: 1 };
        Rank {
            kv_cache: KvCache::new(&config, KvType::F32, 1),
            work: Workspace::new(&config, Precision::F32, limits),
            output: StepOutput::default(),
            network,
            config,
        }
    }
}

fn batch(num_rows: usize) -> Batch {
    let sequence = SequenceRows { num_rows, first_position: 0, block_table: vec![BlockId(0)] };
    Batch {
        tokens: (0..num_rows as u32).map(|row| TokenId(7 + row * 3)).collect(),
        sequences: vec![sequence],
        logit_rows: vec![2, num_rows as u32 - 1],
        ..Batch::default()
    }
}

/// Every rank's `projected` becomes the sum of all.
fn reduce(steps: &mut [CpuStep<'_>]) {
    let mut sum = vec![0.0; steps[0].work.projected.len()];
    for step in &*steps {
        sum.iter_mut().zip(&step.work.projected).for_each(|(sum, x)| *sum += x);
    }
    steps.iter_mut().for_each(|step| step.work.projected.copy_from_slice(&sum));
}

/// The decoder on ranks side by side, which meet after every attention and every MLP.
fn decode_together(networks: &[&Network], steps: &mut [CpuStep<'_>]) {
    for (network, step) in networks.iter().zip(&mut *steps) {
        step.embed(&network.embedding);
    }
    for index in 0..networks[0].layers.len() {
        let layers: Vec<_> = networks.iter().map(|network| &network.layers[index]).collect();
        for (layer, step) in layers.iter().zip(&mut *steps) {
            step.norm_for_attention(layer);
            step.project_to_heads(layer);
            step.write_kv(layer, index);
            step.attend(index);
            step.project_from_heads(layer);
        }
        reduce(steps);
        for (layer, step) in layers.iter().zip(&mut *steps) {
            step.add_to_residual(layer.post_norms.as_ref().map(|norms| &norms.attention[..]));
            step.norm_for_mlp(layer);
            match &layer.mlp {
                LayerMlp::Dense(mlp) => step.dense_mlp(mlp),
                LayerMlp::Experts(experts) => {
                    step.route(experts);
                    step.dispatch();
                    step.shared_expert(experts);
                    step.routed_experts(experts, Begin::Zero);
                }
            }
        }
        reduce(steps);
        for (layer, step) in layers.iter().zip(&mut *steps) {
            step.add_to_residual(layer.post_norms.as_ref().map(|norms| &norms.mlp[..]));
        }
    }
    for (network, step) in networks.iter().zip(steps) {
        step.keep_logit_rows();
        step.logits(&network.final_norm, &network.head);
    }
}

fn logits_of(case: &str, num_ranks: usize) -> Vec<Vec<f32>> {
    let (cpu, batch) = (Cpu::new(Isa::best(), 1), batch(23));
    let mut ranks: Vec<Rank> =
        (0..num_ranks).map(|rank| Rank::new(case, Share { rank, num_ranks }, batch.num_rows())).collect();
    let (mut networks, mut steps) = (Vec::new(), Vec::new());
    for Rank { config, network, kv_cache, work, output } in &mut ranks {
        let mut step = CpuStep { config, cpu: &cpu, batch: &batch, kv_cache, work, output };
        step.begin(&step.config.rope.inverse_frequencies());
        networks.push(&*network);
        steps.push(step);
    }
    match &mut steps[..] {
        [step] => decode(networks[0], step),
        _ => decode_together(&networks, &mut steps),
    }
    drop(steps);
    ranks.into_iter().map(|rank| rank.output.logits).collect()
}

#[test]
fn two_halves_of_a_network_add_up_to_the_whole() {
    for case in ["pangu-pro-moe-v1", "qwen3", "llama", "glm4"] {
        let whole = logits_of(case, 1).remove(0);
        for half in logits_of(case, 2) {
            let difference = whole.iter().zip(&half).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(half.len() == whole.len() && difference <= SHARED_TOLERANCE, "{case}: off by {difference}");
        }
    }
}
