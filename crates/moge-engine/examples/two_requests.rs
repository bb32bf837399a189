//! Two requests that share every step of the model.
#![allow(clippy::unwrap_used, reason = "an example")]

use std::collections::BTreeMap;
use std::path::Path;

use moge_engine::{Engine, EngineConfig, Request, SamplingParams};
use moge_model::{Cpu, Isa, KvType, LoadMode, Model, Precision, TokenId};

pub(crate) fn main() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/pangu-pro-moe-v1");
    let model = Model::load(&dir, LoadMode::Mmap, &|_, _| ()).unwrap();
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    let config = EngineConfig {
        activation: Precision::F32,
        kv: KvType::F32,
        num_blocks: 8,
        max_sequence_tokens: 64,
        max_batched_tokens: 16,
        max_running: 2,
        max_waiting: 2,
        eos_token_ids: Vec::new(),
        max_draft_tokens: 0,
    };
    let mut engine = Engine::new(model, &cpu, None, &config);
    for (prompt, temperature) in [(vec![5, 17, 42], 0.0), (vec![9, 8], 0.8)] {
        let sampling = SamplingParams { max_tokens: Some(6), temperature, seed: 1, ..SamplingParams::default() };
        let prompt = prompt.into_iter().map(TokenId).collect();
        engine.add_request(Request { prompt, sampling, grammar: None }).unwrap();
    }
    let mut answers: BTreeMap<_, Vec<TokenId>> = BTreeMap::new();
    while engine.has_unfinished() {
        for output in engine.step(&cpu) {
            answers.entry(output.id).or_default().extend(output.sampled.iter().map(|sampled| sampled.token));
        }
    }
    println!("{answers:?}");
    assert!(answers.len() == 2 && answers.values().all(|answer| answer.len() == 6));
}
