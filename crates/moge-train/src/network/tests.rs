use std::fs;
use std::path::{Path, PathBuf};

use moge_kernels::{Accumulate, Cpu, IGNORED_TARGET, Isa, Precision};
use moge_model::{
    BLOCK_SIZE, Batch as EngineBatch, BlockId, ExpertId, KvCache, LayerConfig, LoadMode, MlpConfig, Model, ModelConfig,
    NormPlacement, QuantScheme, Router, SequenceRows, StepLimits, StepOutput, TokenId, Workspace as EngineWorkspace,
};
use safetensors::SafeTensors;
use serde_json::Value;

use super::{Batch, LossScales, Losses, MAX_ROWS, TrainMemory, TrainNetwork, Workspace};
use crate::batch::TokenBatch;
use crate::checkpoint::load_weights;
use crate::init::initial_weights;
use crate::params::Layout;

const CASES: [&str; 8] = [
    "pangu-pro-moe-k1",
    "pangu-pro-moe-k2",
    "plain-top-k",
    "pangu-embedded-tied",
    "qwen3",
    "qwen3-moe",
    "glm4",
    "llama3",
];

/// A golden case: a network, a batch of packed pieces, and what PyTorch made of them.
pub(crate) struct Golden {
    pub(crate) dir: PathBuf,
    pub(crate) config: ModelConfig,
    pub(crate) layout: Layout,
    pub(crate) params: Vec<f32>,
}

impl Golden {
    pub(crate) fn load(case: &str) -> Golden {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/train").join(case);
        let config = ModelConfig::load(&dir).unwrap();
        let layout = Layout::new(&config);
        let params = load_weights(&dir, &config, &layout).unwrap();
        Golden { dir, config, layout, params }
    }

    pub(crate) fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.dir.join(name)).unwrap()).unwrap()
    }

    fn batch(&self) -> (TokenBatch, Option<Vec<ExpertId>>) {
        let bytes = fs::read(self.dir.join("batch.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let ids = tensors.tensor("expert_ids").ok();
        let ids = ids.map(|ids| integers(ids.data()).iter().map(|&id| ExpertId(id as u32)).collect());
        let [tokens, targets, offsets] =
            ["tokens", "targets", "piece_offsets"].map(|name| integers(tensors.tensor(name).unwrap().data()));
        (token_batch(&tokens, &targets, &offsets), ids)
    }

    fn scales(&self, batch: &TokenBatch) -> LossScales {
        let expected = self.json("expected.json");
        LossScales {
            cross_entropy: 1.0 / batch.num_targets() as f32,
            aux: expected["aux_coefficient"].as_f64().unwrap() as f32,
            z: expected["z_coefficient"].as_f64().unwrap() as f32,
        }
    }

    fn pass(
        &self,
        cpu: &Cpu,
        activation: Precision,
        recompute: bool,
        forced: Option<&[ExpertId]>,
    ) -> (Losses, Vec<f32>) {
        let (rows, _) = self.batch();
        let network = TrainNetwork::new(&self.config);
        // More rows than the batch has.
        let mut work = Workspace::new(cpu, &self.config, activation, rows.num_rows() + 7, recompute);
        let mut grads = vec![f32::NAN; self.layout.len];
        let scales = self.scales(&rows);
        let batch = Batch { rows: &rows, forced_experts: forced, row_weights: None };
        let losses =
            network.forward_backward(cpu, (&self.params, (&mut grads, Accumulate::Set)), batch, scales, &mut work);
        (losses, grads)
    }
}

pub(crate) fn integers(bytes: &[u8]) -> Vec<i32> {
    bytes.as_chunks::<4>().0.iter().map(|&bytes| i32::from_le_bytes(bytes)).collect()
}

pub(crate) fn token_batch(tokens: &[i32], targets: &[i32], offsets: &[i32]) -> TokenBatch {
    TokenBatch {
        tokens: tokens.iter().map(|&token| token as u32).collect(),
        targets: targets.iter().map(|&target| u32::try_from(target).unwrap_or(IGNORED_TARGET)).collect(),
        offsets: offsets.iter().map(|&offset| offset as usize).collect(),
    }
}

fn norm(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn losses_and_gradients_equal_pytorch() {
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    for case in CASES {
        let golden = Golden::load(case);
        let (rows, _) = golden.batch();
        let (losses, grads) = golden.pass(&cpu, Precision::F32, false, None);
        let expected = golden.json("expected.json");
        let scales = golden.scales(&rows);
        for (name, found) in [
            ("cross_entropy", losses.cross_entropy / rows.num_targets() as f64),
            ("aux_loss", losses.routing.aux * f64::from(scales.aux)),
            ("z_loss", losses.routing.z * f64::from(scales.z)),
        ] {
            let expected = expected[name].as_f64().unwrap();
            assert!((found - expected).abs() <= 1e-5 * expected.abs(), "{case}: {name} {found} for {expected}");
        }
        let bytes = fs::read(golden.dir.join("gradients.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        for tensor in &golden.layout.tensors {
            let stored = expected.tensor(&tensor.name).unwrap();
            let expected = stored.data().as_chunks::<4>().0.iter().map(|&bytes| f64::from(f32::from_le_bytes(bytes)));
            let found = grads[tensor.range.clone()].iter().map(|&x| f64::from(x));
            let error = norm(expected.clone().zip(found).map(|(a, b)| a - b));
            let size = norm(expected);
            assert!(error <= 1e-4 * size, "{case}: {}: off by {error:e} of {size:e}", tensor.name);
        }
    }
}

#[test]
fn gradients_have_the_same_bits_at_any_number_of_threads_and_when_computed_again() {
    let isa = Isa::select().unwrap();
    for case in ["pangu-pro-moe-k2", "glm4"] {
        let golden = Golden::load(case);
        for activation in [Precision::F32, Precision::Bf16] {
            let (losses, grads) = golden.pass(&Cpu::new(isa, 1), activation, false, None);
            for (num_threads, recompute) in [(2, false), (3, true), (5, false)] {
                let found = golden.pass(&Cpu::new(isa, num_threads), activation, recompute, None);
                assert_eq!(found.0, losses);
                assert!(found.1.iter().zip(&grads).all(|(a, b)| a.to_bits() == b.to_bits()), "{case} {num_threads}");
            }
        }
    }
}

#[test]
fn gradients_of_two_passes_add_up() {
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    for case in CASES {
        let golden = Golden::load(case);
        let (rows, _) = golden.batch();
        let (_, once) = golden.pass(&cpu, Precision::F32, false, None);
        let network = TrainNetwork::new(&golden.config);
        let mut work = Workspace::new(&cpu, &golden.config, Precision::F32, rows.num_rows(), false);
        let mut grads = vec![f32::NAN; golden.layout.len];
        for store in [Accumulate::Set, Accumulate::Add] {
            let batch = Batch { rows: &rows, forced_experts: None, row_weights: None };
            let scales = golden.scales(&rows);
            network.forward_backward(&cpu, (&golden.params, (&mut grads, store)), batch, scales, &mut work);
        }
        let size = norm(once.iter().map(|&x| f64::from(x)));
        let error = norm(grads.iter().zip(&once).map(|(&twice, &once)| f64::from(twice - 2.0 * once)));
        assert!(error <= 1e-6 * size, "{case}: off by {error:e} of {size:e}");
    }
}

#[test]
fn forced_experts_that_are_the_routers_own_change_nothing_and_others_are_taken() {
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    for case in ["pangu-pro-moe-k1", "pangu-pro-moe-k2", "plain-top-k", "qwen3-moe"] {
        let golden = Golden::load(case);
        let moe = *golden.config.moe().unwrap();
        let (rows, ids) = golden.batch();
        let ids = ids.unwrap();
        let own = golden.pass(&cpu, Precision::F32, false, None);
        assert_eq!(golden.pass(&cpu, Precision::F32, false, Some(&ids)), own, "{case}");
        // The next expert of the same expert group; all of a row's stay different.
        let group = moe.experts_per_group() as u32;
        let next = |id: &ExpertId| ExpertId(id.0 / group * group + (id.0 + 1) % group);
        let other: Vec<ExpertId> = ids.iter().map(next).collect();
        let (losses, _) = golden.pass(&cpu, Precision::F32, false, Some(&other));
        let per_layer = rows.num_rows() * moe.experts_per_token();
        for (layer, load) in losses.expert_load.iter().enumerate() {
            let mut expected = vec![0; moe.num_experts];
            other[layer * per_layer..(layer + 1) * per_layer].iter().for_each(|id| expected[id.0 as usize] += 1);
            assert_eq!(*load, expected, "{case}");
        }
    }
}

#[test]
#[should_panic(expected = "forced experts")]
fn forced_experts_of_another_number_panic() {
    let golden = Golden::load("pangu-pro-moe-k2");
    let mut ids = golden.batch().1.unwrap();
    ids.push(ids[0]);
    golden.pass(&Cpu::new(Isa::best(), 1), Precision::F32, false, Some(&ids));
}

#[test]
fn the_memory_of_the_largest_networks_and_batches_is_counted_without_overflow() {
    let mut config = Golden::load("pangu-pro-moe-k2").config;
    let size = 1 << 21;
    (config.hidden_size, config.vocab_size, config.num_q_heads, config.num_kv_heads) = (size, size, 1, 1);
    config.head_dim = size;
    for (num_layers, num_experts) in [(1, 1 << 18), (1 << 12, 1 << 6)] {
        let mlp = MlpConfig::Experts(moge_model::MoeConfig {
            num_experts,
            router: Router::TopKSoftmax { top_k: num_experts, renormalize: false },
            router_scale: true,
            expert_intermediate_size: size,
            shared_intermediate_size: Some(size),
        });
        config.layers = vec![LayerConfig { norms: NormPlacement::Pre, mlp }; num_layers];
        for recompute in [false, true] {
            let memory = TrainMemory::new(&config, MAX_ROWS, recompute);
            assert!(memory.activation_bytes > 1 << 55 && memory.total_bytes() >= memory.activation_bytes);
        }
    }
}

/// Logits of the engine for one piece.
fn engine_logits(cpu: &Cpu, model: &Model, tokens: &[u32], activation: Precision) -> Vec<f32> {
    let num_blocks = tokens.len().div_ceil(BLOCK_SIZE);
    let mut kv_cache = KvCache::new(model.config(), activation.into(), num_blocks);
    let limits = StepLimits {
        max_rows: tokens.len(),
        max_logit_rows: tokens.len(),
        max_context: tokens.len(),
        num_threads: cpu.num_threads(),
    };
    let mut work = EngineWorkspace::new(model.config(), activation, limits);
    let mut output = StepOutput::default();
    let batch = EngineBatch {
        tokens: tokens.iter().map(|&token| TokenId(token)).collect(),
        sequences: vec![SequenceRows {
            num_rows: tokens.len(),
            first_position: 0,
            block_table: (0..num_blocks as u32).map(BlockId).collect(),
        }],
        logit_rows: (0..tokens.len() as u32).collect(),
        ..EngineBatch::default()
    };
    model.forward(cpu, &batch, &mut kv_cache, &mut work, &mut output);
    output.logits
}

#[test]
fn forward_equals_the_engine_on_the_same_checkpoint() {
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    for case in CASES {
        let golden = Golden::load(case);
        let (rows, _) = golden.batch();
        let network = TrainNetwork::new(&golden.config);
        let model = Model::load(&golden.dir, LoadMode::Mmap, &|_, _| ()).unwrap();
        for (activation, tolerance) in [(Precision::F32, 2e-5), (Precision::Bf16, 5e-2)] {
            let mut work = Workspace::new(&cpu, &golden.config, activation, rows.num_rows(), false);
            let batch = Batch { rows: &rows, forced_experts: None, row_weights: None };
            let logits = network.logits(&cpu, &golden.params, batch, &mut work);
            for piece in rows.pieces() {
                let expected = engine_logits(&cpu, &model, &rows.tokens[piece.clone()], activation);
                let vocab = golden.config.vocab_size;
                let found = &logits[piece.start * vocab..piece.end * vocab];
                let error = norm(found.iter().zip(&expected).map(|(a, b)| f64::from(a - b)));
                let size = norm(expected.iter().map(|&x| f64::from(x)));
                assert!(error <= tolerance * size, "{case} {activation:?}: off by {error:e} of {size:e}");
            }
        }
    }
}

#[test]
fn experts_between_sandwich_norms_compute_as_in_the_engine_and_have_the_gradient_of_differences() {
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    let mut golden = Golden::load("pangu-pro-moe-k2");
    golden.config.layers.iter_mut().for_each(|layer| layer.norms = NormPlacement::Sandwich);
    golden.layout = Layout::new(&golden.config);
    golden.params = initial_weights(&golden.config, &golden.layout, 3);
    let (rows, ids) = golden.batch();
    let vocab = golden.config.vocab_size;

    let model = Model::from_params(&cpu, &golden.config, &golden.params, QuantScheme::default()).unwrap();
    let network = TrainNetwork::new(&golden.config);
    let mut work = Workspace::new(&cpu, &golden.config, Precision::F32, rows.num_rows(), false);
    let logits =
        network.logits(&cpu, &golden.params, Batch { rows: &rows, forced_experts: None, row_weights: None }, &mut work);
    for piece in rows.pieces() {
        let expected = engine_logits(&cpu, &model, &rows.tokens[piece.clone()], Precision::F32);
        let found = &logits[piece.start * vocab..piece.end * vocab];
        let error = norm(found.iter().zip(&expected).map(|(a, b)| f64::from(a - b)));
        assert!(error <= 2e-5 * norm(expected.iter().map(|&x| f64::from(x))), "off by {error:e}");
    }

    // Along its gradient the loss grows by the gradient's length, whatever experts are nearly as good.
    let scales = golden.scales(&rows);
    let forced = ids.as_deref();
    let loss = |golden: &Golden| {
        let Losses { cross_entropy, routing, .. } = golden.pass(&cpu, Precision::F32, false, forced).0;
        let [of_tokens, of_load, of_logits] = [scales.cross_entropy, scales.aux, scales.z].map(f64::from);
        cross_entropy * of_tokens + routing.aux * of_load + routing.z * of_logits
    };
    let (_, grads) = golden.pass(&cpu, Precision::F32, false, forced);
    let length = norm(grads.iter().map(|&g| f64::from(g)));
    let step = 1e-2 / length;
    let start = golden.params.clone();
    let mut at = |distance: f64| {
        let moved = start.iter().zip(&grads).map(|(p, g)| (f64::from(*p) + distance * f64::from(*g)) as f32);
        golden.params = moved.collect();
        loss(&golden)
    };
    let slope = (at(step) - at(-step)) / (2.0 * step * length);
    assert!((slope / length - 1.0).abs() < 5e-3, "slope {slope}, gradient {length}");
}

#[test]
fn row_weights_count_in_loss_and_gradients_and_equal_ones_change_nothing() {
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    let golden = Golden::load("qwen3");
    let (rows, _) = golden.batch();
    let network = TrainNetwork::new(&golden.config);
    let scales = LossScales { cross_entropy: 0.5, aux: 0.0, z: 0.0 };
    let mut work = Workspace::new(&cpu, &golden.config, Precision::F32, rows.num_rows(), false);
    let mut pass = |rows: &TokenBatch, row_weights: Option<&[f32]>| {
        let mut grads = vec![f32::NAN; golden.layout.len];
        let batch = Batch { rows, forced_experts: None, row_weights };
        let losses =
            network.forward_backward(&cpu, (&golden.params, (&mut grads, Accumulate::Set)), batch, scales, &mut work);
        (losses.cross_entropy, grads)
    };
    let plain = pass(&rows, None);
    assert!(pass(&rows, Some(&vec![1.0; rows.num_rows()])) == plain);
    // Twice the weight is twice the loss and the gradient; a row of weight 0 is as one without a target.
    let (loss, grads) = pass(&rows, Some(&vec![2.0; rows.num_rows()]));
    assert!(loss == 2.0 * plain.0 && grads.iter().zip(&plain.1).all(|(doubled, once)| *doubled == 2.0 * once));
    let weights: Vec<f32> = (0..rows.num_rows()).map(|row| if row % 3 == 0 { 0.0 } else { 1.0 }).collect();
    let mut fewer = rows.clone();
    fewer.targets.iter_mut().step_by(3).for_each(|target| *target = IGNORED_TARGET);
    let (weighed, masked) = (pass(&rows, Some(&weights)), pass(&fewer, None));
    assert!((weighed.0 - masked.0).abs() <= 1e-9 * masked.0);
    let error = norm(weighed.1.iter().zip(&masked.1).map(|(a, b)| f64::from(a - b)));
    assert!(error <= 1e-6 * norm(masked.1.iter().map(|&x| f64::from(x))), "off by {error:e}");
    // Without any target there is no loss and no gradient.
    let nothing = TokenBatch { targets: vec![IGNORED_TARGET; rows.num_rows()], ..rows.clone() };
    assert!(pass(&nothing, None) == (0.0, vec![0.0; golden.layout.len]));
}
