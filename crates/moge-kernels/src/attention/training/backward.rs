//! Backward: probabilities again from scores and log sums, then the gradients of queries, keys and values.

use std::ops::Range;

use super::tile::{Causal, Form, PackRows, Product, Tile, Transpose, UnpackRow};
use super::{
    BACKWARD_KEYS, BLOCK_KEYS, SegmentAttention, SegmentAttentionScratch, Work, Worker, score_scale, tile_positions,
};
use crate::cpu::{Cpu, SharedMut};
use crate::elements::Accumulate;
use crate::exp::exp2_up_to_0;
use crate::isa::Isa;
use crate::simd::{Simd, SimdOp};

/// What [`super::attention_forward`] read and wrote.
#[derive(Clone, Copy, Debug)]
pub struct AttentionKept<'a> {
    /// Queries, keys and values.
    pub qkv: [&'a [f32]; 3],
    /// The output.
    pub out: &'a [f32],
    /// Logarithms of the sums of exponentials.
    pub log_sums: &'a [f32],
}

/// Gradients of [`super::attention_forward`]: `d_qkv`, of its queries, keys and values, from `d_out`, that of its output.
///
/// With `p = exp(score - log_sum)`, the probabilities: `dv[j] = sum over t, h of p * d_out[t, h]`,
/// `d_score = p * (d_out[t, h] . v[j] - d_out[t, h] . out[t, h])`, `dq[t, h] = sum over j of d_score * k[j] / sqrt(head_dim)` and
/// `dk[j] = sum over t, h of d_score * q[t, h] / sqrt(head_dim)`, over the rows `t` of a piece from `j` on and the heads `h` of
/// the KV head.
///
/// Shapes: as of what each is the gradient; what is in `d_qkv` is replaced. Results have the same bits on any number of
/// threads. What a NaN or an infinity makes of its piece is unspecified.
///
/// # Panics
/// If a length does not fit, the offsets fall, or the batch exceeds what `scratch` is for.
pub fn attention_backward(
    cpu: &Cpu,
    shape: SegmentAttention<'_>,
    d_qkv: [&mut [f32]; 3],
    d_out: &[f32],
    kept: AttentionKept<'_>,
    scratch: &mut SegmentAttentionScratch,
) {
    let [dq, dk, dv] = d_qkv;
    shape.check(kept.qkv, &[kept.out, d_out, dq], kept.log_sums);
    assert_eq!((dk.len(), dv.len()), (kept.qkv[1].len(), kept.qkv[2].len()), "gradients of k and v");
    scratch.list_work(cpu, &shape, usize::MAX);
    let (work, workers) = (&scratch.work, SharedMut::new(&mut scratch.workers));
    let (isa, gradients) = (cpu.isa(), [dq, dk, dv].map(SharedMut::new));
    cpu.for_each_with_worker(work.len() * shape.num_kv_heads, |worker, index| {
        // SAFETY: Each thread has its own worker.
        let worker = unsafe { &mut workers.slice(worker..worker + 1)[0] };
        let item = Item {
            isa,
            shape,
            kept,
            d_out,
            piece: &work[index / shape.num_kv_heads],
            kv_head: index % shape.num_kv_heads,
        };
        item.run(worker, &gradients);
    });
}

/// A piece and KV head.
struct Item<'a> {
    isa: Isa,
    shape: SegmentAttention<'a>,
    kept: AttentionKept<'a>,
    d_out: &'a [f32],
    piece: &'a Work,
    kv_head: usize,
}

impl Item<'_> {
    fn run(&self, worker: &mut Worker, [dq, dk, dv]: &[SharedMut<'_, f32>; 3]) {
        let kv_head = self.shape.kv_head(self.kv_head);
        let (piece, max_positions) = (&self.piece.rows, tile_positions(self.shape.q_per_kv()));
        for first_key in (0..piece.len()).step_by(BLOCK_KEYS) {
            let keys = first_key..piece.len().min(first_key + BLOCK_KEYS);
            let rows = piece.start + keys.start..piece.start + keys.end;
            let Worker { k, v, dk: dk_tile, dv: dv_tile, .. } = worker;
            for (tile, x) in [(k, self.kept.qkv[1]), (v, self.kept.qkv[2])] {
                self.isa.run(PackRows { tile, x, head: kv_head, rows: rows.clone(), scale: 1.0 });
            }
            dk_tile.clear(keys.len());
            dv_tile.clear(keys.len());
            let first_position = first_key / max_positions * max_positions;
            for position in (first_position..piece.len()).step_by(max_positions) {
                self.add_queries(worker, keys.clone(), position..piece.len().min(position + max_positions), dq);
            }
            for (gradient, tile) in [(dk, &worker.dk), (dv, &worker.dv)] {
                for (key, row) in rows.clone().enumerate() {
                    // SAFETY: Each piece and KV head is in one item of work only.
                    let out = unsafe { gradient.slice(kv_head.numbers_of(row)) };
                    let x = tile.all().from(key);
                    self.isa.run(UnpackRow { out, x, head: kv_head, scale: 1.0, store: Accumulate::Set });
                }
            }
        }
    }

    /// What a tile of queries adds to the gradients of a block of keys and values, and what they add to its own.
    fn add_queries(&self, worker: &mut Worker, keys: Range<usize>, positions: Range<usize>, dq: &SharedMut<'_, f32>) {
        let (q_head, head_dim, q_per_kv) =
            (self.shape.q_head(self.kv_head), self.shape.head_dim, self.shape.q_per_kv());
        let rows = self.piece.rows.start + positions.start..self.piece.rows.start + positions.end;
        self.pack_queries(worker, rows.clone());
        for first_key in (keys.start..keys.end.min(positions.end)).step_by(BACKWARD_KEYS) {
            let num_keys = BACKWARD_KEYS.min(keys.end.min(positions.end) - first_key);
            let num_queries = rows.len() * q_per_kv;
            let causal = Causal { q_per_kv, num_queries, num_keys, position: positions.start, first_key };
            let place = first_key - keys.start;
            self.probabilities(worker, causal, place);
            let Worker { q, d_out, scores, d_scores, k, dk, dv, sums, .. } = worker;
            let (form, store) = (Form::SumOverQueries, Accumulate::Add);
            for (a, b, out) in [(&*scores, &*d_out, dv), (&*d_scores, &*q, dk)] {
                let (a, b, out) = (a.all(), b.all(), out.all_mut().from(place));
                self.isa.run(Product { form, a, b, out, store, causal, head_dim });
            }
            let (form, store) = (Form::SumOverKeys, first_or_add(place == 0));
            let (a, b, out) = (d_scores.all(), k.all().from(place), sums.all_mut());
            self.isa.run(Product { form, a, b, out, store, causal, head_dim });
        }
        for (index, row) in rows.enumerate() {
            // SAFETY: Each piece and KV head is in one item of work only.
            let out = unsafe { dq.slice(q_head.numbers_of(row)) };
            let (x, store) = (worker.sums.all().from(index * q_per_kv), first_or_add(keys.start == 0));
            self.isa.run(UnpackRow { out, x, head: q_head, scale: score_scale(head_dim), store });
        }
    }

    /// Prepare a tile of queries: their numbers and gradients as they are and turned, and what each subtracts.
    fn pack_queries(&self, worker: &mut Worker, rows: Range<usize>) {
        let (q_per_kv, head_dim, isa) = (self.shape.q_per_kv(), self.shape.head_dim, self.isa);
        let head = self.shape.q_head(self.kv_head);
        let num_rows = rows.len() * q_per_kv;
        let Worker { q, q_columns, d_out, d_out_columns, sums, stats, .. } = worker;
        let scale = score_scale(head_dim);
        isa.run(PackRows { tile: q, x: self.kept.qkv[0], head, rows: rows.clone(), scale });
        let scale = std::f32::consts::LOG2_E;
        isa.run(Transpose { out: q_columns, x: q, num_rows, num_cols: head_dim, scale });
        isa.run(PackRows { tile: d_out, x: self.d_out, head, rows: rows.clone(), scale: 1.0 });
        isa.run(Transpose { out: d_out_columns, x: d_out, num_rows, num_cols: head_dim, scale: 1.0 });
        isa.run(PackRows { tile: sums, x: self.kept.out, head, rows: rows.clone(), scale: 1.0 });
        isa.run(RowDots { stats, out: sums, d_out, num_rows, head_dim });
        let head = self.shape.head_numbers(self.kv_head);
        let log_sums = rows.flat_map(|row| &self.kept.log_sums[head.numbers_of(row)]);
        for (out, log_sum) in stats.all_mut().row(LOG_SUM).iter_mut().zip(log_sums) {
            *out = log_sum * std::f32::consts::LOG2_E;
        }
    }

    /// Leave the probabilities of a tile in `scores` and the gradients of scores in `d_scores`; its keys are from `place` on
    /// in the block.
    fn probabilities(&self, worker: &mut Worker, causal: Causal, place: usize) {
        let (head_dim, isa) = (self.shape.head_dim, self.isa);
        let Worker { q_columns, d_out_columns, k, v, scores, d_scores, stats, .. } = worker;
        let (form, store) = (Form::Scores, Accumulate::Set);
        for (a, b, out) in [(k, q_columns, &mut *scores), (v, d_out_columns, &mut *d_scores)] {
            let (a, b, out) = (a.all().from(place), b.all(), out.all_mut());
            isa.run(Product { form, a, b, out, store, causal, head_dim });
        }
        isa.run(SoftmaxBackward { scores, d_scores, stats, causal });
    }
}

fn first_or_add(is_first: bool) -> Accumulate {
    if is_first { Accumulate::Set } else { Accumulate::Add }
}

/// Rows of [`Worker::stats`]: log sums in units of ln 2, and the products of each query's output and its gradient.
const LOG_SUM: usize = 0;
const DELTA: usize = 1;

/// `stats[DELTA][r] = sum over c of out[r, c] * d_out[r, c]`.
struct RowDots<'a> {
    stats: &'a mut Tile,
    out: &'a Tile,
    d_out: &'a Tile,
    num_rows: usize,
    head_dim: usize,
}

impl SimdOp for RowDots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (mut stats, out, d_out) = (self.stats.all_mut(), self.out.all(), self.d_out.all());
        for row in 0..self.num_rows {
            let (a, b) = (&out.row(row)[..self.head_dim], &d_out.row(row)[..self.head_dim]);
            let mut sums = simd.splat(0.0);
            for (a, b) in a.chunks(S::LANES).zip(b.chunks(S::LANES)) {
                sums = if a.len() == S::LANES {
                    simd.mul_add(simd.load(a), simd.load(b), sums)
                } else {
                    simd.mul_add(simd.load_part(a, 0.0), simd.load_part(b, 0.0), sums)
                };
            }
            stats.row(DELTA)[row] = simd.sum(sums);
        }
    }
}

/// Scores become probabilities, and their gradients become those of scores; 0 where a query does not see the key.
struct SoftmaxBackward<'a> {
    scores: &'a mut Tile,
    d_scores: &'a mut Tile,
    stats: &'a Tile,
    causal: Causal,
}

impl SimdOp for SoftmaxBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (mut scores, mut d_scores, stats) = (self.scores.all_mut(), self.d_scores.all_mut(), self.stats.all());
        let (log_sums, deltas) = (stats.row(LOG_SUM), stats.row(DELTA));
        for key in 0..self.causal.num_keys {
            let (scores, d_scores) = (scores.row(key), d_scores.row(key));
            let hidden = self.causal.first_query(key);
            let mut query = hidden / S::LANES * S::LANES;
            while query < self.causal.num_queries {
                let score = simd.sub(simd.load(&scores[query..]), simd.load(&log_sums[query..]));
                let probability = exp2_up_to_0(simd, score);
                let d_probability = simd.sub(simd.load(&d_scores[query..]), simd.load(&deltas[query..]));
                simd.store(&mut scores[query..], probability);
                simd.store(&mut d_scores[query..], simd.mul(probability, d_probability));
                query += S::LANES;
            }
            scores[..hidden].fill(0.0);
            d_scores[..hidden].fill(0.0);
        }
    }
}
