//! Special tokens of a SentencePiece tokenizer: the text is split at them before the model encodes it.

use std::collections::HashMap;

use super::files::AddedToken;
use crate::TokenId;

/// Texts that stand for one token each, wherever they occur.
pub(super) struct SpecialTokens {
    by_text: HashMap<String, Special>,
    by_id: HashMap<TokenId, String>,
    /// Lengths of the texts in bytes, longest first.
    lengths: Vec<usize>,
    /// True for bytes that a special token starts with.
    first_bytes: [bool; 256],
}

#[derive(Clone, Copy)]
struct Special {
    id: TokenId,
    lstrip: bool,
    rstrip: bool,
}

/// A part of a text.
#[derive(Debug, PartialEq)]
pub(super) enum Segment<'a> {
    /// Ordinary text, never empty.
    Text(&'a str),
    /// A special token.
    Special(TokenId),
}

impl SpecialTokens {
    /// Tokens without an id are left out: no file gives them one, so no model can know them.
    pub(super) fn new(tokens: impl IntoIterator<Item = AddedToken>) -> Self {
        let mut special =
            Self { by_text: HashMap::new(), by_id: HashMap::new(), lengths: Vec::new(), first_bytes: [false; 256] };
        for token in tokens {
            let (Some(id), Some(&first)) = (token.id, token.text.as_bytes().first()) else { continue };
            special.first_bytes[usize::from(first)] = true;
            special.lengths.push(token.text.len());
            special.by_id.insert(id, token.text.clone());
            special.by_text.insert(token.text, Special { id, lstrip: token.lstrip, rstrip: token.rstrip });
        }
        special.lengths.sort_unstable_by(|a, b| b.cmp(a));
        special.lengths.dedup();
        special
    }

    /// The text of a special token.
    pub(super) fn text(&self, id: TokenId) -> Option<&str> {
        self.by_id.get(&id).map(String::as_str)
    }

    /// The id of a special token.
    pub(super) fn id_of(&self, text: &str) -> Option<TokenId> {
        self.by_text.get(text).map(|special| special.id)
    }

    /// All ids.
    pub(super) fn ids(&self) -> impl Iterator<Item = TokenId> {
        self.by_id.keys().copied()
    }

    /// Split a text at its special tokens: the leftmost first, and the longest of those that begin at one place.
    pub(super) fn split<'a>(&self, text: &'a str) -> Vec<Segment<'a>> {
        let mut segments = Vec::new();
        let push_text = |segments: &mut Vec<Segment<'a>>, text: &'a str| {
            if !text.is_empty() {
                segments.push(Segment::Text(text));
            }
        };
        let (mut start, mut at) = (0, 0);
        while at < text.len() {
            let Some((length, special)) = self.match_at(text, at) else {
                at += 1;
                continue;
            };
            let before = &text[start..at];
            push_text(&mut segments, if special.lstrip { before.trim_end() } else { before });
            segments.push(Segment::Special(special.id));
            at += length;
            if special.rstrip {
                at += text[at..].len() - text[at..].trim_start().len();
            }
            start = at;
        }
        push_text(&mut segments, &text[start..]);
        segments
    }

    /// The longest special token that begins at byte `at`, which need not be the first of a character.
    fn match_at(&self, text: &str, at: usize) -> Option<(usize, Special)> {
        if !self.first_bytes[usize::from(text.as_bytes()[at])] {
            return None;
        }
        self.lengths.iter().find_map(|&length| {
            let candidate = text.get(at..at.checked_add(length)?)?;
            self.by_text.get(candidate).map(|&special| (length, special))
        })
    }
}

/// True for a text in brackets: the form of markers that are ordinary entries of their vocabulary.
pub(super) fn is_bracketed(text: &str) -> bool {
    let inside = |open, close| text.strip_prefix(open).and_then(|text| text.strip_suffix(close));
    inside('<', '>').or(inside('[', ']')).is_some_and(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str, id: u32) -> AddedToken {
        AddedToken { text: text.into(), id: Some(TokenId(id)), ..AddedToken::default() }
    }

    #[test]
    fn the_leftmost_and_then_longest_special_token_wins() {
        let special = SpecialTokens::new([token("<a>", 3), token("<a><b>", 4), token("a>", 5), token("文", 6)]);
        assert_eq!(
            special.split("é<a><b>x<a>文y"),
            [
                Segment::Text("é"),
                Segment::Special(TokenId(4)),
                Segment::Text("x"),
                Segment::Special(TokenId(3)),
                Segment::Special(TokenId(6)),
                Segment::Text("y"),
            ]
        );
    }

    #[test]
    fn stripping_tokens_take_white_space_with_them() {
        let strip = AddedToken { lstrip: true, rstrip: true, ..token("<s>", 7) };
        let special = SpecialTokens::new([strip, token("|", 8)]);
        let [first, second, third, fourth] = ["a", "b ", "c", " "].map(Segment::Text);
        assert_eq!(
            special.split("a <s> \nb | <s>c| "),
            [
                first,
                Segment::Special(TokenId(7)),
                second,
                Segment::Special(TokenId(8)),
                Segment::Special(TokenId(7)),
                third,
                Segment::Special(TokenId(8)),
                fourth
            ]
        );
    }

    #[test]
    fn a_token_without_an_id_is_ordinary_text() {
        let special = SpecialTokens::new([AddedToken { id: None, ..token("<x>", 0) }]);
        assert_eq!(special.split("<x>"), [Segment::Text("<x>")]);
    }
}
