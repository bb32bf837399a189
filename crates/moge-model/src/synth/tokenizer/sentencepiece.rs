//! A `tokenizer.model` with SentencePiece BPE, as Pangu checkpoints have it.

use super::words::joined_pieces;
use crate::text::tokenizer::sentencepiece::{ModelProto, NormalizerSpec, Piece, PieceKind, TrainerSpec};

/// `<unk>`, which also pads.
pub(super) const PAD_ID: usize = 0;

/// `<s>`.
pub(super) const BOS_ID: usize = 1;

/// Token that ends a turn of the chat, and so an answer.
pub(super) const END_OF_TURN: &str = "[unused10]";

/// Id of [`END_OF_TURN`].
pub(super) const END_OF_TURN_ID: usize = 4;

/// Markers of the chat template, of tool calls and of thinking, after `<unk>`, `<s>` and `</s>`.
const MARKS: [&str; 6] = ["[unused9]", END_OF_TURN, "[unused11]", "[unused12]", "[unused16]", "[unused17]"];

/// The Chinese characters of the chat template.
const CHINESE: &str = "系统：用户助手工具方法";

/// Stands for a space.
const META_SPACE: char = '\u{2581}';

/// Special pieces, bytes, the space, printing ASCII, Chinese.
pub(super) fn min_vocab_size() -> usize {
    alphabet().count()
}

/// The tokenizer's file.
///
/// # Panics
/// If `vocab_size` is below [`min_vocab_size`].
pub(super) fn tokenizer_model(vocab_size: usize) -> Vec<u8> {
    assert!(vocab_size >= min_vocab_size(), "a vocabulary of {vocab_size} has no room for the alphabet");
    let joined = joined_pieces(META_SPACE).map(|joined| (joined.text(), PieceKind::Normal));
    let pieces = alphabet().chain(joined).take(vocab_size).enumerate().map(|(id, (piece, kind))| {
        // Earlier pieces are shorter; as in a trained model they are joined before longer ones.
        let score = if kind == PieceKind::Normal { -(id as f32) } else { 0.0 };
        Piece { piece, score, kind }
    });
    let model = ModelProto {
        pieces: pieces.collect(),
        trainer_spec: TrainerSpec { byte_fallback: true, pad_piece: "<unk>".to_string(), ..TrainerSpec::default() },
        normalizer_spec: NormalizerSpec {
            name: "identity".to_string(),
            add_dummy_prefix: false,
            remove_extra_whitespaces: false,
            ..NormalizerSpec::default()
        },
    };
    model.to_bytes()
}

/// The pieces that every vocabulary has, in the order of their ids.
fn alphabet() -> impl Iterator<Item = (String, PieceKind)> {
    let special =
        [("<unk>", PieceKind::Unknown), ("<s>", PieceKind::Control), ("</s>", PieceKind::Control)].into_iter();
    let marks = MARKS.into_iter().map(|mark| (mark, PieceKind::UserDefined));
    let bytes = (0..=u8::MAX).map(|byte| (format!("<0x{byte:02X}>"), PieceKind::Byte(byte)));
    let characters = std::iter::once(META_SPACE).chain('!'..='~').chain(CHINESE.chars());
    special
        .chain(marks)
        .map(|(piece, kind)| (piece.to_string(), kind))
        .chain(bytes)
        .chain(characters.map(|character| (character.to_string(), PieceKind::Normal)))
}
