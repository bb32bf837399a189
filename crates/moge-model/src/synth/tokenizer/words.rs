//! The pieces beyond the alphabet of a synthetic vocabulary: syllables, and words made of them.

const CONSONANTS: &[u8] = b"bcdfghjklmnpqrstvwxyz";
const VOWELS: &[u8] = b"aeiou";
const NUM_SYLLABLES: usize = CONSONANTS.len() * VOWELS.len();

/// A piece as the concatenation of two earlier pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Joined {
    pub(super) left: String,
    pub(super) right: String,
}

impl Joined {
    pub(super) fn text(&self) -> String {
        format!("{}{}", self.left, self.right)
    }
}

/// An infinite sequence of distinct pieces, each joined of two earlier ones or of letters and `space`: first all syllables, then
/// all words of one syllable, of two, and so on. A word begins with `space`.
pub(super) fn joined_pieces(space: char) -> impl Iterator<Item = Joined> {
    let syllables = (0..NUM_SYLLABLES).map(|index| {
        let [consonant, vowel] = syllable(index);
        Joined { left: consonant.to_string(), right: vowel.to_string() }
    });
    let words = (0..).map(move |index| {
        let left = if index < NUM_SYLLABLES { space.to_string() } else { word(space, index / NUM_SYLLABLES - 1) };
        Joined { left, right: syllable(index % NUM_SYLLABLES).iter().collect() }
    });
    syllables.chain(words)
}

/// Word number `index`: words are a tree, in which each has all syllables as its next.
fn word(space: char, index: usize) -> String {
    let mut path = Vec::new();
    let mut next = Some(index);
    while let Some(index) = next {
        path.push(index % NUM_SYLLABLES);
        next = (index / NUM_SYLLABLES).checked_sub(1);
    }
    let syllables = path.into_iter().rev().flat_map(syllable);
    std::iter::once(space).chain(syllables).collect()
}

fn syllable(index: usize) -> [char; 2] {
    [CONSONANTS[index / VOWELS.len()].into(), VOWELS[index % VOWELS.len()].into()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_piece_is_new_and_joins_earlier_ones() {
        let mut known: HashSet<String> = ('a'..='z').map(String::from).chain(["_".to_string()]).collect();
        for joined in joined_pieces('_').take(20_000) {
            assert!(known.contains(&joined.left) && known.contains(&joined.right), "{joined:?}");
            assert!(known.insert(joined.text()), "{joined:?} is there already");
        }
        for piece in ["ba", "_zu", "_baba", "_bazu"] {
            assert!(known.contains(piece), "{piece}");
        }
    }
}
