//! Our SentencePiece reader against what the C++ library did (`reference/sentencepiece_goldens.py`), and against files
//! that mean harm.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::PathBuf;

use moge_model::TokenId;
use moge_model::tokenizer::sentencepiece::SentencePiece;
use proptest::prelude::{Strategy, any, prop, prop_assert_eq, prop_oneof, proptest};
use serde::Deserialize;
use serde::de::DeserializeOwned;

const MODELS: [&str; 7] = ["pangu_like", "nmt_nfkc", "nmt_nfkc_cf", "user_defined", "unused", "suffix", "unescaped"];

/// Results of the library for one model.
#[derive(Deserialize)]
struct Golden {
    /// For each text its ids, and what they decode to if that is not the text.
    texts: Vec<(Vec<TokenId>, Option<String>)>,
    /// Text of each id alone.
    pieces: Vec<String>,
    /// Random ids and what they decode to.
    sequences: Vec<(Vec<TokenId>, String)>,
}

fn golden_bytes(file: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../goldens/sentencepiece").join(file);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn golden_json<T: DeserializeOwned>(file: &str) -> T {
    serde_json::from_slice(&golden_bytes(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn load(name: &str) -> SentencePiece {
    let file = format!("{name}.model");
    SentencePiece::from_bytes(&golden_bytes(&file), &file).unwrap_or_else(|error| panic!("{error}"))
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

/// Bytes to change files with: the same ones in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % limit as u64) as usize
    }

    /// Cut, flip, overwrite, insert, move or double some bytes, mostly where the structure is.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(2) {
            if bytes.is_empty() {
                return;
            }
            let at = match self.below(3) {
                0 => self.below(bytes.len()),
                1 => bytes.len() - 1 - self.below(bytes.len().min(200)),
                _ => self.below(bytes.len().min(400)),
            };
            match self.below(12) {
                0 => bytes.truncate(at),
                1 => drop(bytes.splice(at..at, [0xff, 0xff, 0xff, 0xff, 0x7f])),
                2 => bytes.insert(at, self.below(256) as u8),
                3 => drop(bytes.remove(at)),
                4..8 => bytes[at] ^= 1 << self.below(8),
                8..11 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, 0x0a, 0x12][self.below(7)],
                _ => {
                    let end = bytes.len().min(at + 1 + self.below(40));
                    bytes.extend_from_within(at..end);
                }
            }
        }
    }
}

#[test]
fn damaged_models_are_refused_or_work_but_never_panic() {
    let texts = ["", "The quick 你好 \t\0 ab...c\u{ad}", "[unused9] ▁▁ <0x0A> ❤️ ① 1234567890 ............"];
    let mut random = Random(42);
    let mut num_loaded = 0;
    // The tries of the large models take long to check, so that fewer variants must do.
    let runs = [("pangu_like", 2000), ("unused", 2000), ("suffix", 4000), ("user_defined", 2000), ("nmt_nfkc", 60)];
    for (name, num_variants) in runs {
        let valid = golden_bytes(&format!("{name}.model"));
        for _ in 0..num_variants {
            let mut bytes = valid.clone();
            random.mutate(&mut bytes);
            let Ok(model) = SentencePiece::from_bytes(&bytes, name) else { continue };
            num_loaded += 1;
            for text in texts {
                let _ = model.decode(&model.encode(text));
            }
            let ids: Vec<TokenId> = (0..20).map(|_| TokenId(random.below(model.vocab_size() + 2) as u32)).collect();
            let _ = model.decode(&ids);
        }
    }
    assert!(num_loaded > 1000, "only {num_loaded} variants got past the reader");
}

/// Characters and fragments that the models know, without U+2581: that decodes to a space.
fn text_strategy() -> impl Strategy<Value = String> {
    const FRAGMENTS: &[&str] =
        &["the", " ", "  ", "\n", "你好", "[unused16]", "[unused9]", "<s>", "<0x0A>", "12", "👨‍👩‍👧", "e\u{301}"];
    let part = prop_oneof![
        any::<char>().prop_filter("decodes to a space", |&c| c != '\u{2581}').prop_map(String::from),
        prop::sample::select(FRAGMENTS).prop_map(str::to_owned),
    ];
    prop::collection::vec(part, 0..40).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn text_survives_a_model_that_keeps_all_of_it(text in text_strategy()) {
        let model = load("pangu_like");
        prop_assert_eq!(model.decode(&model.encode(&text)), text);
    }

    #[test]
    fn pushed_tokens_are_the_bytes_of_the_whole(indices in prop::collection::vec(0_u32..800, 0..30)) {
        let model = load("pangu_like");
        let ids: Vec<TokenId> = indices.into_iter().map(TokenId).collect();
        let (mut start, mut bytes) = (model.text_start(), Vec::new());
        for (index, &id) in ids.iter().enumerate() {
            model.push_token(id, &mut start, &mut bytes);
            prop_assert_eq!(&bytes, &model.decode_bytes(&ids[..=index]));
        }
    }
}
