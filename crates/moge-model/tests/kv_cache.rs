//! A KV cache of less precision than the activations changes log-probabilities by little.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use common::{CASES, Golden, logprobs, run_with_kv};
use moge_model::{BLOCK_SIZE, KvCache, KvType, Precision};

/// Largest root mean square, over the vocabulary, by which a row's log-probabilities differ from those with a cache in
/// f32: bf16 keeps 8 bits of a number, int8 7 bits of the largest of a head. In the median over the rows, because a row
/// whose expert choice is close may choose another.
const ROW_TOLERANCES: [(KvType, f64); 2] = [(KvType::Bf16, 0.03), (KvType::Int8, 0.06)];

#[test]
fn a_narrow_cache_stays_close_to_one_in_f32_and_is_not_the_same() {
    for case in CASES {
        let golden = Golden::load(case);
        let vocab_size = golden.model.config().vocab_size;
        let run = |kv_type| {
            let run = run_with_kv(&golden.model, &golden.tokens("tokens"), Precision::F32, kv_type);
            logprobs(&run.logits, vocab_size)
        };
        let exact = run(KvType::F32);
        for (kv_type, tolerance) in ROW_TOLERANCES {
            let narrow = run(kv_type);
            let rows = exact.chunks_exact(vocab_size).zip(narrow.chunks_exact(vocab_size));
            let mut differences: Vec<f64> = rows
                .map(|(exact, narrow)| exact.iter().zip(narrow).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>())
                .map(|sum| (sum / vocab_size as f64).sqrt())
                .collect();
            differences.sort_by(f64::total_cmp);
            let median = differences[differences.len() / 2];
            assert!(median > 0.0 && median <= tolerance, "{case} {kv_type:?}: {median}");
        }
    }
}

#[test]
fn a_block_takes_its_numbers_and_for_int8_their_scales() {
    let golden = Golden::load("pangu-pro-moe-k2");
    let config = golden.model.config();
    let width = config.head_dim.next_multiple_of(16);
    let num_heads = 2 * config.num_layers() * BLOCK_SIZE * config.num_kv_heads;
    let note_bytes = config.num_layers() * size_of::<u64>();
    for (kv_type, head_bytes) in [(KvType::F32, 4 * width), (KvType::Bf16, 2 * width), (KvType::Int8, width + 4)] {
        assert_eq!(KvCache::block_bytes(config, kv_type), (num_heads * head_bytes + note_bytes) as u64);
    }
}
