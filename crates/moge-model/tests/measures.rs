//! What benchmarks ask of a model: times of operators, experts hit, bytes of weights.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use common::Golden;
use moge_model::{
    Batch, BlockId, Cpu, ExpertId, Isa, KvCache, KvType, Model, Operator, Precision, SequenceRows, StepLimits,
    StepOutput, TokenId, Workspace,
};

/// Steps of five rows that continue a sequence.
struct Steps {
    cpu: Cpu,
    kv_cache: KvCache,
    work: Workspace,
    output: StepOutput,
    num_tokens: usize,
}

impl Steps {
    fn new(model: &Model) -> Steps {
        let cpu = Cpu::new(Isa::select().unwrap(), 2);
        let limits = StepLimits { max_rows: 5, max_logit_rows: 5, max_context: 20, num_threads: cpu.num_threads() };
        let kv_cache = KvCache::new(model.config(), KvType::F32, 1);
        let work = Workspace::new(model.config(), Precision::F32, limits);
        Steps { cpu, kv_cache, work, output: StepOutput::default(), num_tokens: 0 }
    }

    fn step(&mut self, model: &Model) {
        let sequence = SequenceRows { num_rows: 5, first_position: self.num_tokens, block_table: vec![BlockId(0)] };
        let batch = Batch {
            tokens: (3..8).map(TokenId).collect(),
            sequences: vec![sequence],
            logit_rows: (0..5).collect(),
            ..Batch::default()
        };
        model.forward(&self.cpu, &batch, &mut self.kv_cache, &mut self.work, &mut self.output);
        self.num_tokens += 5;
    }
}

#[test]
fn experts_hit_counts_the_experts_that_rows_went_to_in_the_last_step() {
    let model = Golden::load("pangu-pro-moe-k2").model;
    let mut steps = Steps::new(&model);
    steps.output.record_trace();
    for _ in 0..2 {
        steps.step(&model);
        let chosen = steps.output.trace.as_ref().unwrap().routes.iter();
        let expected: Vec<usize> =
            chosen.map(|routes| routes.iter().map(|route| route.expert).collect::<HashSet<ExpertId>>().len()).collect();
        assert_eq!(expected.len(), model.config().num_layers());
        assert_eq!(steps.output.experts_hit(model.config()), expected);
        for (rows, routes) in
            steps.output.rows_per_expert.chunks_exact(10).zip(&steps.output.trace.as_ref().unwrap().routes)
        {
            let num_rows = |expert| routes.iter().filter(|route| route.expert.0 == expert).count();
            assert_eq!(rows, (0..10).map(num_rows).collect::<Vec<_>>());
        }
    }
    let dense = Golden::load("qwen3").model;
    let mut steps = Steps::new(&dense);
    steps.step(&dense);
    assert_eq!(steps.output.experts_hit(model.config()), [0usize; 0]);
}

#[test]
fn the_profile_has_time_for_every_operator_of_the_network_and_no_more_than_passed() {
    for (case, absent) in [
        ("pangu-pro-moe-v1", &[Operator::DenseMlp][..]),
        (
            "glm4",
            &[
                Operator::Router,
                Operator::SharedExpert,
                Operator::RoutedGateUp,
                Operator::RoutedDown,
                Operator::Combine,
            ],
        ),
    ] {
        let model = Golden::load(case).model;
        let mut steps = Steps::new(&model);
        steps.step(&model);
        assert!(steps.work.profile().is_none(), "nobody asked for it");
        let start = Instant::now();
        steps.work.record_profile();
        steps.step(&model);
        steps.step(&model);
        let passed = start.elapsed();
        let profile = steps.work.profile().unwrap();
        for operator in Operator::ALL {
            let expected = !absent.contains(&operator);
            assert_eq!(profile.time(operator) > Duration::ZERO, expected, "{case}: {}", operator.name());
        }
        assert!(profile.total() <= passed);
    }
}

#[test]
fn weight_bytes_are_those_of_the_checkpoint_by_what_uses_them() {
    for case in ["pangu-pro-moe-v1", "glm4", "qwen3-tied", "qwen3-moe-mixed", "llama3"] {
        let model = Golden::load(case).model;
        let stored = |part: &dyn Fn(&str) -> bool| -> u64 {
            let tensors =
                model.checkpoint().unwrap().tensors().filter(|(name, _)| name.ends_with(".weight") && part(name));
            tensors.filter(|(_, tensor)| tensor.shape().len() == 2).map(|(_, tensor)| tensor.bytes().len() as u64).sum()
        };
        let weights = model.cost();
        assert_eq!(weights.layers.len(), model.config().num_layers());
        let tied = model.config().tie_word_embeddings;
        let head = if tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
        assert_eq!(weights.head.bytes, stored(&|name| name == head), "{case}");
        for (index, layer) in weights.layers.iter().enumerate() {
            let prefix = format!("model.layers.{index}.");
            let in_layer = |part: &str| stored(&|name| name.starts_with(&(prefix.clone() + part)));
            assert_eq!(layer.attention.bytes, in_layer("self_attn."), "{case}");
            let all_experts = in_layer("mlp.experts.");
            assert_eq!(layer.expert.bytes, in_layer("mlp.experts.0."), "{case}");
            assert_eq!(layer.dense.bytes + layer.router.bytes, in_layer("mlp.") - all_experts, "{case}");
        }
    }
}
