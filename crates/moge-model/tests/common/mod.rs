//! Golden checkpoints and small drivers of the model, shared by the tests.
#![allow(dead_code, reason = "each test file uses its part")]

use std::path::Path;

use moge_model::{
    BLOCK_SIZE, Batch, BlockId, Cpu, Isa, KvCache, KvType, LoadMode, Model, Precision, SequenceRows, StepLimits,
    StepOutput, TokenId, Trace, Workspace,
};
use safetensors::SafeTensors;

pub(crate) const CASES: [&str; 12] = [
    "pangu-pro-moe-v1",
    "pangu-pro-moe-k2",
    "pangu-embedded",
    "pangu-embedded-tied",
    "qwen3",
    "qwen3-tied",
    "glm4",
    "glm4-rope-parameters",
    "qwen3-moe",
    "qwen3-moe-mixed",
    "llama",
    "llama3",
];

/// A golden checkpoint and what the reference computed with it.
pub(crate) struct Golden {
    pub(crate) model: Model,
    expected: Vec<u8>,
}

impl Golden {
    pub(crate) fn load(case: &str) -> Golden {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens").join(case);
        let model = Model::load(&dir, LoadMode::Mmap, &|_, _| ()).unwrap();
        Golden { model, expected: std::fs::read(dir.join("expected.safetensors")).unwrap() }
    }

    fn words_or_empty(&self, name: &str) -> Vec<[u8; 4]> {
        let tensors = SafeTensors::deserialize(&self.expected).unwrap();
        let data = tensors.tensor(name).map(|tensor| tensor.data().to_vec()).unwrap_or_default();
        data.chunks_exact(4).map(|word| word.try_into().unwrap()).collect()
    }

    pub(crate) fn f32_or_empty(&self, name: &str) -> Vec<f32> {
        self.words_or_empty(name).into_iter().map(f32::from_le_bytes).collect()
    }

    pub(crate) fn i32_or_empty(&self, name: &str) -> Vec<i32> {
        self.words_or_empty(name).into_iter().map(i32::from_le_bytes).collect()
    }

    pub(crate) fn f32(&self, name: &str) -> Vec<f32> {
        let numbers = self.f32_or_empty(name);
        assert!(!numbers.is_empty(), "{name} is not recorded");
        numbers
    }

    pub(crate) fn tokens(&self, name: &str) -> Vec<TokenId> {
        let tokens = self.i32_or_empty(name);
        assert!(!tokens.is_empty(), "{name} is not recorded");
        tokens.into_iter().map(|token| TokenId(token as u32)).collect()
    }
}

/// What a pass over a whole sequence left.
pub(crate) struct Run {
    pub(crate) logits: Vec<f32>,
    pub(crate) trace: Trace,
}

/// All tokens in one step, logits wanted everywhere.
pub(crate) fn run_whole(model: &Model, tokens: &[TokenId], activation: Precision) -> Run {
    run_with_kv(model, tokens, activation, activation.into())
}

/// As [`run_whole`], with a KV cache of another type than the activations.
pub(crate) fn run_with_kv(model: &Model, tokens: &[TokenId], activation: Precision, kv_type: KvType) -> Run {
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    let num_blocks = tokens.len().div_ceil(BLOCK_SIZE);
    let mut kv_cache = KvCache::new(model.config(), kv_type, num_blocks);
    let limits = StepLimits {
        max_rows: tokens.len(),
        max_logit_rows: tokens.len(),
        max_context: tokens.len(),
        num_threads: cpu.num_threads(),
    };
    let mut work = Workspace::new(model.config(), activation, limits);
    let mut output = StepOutput::default();
    output.record_trace();
    let batch = Batch {
        tokens: tokens.to_vec(),
        sequences: vec![SequenceRows {
            num_rows: tokens.len(),
            first_position: 0,
            // Blocks in falling order: a table that is ignored cannot pass.
            block_table: (0..num_blocks as u32).rev().map(BlockId).collect(),
        }],
        logit_rows: (0..tokens.len() as u32).collect(),
        ..Batch::default()
    };
    model.forward(&cpu, &batch, &mut kv_cache, &mut work, &mut output);
    Run { logits: output.logits, trace: output.trace.unwrap() }
}

/// `num_tokens` tokens, each the likeliest; ties go to the lower id.
pub(crate) fn greedy(model: &Model, prompt: &[TokenId], num_tokens: usize) -> Vec<TokenId> {
    let cpu = Cpu::new(Isa::select().unwrap(), 1);
    let num_blocks = (prompt.len() + num_tokens).div_ceil(BLOCK_SIZE);
    let mut kv_cache = KvCache::new(model.config(), KvType::F32, num_blocks);
    let limits = StepLimits {
        max_rows: prompt.len(),
        max_logit_rows: 1,
        max_context: prompt.len() + num_tokens,
        num_threads: cpu.num_threads(),
    };
    let mut work = Workspace::new(model.config(), Precision::F32, limits);
    let mut output = StepOutput::default();
    let (mut tokens, mut computed) = (prompt.to_vec(), 0);
    while tokens.len() < prompt.len() + num_tokens {
        let batch = Batch {
            tokens: tokens[computed..].to_vec(),
            sequences: vec![SequenceRows {
                num_rows: tokens.len() - computed,
                first_position: computed,
                block_table: (0..num_blocks as u32).map(BlockId).collect(),
            }],
            logit_rows: vec![(tokens.len() - computed - 1) as u32],
            ..Batch::default()
        };
        model.forward(&cpu, &batch, &mut kv_cache, &mut work, &mut output);
        computed = tokens.len();
        let logits = &output.logits;
        let best = (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best });
        tokens.push(TokenId(best.unwrap() as u32));
    }
    tokens.split_off(prompt.len())
}

/// Log-softmax of each row of `vocab_size` logits.
pub(crate) fn logprobs(logits: &[f32], vocab_size: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(logits.len());
    for row in logits.chunks_exact(vocab_size) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
        out.extend(row.iter().map(|&x| (f64::from(x - max) - sum.ln()) as f32));
    }
    out
}
