//! Attention of one row over one chunk of keys, and the merging of chunks.
//!
//! A *part* is what one query head makes of one chunk: the largest score, the sum of the scores' exponentials
//! after taking it away, and the values weighted with them: `[2 + head_dim]` numbers. Every part is computed
//! from nothing, and parts are merged in the order of the chunks, so it does not matter who computes which.

use std::ops::Range;

use crate::exp::exp;
use crate::gemm::tile::{TILE_COLS, dot_tile};
use crate::simd::{MAX_LANES, Simd, SimdOp, Stored};
use crate::softmax::exp_minus_max;

/// Tokens of a chunk. Chunks sit at fixed positions: chunk `c` holds the tokens from `c * CHUNK_LEN`. The keys
/// and values of one head, 128 wide in bf16, are 128 KiB, a share of L2.
pub(super) const CHUNK_LEN: usize = 256;

/// Query heads that share loads of keys and values.
const TILE_HEADS: usize = 3;
/// Registers of one head's values that are summed at once.
const TILE_REGISTERS: usize = 4;

/// Numbers of a part: maximum, sum, weighted values.
pub(super) fn part_len(head_dim: usize) -> usize {
    2 + head_dim
}

/// Where a chunk's keys and values lie: the same offsets in both.
pub(super) struct ChunkPlaces {
    offsets: [usize; CHUNK_LEN],
}

impl ChunkPlaces {
    /// `offset(position)` for the positions of a chunk.
    pub(super) fn new(positions: Range<usize>, offset: impl Fn(usize) -> usize) -> ChunkPlaces {
        let mut offsets = [0; CHUNK_LEN];
        for (place, position) in offsets.iter_mut().zip(positions) {
            *place = offset(position);
        }
        ChunkPlaces { offsets }
    }
}

/// The parts of all query heads of one KV head, for one row and the first `num_keys` keys of a chunk.
pub(super) struct AttendChunk<'a, W> {
    /// `[q_per_kv, head_dim]`.
    pub(super) q: &'a [f32],
    pub(super) keys: &'a [W],
    pub(super) values: &'a [W],
    pub(super) places: &'a ChunkPlaces,
    /// At least one.
    pub(super) num_keys: usize,
    pub(super) head_dim: usize,
    /// Scratch, `[q_per_kv, CHUNK_LEN]`.
    pub(super) scores: &'a mut [f32],
    /// `[q_per_kv, part_len]`.
    pub(super) parts: &'a mut [f32],
}

impl<W: Stored> SimdOp for AttendChunk<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let num_heads = self.q.len() / self.head_dim;
        assert!((1..=CHUNK_LEN).contains(&self.num_keys));
        assert!(self.q.len() == num_heads * self.head_dim && self.scores.len() >= num_heads * CHUNK_LEN);
        assert_eq!(self.parts.len(), num_heads * part_len(self.head_dim));
        for &offset in &self.places.offsets[..self.num_keys] {
            assert!(offset + self.head_dim <= self.keys.len() && offset + self.head_dim <= self.values.len());
        }
        let mut head = 0;
        while head < num_heads {
            // SAFETY: `head + M` heads exist; the lengths were checked above.
            head += unsafe {
                match num_heads - head {
                    1 => self.attend_heads::<S, 1>(simd, head),
                    2 => self.attend_heads::<S, 2>(simd, head),
                    _ => self.attend_heads::<S, TILE_HEADS>(simd, head),
                }
            };
        }
    }
}

impl<W: Stored> AttendChunk<'_, W> {
    /// The parts of `M` heads from `head`; returns `M`.
    ///
    /// # Safety
    /// There are `head + M` heads, and every length and offset fits.
    #[inline(always)]
    unsafe fn attend_heads<S: Simd, const M: usize>(&mut self, simd: S, head: usize) -> usize {
        // SAFETY: The caller's promise.
        unsafe { self.score_heads::<S, M>(simd, head) };
        for head in head..head + M {
            let scores = &mut self.scores[head * CHUNK_LEN..][..self.num_keys];
            let (max, sum) = exp_minus_max(simd, scores);
            let part = &mut self.parts[head * part_len(self.head_dim)..];
            (part[0], part[1]) = (max, sum);
        }
        let head_dim = self.head_dim;
        let mut first = 0;
        // SAFETY: The caller's promise, and `first` stays within a head.
        unsafe {
            while first + TILE_REGISTERS * S::LANES <= head_dim {
                self.weigh_values::<S, M, TILE_REGISTERS>(simd, head, first);
                first += TILE_REGISTERS * S::LANES;
            }
            while first + S::LANES <= head_dim {
                self.weigh_values::<S, M, 1>(simd, head, first);
                first += S::LANES;
            }
        }
        for head in head..head + M {
            self.weigh_rest(head, first..head_dim);
        }
        M
    }

    /// Scaled scores of `M` heads with every key.
    ///
    /// # Safety
    /// As for [`Self::attend_heads`].
    #[inline(always)]
    unsafe fn score_heads<S: Simd, const M: usize>(&mut self, simd: S, head: usize) {
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let mut q = [self.q.as_ptr(); M];
        for (m, q) in q.iter_mut().enumerate() {
            *q = self.q[(head + m) * self.head_dim..].as_ptr();
        }
        for first_key in (0..self.num_keys).step_by(TILE_COLS) {
            let mut keys = [self.keys.as_ptr(); TILE_COLS];
            for (n, key) in keys.iter_mut().enumerate() {
                // Past the last key it is used again; that score is not stored.
                let offset = self.places.offsets[(first_key + n).min(self.num_keys - 1)];
                *key = self.keys[offset..].as_ptr();
            }
            // SAFETY: `head_dim` numbers follow each of these offsets.
            let tile = unsafe { dot_tile(simd, q, keys, self.head_dim) };
            let num_keys = TILE_COLS.min(self.num_keys - first_key);
            for m in 0..M {
                let scores = &mut self.scores[(head + m) * CHUNK_LEN + first_key..][..num_keys];
                for n in 0..num_keys {
                    scores[n] = tile[m][n] * scale;
                }
            }
        }
    }

    /// `R` registers of the weighted values of `M` heads, from number `first` of a head; keys in order.
    ///
    /// # Safety
    /// As for [`Self::attend_heads`], and `first + R * LANES <= head_dim`.
    #[inline(always)]
    unsafe fn weigh_values<S: Simd, const M: usize, const R: usize>(&mut self, simd: S, head: usize, first: usize) {
        let mut sums = [[simd.splat(0.0); R]; M];
        let values = self.values.as_ptr();
        let scores = self.scores[head * CHUNK_LEN..][..M * CHUNK_LEN].as_ptr();
        for (key, offset) in self.places.offsets[..self.num_keys].iter().enumerate() {
            let mut weights = [simd.splat(0.0); M];
            for m in 0..M {
                // SAFETY: `M * CHUNK_LEN` scores follow, and `key` is below `CHUNK_LEN`.
                weights[m] = simd.splat(unsafe { *scores.add(m * CHUNK_LEN + key) });
            }
            for r in 0..R {
                // SAFETY: `head_dim` numbers follow the offset, and these are among them.
                let value = unsafe { W::load(simd, values.add(offset + first + r * S::LANES)) };
                for m in 0..M {
                    sums[m][r] = simd.mul_add(weights[m], value, sums[m][r]);
                }
            }
        }
        let part_len = part_len(self.head_dim);
        for m in 0..M {
            let out = &mut self.parts[(head + m) * part_len + 2..][..self.head_dim];
            for r in 0..R {
                simd.store(&mut out[first + r * S::LANES..], sums[m][r]);
            }
        }
    }

    /// The numbers of a head that fill no register.
    #[inline(always)]
    fn weigh_rest(&mut self, head: usize, rest: Range<usize>) {
        let scores = &self.scores[head * CHUNK_LEN..][..self.num_keys];
        let out = &mut self.parts[head * part_len(self.head_dim) + 2..][..self.head_dim];
        for i in rest {
            out[i] = 0.0;
            for (score, offset) in scores.iter().zip(&self.places.offsets) {
                out[i] += score * self.values[offset + i].widen();
            }
        }
    }
}

/// Merge `next` into `merged`: the parts of a run of query heads over one chunk more.
pub(super) struct MergeParts<'a> {
    /// `[num_heads, part_len]`.
    pub(super) merged: &'a mut [f32],
    /// `[num_heads, part_len]`.
    pub(super) next: &'a [f32],
    pub(super) head_dim: usize,
}

impl SimdOp for MergeParts<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let part_len = part_len(self.head_dim);
        for (merged, next) in self.merged.chunks_exact_mut(part_len).zip(self.next.chunks_exact(part_len)) {
            let max = merged[0].max(next[0]);
            let merged_scale = exp_of(simd, merged[0] - max);
            let next_scale = exp_of(simd, next[0] - max);
            merged[0] = max;
            for (merged, next) in merged[1..].iter_mut().zip(&next[1..]) {
                *merged = *merged * merged_scale + next * next_scale;
            }
        }
    }
}

/// The exponential of one number.
#[inline(always)]
fn exp_of<S: Simd>(simd: S, x: f32) -> f32 {
    let mut lanes = [0.0; MAX_LANES];
    simd.store(&mut lanes, exp(simd, simd.splat(x)));
    lanes[0]
}
