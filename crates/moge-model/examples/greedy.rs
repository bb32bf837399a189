//! The likeliest tokens after a prompt, one step of the model after another.
#![allow(clippy::unwrap_used, reason = "an example")]

use std::path::Path;

use moge_model::{
    BLOCK_SIZE, Batch, BlockId, Cpu, Isa, KvCache, KvType, LoadMode, Model, Precision, SequenceRows, StepLimits,
    StepOutput, TokenId, Workspace,
};

pub(crate) fn main() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/pangu-pro-moe-v1");
    let model = Model::load(&dir, LoadMode::Mmap, &|_, _| ()).unwrap();
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    let mut kv_cache = KvCache::new(model.config(), KvType::F32, 1);
    let limits = StepLimits { max_rows: 3, max_logit_rows: 1, max_context: BLOCK_SIZE, num_threads: cpu.num_threads() };
    let mut work = Workspace::new(model.config(), Precision::F32, limits);
    let mut output = StepOutput::new(model.config(), limits);

    let mut tokens = [5, 17, 42].map(TokenId).to_vec();
    let mut num_computed = 0;
    for _ in 0..8 {
        let num_rows = tokens.len() - num_computed;
        let batch = Batch {
            tokens: tokens[num_computed..].to_vec(),
            sequences: vec![SequenceRows { num_rows, first_position: num_computed, block_table: vec![BlockId(0)] }],
            logit_rows: vec![num_rows as u32 - 1],
            ..Batch::default()
        };
        model.forward(&cpu, &batch, &mut kv_cache, &mut work, &mut output);
        num_computed = tokens.len();
        let likeliest = (0..output.logits.len()).max_by(|&a, &b| output.logits[a].total_cmp(&output.logits[b]));
        tokens.push(TokenId(likeliest.unwrap() as u32));
    }
    println!("{tokens:?}");
    assert_eq!(tokens.len(), 11);
}
