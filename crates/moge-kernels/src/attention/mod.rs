//! Paged attention: keys and values in blocks, any mix of prefill chunks and decodes.
//!
//! A query's keys are cut into chunks at fixed absolute positions ([`chunk`]). Long contexts of few rows are spread over
//! the threads by chunk, others by run of rows; both by KV head. The order of every sum belongs to the query's
//! position alone, so a row gives the same bits in a prefill of any cut, in a decode, and in any company.

mod chunk;
mod encode;
mod numbers;
mod paged_kv;
mod scratch;
mod split;
#[cfg(all(test, not(loom)))]
mod tests;
mod training;
mod write;

use std::ops::Range;

use crate::cpu::{Cpu, SharedMut};
use crate::elements::Precision;
use crate::isa::Isa;
use crate::simd::round_to_bf16;
use chunk::{AttendChunk, MergeParts, PrefetchChunk, Worker};
use encode::{Attend, PutQueries};
use paged_kv::{KvStorage, KvView};
pub use paged_kv::{KvType, PagedKv};
use scratch::Work;
pub use scratch::{AttentionLimits, AttentionScratch};
use split::{CHUNK_LEN, part_len};
pub use training::{AttentionKept, SegmentAttention, SegmentAttentionScratch, attention_backward, attention_forward};
pub use write::{QkvParams, write_qkv};

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

/// What a step asks of attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionRows<'a> {
    /// Queries, `[num_rows, num_q_heads * head_dim]`, where `num_rows` is the sum over `sequences`, whose rows follow one
    /// another.
    pub q: &'a [f32],
    /// Whose rows they are.
    pub sequences: &'a [SequenceRows],
    /// Precision of the outcome.
    pub activation: Precision,
}

/// Causal attention of a step's rows, all query heads of a KV head sharing its keys and values:
/// `out[t, h] = sum over j of softmax_j(q[t, h] . k[j] / sqrt(head_dim)) * v[j]` over the positions `j` up to that of row `t`.
///
/// Shape: `out` `[num_rows, num_q_heads * head_dim]`. Keys and values of these rows must have been written. Softmax and
/// sums are f32; with an int8 cache queries and weights are rounded to 16 bits, and their sums with keys and with the
/// values of a chunk are exact. A row whose scores hold a NaN or +inf becomes NaN; with an int8 cache any NaN or
/// infinity among what a row reads does that.
///
/// # Panics
/// If a length does not fit, a block table is too short, a block is out of bounds, or the step exceeds the limits of
/// `scratch`.
pub fn paged_attention(
    cpu: &Cpu,
    out: &mut [f32],
    rows: AttentionRows<'_>,
    kv: &PagedKv,
    scratch: &mut AttentionScratch,
) {
    let num_rows = kv.layout.check(rows.sequences);
    let limits = scratch.limits;
    limits.check(cpu, num_rows, kv.layout);
    let width = limits.num_q_heads * limits.head_dim;
    assert_eq!(rows.q.len(), num_rows * width, "q of {num_rows} x {width}");
    assert_eq!(out.len(), rows.q.len(), "out and q");
    scratch.list_work(rows.sequences);
    let isa = cpu.isa();
    match &kv.store {
        KvStorage::F32(numbers) => Step { isa, limits, rows, kv: numbers.view(kv.layout) }.attend(cpu, out, scratch),
        KvStorage::Bf16(numbers) => {
            Step { isa, limits, rows, kv: numbers.view(kv.layout).as_bf16() }.attend(cpu, out, scratch);
        }
        KvStorage::Int8(numbers) => Step { isa, limits, rows, kv: numbers.view(kv.layout) }.attend(cpu, out, scratch),
    }
}

/// What all threads read.
struct Step<'a, T> {
    isa: Isa,
    limits: AttentionLimits,
    rows: AttentionRows<'a>,
    kv: KvView<'a, T>,
}

impl<T: Attend> Step<'_, T> {
    fn attend(&self, cpu: &Cpu, out: &mut [f32], scratch: &mut AttentionScratch) {
        let (num_kv_heads, num_slots) = (self.limits.num_kv_heads, self.limits.num_slots());
        let (run_len, heads_len) = (self.limits.run_len(), self.limits.heads_len());
        let AttentionScratch { work, spread_rows, workers, merged, slots, .. } = scratch;
        let [merged, slots, out] = [merged, slots, out].map(SharedMut::new);
        let workers = SharedMut::new(workers);
        let slots_at = |kv_head: usize, first: usize, num: usize| {
            let start = (kv_head * num_slots + first) * heads_len;
            start..start + num * heads_len
        };
        cpu.for_each_with_worker(work.len() * num_kv_heads, |worker, index| {
            let (work, kv_head) = (&work[index / num_kv_heads], index % num_kv_heads);
            // SAFETY: Each thread has its own worker and run; each slot and KV head is in one item of work only.
            let (run, worker) = unsafe {
                let run = match work.first_slot {
                    Some(slot) => slots.slice(slots_at(kv_head, slot, work.rows.len())),
                    None => merged.slice(worker * run_len..(worker + 1) * run_len),
                };
                (run, &mut workers.slice(worker..worker + 1)[0])
            };
            self.attend_work(work, kv_head, worker, run);
            if work.first_slot.is_none() {
                for (row, parts) in work.rows.clone().zip(run.chunks_exact(heads_len)) {
                    // SAFETY: Each row and KV head is in one item of work only.
                    self.write_out(unsafe { out.slice(self.numbers_of(row, kv_head)) }, parts);
                }
            }
        });
        cpu.for_each(spread_rows.len() * num_kv_heads, |index| {
            let (spread, kv_head) = (&spread_rows[index / num_kv_heads], index % num_kv_heads);
            let slot = |chunk: usize| slots_at(kv_head, spread.first_slot + chunk * spread.slot_step, 1);
            // SAFETY: Each slot belongs to one spread row, and each of its KV heads to one item of this loop.
            let mut parts = (0..spread.num_chunks).map(|chunk| unsafe { slots.slice(slot(chunk)) });
            if let Some(merged) = parts.next() {
                for next in parts {
                    self.isa.run(MergeParts { merged, next, part_len: part_len(self.kv.layout.width()) });
                }
                // SAFETY: Each row and KV head is in one item of this loop only.
                self.write_out(unsafe { out.slice(self.numbers_of(spread.row, kv_head)) }, merged);
            }
        });
    }

    /// Leave the merged parts of a run of rows, `[rows.len(), q_per_kv, part_len]`, in `merged`.
    fn attend_work(&self, work: &Work, kv_head: usize, worker: &mut Worker, merged: &mut [f32]) {
        let (kv, layout, q_per_kv) = (self.kv, self.kv.layout, self.limits.q_per_kv());
        let num_tokens = work.position + work.rows.len();
        for chunk in work.chunks.clone() {
            let is_first = chunk == work.chunks.start;
            let chunk_start = chunk * CHUNK_LEN;
            let chunk_end = num_tokens.min(chunk_start + CHUNK_LEN);
            let blocks = chunk_start / layout.block_size..chunk_end.div_ceil(layout.block_size);
            let mut heads = [0; CHUNK_LEN / paged_kv::MIN_BLOCK_SIZE];
            let heads = &mut heads[..blocks.len()];
            for (head, block) in heads.iter_mut().zip(blocks) {
                *head = layout.head_index(&self.rows.sequences[work.sequence], kv_head, block);
            }
            self.isa.run(PrefetchChunk { kv, heads });
            if is_first {
                for (index, row) in work.rows.clone().enumerate() {
                    let q = &self.rows.q[self.numbers_of(row, kv_head)];
                    self.isa.run(PutQueries::<T>::new(&mut worker.queries, index * q_per_kv, q, layout));
                }
            }
            let (position, num_rows) = (work.position, work.rows.len());
            self.isa.run(AttendChunk {
                kv,
                heads,
                position,
                chunk_start,
                num_rows,
                q_per_kv,
                is_first,
                worker,
                merged,
            });
        }
    }

    /// Where the query heads of `kv_head` are in row `row` of `q` and `out`.
    fn numbers_of(&self, row: usize, kv_head: usize) -> Range<usize> {
        let len = self.limits.q_per_kv() * self.limits.head_dim;
        let start = (row * self.limits.num_kv_heads + kv_head) * len;
        start..start + len
    }

    /// Divide the weighted values by the sums.
    fn write_out(&self, out: &mut [f32], parts: &[f32]) {
        let width = self.kv.layout.width();
        for (out, part) in out.chunks_exact_mut(self.limits.head_dim).zip(parts.chunks_exact(part_len(width))) {
            for (out, value) in out.iter_mut().zip(part) {
                *out = value / part[width];
            }
            if self.rows.activation == Precision::Bf16 {
                out.iter_mut().for_each(|out| *out = round_to_bf16(*out));
            }
        }
    }
}
