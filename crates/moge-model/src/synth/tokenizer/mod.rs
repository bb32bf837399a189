//! Small tokenizers that fit any vocabulary size, in the files of the official releases.
//!
//! They know the special tokens, every byte, ASCII letters and the Chinese characters of the chat template; the other
//! entries are syllables and words made of them. Every id below the vocabulary size decodes.

mod byte_level;
mod sentencepiece;
mod words;

use serde_json::{Value, json};

use crate::network::config::Architecture;

/// Special tokens of Qwen3, the last entries of its vocabulary.
const QWEN3_SPECIAL: &[&str] = &["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"];

/// Special tokens of GLM-4, the last entries of its vocabulary.
const GLM4_SPECIAL: &[&str] =
    &["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"];

/// What GLM-4's tokenizer puts before every text.
const GLM4_PREFIX: &[&str] = &["[gMASK]", "<sop>"];

/// ChatML with Qwen3's switch for thinking.
const QWEN3_CHAT_TEMPLATE: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\
    {% endfor %}\
    {% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\\n' }}\
    {% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}\
    {% endif %}";

/// GLM-4's turns; its template states the prefix itself.
const GLM4_CHAT_TEMPLATE: &str = "[gMASK]<sop>{% for message in messages %}\
    {{ '<|' + ('observation' if message.role == 'tool' else message.role) + '|>\\n' + message.content }}\
    {% endfor %}\
    {% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}";

/// The ids that config.json names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SpecialIds {
    /// Begin of sequence, where the network has one.
    pub(super) bos: Option<usize>,
    /// Ends of a sequence.
    pub(super) eos: Vec<usize>,
    /// Padding.
    pub(super) pad: usize,
}

/// The special ids of a vocabulary of `vocab_size` entries.
///
/// # Panics
/// If `vocab_size` is below [`min_vocab_size`].
pub(super) fn special_ids(architecture: Architecture, vocab_size: usize) -> SpecialIds {
    let last = |special: &[&str], names: &[&str]| -> Vec<usize> {
        let first_id = vocab_size - special.len();
        let position = |name: &&str| special.iter().position(|token| token == name);
        names.iter().filter_map(position).map(|position| first_id + position).collect()
    };
    match architecture {
        Architecture::PanguProMoe | Architecture::PanguEmbedded => SpecialIds {
            bos: Some(sentencepiece::BOS_ID),
            eos: vec![sentencepiece::END_OF_TURN_ID],
            pad: sentencepiece::PAD_ID,
        },
        Architecture::Qwen3 => {
            let eos = last(QWEN3_SPECIAL, &["<|im_end|>", "<|endoftext|>"]);
            SpecialIds { bos: None, pad: eos[1], eos }
        }
        Architecture::Glm4 => {
            let eos = last(GLM4_SPECIAL, &["<|endoftext|>", "<|user|>", "<|observation|>"]);
            SpecialIds { bos: None, pad: eos[0], eos }
        }
    }
}

/// The smallest vocabulary that has room for the special tokens and the alphabet.
pub(super) fn min_vocab_size(architecture: Architecture) -> usize {
    match architecture {
        Architecture::PanguProMoe | Architecture::PanguEmbedded => sentencepiece::min_vocab_size(),
        Architecture::Qwen3 => 256 + QWEN3_SPECIAL.len(),
        Architecture::Glm4 => 256 + GLM4_SPECIAL.len(),
    }
}

/// Names and contents of the tokenizer's files.
///
/// # Panics
/// If `vocab_size` is below [`min_vocab_size`].
pub(super) fn files(architecture: Architecture, vocab_size: usize) -> Vec<(&'static str, Vec<u8>)> {
    let tokenizer = match architecture {
        Architecture::PanguProMoe | Architecture::PanguEmbedded => {
            ("tokenizer.model", sentencepiece::tokenizer_model(vocab_size))
        }
        Architecture::Qwen3 => ("tokenizer.json", byte_level::tokenizer_json(vocab_size, QWEN3_SPECIAL, &[])),
        Architecture::Glm4 => ("tokenizer.json", byte_level::tokenizer_json(vocab_size, GLM4_SPECIAL, GLM4_PREFIX)),
    };
    let config = format!("{:#}\n", tokenizer_config(architecture)).into_bytes();
    vec![tokenizer, ("tokenizer_config.json", config)]
}

/// `tokenizer_config.json`. The Pangu kinds state no chat template: readers know it.
fn tokenizer_config(architecture: Architecture) -> Value {
    match architecture {
        Architecture::PanguProMoe | Architecture::PanguEmbedded => json!({
            "add_bos_token": true,
            "add_eos_token": false,
            "additional_special_tokens": ["</s>"],
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": false,
            "eos_token": sentencepiece::END_OF_TURN,
            "pad_token": "<unk>",
            "tokenizer_class": "PanguTokenizer",
            "unk_token": "<unk>",
        }),
        Architecture::Qwen3 => json!({
            "add_bos_token": false,
            "add_prefix_space": false,
            "bos_token": null,
            "chat_template": QWEN3_CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": false,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": null,
        }),
        Architecture::Glm4 => json!({
            "chat_template": GLM4_CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": false,
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }),
    }
}

#[cfg(test)]
mod tests;
