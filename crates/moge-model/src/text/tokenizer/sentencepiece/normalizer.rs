//! Normalisation of text to the spelling of the pieces.

use super::charsmap::Charsmap;
use super::error::Problem;
use super::prefix_set::PrefixSet;
use super::proto::{NormalizerSpec, TrainerSpec};

/// U+2581, which stands for a space in the text of a piece.
pub(super) const META_SPACE: &str = "\u{2581}";

/// The rules of one model.
#[derive(Debug)]
pub(super) struct Normalizer {
    charsmap: Option<Charsmap>,
    dummy_space: DummySpace,
    remove_extra_whitespaces: bool,
    /// Replacement of a space.
    space: &'static str,
}

/// Place of the space that is added to the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DummySpace {
    None,
    Before,
    After,
}

impl Normalizer {
    pub(super) fn new(spec: &NormalizerSpec, trainer: &TrainerSpec) -> Result<Normalizer, Problem> {
        let charsmap = match spec.precompiled_charsmap.as_slice() {
            [] => None,
            bytes => Some(Charsmap::new(bytes)?),
        };
        let dummy_space = match (spec.add_dummy_prefix, trainer.treat_whitespace_as_suffix) {
            (false, _) => DummySpace::None,
            (true, false) => DummySpace::Before,
            (true, true) => DummySpace::After,
        };
        let space = if spec.escape_whitespaces { META_SPACE } else { " " };
        Ok(Normalizer { charsmap, dummy_space, remove_extra_whitespaces: spec.remove_extra_whitespaces, space })
    }

    /// `text` after all rules. User-defined symbols are found before any rule and keep their characters.
    pub(super) fn normalize(&self, text: &str, user_defined: &PrefixSet) -> String {
        let mut rest = text;
        if self.remove_extra_whitespaces {
            while let Some((" ", len)) = self.next_chunk(rest, user_defined) {
                rest = &rest[len..];
            }
        }
        let mut normalized = String::new();
        if rest.is_empty() {
            return normalized;
        }
        normalized.reserve(rest.len() + rest.len() / 2);
        if self.dummy_space == DummySpace::Before {
            normalized.push_str(self.space);
        }
        let mut after_space = self.remove_extra_whitespaces;
        while let Some((mut chunk, len)) = self.next_chunk(rest, user_defined) {
            rest = &rest[len..];
            if after_space {
                chunk = chunk.trim_start_matches(' ');
            }
            for character in chunk.chars() {
                match character {
                    ' ' => normalized.push_str(self.space),
                    other => normalized.push(other),
                }
            }
            // An empty chunk does not change the state.
            if !chunk.is_empty() {
                after_space = self.remove_extra_whitespaces && chunk.ends_with(' ');
            }
        }
        if self.remove_extra_whitespaces {
            let len = normalized.trim_end_matches(self.space).len();
            normalized.truncate(len);
        }
        if self.dummy_space == DummySpace::After {
            normalized.push_str(self.space);
        }
        normalized
    }

    /// The normalised start of `text` and the number of its bytes: a user-defined symbol, the longest rule that matches,
    /// or one character.
    fn next_chunk<'a>(&'a self, text: &'a str, user_defined: &PrefixSet) -> Option<(&'a str, usize)> {
        let character = text.chars().next()?;
        if let Some(len) = user_defined.longest_prefix(text) {
            return Some((&text[..len], len));
        }
        if let Some((len, replacement)) = self.charsmap.as_ref().and_then(|map| map.longest_prefix(text)) {
            return Some((replacement, len));
        }
        let len = character.len_utf8();
        Some((&text[..len], len))
    }
}
