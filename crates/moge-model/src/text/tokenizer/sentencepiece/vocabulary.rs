//! The pieces of a model, checked, and looked up both ways.

use std::collections::HashMap;

use super::error::Problem;
use super::prefix_set::PrefixSet;
use super::proto::{Piece, PieceKind};
use crate::TokenId;

/// Maximum length of a piece, as in the library; keeps every lookup short.
const MAX_PIECE_BYTES: usize = 7999;

/// The pieces of a model, checked.
#[derive(Debug)]
pub(super) struct Vocabulary {
    pieces: Vec<Piece>,
    ids: HashMap<String, TokenId>,
    /// Symbols that are matched in a text before other pieces.
    pub(super) user_defined: PrefixSet,
    /// The unknown piece; optional in a model with byte pieces.
    pub(super) unk_id: Option<TokenId>,
    /// The byte pieces, if characters without a piece are spelled with them.
    pub(super) byte_ids: Option<Box<[TokenId; 256]>>,
}

impl Vocabulary {
    /// `pieces` in the order of their ids, and whether characters without a piece are spelled with byte pieces.
    pub(super) fn new(mut pieces: Vec<Piece>, byte_fallback: bool) -> Result<Vocabulary, Problem> {
        let mut ids = HashMap::with_capacity(pieces.len());
        let mut user_defined = Vec::new();
        let mut unk_id = None;
        let mut byte_ids = [None; 256];
        for (index, piece) in pieces.iter_mut().enumerate() {
            let refuse = |value: String, allowed: &str| Err(Problem::new(&format!("pieces[{index}]"), value, allowed));
            let id = TokenId(u32::try_from(index).map_err(|_| too_many(index))?);
            check_text(piece, byte_fallback).map_err(|problem| problem.inside(&format!("pieces[{index}]")))?;
            if ids.insert(piece.piece.clone(), id).is_some() {
                return refuse(format!("{:?} a second time", piece.piece), "each piece once");
            }
            match piece.kind {
                PieceKind::UserDefined => user_defined.push(piece.piece.clone()),
                PieceKind::Unknown if unk_id.is_some() => {
                    return refuse("a second unknown piece".to_owned(), "one unknown piece");
                }
                PieceKind::Unknown => unk_id = Some(id),
                PieceKind::Byte(_) if !byte_fallback => {
                    return refuse(
                        format!("byte piece {:?}", piece.piece),
                        "none, as trainer_spec.byte_fallback is false",
                    );
                }
                PieceKind::Byte(byte) => byte_ids[usize::from(byte)] = Some(id),
                PieceKind::Normal | PieceKind::Control | PieceKind::Unused => {}
            }
        }
        let byte_ids = if byte_fallback { Some(all_bytes(&byte_ids)?) } else { None };
        if unk_id.is_none() && byte_ids.is_none() {
            return Err(Problem::new("pieces", "no unknown piece".to_owned(), "one unknown piece, or byte pieces"));
        }
        Ok(Vocabulary { pieces, ids, user_defined: PrefixSet::new(user_defined), unk_id, byte_ids })
    }

    pub(super) fn len(&self) -> usize {
        self.pieces.len()
    }

    pub(super) fn piece(&self, id: TokenId) -> Option<&Piece> {
        self.pieces.get(id.0 as usize)
    }

    pub(super) fn kind(&self, id: TokenId) -> Option<PieceKind> {
        self.piece(id).map(|piece| piece.kind)
    }

    pub(super) fn score(&self, id: TokenId) -> f32 {
        self.pieces[id.0 as usize].score
    }

    pub(super) fn id_of(&self, piece: &str) -> Option<TokenId> {
        self.ids.get(piece).copied()
    }

    /// The piece that stands for exactly this text. Control, byte and unknown pieces stand for no text, whatever their
    /// names.
    pub(super) fn spelled(&self, text: &str) -> Option<TokenId> {
        let id = self.id_of(text)?;
        let spells = match self.pieces[id.0 as usize].kind {
            PieceKind::Normal | PieceKind::UserDefined | PieceKind::Unused => true,
            PieceKind::Unknown | PieceKind::Control | PieceKind::Byte(_) => false,
        };
        spells.then_some(id)
    }
}

fn too_many(index: usize) -> Problem {
    Problem::new("pieces", format!("more than {index}"), "at most 2^32")
}

fn check_text(piece: &mut Piece, byte_fallback: bool) -> Result<(), Problem> {
    let text = &piece.piece;
    if text.is_empty() {
        return Err(Problem::new("piece", "an empty text".to_owned(), "at least one character"));
    }
    if text.len() > MAX_PIECE_BYTES {
        return Err(Problem::new("piece", format!("{} bytes", text.len()), &format!("at most {MAX_PIECE_BYTES}")));
    }
    if piece.score.is_nan() {
        return Err(Problem::new("score", "NaN".to_owned(), "a number"));
    }
    if text.contains('\0') {
        // Trainers have written such a piece by mistake; with byte pieces the library treats it as unused.
        if text != "\0" || !byte_fallback {
            return Err(Problem::new("piece", format!("{text:?}"), "no NUL character"));
        }
        piece.kind = PieceKind::Unused;
    }
    Ok(())
}

fn all_bytes(ids: &[Option<TokenId>; 256]) -> Result<Box<[TokenId; 256]>, Problem> {
    let mut all = Box::new([TokenId(0); 256]);
    for (byte, id) in ids.iter().enumerate() {
        let Some(id) = id else {
            let missing = format!("no piece <0x{byte:02X}>");
            return Err(Problem::new("pieces", missing, "all 256 byte pieces, as trainer_spec.byte_fallback is true"));
        };
        all[byte] = *id;
    }
    Ok(all)
}
