//! The experts of the rows that ask are those of a trace, and asking changes no logits.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use common::{Golden, run_whole};
use moge_model::{
    BLOCK_SIZE, Batch, BlockId, Cpu, ExpertId, Isa, KvCache, KvType, Model, Precision, SequenceRows, StepLimits,
    StepOutput, TokenId, Workspace,
};

/// A sequence fed in chunks of seven rows, every third row's logits wanted.
struct Steps<'a> {
    model: &'a Model,
    tokens: &'a [TokenId],
    /// Whether a token's experts are wanted.
    is_wanted: fn(usize) -> bool,
    with_trace: bool,
}

impl Steps<'_> {
    /// Bits of the logits, and of each routed layer the experts of the rows that asked.
    fn run(&self) -> (Vec<u32>, Vec<Vec<ExpertId>>) {
        let cpu = Cpu::new(Isa::select().unwrap(), 2);
        let config = self.model.config();
        let num_blocks = self.tokens.len().div_ceil(BLOCK_SIZE);
        let mut kv_cache = KvCache::new(config, KvType::F32, num_blocks);
        let limits =
            StepLimits { max_rows: 7, max_logit_rows: 3, max_context: num_blocks * BLOCK_SIZE, num_threads: 2 };
        let mut work = Workspace::new(config, Precision::F32, limits);
        let mut output = StepOutput::default();
        if self.with_trace {
            output.record_trace();
        }
        let mut logits = Vec::new();
        let mut expert_ids = vec![Vec::new(); config.num_routed_layers()];
        for (chunk, tokens) in self.tokens.chunks(7).enumerate() {
            let num_rows = tokens.len();
            let block_table = (0..num_blocks as u32).map(BlockId).collect();
            let batch = Batch {
                tokens: tokens.to_vec(),
                sequences: vec![SequenceRows { num_rows, first_position: 7 * chunk, block_table }],
                logit_rows: (0..num_rows as u32).filter(|row| row % 3 == 1).collect(),
                route_rows: (0..num_rows)
                    .filter(|row| (self.is_wanted)(7 * chunk + row))
                    .map(|row| row as u32)
                    .collect(),
                ..Batch::default()
            };
            self.model.forward(&cpu, &batch, &mut kv_cache, &mut work, &mut output);
            logits.extend(output.logits.iter().map(|x| x.to_bits()));
            let layer_len = output.expert_ids.len() / config.num_routed_layers().max(1);
            for (all, layer) in expert_ids.iter_mut().zip(output.expert_ids.chunks(layer_len.max(1))) {
                all.extend(layer);
            }
        }
        (logits, expert_ids)
    }
}

#[test]
fn rows_that_ask_get_their_experts_of_every_layer_whoever_wants_logits() {
    for case in ["pangu-pro-moe-v1", "pangu-pro-moe-k2", "qwen3-moe", "qwen3-moe-mixed"] {
        let golden = Golden::load(case);
        let experts_per_token = golden.model.config().moe().unwrap().experts_per_token();
        let (model, tokens) = (&golden.model, &golden.tokens("tokens")[..]);
        let trace = run_whole(model, tokens, Precision::F32).trace;
        let (plain_logits, nothing) = Steps { model, tokens, is_wanted: |_| false, with_trace: false }.run();
        assert!(nothing.iter().all(Vec::is_empty));
        let some: [fn(usize) -> bool; 3] = [|_| true, |position| position % 5 < 2, |position| position == 8];
        for (is_wanted, with_trace) in some.into_iter().flat_map(|wanted| [(wanted, false), (wanted, true)]) {
            let (logits, expert_ids) = Steps { model, tokens, is_wanted, with_trace }.run();
            assert!(logits == plain_logits, "{case}: asking changed the logits");
            for (ours, routes) in expert_ids.iter().zip(&trace.routes) {
                let rows = routes.chunks_exact(experts_per_token).enumerate();
                let wanted = rows.filter(|(position, _)| is_wanted(*position));
                let expected: Vec<ExpertId> = wanted.flat_map(|(_, row)| row).map(|route| route.expert).collect();
                assert_eq!(*ours, expected, "{case}, trace {with_trace}");
            }
        }
    }
}

#[test]
fn a_dense_network_has_no_experts_to_tell() {
    let golden = Golden::load("qwen3");
    let tokens = golden.tokens("tokens");
    let with = |is_wanted| Steps { model: &golden.model, tokens: &tokens, is_wanted, with_trace: false }.run();
    assert!(with(|_| true) == with(|_| false));
}
