//! A `tokenizer.json` with byte-level BPE, as Qwen3 and GLM-4 have it: 256 byte symbols, merges, then special tokens.

use serde_json::{Map, Value, json};

use super::words::joined_pieces;

/// Split of text before merging: a contraction, letters with one leading mark or space, one digit, marks, white space.
const SPLIT_PATTERN: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The tokenizer as JSON. The last ids are the `special` tokens; `prefix` names those that begin every encoded text.
///
/// # Panics
/// If `vocab_size` is less than 256 and the special tokens.
pub(super) fn tokenizer_json(vocab_size: usize, special: &[&str], prefix: &[&str]) -> Vec<u8> {
    let num_ordinary = vocab_size - special.len();
    let joined: Vec<_> = joined_pieces(byte_symbol(b' ')).take(num_ordinary - 256).collect();
    let bytes = (0..=u8::MAX).map(|byte| byte_symbol(byte).to_string());
    let ordinary = bytes.chain(joined.iter().map(|piece| piece.text()));
    let vocab: Map<String, Value> = ordinary.zip(0..).map(|(piece, id)| (piece, Value::from(id))).collect();
    let merges: Vec<Value> = joined.into_iter().map(|piece| json!([piece.left, piece.right])).collect();
    let added: Vec<Value> = special.iter().zip(num_ordinary..).map(|(content, id)| added_token(content, id)).collect();
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false });
    let post_processor = if prefix.is_empty() {
        byte_level.clone()
    } else {
        let first_id = |token: &str| num_ordinary + special.iter().position(|s| *s == token).unwrap_or_default();
        json!({ "type": "Sequence", "processors": [byte_level, template(prefix, first_id)] })
    };
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": SPLIT_PATTERN }, "behavior": "Isolated", "invert": false },
                byte_level,
            ],
        },
        "post_processor": post_processor,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges,
        },
    });
    tokenizer.to_string().into_bytes()
}

/// The character that stands for a byte in a byte-level vocabulary: itself where it prints, else one from U+0100 on.
fn byte_symbol(byte: u8) -> char {
    let prints = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if prints(byte) {
        return byte.into();
    }
    let num_before = (0..byte).filter(|byte| !prints(*byte)).count();
    char::from_u32(0x100 + num_before as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
}

fn added_token(content: &str, id: usize) -> Value {
    json!({
        "id": id,
        "content": content,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        // The delimiters of thinking are kept in decoded text, as in the official files.
        "special": !["<think>", "</think>"].contains(&content),
    })
}

/// A post-processor that puts `prefix` before a text.
fn template(prefix: &[&str], id_of: impl Fn(&str) -> usize) -> Value {
    let token = |token: &&str| json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    let sequence = |id: &str| json!({ "Sequence": { "id": id, "type_id": 0 } });
    let single: Vec<Value> = prefix.iter().map(token).chain([sequence("A")]).collect();
    let pair: Vec<Value> = single.iter().cloned().chain([sequence("B")]).collect();
    let special_tokens: Map<String, Value> = prefix
        .iter()
        .map(|token| (token.to_string(), json!({ "id": token, "ids": [id_of(token)], "tokens": [token] })))
        .collect();
    json!({ "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special_tokens })
}
