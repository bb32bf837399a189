//! Engines on small networks.
#![allow(dead_code, reason = "each test program uses a part")]

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moge_engine::{Engine, EngineConfig, SequenceOutput};
use moge_model::{Cpu, Isa, KvType, LoadMode, Model, Precision, Tokenizer};

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens").join(name)
}

/// A tokenizer of more tokens than the models have.
pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::load(&golden("tokenizer_json/qwen3")).unwrap())
}

pub(crate) fn cpu(num_threads: usize) -> Cpu {
    Cpu::new(Isa::select().unwrap(), num_threads)
}

/// Room for any test; without drafts.
pub(crate) fn config() -> EngineConfig {
    EngineConfig {
        activation: Precision::F32,
        kv: KvType::F32,
        num_blocks: 90,
        max_sequence_tokens: 400,
        max_batched_tokens: 500,
        max_running: 17,
        max_waiting: 20,
        eos_token_ids: Vec::new(),
        max_draft_tokens: 0,
    }
}

/// An engine and the threads that it has to itself.
pub(crate) struct TestEngine {
    engine: Engine,
    cpu: Cpu,
}

impl TestEngine {
    /// Of the golden network `case`.
    pub(crate) fn new(
        case: &str,
        num_threads: usize,
        tokenizer: Option<Arc<Tokenizer>>,
        config: &EngineConfig,
    ) -> TestEngine {
        let model = Model::load(&golden(case), LoadMode::Mmap, &|_, _| ()).unwrap();
        let cpu = cpu(num_threads);
        TestEngine { engine: Engine::new(model, &cpu, tokenizer, config), cpu }
    }

    pub(crate) fn step(&mut self) -> Vec<SequenceOutput> {
        self.engine.step(&self.cpu)
    }
}

impl Deref for TestEngine {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        &self.engine
    }
}

impl DerefMut for TestEngine {
    fn deref_mut(&mut self) -> &mut Engine {
        &mut self.engine
    }
}
