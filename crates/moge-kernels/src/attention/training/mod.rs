//! Attention for training: causal, over the packed pieces of a batch, and its backward.
//!
//! Keys and values of a piece are packed in blocks of 256, queries in tiles, the query heads of a KV head stacked. Forward
//! takes a tile of queries through the blocks before its end; backward takes a block through the tiles that see it. Scores
//! lie `[keys, queries]`, so that softmax works on lanes of queries and never sums over the lanes of a register. Backward
//! computes the probabilities again from the scores and the log sums that forward kept, so nothing grows with the square of
//! a piece's length.
//!
//! **Order.** An item of forward's work is 256 rows of a piece for one KV head; of backward's it is a whole piece for one KV
//! head, because all its tiles of queries add to the same gradients of keys and values. An item is alone with what it
//! writes, and where its tiles begin depends on the piece alone, so results have the same bits on any number of threads and
//! beside any other pieces.

mod backward;
mod forward;
#[cfg(all(test, not(loom)))]
mod tests;
mod tile;

use std::ops::Range;

pub use backward::{AttentionKept, attention_backward};
pub use forward::attention_forward;
use tile::Tile;

use crate::cpu::Cpu;

/// Heads of an attention layer, and where the pieces of a batch begin: each row sees the rows of its piece up to itself.
#[derive(Clone, Copy, Debug)]
pub struct SegmentAttention<'a> {
    /// Query heads.
    pub num_q_heads: usize,
    /// Key/value heads; divides `num_q_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The first row of each piece, and the number of rows behind the last one: `[num_pieces + 1]`, from 0 upwards. A piece
    /// may be empty.
    pub offsets: &'a [usize],
}

impl SegmentAttention<'_> {
    fn q_per_kv(&self) -> usize {
        self.num_q_heads / self.num_kv_heads
    }

    fn num_rows(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0)
    }

    /// The query heads of a KV head.
    fn q_head(&self, kv_head: usize) -> Head {
        let len = self.q_per_kv() * self.head_dim;
        Head { start: kv_head * len, len, row_len: self.num_q_heads * self.head_dim, head_dim: self.head_dim }
    }

    fn kv_head(&self, kv_head: usize) -> Head {
        Head {
            start: kv_head * self.head_dim,
            len: self.head_dim,
            row_len: self.num_kv_heads * self.head_dim,
            head_dim: self.head_dim,
        }
    }

    /// Where the numbers of the query heads of a KV head are that are one for each head, `[num_rows, num_q_heads]`.
    fn head_numbers(&self, kv_head: usize) -> Head {
        let len = self.q_per_kv();
        Head { start: kv_head * len, len, row_len: self.num_q_heads, head_dim: 1 }
    }

    /// Panics unless the lengths of q, k and v, and of what has the shape of q, fit.
    fn check(&self, [q, k, v]: [&[f32]; 3], like_q: &[&[f32]], log_sums: &[f32]) {
        assert!(
            self.num_kv_heads > 0 && self.num_q_heads.is_multiple_of(self.num_kv_heads),
            "{} query heads for {} KV heads",
            self.num_q_heads,
            self.num_kv_heads
        );
        assert!(self.offsets.first().is_none_or(|first| *first == 0) && self.offsets.is_sorted(), "offsets of pieces");
        let num_rows = self.num_rows();
        let (q_width, kv_width) = (self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        assert_eq!(q.len(), num_rows * q_width, "q of {num_rows} x {q_width}");
        assert_eq!(
            (k.len(), v.len()),
            (num_rows * kv_width, num_rows * kv_width),
            "k and v of {num_rows} x {kv_width}"
        );
        assert!(like_q.iter().all(|x| x.len() == q.len()), "{num_rows} x {q_width} as q");
        assert_eq!(log_sums.len(), num_rows * self.num_q_heads, "log sums of {num_rows} x {}", self.num_q_heads);
    }
}

/// Where neighboring heads are in the rows of a matrix.
#[derive(Clone, Copy, Debug)]
struct Head {
    start: usize,
    len: usize,
    row_len: usize,
    head_dim: usize,
}

impl Head {
    #[inline(always)]
    fn numbers_of(self, row: usize) -> Range<usize> {
        let start = row * self.row_len + self.start;
        start..start + self.len
    }
}

/// Scratch memory of [`attention_forward`] and [`attention_backward`], allocated once.
#[derive(Debug)]
pub struct SegmentAttentionScratch {
    q_per_kv: usize,
    head_dim: usize,
    max_rows: usize,
    workers: Vec<Worker>,
    work: Vec<Work>,
}

impl SegmentAttentionScratch {
    /// Scratch for batches of at most `max_rows` rows on `num_threads` threads: for heads of 128 numbers some 1 MiB for each
    /// thread, and 24 bytes for each row.
    ///
    /// # Panics
    /// If `q_per_kv` or `head_dim` is 0.
    pub fn new(num_threads: usize, max_rows: usize, q_per_kv: usize, head_dim: usize) -> SegmentAttentionScratch {
        assert!(q_per_kv > 0 && head_dim > 0, "{q_per_kv} query heads for each KV head, of {head_dim} numbers");
        let workers = (0..num_threads).map(|_| Worker::new(q_per_kv, head_dim)).collect();
        SegmentAttentionScratch { q_per_kv, head_dim, max_rows, workers, work: Vec::with_capacity(max_rows) }
    }

    /// List the pieces, cut to at most `max_rows` rows, those with the most work first: the order changes no result.
    fn list_work(&mut self, cpu: &Cpu, shape: &SegmentAttention<'_>, max_rows: usize) {
        assert_eq!((self.q_per_kv, self.head_dim), (shape.q_per_kv(), shape.head_dim), "heads of scratch");
        assert!(shape.num_rows() <= self.max_rows, "{} rows in scratch for {}", shape.num_rows(), self.max_rows);
        assert!(cpu.num_threads() <= self.workers.len(), "threads in scratch for {}", self.workers.len());
        self.work.clear();
        for piece in shape.offsets.windows(2) {
            for start in (piece[0]..piece[1]).step_by(max_rows) {
                self.work
                    .push(Work { piece_start: piece[0], rows: start..piece[1].min(start.saturating_add(max_rows)) });
            }
        }
        self.work.sort_unstable_by_key(|work| std::cmp::Reverse((work.rows.end - work.piece_start, work.rows.len())));
    }
}

/// Rows of one piece that one thread takes at once, for one KV head.
#[derive(Clone, Debug)]
struct Work {
    /// The first row of the piece.
    piece_start: usize,
    rows: Range<usize>,
}

/// Most stacked queries of a tile, unless one row has more: 96 queries of 64 numbers are 30 KiB, and backward has five such
/// tiles, a share of a 512 KiB L2. A multiple of the rows and of the columns of a register tile.
const MAX_TILE_QUERIES: usize = 96;
/// Keys that backward takes at once: with 96 queries two tiles of scores are 42 KiB. A multiple of the rows of a register tile.
const BACKWARD_KEYS: usize = 48;
/// Keys that are packed at once: with their values and the gradients of both, 64 numbers each, 320 KiB, a share of L2.
const BLOCK_KEYS: usize = 256;

/// Rows of a tile of queries.
fn tile_positions(q_per_kv: usize) -> usize {
    (MAX_TILE_QUERIES / q_per_kv).max(1)
}

/// Tiles of one thread, called by their shapes.
#[derive(Debug)]
struct Worker {
    /// `[queries, head_dim]`; in backward times the scale of scores.
    q: Tile,
    /// `[head_dim, queries]`, times the scale of scores in units of ln 2.
    q_columns: Tile,
    d_out: Tile,
    d_out_columns: Tile,
    /// `[keys, head_dim]`.
    k: Tile,
    v: Tile,
    /// `[keys, queries]`: scores in units of ln 2, then probabilities.
    scores: Tile,
    /// `[keys, queries]`: gradients of probabilities, then of scores.
    d_scores: Tile,
    /// `[queries, head_dim]`: output or the gradient of queries.
    sums: Tile,
    /// `[keys, head_dim]`: gradients of keys and values.
    dk: Tile,
    dv: Tile,
    /// `[3, queries]`, one number for each query.
    stats: Tile,
}

impl Worker {
    fn new(q_per_kv: usize, head_dim: usize) -> Worker {
        let num_queries = tile_positions(q_per_kv) * q_per_kv;
        Worker {
            q: Tile::new(num_queries, head_dim),
            q_columns: Tile::new(head_dim, num_queries),
            d_out: Tile::new(num_queries, head_dim),
            d_out_columns: Tile::new(head_dim, num_queries),
            k: Tile::new(BLOCK_KEYS, head_dim),
            v: Tile::new(BLOCK_KEYS, head_dim),
            scores: Tile::new(BLOCK_KEYS, num_queries),
            d_scores: Tile::new(BACKWARD_KEYS, num_queries),
            sums: Tile::new(num_queries, head_dim),
            dk: Tile::new(BLOCK_KEYS, head_dim),
            dv: Tile::new(BLOCK_KEYS, head_dim),
            stats: Tile::new(3, num_queries),
        }
    }
}

/// What scores are multiplied with.
fn score_scale(head_dim: usize) -> f32 {
    1.0 / (head_dim as f32).sqrt()
}
