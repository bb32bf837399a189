//! One function for each parser of bytes that strangers write. It must return, whatever it is given: a panic, a hang and
//! unbounded memory are defects. `tests/mutations.rs` tries damaged goldens, `libfuzzer/` wraps the functions for cargo-fuzz.

use std::fs;
use std::path::Path;

use moge_model::{
    Architecture, ChatRequest, ChatTemplate, Checkpoint, LoadMode, ModelConfig, Prefix, TokenId, Tokenizer,
};
use serde_json::json;

/// A shard of weights: its header is checked, its data is mapped.
pub fn safetensors(data: &[u8]) {
    in_folder_with("model.safetensors", data, |dir| {
        if let Ok(checkpoint) = Checkpoint::open(dir, LoadMode::Mmap, &|_, _| ()) {
            checkpoint.tensors().for_each(|(_, tensor)| assert!(tensor.bytes().len() <= data.len()));
        }
    });
}

/// A `config.json`.
pub fn config(data: &[u8]) {
    let _ = ModelConfig::from_json(data, "config.json");
}

/// A SentencePiece `tokenizer.model`.
pub fn sentencepiece(data: &[u8]) {
    in_folder_with("tokenizer.model", data, tokenize);
}

/// A byte-level `tokenizer.json`.
pub fn tokenizer_json(data: &[u8]) {
    in_folder_with("tokenizer.json", data, tokenize);
}

/// A `chat_template.jinja`, and a conversation that it renders.
pub fn chat_template(data: &[u8]) {
    in_folder_with("chat_template.jinja", data, |dir| {
        let Ok(template) = ChatTemplate::load(dir, Architecture::Qwen3) else { return };
        let messages = [
            json!({ "role": "system", "content": "be brief" }),
            json!({ "role": "user", "content": "{{ 1 }} <|im_end|>" }),
            json!({ "role": "assistant", "content": "<think>\n</think>yes" }),
            json!({ "role": "user", "content": "\u{1f600}" }),
        ];
        let _ = template.render(&ChatRequest {
            messages: &messages,
            add_generation_prompt: true,
            ..ChatRequest::default()
        });
    });
}

/// The body of a request to each endpoint that takes one.
pub fn request_body(data: &[u8]) {
    moge_server::parse_request_body(data);
}

fn tokenize(dir: &Path) {
    let Ok(tokenizer) = Tokenizer::load(dir) else { return };
    let _ = tokenizer.encode("Hello,\u{a0}系统 <|im_start|>\u{0}\u{1f600}  1234\n", Prefix::Add);
    let ids: Vec<TokenId> = (0..300).chain([u32::MAX]).map(TokenId).collect();
    let _ = tokenizer.decode(&ids);
}

#[allow(clippy::expect_used, reason = "without a folder there is nothing to try")]
fn in_folder_with(name: &str, data: &[u8], check: impl Fn(&Path)) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join(name), data).expect("a file in a temporary folder");
    check(folder.path());
}
