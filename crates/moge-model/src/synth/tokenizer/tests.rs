use std::collections::HashSet;

use tokenizers::Tokenizer;

use super::*;
use crate::TokenId;
use crate::text::tokenizer::sentencepiece::{PieceKind, SentencePiece};

fn file(architecture: Architecture, vocab_size: usize) -> Vec<u8> {
    files(architecture, vocab_size).swap_remove(0).1
}

fn sentencepiece(vocab_size: usize) -> SentencePiece {
    SentencePiece::from_bytes(&file(Architecture::PanguProMoe, vocab_size), "tokenizer.model").unwrap()
}

fn byte_level(architecture: Architecture, vocab_size: usize) -> Tokenizer {
    Tokenizer::from_bytes(file(architecture, vocab_size)).unwrap()
}

#[test]
fn every_sentencepiece_id_decodes_to_text_of_its_own() {
    for vocab_size in [min_vocab_size(Architecture::PanguEmbedded), 512, 32_000] {
        let tokenizer = sentencepiece(vocab_size);
        assert_eq!(tokenizer.vocab_size(), vocab_size);
        let mut seen = HashSet::new();
        for id in (0..vocab_size as u32).map(TokenId) {
            let piece = tokenizer.piece(id).unwrap();
            assert!(!piece.is_empty() && seen.insert(piece.to_string()), "{id:?}: {piece:?}");
            let has_text = tokenizer.kind(id) != Some(PieceKind::Control);
            assert_eq!(!tokenizer.decode_bytes(&[id]).is_empty(), has_text, "{id:?}: {piece:?}");
        }
    }
}

#[test]
fn sentencepiece_joins_syllables_to_words_and_spells_the_rest() {
    let tokenizer = sentencepiece(32_000);
    let num_tokens = |text: &str| tokenizer.encode(text).len();
    assert_eq!(num_tokens(" ba"), 1);
    assert_eq!(num_tokens(" bazu"), 1);
    assert_eq!(num_tokens("[unused9]系统：[unused10]"), 5);
    let eos = special_ids(Architecture::PanguProMoe, 512).eos[0];
    assert_eq!(tokenizer.encode("[unused10]"), [TokenId(eos as u32)]);
    assert_eq!(num_tokens("é"), 2, "one byte piece for each byte");
    for text in [" Hello,  bazu world! é 系统\n", "x", "  "] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text)), text);
    }
}

#[test]
fn every_byte_level_id_decodes() {
    for architecture in [Architecture::Qwen3, Architecture::Glm4] {
        for vocab_size in [min_vocab_size(architecture), 512, 20_000] {
            let tokenizer = byte_level(architecture, vocab_size);
            assert_eq!(tokenizer.get_vocab_size(true), vocab_size);
            let mut seen = HashSet::new();
            for id in 0..vocab_size as u32 {
                assert!(!tokenizer.decode(&[id], false).unwrap().is_empty(), "{id}");
                assert!(seen.insert(tokenizer.id_to_token(id).unwrap()), "{id}");
            }
        }
    }
}

#[test]
fn byte_level_text_survives_and_special_tokens_are_single() {
    let tokenizer = byte_level(Architecture::Qwen3, 20_000);
    let ids = |text: &str| tokenizer.encode(text, true).unwrap().get_ids().to_vec();
    assert_eq!(ids(" bazu").len(), 1);
    for text in ["Hello,  bazu world!\n\té 系统 🙂", "it's 2026"] {
        assert_eq!(tokenizer.decode(&ids(text), false).unwrap(), text);
    }
    let special = special_ids(Architecture::Qwen3, 20_000);
    let eos: Vec<usize> = ids("<|im_end|><|endoftext|>").into_iter().map(|id| id as usize).collect();
    assert_eq!(eos, special.eos);
    assert_eq!(special.pad, eos[1]);
}

#[test]
fn glm4_begins_every_text_with_its_prefix() {
    let tokenizer = byte_level(Architecture::Glm4, 700);
    let tokens = tokenizer.encode("a<|user|>", true).unwrap().get_tokens().to_vec();
    assert_eq!(tokens, ["[gMASK]", "<sop>", "a", "<|user|>"]);
    assert_eq!(tokenizer.encode("a", false).unwrap().len(), 1);
    let eos = special_ids(Architecture::Glm4, 700).eos;
    let names: Vec<String> = eos.iter().map(|&id| tokenizer.id_to_token(id as u32).unwrap()).collect();
    assert_eq!(names, ["<|endoftext|>", "<|user|>", "<|observation|>"]);
}

#[test]
fn a_vocabulary_of_full_size_stays_small_on_disk() {
    let bytes = file(Architecture::Qwen3, 151_936);
    assert!(bytes.len() < 15_000_000, "{}", bytes.len());
    assert_eq!(Tokenizer::from_bytes(bytes).unwrap().get_vocab_size(true), 151_936);
    assert_eq!(sentencepiece(153_376).vocab_size(), 153_376);
}
