//! Byte-pair encoding: neighbouring symbols merge, best score first, until no two of them form a piece.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};

use super::proto::PieceKind;
use super::vocabulary::Vocabulary;
use crate::TokenId;

/// Maximum depth at which an unused piece is split again. It is the library's bound, and keeps a hostile file from
/// exhausting the stack.
const MAX_RESEGMENT_DEPTH: usize = 100;

/// A part of the text that may become a piece. Symbols form a linked list; a merge removes the right one.
struct Symbol {
    start: usize,
    /// Length in bytes; zero once merged into the previous symbol.
    len: usize,
    prev: Option<usize>,
    next: Option<usize>,
    /// A user-defined symbol, which merges with nothing.
    frozen: bool,
}

/// A merge that was possible when it was put on the agenda.
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    /// Length of both symbols in bytes; if it has changed since, the merge is stale.
    len: usize,
}

impl Ord for Merge {
    /// The greatest comes first: highest score, then leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| Reverse(self.left).cmp(&Reverse(other.left)))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Merge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Merge {}

/// One text being encoded.
struct Encoder<'a> {
    vocabulary: &'a Vocabulary,
    text: &'a str,
    symbols: Vec<Symbol>,
    agenda: BinaryHeap<Merge>,
    /// For each unused piece that was considered, the length of its left half, at which it is split again.
    unused_splits: HashMap<TokenId, usize>,
    ids: Vec<TokenId>,
    /// True if the last id is the unknown piece, which a further unknown character joins.
    after_unknown: bool,
}

/// Token ids of normalised text, in O(n log n).
pub(super) fn encode(vocabulary: &Vocabulary, text: &str) -> Vec<TokenId> {
    let symbols = split(vocabulary, text);
    let mut encoder = Encoder {
        vocabulary,
        text,
        symbols,
        agenda: BinaryHeap::new(),
        unused_splits: HashMap::new(),
        ids: Vec::new(),
        after_unknown: false,
    };
    encoder.merge_all();
    encoder.emit_all();
    encoder.ids
}

/// User-defined symbols, and single characters between them.
fn split(vocabulary: &Vocabulary, text: &str) -> Vec<Symbol> {
    let mut symbols: Vec<Symbol> = Vec::new();
    let mut start = 0;
    while let Some(character) = text[start..].chars().next() {
        let user_defined = vocabulary.user_defined.longest_prefix(&text[start..]);
        let len = user_defined.unwrap_or(character.len_utf8());
        let index = symbols.len();
        if let Some(previous) = symbols.last_mut() {
            previous.next = Some(index);
        }
        symbols.push(Symbol { start, len, prev: index.checked_sub(1), next: None, frozen: user_defined.is_some() });
        start += len;
    }
    symbols
}

impl Encoder<'_> {
    fn merge_all(&mut self) {
        for right in 1..self.symbols.len() {
            self.consider(right - 1, right);
        }
        while let Some(merge) = self.agenda.pop() {
            let (left_len, right_len) = (self.symbols[merge.left].len, self.symbols[merge.right].len);
            if left_len == 0 || right_len == 0 || left_len + right_len != merge.len {
                continue;
            }
            let next = self.symbols[merge.right].next;
            self.symbols[merge.right].len = 0;
            self.symbols[merge.left].len = merge.len;
            self.symbols[merge.left].next = next;
            if let Some(prev) = self.symbols[merge.left].prev {
                self.consider(prev, merge.left);
            }
            if let Some(next) = next {
                self.symbols[next].prev = Some(merge.left);
                self.consider(merge.left, next);
            }
        }
    }

    /// Put the merge of two neighbours on the agenda if it forms a piece.
    fn consider(&mut self, left: usize, right: usize) {
        let (first, second) = (&self.symbols[left], &self.symbols[right]);
        if first.frozen || second.frozen {
            return;
        }
        let len = first.len + second.len;
        let Some(id) = self.vocabulary.spelled(&self.text[first.start..first.start + len]) else { return };
        if self.vocabulary.kind(id) == Some(PieceKind::Unused) {
            self.unused_splits.insert(id, first.len);
        }
        self.agenda.push(Merge { score: self.vocabulary.score(id), left, right, len });
    }

    fn emit_all(&mut self) {
        let mut index = (!self.symbols.is_empty()).then_some(0);
        while let Some(at) = index {
            let Symbol { start, len, next, .. } = self.symbols[at];
            self.emit(start, len, 0);
            index = next;
        }
    }

    /// Append the ids of one finished symbol. An unused piece is first taken apart into what it was merged from; one that
    /// was not merged is as good as no piece.
    fn emit(&mut self, start: usize, len: usize, depth: usize) {
        let symbol = &self.text[start..start + len];
        let Some(id) = self.vocabulary.spelled(symbol) else { return self.emit_unknown(symbol) };
        if self.vocabulary.kind(id) == Some(PieceKind::Unused) && depth <= MAX_RESEGMENT_DEPTH {
            let Some(&left_len) = self.unused_splits.get(&id) else { return self.emit_unknown(symbol) };
            self.emit(start, left_len, depth + 1);
            self.emit(start + left_len, len - left_len, depth + 1);
            return;
        }
        self.ids.push(id);
        self.after_unknown = false;
    }

    /// Append a character that no piece spells: its bytes, or the unknown piece once for a run of such characters.
    fn emit_unknown(&mut self, symbol: &str) {
        match &self.vocabulary.byte_ids {
            Some(byte_ids) => self.ids.extend(symbol.bytes().map(|byte| byte_ids[usize::from(byte)])),
            None if self.after_unknown => {}
            None => self.ids.extend(self.vocabulary.unk_id),
        }
        self.after_unknown = true;
    }
}
