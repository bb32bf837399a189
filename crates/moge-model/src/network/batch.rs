//! What one step computes: rows of tokens, where their keys and values go, and what is wanted back.

use moge_kernels::SequenceRows;

use crate::TokenId;

/// The rows of one step. Prefill chunks and decodes mix freely.
///
/// Row `r` is token `tokens[r]`. Each sequence owns a run of consecutive rows; the runs follow one another
/// without gaps, in the order of `sequences`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token of each row, `[num_rows]`.
    pub tokens: Vec<TokenId>,
    /// The sequences that have rows in this step.
    pub sequences: Vec<SequenceRows>,
    /// Rows whose logits are wanted, strictly ascending.
    pub logit_rows: Vec<u32>,
    /// Rows whose hidden state before the final norm is wanted, strictly ascending.
    pub hidden_rows: Vec<u32>,
    /// Rows whose experts are wanted, strictly ascending. They change no logits. Of no use for a dense network.
    pub route_rows: Vec<u32>,
}

impl Batch {
    /// Number of rows over all sequences.
    pub fn num_rows(&self) -> usize {
        self.tokens.len()
    }
}
