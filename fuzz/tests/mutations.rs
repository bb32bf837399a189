//! Damaged goldens in every parser: the same damage in every run.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next_below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

/// What breaks parsers where it replaces or follows something.
const NASTY: [&[u8]; 14] = [
    b"\0",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"-1",
    b"18446744073709551615",
    b"9223372036854775808",
    b"1e999",
    b"null",
    b"[]",
    b"{}",
    b"\"\"",
    b"\"\\ud800\"",
    b"{{",
    b"{% for x in range(99999) %}",
    b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
];

/// `seed` with one to four changes within its first `reach` bytes.
fn mutate(seed: &[u8], reach: usize, random: &mut Random) -> Vec<u8> {
    let mut data = seed.to_vec();
    for _ in 0..1 + random.next_below(4) {
        let len = data.len().min(reach);
        let at = random.next_below(len + 1);
        let end = (at + 1 + random.next_below(16)).min(data.len());
        match random.next_below(6) {
            0 => data.truncate(at),
            1 if at < data.len() => data[at] ^= 1 << random.next_below(8),
            2 if at < data.len() => data[at] = random.next_below(256) as u8,
            3 if at < end => drop(data.drain(at..end)),
            4 if at < end => {
                let copy = data[at..end].to_vec();
                let to = random.next_below(len + 1);
                data.splice(to..to, copy);
            }
            _ => {
                let nasty = NASTY[random.next_below(NASTY.len())];
                let replaced = if random.next_below(2) == 0 { at..at } else { at..end.max(at) };
                data.splice(replaced, nasty.iter().copied());
            }
        }
    }
    data
}

/// Try `target` on the goldens and on `num_mutations` of each.
fn try_goldens(target: fn(&[u8]), paths: &[&str], reach: usize, num_mutations: u64) {
    for path in paths {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../goldens").join(path);
        let golden = fs::read(&file).unwrap();
        target(&golden);
        for seed in 0..num_mutations {
            let data = mutate(&golden, reach.min(golden.len()), &mut Random(seed));
            assert!(catch_unwind(|| target(&data)).is_ok(), "{path}, mutation {seed}");
        }
    }
}

#[test]
fn damaged_headers_of_weights_are_refused_or_read() {
    let files = ["qwen3/model.safetensors", "pangu-pro-moe-v1/model-00001-of-00002.safetensors"];
    try_goldens(moge_fuzz::safetensors, &files, 2000, 500);
}

#[test]
fn damaged_configs_are_refused_or_read() {
    let files = [
        "qwen3/config.json",
        "pangu-pro-moe-v1/config.json",
        "qwen3-moe/config.json",
        "glm4/config.json",
        "llama3/config.json",
    ];
    try_goldens(moge_fuzz::config, &files, usize::MAX, 2000);
}

#[test]
fn damaged_sentencepiece_models_are_refused_or_tokenise() {
    try_goldens(
        moge_fuzz::sentencepiece,
        &["sentencepiece/pangu_like.model", "sentencepiece/nmt_nfkc.model"],
        usize::MAX,
        150,
    );
}

#[test]
fn damaged_tokenizer_files_are_refused_or_tokenise() {
    try_goldens(
        moge_fuzz::tokenizer_json,
        &["tokenizer_json/qwen3/tokenizer.json", "tokenizer_json/glm4/tokenizer.json"],
        usize::MAX,
        200,
    );
}

#[test]
fn damaged_chat_templates_are_refused_or_render() {
    try_goldens(
        moge_fuzz::chat_template,
        &["chat/qwen3_like.jinja", "chat/glm4_like.jinja", "chat/llama3_like.jinja"],
        usize::MAX,
        300,
    );
}

#[test]
fn damaged_requests_are_refused_or_read() {
    let body = br#"{"model": "m", "messages": [{"role": "user", "content": "hi", "tool_calls": [{"id": "1", "type": "function",
        "function": {"name": "f", "arguments": "{}"}}]}], "prompt": ["a", "b"], "input": "x", "tokens": [1, 2], "max_tokens": 5,
        "temperature": 0.7, "top_p": 0.9, "stop": ["a", "b"], "logit_bias": {"5": -1.5}, "n": 2, "seed": 7, "stream": true,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer"}}}}"#;
    moge_fuzz::request_body(body);
    for seed in 0..3000 {
        let data = mutate(body, body.len(), &mut Random(seed));
        assert!(catch_unwind(|| moge_fuzz::request_body(&data)).is_ok(), "mutation {seed}");
    }
}
