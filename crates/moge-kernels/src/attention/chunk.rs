//! Attention of a run of queries over one chunk of keys, and the merging of chunks.
//!
//! A *part* is what one query makes of one chunk: the values weighted with the exponentials of its scores, after the
//! largest score was taken away; the sum of the exponentials; the largest score: `[width + 2]` numbers. Every part is
//! computed from nothing, and parts are merged in the order of the chunks, so it does not matter who computes which.
//! Scores are in units of `ln 2`, because powers of two are cheaper.

use std::ops::Range;

use super::encode::{Attend, Queries};
use super::numbers::{KvNumber, Product};
use super::paged_kv::KvView;
use super::split::{CHUNK_LEN, TILE_QUERIES, Tile, part_len};
use crate::exp::exp2_up_to_0;
use crate::simd::{MAX_LANES, Simd, SimdOp};

/// Scratch memory of one thread.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) queries: Queries,
    tile: Tile,
    /// Parts of a tile.
    parts: Vec<f32>,
}

impl Worker {
    /// For runs of `max_queries` queries of `head_dim` numbers.
    pub(super) fn new(max_queries: usize, width: usize) -> Worker {
        Worker {
            queries: Queries::new(max_queries, width),
            tile: Tile::new(),
            parts: vec![0.0; TILE_QUERIES * part_len(width)],
        }
    }

    /// Bytes that [`Worker::new`] takes.
    pub(super) fn bytes(max_queries: usize, width: usize) -> usize {
        size_of::<Worker>() + Queries::bytes(max_queries, width) + 4 * TILE_QUERIES * part_len(width)
    }
}

/// Ask for what a chunk begins with, and for what comes in pieces too small for the processor to foresee: the keys of
/// the first block, and all scales.
pub(super) struct PrefetchChunk<'a, T> {
    pub(super) kv: KvView<'a, T>,
    pub(super) heads: &'a [usize],
}

impl<T: KvNumber> SimdOp for PrefetchChunk<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        const LINE_BYTES: usize = 64;
        let (head_len, block_size) = (self.kv.layout.head_len(), self.kv.layout.block_size);
        let keys = &self.kv.keys[self.heads[0] * head_len..][..head_len];
        for keys in keys.chunks(LINE_BYTES / size_of::<T>()) {
            simd.prefetch(keys.as_ptr().cast());
        }
        for head in self.heads {
            for scales in [self.kv.key_scales, self.kv.value_scales] {
                let scales = scales.get(head * block_size..(head + 1) * block_size).unwrap_or_default();
                for scales in scales.chunks(LINE_BYTES / size_of::<f32>()) {
                    simd.prefetch(scales.as_ptr().cast());
                }
            }
        }
    }
}

/// Attend a run of rows, whose queries `worker` holds, to one chunk, and merge what comes out into `merged`.
pub(super) struct AttendChunk<'a, T: KvNumber> {
    pub(super) kv: KvView<'a, T>,
    /// The heads of the chunk's blocks, as [`super::paged_kv::Layout::head_index`] counts them.
    pub(super) heads: &'a [usize],
    /// Position of the first row, and of the first key.
    pub(super) position: usize,
    pub(super) chunk_start: usize,
    pub(super) num_rows: usize,
    pub(super) q_per_kv: usize,
    /// True if `merged` holds nothing yet.
    pub(super) is_first: bool,
    pub(super) worker: &'a mut Worker,
    /// Merged parts of the run's queries.
    pub(super) merged: &'a mut [f32],
}

impl<T: Attend> SimdOp for AttendChunk<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let num_queries = self.num_rows * self.q_per_kv;
        // The queries of rows before the chunk come first.
        let first = self.chunk_start.saturating_sub(self.position).min(self.num_rows) * self.q_per_kv;
        self.check(first..num_queries);
        let num_tiles = (num_queries - first).div_ceil(TILE_QUERIES);
        for tile in 0..num_tiles {
            let start = |tile| first + tile * (num_queries - first) / num_tiles;
            // SAFETY: Each tile has at most `TILE_QUERIES` queries, and `check` looked at the lengths.
            unsafe { self.attend_tile(simd, start(tile)..start(tile + 1)) };
        }
    }
}

impl<T: Attend> AttendChunk<'_, T> {
    /// How many keys of the chunk a query sees.
    #[inline(always)]
    fn num_keys(&self, query: usize) -> usize {
        (self.position + query / self.q_per_kv + 1 - self.chunk_start).min(CHUNK_LEN)
    }

    #[inline(always)]
    fn check(&self, queries: Range<usize>) {
        let (layout, width) = (self.kv.layout, self.kv.layout.width());
        self.worker.queries.check(queries.end, width);
        assert!(self.worker.parts.len() >= TILE_QUERIES * part_len(width));
        assert!(self.merged.len() >= queries.end * part_len(width));
        assert!(queries.is_empty() || self.num_keys(queries.end - 1) <= self.heads.len() * layout.block_size);
        for head in self.heads {
            assert!((head + 1) * layout.head_len() <= self.kv.keys.len().min(self.kv.values.len()));
        }
    }

    /// The parts of a tile of queries, merged.
    ///
    /// # Safety
    /// At most [`TILE_QUERIES`] queries, within what [`AttendChunk::check`] looked at.
    #[inline(always)]
    unsafe fn attend_tile<S: Simd>(&mut self, simd: S, queries: Range<usize>) {
        let part_len = part_len(self.kv.layout.width());
        // SAFETY: The caller's promise.
        unsafe { self.score(simd, queries.clone()) };
        let mut num_keys = [0; TILE_QUERIES];
        for (m, query) in queries.clone().enumerate() {
            num_keys[m] = self.num_keys(query);
        }
        let num_keys = &num_keys[..queries.len()];
        let Worker { tile, parts, .. } = &mut *self.worker;
        let merged = &mut self.merged[queries.start * part_len..queries.end * part_len];
        let parts = &mut parts[..merged.len()];
        let out = if self.is_first { &mut *merged } else { &mut *parts };
        // SAFETY: The caller's promise; the lengths of scores, weights and parts are those of a tile.
        unsafe { T::weigh(simd, (self.kv, self.heads), num_keys, tile, out) };
        if !self.is_first {
            MergeParts { merged, next: parts, part_len }.run(simd);
        }
    }

    /// Scaled scores of a tile of queries with every key that the last of them sees, and a few more.
    ///
    /// # Safety
    /// As for [`AttendChunk::attend_tile`].
    #[inline(always)]
    unsafe fn score<S: Simd>(&mut self, simd: S, queries: Range<usize>) {
        let layout = self.kv.layout;
        let (block_size, width) = (layout.block_size, layout.width());
        let num_keys = self.num_keys(queries.end - 1);
        let scores = self.worker.tile.scores.as_flattened_mut().as_mut_ptr();
        for (index, &head) in self.heads[..num_keys.div_ceil(block_size)].iter().enumerate() {
            let first_key = index * block_size;
            // SAFETY: The caller's promise; a block is a multiple of two registers.
            unsafe {
                let keys = self.kv.keys.as_ptr().add(head * layout.head_len());
                let next = match self.heads.get(index + 1) {
                    Some(next) => self.kv.keys.as_ptr().add(next * layout.head_len()),
                    None => self.kv.values.as_ptr().add(self.heads[0] * layout.head_len()),
                };
                let product = Product {
                    x: keys,
                    cols: block_size,
                    num_cols: (num_keys - first_key).min(block_size).next_multiple_of(2 * S::LANES),
                    num_rows: layout.head_dim.next_multiple_of(2),
                    factors: T::queries(&self.worker.queries).as_ptr().add(queries.start * width),
                    factor_stride: width,
                    out: scores.add(first_key),
                    out_stride: CHUNK_LEN,
                    accumulate: false,
                    next,
                };
                product.run(simd, queries.len());
            }
        }
        let Worker { tile, queries: all, .. } = &mut *self.worker;
        let num_scores = num_keys.next_multiple_of(S::LANES);
        for (scores, query) in tile.scores.iter_mut().zip(queries) {
            T::finish_scores(simd, &mut scores[..num_scores], all, query, (self.kv, self.heads));
        }
    }
}

/// Merge `next` into `merged`: the parts of a run of queries over one chunk more.
pub(super) struct MergeParts<'a> {
    /// `[num_queries, part_len]`.
    pub(super) merged: &'a mut [f32],
    /// `[num_queries, part_len]`.
    pub(super) next: &'a [f32],
    pub(super) part_len: usize,
}

impl SimdOp for MergeParts<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let max_place = self.part_len - 1;
        for (merged, next) in self.merged.chunks_exact_mut(self.part_len).zip(self.next.chunks_exact(self.part_len)) {
            let max = merged[max_place].max(next[max_place]);
            let merged_scale = exp2_of(simd, merged[max_place] - max);
            let next_scale = exp2_of(simd, next[max_place] - max);
            merged[max_place] = max;
            for (merged, next) in merged[..max_place].iter_mut().zip(&next[..max_place]) {
                *merged = *merged * merged_scale + next * next_scale;
            }
        }
    }
}

/// Two to the power of one number.
#[inline(always)]
fn exp2_of<S: Simd>(simd: S, x: f32) -> f32 {
    let mut lanes = [0.0; MAX_LANES];
    simd.store(&mut lanes, exp2_up_to_0(simd, simd.splat(x)));
    lanes[0]
}
