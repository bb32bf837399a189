//! A sequence's logits are the same bits alone, among others, in any chunks, and with any number of threads.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::collections::BTreeMap;

use common::Golden;
use moge_model::synth::{SynthConfig, SynthMlp, write_checkpoint};
use moge_model::{
    Architecture, BLOCK_SIZE, Batch, BlockId, Cpu, Dtype, Isa, KvCache, KvType, LayerFormats, Model, PackedFormat,
    Precision, QuantScheme, SequenceRows, StepLimits, StepOutput, TokenId, Workspace,
};

/// A sequence that a test feeds in chunks.
struct Feed {
    tokens: Vec<TokenId>,
    computed: usize,
    block_table: Vec<BlockId>,
    logits: Vec<f32>,
}

/// Rows that a sequence brings in each step, at the most.
type Chunking = fn(usize) -> usize;

/// The sequence under test, then `num_others` of different lengths; blocks of all are their own.
fn feeds(tokens: &[TokenId], num_others: usize, vocab_size: u32) -> Vec<Feed> {
    let mut next_block = 0;
    let mut feed = |tokens: Vec<TokenId>| {
        let num_blocks = tokens.len().div_ceil(BLOCK_SIZE) as u32;
        let block_table = (next_block..next_block + num_blocks).rev().map(BlockId).collect();
        next_block += num_blocks;
        Feed { tokens, computed: 0, block_table, logits: Vec::new() }
    };
    let other = |i: u32| (0..5 + 7 * i).map(|t| TokenId((t * 31 + i * 17) % vocab_size)).collect();
    let others: Vec<Vec<TokenId>> = (0..num_others as u32).map(other).collect();
    std::iter::once(tokens.to_vec()).chain(others).map(&mut feed).collect()
}

/// Logits of the first sequence at every position. In each step a sequence brings up to `chunk(step)` rows.
fn run(
    model: &Model,
    (activation, kv_type): (Precision, KvType),
    num_threads: usize,
    mut feeds: Vec<Feed>,
    chunk: impl Fn(usize) -> usize,
) -> Vec<f32> {
    let cpu = Cpu::new(Isa::select().unwrap(), num_threads);
    let num_blocks = feeds.iter().map(|feed| feed.block_table.len()).sum();
    let max_rows = feeds.iter().map(|feed| feed.tokens.len()).sum();
    let mut kv_cache = KvCache::new(model.config(), kv_type, num_blocks);
    let limits = StepLimits { max_rows, max_logit_rows: max_rows, max_context: max_rows, num_threads };
    let mut work = Workspace::new(model.config(), activation, limits);
    let mut output = StepOutput::default();
    for step in 0.. {
        let mut batch = Batch::default();
        let mut wanted = 0;
        // The sequence under test stands at another place of the batch in every step.
        let num_feeds = feeds.len();
        for i in (0..num_feeds).map(|i| (i + step) % num_feeds) {
            let feed = &mut feeds[i];
            let num_rows = chunk(step + i).min(feed.tokens.len() - feed.computed);
            if num_rows == 0 {
                continue;
            }
            if i == 0 {
                let first = batch.num_rows() as u32;
                batch.logit_rows = (first..first + num_rows as u32).collect();
                wanted = num_rows;
            }
            batch.tokens.extend(&feed.tokens[feed.computed..][..num_rows]);
            let block_table = feed.block_table.clone();
            batch.sequences.push(SequenceRows { num_rows, first_position: feed.computed, block_table });
            feed.computed += num_rows;
        }
        if batch.sequences.is_empty() {
            break;
        }
        model.forward(&cpu, &batch, &mut kv_cache, &mut work, &mut output);
        assert_eq!(output.logits.len(), wanted * model.config().vocab_size);
        feeds[0].logits.extend_from_slice(&output.logits);
    }
    feeds.swap_remove(0).logits
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn logits_do_not_depend_on_batch_chunks_or_threads() {
    for case in ["pangu-pro-moe-v1", "pangu-pro-moe-k2", "qwen3", "glm4"] {
        let golden = Golden::load(case);
        let (model, tokens) = (&golden.model, golden.tokens("tokens"));
        let vocab_size = model.config().vocab_size as u32;
        for precision in
            [(Precision::F32, KvType::F32), (Precision::Bf16, KvType::Bf16), (Precision::Bf16, KvType::Int8)]
        {
            let alone = run(model, precision, 1, feeds(&tokens, 0, vocab_size), |_| usize::MAX);
            assert_eq!(alone.len(), tokens.len() * model.config().vocab_size);
            let chunkings: [(&str, Chunking); 4] = [
                ("whole", |_| usize::MAX),
                ("one by one", |_| 1),
                ("sevens", |_| 7),
                ("uneven", |step| [1, 13, 2, 33, 5][step % 5]),
            ];
            for (name, chunk) in chunkings {
                for (num_threads, num_others) in [(1, 0), (2, 0), (3, 0), (1, 16), (2, 16), (3, 16)] {
                    let feeds = feeds(&tokens, num_others, vocab_size);
                    let together = run(model, precision, num_threads, feeds, chunk);
                    let what = format!("{case} {precision:?}, {name}, {num_threads} threads, {num_others} others");
                    assert!(bits(&together) == bits(&alone), "{what}");
                }
            }
        }
    }
}

#[test]
fn quantised_weights_keep_to_the_same_rule_in_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let config = SynthConfig {
        architecture: Architecture::PanguProMoe,
        num_layers: 2,
        hidden_size: 96,
        num_q_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        mlp: SynthMlp::Experts {
            num_experts: 6,
            num_expert_groups: 3,
            experts_per_token: 3,
            expert_intermediate_size: 32,
            shared_intermediate_size: Some(160),
        },
        vocab_size: 500,
        max_position_embeddings: 256,
        tie_word_embeddings: false,
        attention_bias: false,
        dtype: Dtype::Bf16,
        seed: 5,
    };
    let path = dir.path().join("model");
    write_checkpoint(&path, &config, &mut |_, _| {}).unwrap();
    let tokens: Vec<TokenId> = (0..83).map(|t| TokenId(t * 7 % 500)).collect();
    let [w8a8, w4a8] = [PackedFormat::W8A8, PackedFormat::W4A8].map(QuantScheme::uniform);
    let attention = w8a8.layers.attention;
    let plain_experts = LayerFormats { mlp: None, ..w8a8.layers };
    let mixed = QuantScheme {
        layers: LayerFormats { attention, shared_expert: None, ..w4a8.layers },
        exceptions: BTreeMap::from([(1, plain_experts)]),
        lm_head: None,
    };
    for scheme in [w8a8, w4a8, mixed] {
        let cpu = Cpu::new(Isa::select().unwrap(), 2);
        let model = Model::load_quantizing(&path, &cpu, scheme.clone(), &|_, _| {}).unwrap();
        for activation in [(Precision::F32, KvType::F32), (Precision::Bf16, KvType::Int8)] {
            let alone = run(&model, activation, 1, feeds(&tokens, 0, 500), |_| usize::MAX);
            assert!(alone.iter().all(|x| x.is_finite()));
            let chunkings: [Chunking; 3] = [|_| 1, |_| 7, |step| [1, 13, 2, 33, 5][step % 5]];
            for chunk in chunkings {
                for (num_threads, num_others) in [(1, 0), (3, 0), (2, 16)] {
                    let together = run(&model, activation, num_threads, feeds(&tokens, num_others, 500), chunk);
                    assert!(bits(&together) == bits(&alone), "{scheme:?} {num_threads} threads, {num_others} others");
                }
            }
        }
    }
}

#[test]
fn a_context_of_several_attention_chunks_gives_the_same_bits_however_it_is_fed() {
    let golden = Golden::load("pangu-pro-moe-k2");
    let model = &golden.model;
    let vocab_size = model.config().vocab_size as u32;
    let tokens: Vec<TokenId> = (0..700).map(|t| TokenId(t * 7 % vocab_size)).collect();
    for kv_type in [KvType::F32, KvType::Bf16, KvType::Int8] {
        let precision = (Precision::F32, kv_type);
        let whole = run(model, precision, 1, feeds(&tokens, 0, vocab_size), |_| usize::MAX);
        let chunked = run(model, precision, 2, feeds(&tokens, 3, vocab_size), |_| 67);
        assert!(bits(&chunked) == bits(&whole), "{kv_type:?}: prefill in chunks of 67");
        let feeds = feeds(&tokens, 0, vocab_size);
        let decoded = run(model, precision, 3, feeds, |step| if step == 0 { 650 } else { 1 });
        assert!(bits(&decoded) == bits(&whole), "{kv_type:?}: the last 50 tokens one by one");
    }
}
