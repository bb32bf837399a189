//! An engine whose weights were replaced answers as one that was made with them.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use moge_engine::{Engine, EngineConfig, Request, SamplingParams};
use moge_model::synth::{TensorRng, Uniform, presets};
use moge_model::{
    Cpu, Isa, KvType, Model, ModelConfig, PackedFormat, Precision, QuantScheme, TokenId, expected_tensors,
};

fn params(config: &ModelConfig, seed: u64) -> Vec<f32> {
    let numbers = |spec: moge_model::TensorSpec| {
        TensorRng::new(seed, &spec.name).numbers(Uniform::with_deviation(0.4), spec.num_elements() as usize)
    };
    expected_tensors(config).into_iter().flat_map(numbers).collect()
}

/// Forty tokens after a prompt of more than one block, which the prefix cache keeps.
fn answer(engine: &mut Engine, cpu: &Cpu) -> Vec<TokenId> {
    let prompt = (0..70).map(|token| TokenId(token * 5 + 3)).collect();
    let sampling = SamplingParams { max_tokens: Some(40), ignore_eos: true, ..SamplingParams::default() };
    engine.add_request(Request { prompt, sampling, grammar: None }).unwrap();
    let mut tokens = Vec::new();
    while engine.has_unfinished() {
        tokens.extend(engine.step(cpu).into_iter().flat_map(|output| output.sampled).map(|sampled| sampled.token));
    }
    tokens
}

#[test]
fn answers_are_those_of_the_weights_that_came_last() {
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    let config = presets().find(|preset| preset.name == "tiny").unwrap().config.model_config().unwrap();
    let limits = EngineConfig {
        activation: Precision::F32,
        kv: KvType::F32,
        num_blocks: 9,
        max_sequence_tokens: 200,
        max_batched_tokens: 50,
        max_running: 2,
        max_waiting: 1,
        eos_token_ids: Vec::new(),
        max_draft_tokens: 0,
    };
    for scheme in [QuantScheme::default(), QuantScheme::uniform(PackedFormat::W8A8)] {
        let make = |seed| {
            let model = Model::from_params(&cpu, &config, &params(&config, seed), scheme.clone()).unwrap();
            Engine::new(model, &cpu, None, &limits)
        };
        let mut engine = make(1);
        let first = answer(&mut engine, &cpu);
        engine.update_params(&cpu, &params(&config, 2));
        let second = answer(&mut engine, &cpu);
        assert!(second == answer(&mut make(2), &cpu) && second != first);
    }
}
