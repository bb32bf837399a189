//! How keys and queries are cut: into chunks at fixed positions, and into tiles.

/// Tokens of a chunk. Chunks sit at fixed positions: chunk `c` holds the tokens from `c * CHUNK_LEN`. The keys
/// and values of one head, 128 wide in bf16, are 128 KiB, a share of L2; the integer sums of int8 fit 32 bits.
pub(super) const CHUNK_LEN: usize = 256;

/// Queries of a tile: with two registers of keys or values each, 12 sums, two loads and a factor fill 16 registers.
pub(super) const TILE_QUERIES: usize = 6;

/// Numbers of a part.
pub(super) fn part_len(width: usize) -> usize {
    width + 2
}

/// What becomes of a tile's scores.
#[derive(Debug)]
pub(super) struct Tile {
    /// Scores, then their exponentials.
    pub(super) scores: [[f32; CHUNK_LEN]; TILE_QUERIES],
    /// For int8 values: the integers that multiply them.
    pub(super) weights: [[i16; CHUNK_LEN]; TILE_QUERIES],
}

impl Tile {
    pub(super) fn new() -> Tile {
        Tile { scores: [[0.0; CHUNK_LEN]; TILE_QUERIES], weights: [[0; CHUNK_LEN]; TILE_QUERIES] }
    }
}
