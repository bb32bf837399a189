//! Small tokenizers of any vocabulary size, in the file formats of the official releases.
//!
//! They have the special tokens, every byte, ASCII letters and the Chinese characters of the chat template; the other
//! entries are syllables and words made of them. Every id below the vocabulary size decodes.

mod byte_level;
mod sentencepiece;
mod words;

use serde_json::{Value, json};

use crate::network::config::Architecture;
use crate::synth::sizes::{SpecialIds, SynthTokenizer};

/// The special ids of a vocabulary of `vocab_size` entries.
///
/// # Panics
/// If `vocab_size` is below [`min_vocab_size`].
pub(super) fn special_ids(architecture: Architecture, vocab_size: usize) -> SpecialIds {
    match architecture.spec().synth.tokenizer {
        SynthTokenizer::SentencePiece => SpecialIds {
            bos: Some(sentencepiece::BOS_ID),
            eos: vec![sentencepiece::END_OF_TURN_ID],
            pad: sentencepiece::PAD_ID,
        },
        SynthTokenizer::ByteLevel(tokenizer) => {
            let first_id = vocab_size - tokenizer.special.len();
            let position = |name: &str| tokenizer.special.iter().position(|token| *token == name);
            let id = |name: &str| first_id + position(name).expect("named tokens are special tokens");
            SpecialIds {
                bos: tokenizer.bos.map(id),
                eos: tokenizer.eos.iter().map(|name| id(name)).collect(),
                pad: id(tokenizer.pad),
            }
        }
    }
}

/// The smallest vocabulary that has room for the special tokens and the alphabet.
pub(super) fn min_vocab_size(architecture: Architecture) -> usize {
    match architecture.spec().synth.tokenizer {
        SynthTokenizer::SentencePiece => sentencepiece::min_vocab_size(),
        SynthTokenizer::ByteLevel(tokenizer) => 256 + tokenizer.special.len(),
    }
}

/// Names and contents of the tokenizer's files.
///
/// # Panics
/// If `vocab_size` is below [`min_vocab_size`].
pub(super) fn files(architecture: Architecture, vocab_size: usize) -> Vec<(&'static str, Vec<u8>)> {
    let (tokenizer, config) = match architecture.spec().synth.tokenizer {
        SynthTokenizer::SentencePiece => {
            (("tokenizer.model", sentencepiece::tokenizer_model(vocab_size)), pangu_tokenizer_config())
        }
        SynthTokenizer::ByteLevel(tokenizer) => {
            let json = byte_level::tokenizer_json(vocab_size, tokenizer.special, tokenizer.prefix);
            (("tokenizer.json", json), (tokenizer.config)())
        }
    };
    vec![tokenizer, ("tokenizer_config.json", format!("{config:#}\n").into_bytes())]
}

/// `tokenizer_config.json` of the Pangu kinds. It has no chat template: the Pangu template is built in.
fn pangu_tokenizer_config() -> Value {
    json!({
        "add_bos_token": true,
        "add_eos_token": false,
        "additional_special_tokens": ["</s>"],
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": false,
        "eos_token": sentencepiece::END_OF_TURN,
        "pad_token": "<unk>",
        "tokenizer_class": "PanguTokenizer",
        "unk_token": "<unk>",
    })
}

#[cfg(test)]
mod tests;
