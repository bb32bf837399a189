//! SentencePiece byte-pair models (`tokenizer.model`), with the same results as the C++ library.
//!
//! Encoding: `normalizer` prepares the text, `bpe` splits it into pieces. Decoding: the bytes of all pieces, without the
//! space that the normaliser put before the text.

mod bpe;
mod charsmap;
mod error;
mod normalizer;
mod prefix_set;
mod proto;
#[cfg(test)]
mod tests;
mod vocabulary;

use crate::TokenId;
pub use error::SentencePieceError;
use normalizer::{META_SPACE, Normalizer};
pub(super) use proto::byte_of;
pub use proto::{ModelProto, NormalizerSpec, Piece, PieceKind, TrainerSpec};
use vocabulary::Vocabulary;

/// State of decoding: at the start of a text a leading U+2581 is the dummy space and not part of the text.
///
/// Start with [`SentencePiece::text_start`], and hand the same value to every [`SentencePiece::push_token`]. For the bytes
/// of one token as they would be inside a text, start with `Passed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextStart {
    /// No byte of the text has been decoded.
    Ahead,
    /// The text has begun, or the model adds no space before it.
    Passed,
}

/// A SentencePiece byte-pair model.
#[derive(Debug)]
pub struct SentencePiece {
    vocabulary: Vocabulary,
    normalizer: Normalizer,
    trainer_spec: TrainerSpec,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
}

impl SentencePiece {
    /// Read a `tokenizer.model`; `file` is its name in errors.
    ///
    /// # Errors
    /// If the bytes are not a valid model, or ask for a feature that is not implemented: a model type other than BPE, or a
    /// denormaliser with rules.
    pub fn from_bytes(bytes: &[u8], file: &str) -> Result<SentencePiece, SentencePieceError> {
        let ModelProto { pieces, trainer_spec, normalizer_spec } = ModelProto::from_bytes(bytes, file)?;
        let vocabulary = Vocabulary::new(pieces, trainer_spec.byte_fallback);
        let normalizer = Normalizer::new(&normalizer_spec, &trainer_spec);
        Ok(SentencePiece {
            vocabulary: vocabulary.map_err(|problem| problem.in_file(file))?,
            normalizer: normalizer.map_err(|problem| problem.in_file(file))?,
            trainer_spec,
            add_dummy_prefix: normalizer_spec.add_dummy_prefix,
            remove_extra_whitespaces: normalizer_spec.remove_extra_whitespaces,
        })
    }

    /// Token ids of plain text. No token is added, and the name of a control piece is ordinary text.
    pub fn encode(&self, text: &str) -> Vec<TokenId> {
        let normalized = self.normalizer.normalize(text, &self.vocabulary.user_defined);
        bpe::encode(&self.vocabulary, &normalized)
    }

    /// The text of `ids`. Bytes of byte pieces that are not UTF-8 become one U+FFFD each. See [`Self::push_token`].
    pub fn decode(&self, ids: &[TokenId]) -> String {
        let mut text = String::new();
        // A character's bytes lie in neighbouring byte pieces: any other piece between them, even one without text,
        // tears it apart.
        let mut run = Vec::new();
        let mut start = self.text_start();
        for &id in ids {
            if !matches!(self.kind(id), Some(PieceKind::Byte(_))) {
                push_repaired(&mut text, &run);
                run.clear();
            }
            self.push_token(id, &mut start, &mut run);
        }
        push_repaired(&mut text, &run);
        text
    }

    /// The bytes that `ids` stand for, which need not be UTF-8. See [`Self::push_token`].
    pub fn decode_bytes(&self, ids: &[TokenId]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut start = self.text_start();
        for &id in ids {
            self.push_token(id, &mut start, &mut bytes);
        }
        bytes
    }

    /// The initial state for [`Self::push_token`].
    pub fn text_start(&self) -> TextStart {
        if self.add_dummy_prefix || self.remove_extra_whitespaces { TextStart::Ahead } else { TextStart::Passed }
    }

    /// Append the bytes that `id` stands for at this place of a text.
    ///
    /// A control piece stands for none, the unknown piece for its surface (by default U+2047 between spaces), a byte
    /// piece for its byte. An id past the vocabulary, as a padded embedding may yield, stands for none.
    pub fn push_token(&self, id: TokenId, start: &mut TextStart, bytes: &mut Vec<u8>) {
        let Some(piece) = self.vocabulary.piece(id) else { return };
        let len_before = bytes.len();
        match piece.kind {
            PieceKind::Control => {}
            PieceKind::Unknown => bytes.extend_from_slice(self.trainer_spec.unk_surface.as_bytes()),
            PieceKind::Byte(byte) => bytes.push(byte),
            PieceKind::Normal | PieceKind::UserDefined | PieceKind::Unused => {
                let mut text = piece.piece.as_str();
                if *start == TextStart::Ahead
                    && let Some(rest) = text.strip_prefix(META_SPACE)
                {
                    text = rest;
                    // Where runs of spaces were removed, every space before the text is the dummy one.
                    if !self.remove_extra_whitespaces {
                        *start = TextStart::Passed;
                    }
                }
                for (index, part) in text.split(META_SPACE).enumerate() {
                    if index > 0 {
                        bytes.push(b' ');
                    }
                    bytes.extend_from_slice(part.as_bytes());
                }
            }
        }
        if bytes.len() > len_before {
            *start = TextStart::Passed;
        }
    }

    /// Number of pieces; token ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// The name of a piece: its text with U+2581 for spaces, or a name such as `<0x0A>` and `<s>`.
    pub fn piece(&self, id: TokenId) -> Option<&str> {
        self.vocabulary.piece(id).map(|piece| piece.piece.as_str())
    }

    /// The kind of a piece.
    pub fn kind(&self, id: TokenId) -> Option<PieceKind> {
        self.vocabulary.kind(id)
    }

    /// The piece of this name, of any kind.
    pub fn id_of(&self, piece: &str) -> Option<TokenId> {
        self.vocabulary.id_of(piece)
    }

    /// The piece for text that is not in the vocabulary.
    pub fn unk_id(&self) -> Option<TokenId> {
        self.vocabulary.unk_id
    }

    /// The piece that begins a sequence.
    pub fn bos_id(&self) -> Option<TokenId> {
        self.control_id(&self.trainer_spec.bos_piece)
    }

    /// The piece that ends a sequence.
    pub fn eos_id(&self) -> Option<TokenId> {
        self.control_id(&self.trainer_spec.eos_piece)
    }

    /// The piece that pads a batch.
    pub fn pad_id(&self) -> Option<TokenId> {
        self.control_id(&self.trainer_spec.pad_piece)
    }

    fn control_id(&self, piece: &str) -> Option<TokenId> {
        self.id_of(piece).filter(|&id| self.kind(id) == Some(PieceKind::Control))
    }
}

/// Append `bytes` with U+FFFD for each byte that is not UTF-8.
fn push_repaired(text: &mut String, bytes: &[u8]) {
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
}
