//! Our SentencePiece reader against what the C++ library did (`reference/sentencepiece_goldens.py`), and against files
//! that mean harm.

use std::fs;
use std::path::PathBuf;

use moge_model::TokenId;
use moge_model::tokenizer::sentencepiece::SentencePiece;
use serde::Deserialize;
use serde::de::DeserializeOwned;

const MODELS: [&str; 7] = ["pangu_like", "nmt_nfkc", "nmt_nfkc_cf", "user_defined", "unused", "suffix", "unescaped"];

/// What the library did with one model.
#[derive(Deserialize)]
struct Golden {
    /// For each text its ids, and what they decode to if that is not the text.
    texts: Vec<(Vec<TokenId>, Option<String>)>,
    /// What each id alone decodes to.
    pieces: Vec<String>,
    /// Random ids and what they decode to.
    sequences: Vec<(Vec<TokenId>, String)>,
}

fn golden_bytes(file: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../goldens/sentencepiece").join(file);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn golden_json<T: DeserializeOwned>(file: &str) -> T {
    serde_json::from_slice(&golden_bytes(file)).unwrap()
}

fn load(name: &str) -> SentencePiece {
    let file = format!("{name}.model");
    SentencePiece::from_bytes(&golden_bytes(&file), &file).unwrap()
}

#[test]
fn every_text_encodes_and_decodes_as_with_the_library() {
    let texts: Vec<String> = golden_json("texts.json");
    for name in MODELS {
        let (model, golden): (_, Golden) = (load(name), golden_json(&format!("{name}.json")));
        assert_eq!(golden.texts.len(), texts.len());
        for (text, (ids, decoded)) in texts.iter().zip(&golden.texts) {
            assert_eq!(&model.encode(text), ids, "{name}: encode {text:?}");
            assert_eq!(&model.decode(ids), decoded.as_ref().unwrap_or(text), "{name}: decode {ids:?}");
        }
    }
}

#[test]
fn every_id_and_random_sequences_decode_as_with_the_library() {
    for name in MODELS {
        let (model, golden): (_, Golden) = (load(name), golden_json(&format!("{name}.json")));
        assert_eq!(golden.pieces.len(), model.vocab_size(), "{name}");
        for (index, decoded) in golden.pieces.iter().enumerate() {
            assert_eq!(&model.decode(&[TokenId(index as u32)]), decoded, "{name}: id {index}");
        }
        for (ids, decoded) in &golden.sequences {
            assert_eq!(&model.decode(ids), decoded, "{name}: {ids:?}");
        }
    }
}
