//! Paged attention: keys and values in blocks, any mix of prefill chunks and decodes.

/// A block of the KV cache: the place of `block_size` consecutive tokens of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// One sequence's share of the rows of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceRows {
    /// Number of consecutive rows, at least one.
    pub num_rows: usize,
    /// Position of the first of these rows in the sequence; that many tokens are in the KV cache already.
    pub first_position: usize,
    /// Blocks of the sequence in order; they have room for `first_position + num_rows` tokens.
    pub block_table: Vec<BlockId>,
}
