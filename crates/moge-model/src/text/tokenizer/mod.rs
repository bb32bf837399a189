//! Text to token ids and back.
//!
//! A checkpoint ships either `tokenizer.json` (BPE: Qwen3, GLM-4, Llama) or `tokenizer.model` (SentencePiece: Pangu).
//! Beside a SentencePiece model the JSON files name the special tokens: text is split at those first, and each run
//! between them is encoded separately; decoding treats runs of ordinary pieces the same way and writes special tokens
//! as they stand.

pub(crate) mod detokenizer;
pub(crate) mod error;
pub(crate) mod files;
mod json_bpe;
pub mod sentencepiece;
mod special_tokens;
pub(crate) mod stop_strings;
mod utf8;

use std::path::Path;

use crate::{GenerationDefaults, TokenId};
use error::{TokenizerError, field_error};
use files::{AddedToken, TokenizerFiles, read_optional};
use json_bpe::{JsonBpe, Spelling};
use sentencepiece::{PieceKind, SentencePiece, TextStart};
use special_tokens::{Segment, SpecialTokens, is_bracketed};
use utf8::{InvalidUtf8, decode_utf8};

/// Largest id of an added token that is accepted.
const MAX_ADDED_ID: u32 = 1 << 24;

/// The tokens that every prompt starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefix {
    /// Add them, unless the ids already begin with them.
    Add,
    /// Do not add them.
    Omit,
}

/// A checkpoint's tokenizer.
pub struct Tokenizer {
    /// Path of the tokenizer, for messages.
    file: String,
    vocabulary: Vocabulary,
    prefix: Vec<TokenId>,
    bos_id: Option<TokenId>,
    eos_id: Option<TokenId>,
}

enum Vocabulary {
    Json(Box<JsonBpe>),
    SentencePiece { model: Box<SentencePiece>, special: Box<SpecialTokens> },
}

impl Tokenizer {
    /// Read `tokenizer.json`, or else `tokenizer.model`, and the JSON files beside it.
    ///
    /// # Errors
    /// If neither is there, or one of the files is not valid or asks for a feature that is not implemented.
    pub fn load(dir: &Path) -> Result<Self, TokenizerError> {
        let files = TokenizerFiles::load(dir)?;
        let json = dir.join("tokenizer.json");
        if let Some(bytes) = read_optional(&json)? {
            return Self::from_json(&bytes, &json.display().to_string(), &files);
        }
        let model = dir.join("tokenizer.model");
        if let Some(bytes) = read_optional(&model)? {
            return Self::from_sentencepiece(&bytes, &model.display().to_string(), &files);
        }
        Err(TokenizerError::Missing { dir: dir.display().to_string() })
    }

    fn from_json(bytes: &[u8], file: &str, files: &TokenizerFiles) -> Result<Self, TokenizerError> {
        let bpe = JsonBpe::from_bytes(bytes, file)?;
        let id_of = |field| named_id(files, field, |text| bpe.id_of(text));
        let (bos_id, eos_id) = (id_of("bos_token")?, id_of("eos_token")?);
        let prefix = bpe.prefix().to_vec();
        Ok(Self { file: file.to_owned(), vocabulary: Vocabulary::Json(Box::new(bpe)), prefix, bos_id, eos_id })
    }

    fn from_sentencepiece(bytes: &[u8], file: &str, files: &TokenizerFiles) -> Result<Self, TokenizerError> {
        let model = SentencePiece::from_bytes(bytes, file)?;
        let added = resolve_added_tokens(&model, files)?;
        let special = SpecialTokens::new(added);
        let id_of = |field| named_id(files, field, |text| special.id_of(text));
        let bos_id = id_of("bos_token")?.or(model.bos_id());
        let eos_id = id_of("eos_token")?.or(model.eos_id());
        if files.add_eos_token {
            let problem = "true is not supported: a prompt that ends here cannot be continued; allowed: false";
            return Err(field_error(&files.file, "add_eos_token", problem.into()));
        }
        let prefix = match (files.add_bos_token, bos_id) {
            (Some(false), _) | (None, None) => Vec::new(),
            (_, Some(bos)) => vec![bos],
            (Some(true), None) => {
                let problem = "true, but neither bos_token nor tokenizer.model names a BOS token".into();
                return Err(field_error(&files.file, "add_bos_token", problem));
            }
        };
        let vocabulary = Vocabulary::SentencePiece { model: Box::new(model), special: Box::new(special) };
        Ok(Self { file: file.to_owned(), vocabulary, prefix, bos_id, eos_id })
    }

    /// Token ids of a text. Special tokens in the text are recognised.
    ///
    /// # Errors
    /// If a `tokenizer.json` cannot express the text (it lacks the token for a byte).
    pub fn encode(&self, text: &str, prefix: Prefix) -> Result<Vec<TokenId>, TokenizerError> {
        let mut ids = match &self.vocabulary {
            Vocabulary::Json(bpe) => bpe.encode(text)?,
            Vocabulary::SentencePiece { model, special } => {
                let mut ids = Vec::new();
                for segment in special.split(text) {
                    match segment {
                        Segment::Text(run) => ids.extend(model.encode(run)),
                        Segment::Special(id) => ids.push(id),
                    }
                }
                ids
            }
        };
        if prefix == Prefix::Add && !ids.starts_with(&self.prefix) {
            ids.splice(0..0, self.prefix.iter().copied());
        }
        Ok(ids)
    }

    /// Tokens that every prompt starts with: BOS for Pangu, `[gMASK]<sop>` for GLM-4, `<s>` for Llama 2, none for Qwen3.
    pub fn prefix(&self) -> &[TokenId] {
        &self.prefix
    }

    /// Text of token ids. Special tokens are written verbatim, ids without a token are skipped, and bytes that are not
    /// UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        let (mut bytes, mut run) = (Vec::new(), Run::default());
        for &id in ids {
            self.append_bytes(id, &mut run, &mut bytes);
        }
        let mut text = String::new();
        decode_utf8(&mut bytes, self.invalid_utf8(), &mut text);
        self.invalid_utf8().replace(bytes.len(), &mut text);
        text
    }

    /// Text of one token inside a text: a leading space is kept, a part of a character becomes U+FFFD.
    pub fn token_text(&self, id: TokenId) -> String {
        String::from_utf8_lossy(&self.token_bytes(id)).into_owned()
    }

    /// Bytes of one token inside a text: a leading space is kept. Empty if the id does not exist.
    pub fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.append_bytes(id, &mut Some(TextStart::Passed), &mut bytes);
        bytes
    }

    /// True for a token that never stands for a part of a text: those that the files beside a SentencePiece model list,
    /// its control and unknown pieces, added tokens marked as special, and those in brackets, such as `<think>` and
    /// `[unused16]`.
    pub fn is_special(&self, id: TokenId) -> bool {
        match &self.vocabulary {
            Vocabulary::Json(bpe) => bpe.is_special(id),
            Vocabulary::SentencePiece { model, special } => {
                special.text(id).is_some()
                    || match model.kind(id) {
                        Some(PieceKind::Control | PieceKind::Unknown) => true,
                        Some(PieceKind::UserDefined) => model.piece(id).is_some_and(is_bracketed),
                        Some(PieceKind::Normal | PieceKind::Unused | PieceKind::Byte(_)) | None => false,
                    }
            }
        }
    }

    /// A token as the vocabulary spells it (`▁word`, `Ġword`, `<0x0A>`); empty if the id does not exist.
    pub fn piece(&self, id: TokenId) -> String {
        match &self.vocabulary {
            Vocabulary::Json(bpe) => bpe.piece(id).unwrap_or_default(),
            Vocabulary::SentencePiece { model, special } => {
                special.text(id).or_else(|| model.piece(id)).unwrap_or_default().to_owned()
            }
        }
    }

    /// The id of a token as the vocabulary spells it.
    pub fn id_of(&self, piece: &str) -> Option<TokenId> {
        match &self.vocabulary {
            Vocabulary::Json(bpe) => bpe.id_of(piece),
            Vocabulary::SentencePiece { model, special } => special.id_of(piece).or_else(|| model.id_of(piece)),
        }
    }

    /// One more than the largest id, special tokens included.
    pub fn vocab_size(&self) -> usize {
        match &self.vocabulary {
            Vocabulary::Json(bpe) => bpe.vocab_size(),
            Vocabulary::SentencePiece { model, special } => {
                let beyond = special.ids().map(|id| id.0 as usize + 1).max().unwrap_or(0);
                beyond.max(model.vocab_size())
            }
        }
    }

    /// The BOS token, if the files name one.
    pub fn bos_id(&self) -> Option<TokenId> {
        self.bos_id
    }

    /// Check that the model has an embedding for every token. A model may have more embeddings than tokens: many are
    /// padded, and an id without a token decodes to nothing.
    ///
    /// # Errors
    /// [`TokenizerError::DoesNotFit`], naming the first token beyond the model's vocabulary.
    pub fn check_vocab(&self, vocab_size: usize) -> Result<(), TokenizerError> {
        let ids = vocab_size..self.vocab_size();
        let first = ids.filter_map(|id| u32::try_from(id).ok().map(TokenId)).find(|&id| !self.piece(id).is_empty());
        match first {
            None => Ok(()),
            Some(id) => {
                let piece = self.piece(id);
                Err(TokenizerError::DoesNotFit { file: self.file.clone(), id, piece, vocab_size })
            }
        }
    }

    /// Append the bytes of one token to those before it.
    fn append_bytes(&self, id: TokenId, run: &mut Run, bytes: &mut Vec<u8>) {
        match &self.vocabulary {
            Vocabulary::Json(bpe) => bpe.push_token(id, run.get_or_insert_with(|| bpe.text_start()), bytes),
            Vocabulary::SentencePiece { model, special } => match special.text(id) {
                Some(text) => {
                    bytes.extend(text.as_bytes());
                    *run = None;
                }
                None => model.push_token(id, run.get_or_insert_with(|| model.text_start()), bytes),
            },
        }
    }

    /// How many U+FFFD stand for bytes that are not UTF-8, as in the library that each kind of vocabulary comes from.
    fn invalid_utf8(&self) -> InvalidUtf8 {
        match &self.vocabulary {
            Vocabulary::Json(bpe) if bpe.spelling() == Spelling::ByteLevel => InvalidUtf8::OnePerSequence,
            Vocabulary::Json(_) | Vocabulary::SentencePiece { .. } => InvalidUtf8::OnePerByte,
        }
    }
}

/// Tokens that end a sequence, each once: those of `config.json` (`ModelConfig::eos_token_ids`), of
/// `generation_config.json`, and of the tokenizer's files where there is a tokenizer.
pub fn eos_token_ids(config: &[u32], generation: &GenerationDefaults, tokenizer: Option<&Tokenizer>) -> Vec<TokenId> {
    let mut ids = Vec::new();
    let generation = generation.eos_token_ids.iter().copied();
    let tokenizer = tokenizer.and_then(|tokenizer| tokenizer.eos_id);
    for id in config.iter().copied().map(TokenId).chain(generation).chain(tokenizer) {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}

/// State of decoding within a run of ordinary pieces; `None` between runs.
type Run = Option<TextStart>;

/// Give every listed special token the id that its file or else the model states.
fn resolve_added_tokens(model: &SentencePiece, files: &TokenizerFiles) -> Result<Vec<AddedToken>, TokenizerError> {
    let mut added = files.added.clone();
    for token in &mut added {
        token.id = token.id.or_else(|| model.id_of(&token.text));
        if let Some(id) = token.id.filter(|id| id.0 > MAX_ADDED_ID) {
            let problem = format!("id {}; allowed: at most {MAX_ADDED_ID}", id.0);
            return Err(field_error(&files.file, &format!("added token {:?}", token.text), problem));
        }
    }
    Ok(added)
}

/// The id of the token that a field such as `eos_token` names, if it is stated.
fn named_id(
    files: &TokenizerFiles,
    field: &str,
    id_of: impl Fn(&str) -> Option<TokenId>,
) -> Result<Option<TokenId>, TokenizerError> {
    let Some(text) = files.named(field) else { return Ok(None) };
    match id_of(text) {
        Some(id) => Ok(Some(id)),
        None => Err(field_error(&files.file, field, format!("the vocabulary has no token {text:?}"))),
    }
}

#[cfg(test)]
mod tests;
