//! What one forward and backward pass reads.

use std::ops::Range;

use moge_kernels::IGNORED_TARGET;

/// Rows of tokens: pieces of documents, one after another. A row sees the rows of its own piece up to itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenBatch {
    /// Token of each row, `[num_rows]`.
    pub tokens: Vec<u32>,
    /// Token that each row should predict, or [`IGNORED_TARGET`], `[num_rows]`.
    pub targets: Vec<u32>,
    /// Piece `i` has the rows `offsets[i]..offsets[i + 1]`, never none; positions count from 0 in each piece,
    /// `[num_pieces + 1]`.
    pub offsets: Vec<usize>,
}

impl TokenBatch {
    /// Rows.
    pub fn num_rows(&self) -> usize {
        self.tokens.len()
    }

    /// Rows that have a target.
    pub fn num_targets(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORED_TARGET).count()
    }

    /// The rows of each piece.
    pub fn pieces(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.offsets.windows(2).map(|pair| pair[0]..pair[1])
    }

    /// Position of each row in its piece, `[num_rows]`.
    pub fn positions(&self) -> Vec<u32> {
        self.pieces().flat_map(|rows| 0..rows.len() as u32).collect()
    }
}
