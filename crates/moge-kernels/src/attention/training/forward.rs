//! Forward: a tile of queries goes through its keys, with the largest score and the sum so far (online softmax).

use std::ops::Range;

use super::tile::{Causal, Form, PackRows, Product, Tile, Transpose, UnpackRow};
use super::{BLOCK_KEYS, SegmentAttention, SegmentAttentionScratch, Work, Worker, score_scale, tile_positions};
use crate::cpu::{Cpu, SharedMut};
use crate::elements::Accumulate;
use crate::exp::exp2_up_to_0;
use crate::isa::Isa;
use crate::simd::{Simd, SimdOp};

/// Causal attention inside each piece, all query heads of a KV head sharing its keys and values:
/// `out[t, h] = sum over j of softmax_j(q[t, h] . k[j] / sqrt(head_dim)) * v[j]` over the rows `j` of the piece up to `t`, and
/// `log_sums[t, h] = log(sum over j of exp(q[t, h] . k[j] / sqrt(head_dim)))`, which backward wants.
///
/// Shapes: `out` and `q` `[num_rows, num_q_heads * head_dim]`, `k` and `v` `[num_rows, num_kv_heads * head_dim]`, `log_sums`
/// `[num_rows, num_q_heads]`, where `num_rows` is the last of the offsets. Results have the same bits on any number of
/// threads. What a NaN or an infinity makes of its piece is unspecified.
///
/// # Panics
/// If a length does not fit, the offsets fall, or the batch exceeds what `scratch` is for.
pub fn attention_forward(
    cpu: &Cpu,
    shape: SegmentAttention<'_>,
    out: &mut [f32],
    log_sums: &mut [f32],
    qkv: [&[f32]; 3],
    scratch: &mut SegmentAttentionScratch,
) {
    shape.check(qkv, &[out], log_sums);
    scratch.list_work(cpu, &shape, BLOCK_KEYS);
    let (work, workers) = (&scratch.work, SharedMut::new(&mut scratch.workers));
    let (isa, results) = (cpu.isa(), [out, log_sums].map(SharedMut::new));
    cpu.for_each_with_worker(work.len() * shape.num_kv_heads, |worker, index| {
        // SAFETY: Each thread has its own worker.
        let worker = unsafe { &mut workers.slice(worker..worker + 1)[0] };
        let (work, kv_head) = (&work[index / shape.num_kv_heads], index % shape.num_kv_heads);
        Item { isa, shape, qkv, work, kv_head }.run(worker, &results);
    });
}

/// Rows of [`Worker::stats`]: the largest score, the sum of exponentials, and what a tile of keys multiplies the latter with.
const MAX: usize = 0;
const SUM: usize = 1;
const SCALE: usize = 2;

/// Rows of a piece, for one KV head.
struct Item<'a> {
    isa: Isa,
    shape: SegmentAttention<'a>,
    qkv: [&'a [f32]; 3],
    work: &'a Work,
    kv_head: usize,
}

impl Item<'_> {
    fn run(&self, worker: &mut Worker, [out, log_sums]: &[SharedMut<'_, f32>; 2]) {
        let (q_per_kv, head_dim) = (self.shape.q_per_kv(), self.shape.head_dim);
        let (head, head_numbers) = (self.shape.q_head(self.kv_head), self.shape.head_numbers(self.kv_head));
        let mut packed = None;
        let max_positions = tile_positions(q_per_kv);
        for start in self.work.rows.clone().step_by(max_positions) {
            let rows = start..self.work.rows.end.min(start + max_positions);
            self.attend(worker, rows.clone(), &mut packed);
            let Worker { sums, stats, .. } = &mut *worker;
            for query in 0..rows.len() * q_per_kv {
                let sum = stats.all().row(SUM)[query];
                stats.all_mut().row(SCALE)[query] = 1.0 / sum;
            }
            let scales = &stats.all().row(SCALE)[..rows.len() * q_per_kv];
            self.isa.run(ScaleRows { tile: sums, scales, head_dim });
            for (index, row) in rows.enumerate() {
                // SAFETY: Each row and KV head is in one item of work only.
                let (out, log_sums) =
                    unsafe { (out.slice(head.numbers_of(row)), log_sums.slice(head_numbers.numbers_of(row))) };
                let x = sums.all().from(index * q_per_kv);
                self.isa.run(UnpackRow { out, x, head, scale: 1.0, store: Accumulate::Set });
                for (query, log_sum) in (index * q_per_kv..).zip(log_sums) {
                    let [max, sum] = [MAX, SUM].map(|row| stats.all().row(row)[query]);
                    *log_sum = max * std::f32::consts::LN_2 + sum.ln();
                }
            }
        }
    }

    /// Leave a tile's values, weighted with the exponentials of scores less the largest, in `sums`, the rest in `stats`.
    /// `packed` is the first of the keys that are packed.
    fn attend(&self, worker: &mut Worker, rows: Range<usize>, packed: &mut Option<usize>) {
        let (q_per_kv, head_dim, isa) = (self.shape.q_per_kv(), self.shape.head_dim, self.isa);
        let num_queries = rows.len() * q_per_kv;
        let Worker { q, q_columns, k, v, scores, sums, stats, .. } = worker;
        let scale = score_scale(head_dim) * std::f32::consts::LOG2_E;
        let head = self.shape.q_head(self.kv_head);
        isa.run(PackRows { tile: q, x: self.qkv[0], head, rows: rows.clone(), scale: 1.0 });
        isa.run(Transpose { out: q_columns, x: q, num_rows: num_queries, num_cols: head_dim, scale });
        stats.all_mut().row(MAX).fill(f32::NEG_INFINITY);
        stats.all_mut().row(SUM).fill(0.0);
        let (position, last_row) = (rows.start - self.work.piece_start, self.work.rows.end);
        for first_key in (0..position + rows.len()).step_by(BLOCK_KEYS) {
            if *packed != Some(first_key) {
                // As many as any tile of these rows sees.
                let first_row = self.work.piece_start + first_key;
                let (rows, head) = (first_row..last_row.min(first_row + BLOCK_KEYS), self.shape.kv_head(self.kv_head));
                isa.run(PackRows { tile: k, x: self.qkv[1], head, rows: rows.clone(), scale: 1.0 });
                isa.run(PackRows { tile: v, x: self.qkv[2], head, rows, scale: 1.0 });
                *packed = Some(first_key);
            }
            let num_keys = BLOCK_KEYS.min(position + rows.len() - first_key);
            let causal = Causal { q_per_kv, num_queries, num_keys, position, first_key };
            let (a, b, out) = (k.all(), q_columns.all(), scores.all_mut());
            isa.run(Product { form: Form::Scores, a, b, out, store: Accumulate::Set, causal, head_dim });
            isa.run(OnlineSoftmax { scores, stats, causal });
            let store = if first_key == 0 { Accumulate::Set } else { Accumulate::Add };
            if store == Accumulate::Add {
                let scales = &stats.all().row(SCALE)[..num_queries];
                isa.run(ScaleRows { tile: sums, scales, head_dim });
            }
            let (a, b, out) = (scores.all(), v.all(), sums.all_mut());
            isa.run(Product { form: Form::SumOverKeys, a, b, out, store, causal, head_dim });
        }
    }
}

/// Scores become exponentials, less the largest so far; 0 where a query does not see the key.
struct OnlineSoftmax<'a> {
    scores: &'a mut Tile,
    stats: &'a mut Tile,
    causal: Causal,
}

impl SimdOp for OnlineSoftmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let causal = self.causal;
        let (mut scores, mut stats) = (self.scores.all_mut(), self.stats.all_mut());
        for key in 0..causal.num_keys {
            let hidden = causal.first_query(key);
            // A register that sees part of the key makes 0 of -inf below.
            let whole_registers = hidden / S::LANES * S::LANES;
            let row = scores.row(key);
            row[..whole_registers].fill(0.0);
            row[whole_registers..hidden].fill(f32::NEG_INFINITY);
        }
        for query in (0..causal.num_queries).step_by(S::LANES) {
            let num_keys = causal.num_keys(causal.num_queries.min(query + S::LANES) - 1);
            let old_max = simd.load(&stats.row(MAX)[query..]);
            let mut max = old_max;
            for key in 0..num_keys {
                max = simd.max(max, simd.load(&scores.row(key)[query..]));
            }
            let mut sum = simd.splat(0.0);
            for key in 0..num_keys {
                let scores = &mut scores.row(key)[query..];
                let power = exp2_up_to_0(simd, simd.sub(simd.load(scores), max));
                sum = simd.add(sum, power);
                simd.store(scores, power);
            }
            let scale = exp2_up_to_0(simd, simd.sub(old_max, max));
            let sum = simd.mul_add(simd.load(&stats.row(SUM)[query..]), scale, sum);
            for (row, v) in [(MAX, max), (SUM, sum), (SCALE, scale)] {
                simd.store(&mut stats.row(row)[query..], v);
            }
        }
    }
}

/// Multiply each row with its scale.
struct ScaleRows<'a> {
    tile: &'a mut Tile,
    scales: &'a [f32],
    head_dim: usize,
}

impl SimdOp for ScaleRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let mut tile = self.tile.all_mut();
        for (row, scale) in self.scales.iter().enumerate() {
            for x in &mut tile.row(row)[..self.head_dim] {
                *x *= scale;
            }
        }
    }
}
