//! BPE in a `tokenizer.json`: byte-level (Qwen3, GLM-4, Llama 3), or SentencePiece converted (Llama 2, Mistral).

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Value, json};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::ModelWrapper;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{Model, Tokenizer as HfTokenizer};

use super::error::{TokenizerError, field_error};
use super::sentencepiece::{TextStart, byte_of};
use super::special_tokens::is_bracketed;
use crate::TokenId;

/// Largest id that is accepted; tables are as long as the largest id, and no known vocabulary is near it.
const MAX_ID: u32 = 1 << 24;

/// A `tokenizer.json`: every token is a string of bytes, and a text decodes to the bytes of its tokens.
pub(super) struct JsonBpe {
    inner: HfTokenizer,
    file: String,
    spelling: Spelling,
    /// Bytes of all tokens in the order of their ids.
    bytes: Vec<u8>,
    /// End of the bytes of each id.
    ends: Vec<usize>,
    /// Tokens that the post-processor puts before a text.
    prefix: Vec<TokenId>,
}

/// How the vocabulary spells the bytes of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// One character of GPT-2's byte alphabet for each byte.
    ByteLevel,
    /// UTF-8 with U+2581 for a space, and `<0x0A>` for a single byte. If `strip_start`, the space before a text is not
    /// part of it.
    Metaspace { strip_start: bool },
}

impl Spelling {
    /// The spelling that the `decoder` of a `tokenizer.json` undoes.
    fn of_decoder(decoder: &Value) -> Option<Self> {
        let replace = json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "});
        let steps = [replace, json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        match (decoder["type"].as_str()?, decoder["decoders"].as_array().map(Vec::as_slice)) {
            ("ByteLevel", _) => Some(Self::ByteLevel),
            ("Sequence", Some(found)) => match found.strip_prefix(&steps)? {
                [] => Some(Self::Metaspace { strip_start: false }),
                [last] if *last == strip => Some(Self::Metaspace { strip_start: true }),
                _ => None,
            },
            _ => None,
        }
    }

    /// The bytes of the token that is spelled `piece`.
    fn bytes(self, piece: &str, byte_of_char: &HashMap<char, u8>) -> Vec<u8> {
        match self {
            // A token that holds a character outside the byte alphabet is an added token, which stands for its own text.
            Self::ByteLevel => match piece.chars().map(|c| byte_of_char.get(&c).copied()).collect() {
                Some(bytes) => bytes,
                None => piece.as_bytes().to_vec(),
            },
            Self::Metaspace { .. } => match byte_of(piece) {
                Some(byte) => vec![byte],
                None => piece.replace('\u{2581}', " ").into_bytes(),
            },
        }
    }
}

impl JsonBpe {
    pub(super) fn from_bytes(json: &[u8], file: &str) -> Result<Self, TokenizerError> {
        let invalid = |problem: String| TokenizerError::Invalid { file: file.to_owned(), problem };
        serde_json::from_slice::<IgnoredAny>(json).map_err(|error| invalid(format!("not JSON: {error}")))?;
        let mut inner =
            without_panic(|| HfTokenizer::from_bytes(json)).map_err(|problem| match unreadable_field(json) {
                Some(field) => field_error(file, field, format!("not understood: {problem}")),
                None => invalid(format!("not a tokenizer: {problem}")),
            })?;
        // The length of a prompt is checked elsewhere; truncation or padding here would be silent.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| field_error(file, "truncation", error.to_string()))?;
        let decoder = serde_json::to_value(inner.get_decoder()).unwrap_or_default();
        let Some(spelling) = Spelling::of_decoder(&decoder) else {
            let found = decoder["type"].as_str().unwrap_or("none");
            let problem = format!(
                "decoder {found:?} is not supported; allowed: \"ByteLevel\", or \"Sequence\" of Replace (U+2581 by a \
                 space), ByteFallback, Fuse and perhaps Strip (one space at the start)"
            );
            return Err(field_error(file, "decoder", problem));
        };
        let (bytes, ends) = token_bytes_table(&inner, spelling, file)?;
        let prefix = prefix_tokens(&inner, file)?;
        Ok(Self { inner, file: file.to_owned(), spelling, bytes, ends, prefix })
    }

    pub(super) fn encode(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        match without_panic(|| self.inner.encode_fast(text, false)) {
            Ok(encoding) => Ok(encoding.get_ids().iter().copied().map(TokenId).collect()),
            Err(problem) => Err(TokenizerError::Encode { file: self.file.clone(), problem }),
        }
    }

    pub(super) fn prefix(&self) -> &[TokenId] {
        &self.prefix
    }

    /// One more than the largest id.
    pub(super) fn vocab_size(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn spelling(&self) -> Spelling {
        self.spelling
    }

    /// The value to begin a text with in [`Self::push_token`].
    pub(super) fn text_start(&self) -> TextStart {
        match self.spelling {
            Spelling::Metaspace { strip_start: true } => TextStart::Ahead,
            _ => TextStart::Passed,
        }
    }

    /// Append the bytes of a token at this place of a text; nothing if there is no such id.
    pub(super) fn push_token(&self, id: TokenId, start: &mut TextStart, bytes: &mut Vec<u8>) {
        let index = id.0 as usize;
        let Some(&end) = self.ends.get(index) else { return };
        let token = &self.bytes[if index == 0 { 0 } else { self.ends[index - 1] }..end];
        if token.is_empty() {
            return;
        }
        let is_dummy_space = *start == TextStart::Ahead && token[0] == b' ';
        bytes.extend(&token[usize::from(is_dummy_space)..]);
        *start = TextStart::Passed;
    }

    pub(super) fn is_special(&self, id: TokenId) -> bool {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id.0);
        added.is_some_and(|token| token.special || is_bracketed(&token.content))
    }

    pub(super) fn piece(&self, id: TokenId) -> Option<String> {
        self.inner.id_to_token(id.0)
    }

    pub(super) fn id_of(&self, piece: &str) -> Option<TokenId> {
        self.inner.token_to_id(piece).map(TokenId)
    }
}

/// Call the library, which panics on some inconsistent files.
fn without_panic<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    // No borrowed value is used after a panic in an inconsistent state: a tokenizer that fails to load is dropped, and
    // encoding changes only a cache behind a lock.
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizers library panicked".into()),
    }
}

/// The first part of a `tokenizer.json` that the library cannot parse; its own message does not name it.
fn unreadable_field(json: &[u8]) -> Option<&'static str> {
    fn is_read<T: DeserializeOwned>(part: &Value) -> bool {
        part.is_null() || without_panic(|| Ok(T::deserialize(part)?)).is_ok()
    }
    let file: Value = serde_json::from_slice(json).ok()?;
    let fields = [
        ("model", is_read::<ModelWrapper>(&file["model"])),
        ("normalizer", is_read::<NormalizerWrapper>(&file["normalizer"])),
        ("pre_tokenizer", is_read::<PreTokenizerWrapper>(&file["pre_tokenizer"])),
        ("post_processor", is_read::<PostProcessorWrapper>(&file["post_processor"])),
        ("decoder", is_read::<DecoderWrapper>(&file["decoder"])),
    ];
    fields.into_iter().find(|(_, is_read)| !is_read).map(|(field, _)| field)
}

/// The bytes of all ids from 0 to the largest, and the end of each.
fn token_bytes_table(
    inner: &HfTokenizer,
    spelling: Spelling,
    file: &str,
) -> Result<(Vec<u8>, Vec<usize>), TokenizerError> {
    let Some((piece, max_id)) = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id) else {
        return Err(field_error(file, "model.vocab", "there is no token".into()));
    };
    if max_id > MAX_ID {
        let problem = format!("token {piece:?} has id {max_id}; allowed: at most {MAX_ID}");
        return Err(field_error(file, "model.vocab", problem));
    }
    let byte_of_char = byte_of_char();
    let added = inner.get_added_vocabulary();
    let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(max_id as usize + 1));
    for id in 0..=max_id {
        let token = added.simple_id_to_token(id).or_else(|| inner.get_model().id_to_token(id)).unwrap_or_default();
        bytes.extend(spelling.bytes(&token, &byte_of_char));
        ends.push(bytes.len());
    }
    Ok((bytes, ends))
}

/// The byte alphabet of GPT-2: a printable byte of Latin-1 is spelled as itself, any other as the next free character
/// from U+0100 on.
fn byte_of_char() -> HashMap<char, u8> {
    let mut next_free = 0x100;
    (0..=255u8)
        .filter_map(|byte| {
            let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let code = if printable { u32::from(byte) } else { next_free };
            next_free += u32::from(!printable);
            Some((char::from_u32(code)?, byte))
        })
        .collect()
}

/// The tokens that the post-processor puts before a text, found by encoding one: post-processors are of several kinds.
fn prefix_tokens(inner: &HfTokenizer, file: &str) -> Result<Vec<TokenId>, TokenizerError> {
    let encoding = without_panic(|| inner.encode("a", true))
        .map_err(|problem| TokenizerError::Encode { file: file.to_owned(), problem })?;
    let added = encoding.get_special_tokens_mask();
    let num_prefix = added.iter().take_while(|&&mask| mask == 1).count();
    if added[num_prefix..].contains(&1) {
        let problem = "it adds tokens after the text; allowed: tokens before it".into();
        return Err(field_error(file, "post_processor", problem));
    }
    Ok(encoding.get_ids()[..num_prefix].iter().copied().map(TokenId).collect())
}
