//! Paged attention: keys and values in blocks, any mix of prefill chunks and decodes.
//!
//! A query's keys are cut into chunks at fixed absolute positions ([`chunk`]). Long contexts of few rows are spread over
//! the threads by chunk, others by run of rows; both by KV head. The order of every sum belongs to the query's
//! position alone, so a row gives the same bits in a prefill of any cut, in a decode, and in any company.

mod chunk;
mod paged_kv;
#[cfg(all(test, not(loom)))]
mod tests;

use std::ops::Range;

use crate::cpu::{Cpu, SharedMut};
use crate::elements::{ActivationType, Elements, round_to_bf16};
use crate::isa::Isa;
use crate::simd::Stored;
use chunk::{AttendChunk, CHUNK_LEN, ChunkPlaces, MergeParts, part_len};
pub use paged_kv::PagedKv;

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

/// Most rows of a sequence that one thread takes at once, so that a chunk's keys are read once for all of them.
const RUN_ROWS: usize = 16;
/// A sequence with at most this many rows is spread over the threads by chunk.
const MAX_SPREAD_ROWS: usize = 8;

/// What [`AttentionScratch`] is sized for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionLimits {
    /// Threads of the [`Cpu`].
    pub num_threads: usize,
    /// Most rows of a step.
    pub max_rows: usize,
    /// Most tokens of a sequence.
    pub max_context: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key/value heads; divides `num_q_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl AttentionLimits {
    fn q_per_kv(self) -> usize {
        self.num_q_heads / self.num_kv_heads
    }

    /// Numbers of one worker: scores of a row, its parts of one chunk, and a run's merged parts.
    fn worker_len(self) -> usize {
        self.q_per_kv() * (CHUNK_LEN + (1 + RUN_ROWS) * part_len(self.head_dim))
    }

    /// Chunks that can wait to be merged: those of one row with the longest context.
    fn num_slots(self) -> usize {
        self.max_context.div_ceil(CHUNK_LEN)
    }

    /// Numbers of a chunk that waits to be merged.
    fn slot_len(self) -> usize {
        self.num_q_heads * part_len(self.head_dim)
    }

    /// Bytes that the scratch takes.
    pub fn scratch_bytes(self) -> usize {
        let numbers = self.num_threads * self.worker_len() + self.num_slots() * self.slot_len();
        let lists = (self.max_rows + self.num_slots()) * size_of::<Work>() + self.num_slots() * size_of::<SpreadRow>();
        4 * numbers + lists
    }
}

/// Scratch memory of [`paged_attention`], allocated once.
#[derive(Debug)]
pub struct AttentionScratch {
    limits: AttentionLimits,
    workers: Vec<f32>,
    slots: Vec<f32>,
    work: Vec<Work>,
    spread_rows: Vec<SpreadRow>,
}

/// Rows and chunks that one thread takes at once, for one KV head.
#[derive(Clone, Debug)]
struct Work {
    /// Index of the sequence.
    sequence: usize,
    /// The rows, counted over the step.
    rows: Range<usize>,
    /// Position of the first row in its sequence.
    position: usize,
    chunks: Range<usize>,
    /// For one chunk of a spread row: where its parts wait.
    slot: Option<usize>,
}

/// A row whose chunks wait in `slots` to be merged.
#[derive(Clone, Debug)]
struct SpreadRow {
    row: usize,
    slots: Range<usize>,
}

impl AttentionScratch {
    /// Scratch for steps within `limits`.
    ///
    /// # Panics
    /// If `num_kv_heads` does not divide `num_q_heads`.
    pub fn new(limits: AttentionLimits) -> AttentionScratch {
        assert!(
            limits.num_kv_heads > 0 && limits.num_q_heads.is_multiple_of(limits.num_kv_heads),
            "{} query heads for {} KV heads",
            limits.num_q_heads,
            limits.num_kv_heads
        );
        AttentionScratch {
            limits,
            workers: vec![0.0; limits.num_threads * limits.worker_len()],
            slots: vec![0.0; limits.num_slots() * limits.slot_len()],
            work: Vec::with_capacity(limits.max_rows + limits.num_slots()),
            spread_rows: Vec::with_capacity(limits.num_slots()),
        }
    }

    /// List the work of a step. How it is cut changes no result.
    fn list_work(&mut self, sequences: &[SequenceRows]) {
        self.work.clear();
        self.spread_rows.clear();
        let (mut first_row, mut first_slot) = (0, 0);
        for (index, sequence) in sequences.iter().enumerate() {
            let num_chunks = |row: usize| (sequence.first_position + row).div_ceil(CHUNK_LEN);
            let waiting: usize = (1..=sequence.num_rows).map(num_chunks).sum();
            let spread = sequence.num_rows <= MAX_SPREAD_ROWS
                && num_chunks(1) > 1
                && first_slot + waiting <= self.limits.num_slots();
            for start in (0..sequence.num_rows).step_by(if spread { 1 } else { RUN_ROWS }) {
                let end = if spread { start + 1 } else { sequence.num_rows.min(start + RUN_ROWS) };
                let work = Work {
                    sequence: index,
                    rows: first_row + start..first_row + end,
                    position: sequence.first_position + start,
                    chunks: 0..num_chunks(end),
                    slot: None,
                };
                if !spread {
                    self.work.push(work);
                    continue;
                }
                let slots = first_slot..first_slot + work.chunks.len();
                first_slot = slots.end;
                self.work.extend(work.chunks.clone().zip(slots.clone()).map(|(chunk, slot)| Work {
                    chunks: chunk..chunk + 1,
                    slot: Some(slot),
                    ..work.clone()
                }));
                self.spread_rows.push(SpreadRow { row: work.rows.start, slots });
            }
            first_row += sequence.num_rows;
        }
    }
}

/// Causal attention of a step's rows, all query heads of a KV head sharing its keys and values:
/// `out[t, h] = sum over j of softmax_j(q[t, h] . k[j] / sqrt(head_dim)) * v[j]` over the positions `j` up to that of row `t`.
///
/// Shapes: `out` and `q` `[num_rows, num_q_heads * head_dim]`, where `num_rows` is the sum over `sequences`, whose rows
/// follow one another. Keys and values of these rows must have been written. Scores, softmax and sums are f32;
/// `out` is rounded if the cache is bf16, and `q` should have been. A row whose scores hold a NaN or +inf becomes NaN.
///
/// # Panics
/// If a length does not fit, a block table is too short, a block is out of bounds, or the step exceeds the limits of
/// `scratch`.
pub fn paged_attention(
    cpu: &Cpu,
    out: &mut [f32],
    q: &[f32],
    kv: &PagedKv,
    sequences: &[SequenceRows],
    scratch: &mut AttentionScratch,
) {
    let limits = scratch.limits;
    let num_rows = kv.check(sequences);
    let width = limits.num_q_heads * limits.head_dim;
    assert_eq!(q.len(), num_rows * width, "q of {num_rows} x {width}");
    assert_eq!(out.len(), q.len(), "out and q");
    assert!(num_rows <= limits.max_rows, "{num_rows} rows in scratch for {}", limits.max_rows);
    assert!(
        cpu.num_threads() <= limits.num_threads,
        "{} threads in scratch for {}",
        cpu.num_threads(),
        limits.num_threads
    );
    assert_eq!((kv.num_kv_heads(), kv.head_dim()), (limits.num_kv_heads, limits.head_dim), "KV cache and scratch");
    scratch.list_work(sequences);
    let isa = cpu.isa();
    match (kv.keys(), kv.values()) {
        (Elements::F32(keys), Elements::F32(values)) => {
            Step { isa, limits, q, kv, sequences, keys, values }.attend(cpu, out, scratch);
        }
        (Elements::Bf16(keys), Elements::Bf16(values)) => {
            Step { isa, limits, q, kv, sequences, keys, values }.attend(cpu, out, scratch);
        }
        _ => unreachable!("keys and values have one type, f32 or bf16"),
    }
}

/// What all threads read.
struct Step<'a, W> {
    isa: Isa,
    limits: AttentionLimits,
    q: &'a [f32],
    kv: &'a PagedKv,
    sequences: &'a [SequenceRows],
    keys: &'a [W],
    values: &'a [W],
}

impl<W: Stored> Step<'_, W> {
    fn attend(&self, cpu: &Cpu, out: &mut [f32], scratch: &mut AttentionScratch) {
        let num_kv_heads = self.limits.num_kv_heads;
        let (worker_len, slot_len) = (self.limits.worker_len(), self.limits.slot_len());
        let heads_len = self.heads_len();
        let AttentionScratch { work, spread_rows, workers, slots, .. } = scratch;
        let (workers, slots) = (SharedMut::new(workers), SharedMut::new(slots));
        let out = SharedMut::new(out);
        cpu.for_each_with_worker(work.len() * num_kv_heads, |worker, chunk| {
            let (work, kv_head) = (&work[chunk / num_kv_heads], chunk % num_kv_heads);
            // SAFETY: Each worker has its own.
            let memory = unsafe { workers.slice(worker * worker_len..(worker + 1) * worker_len) };
            let merged = self.attend_work(work, kv_head, memory);
            let rows = work.rows.clone().zip(merged.chunks_exact(heads_len));
            match work.slot {
                None => {
                    for (row, parts) in rows {
                        // SAFETY: Each row and KV head is in one item of work only.
                        self.write_out(unsafe { out.slice(self.numbers_of(row, kv_head)) }, parts);
                    }
                }
                Some(slot) => {
                    let start = slot * slot_len + kv_head * heads_len;
                    // SAFETY: Each slot and KV head is in one item of work only.
                    unsafe { slots.slice(start..start + heads_len) }.copy_from_slice(&merged[..heads_len]);
                }
            }
        });
        cpu.for_each(spread_rows.len() * num_kv_heads, |chunk| {
            let (spread, kv_head) = (&spread_rows[chunk / num_kv_heads], chunk % num_kv_heads);
            let mut parts = spread.slots.clone().map(|slot| {
                let start = slot * slot_len + kv_head * heads_len;
                // SAFETY: Each slot belongs to one spread row, and each of its KV heads to one chunk of this loop.
                unsafe { slots.slice(start..start + heads_len) }
            });
            if let Some(merged) = parts.next() {
                for next in parts {
                    self.isa.run(MergeParts { merged, next, head_dim: self.limits.head_dim });
                }
                // SAFETY: Each row and KV head is in one chunk of this loop only.
                self.write_out(unsafe { out.slice(self.numbers_of(spread.row, kv_head)) }, merged);
            }
        });
    }

    /// The merged parts of a run of rows, `[rows.len(), q_per_kv, part_len]`, in `memory`.
    fn attend_work<'m>(&self, work: &Work, kv_head: usize, memory: &'m mut [f32]) -> &'m [f32] {
        let (q_per_kv, head_dim) = (self.limits.q_per_kv(), self.limits.head_dim);
        let (scores, memory) = memory.split_at_mut(q_per_kv * CHUNK_LEN);
        let (parts, merged) = memory.split_at_mut(self.heads_len());
        let sequence = &self.sequences[work.sequence];
        let num_tokens = work.position + work.rows.len();
        for chunk in work.chunks.clone() {
            let start = chunk * CHUNK_LEN;
            let positions = start..num_tokens.min(start + CHUNK_LEN);
            let places = ChunkPlaces::new(positions, |position| self.kv.offset(sequence, kv_head, position));
            for (index, merged) in merged.chunks_exact_mut(self.heads_len()).take(work.rows.len()).enumerate() {
                let num_keys = (work.position + index + 1).saturating_sub(start).min(CHUNK_LEN);
                if num_keys == 0 {
                    continue;
                }
                let is_first = chunk == work.chunks.start;
                self.isa.run(AttendChunk {
                    q: &self.q[self.numbers_of(work.rows.start + index, kv_head)],
                    keys: self.keys,
                    values: self.values,
                    places: &places,
                    num_keys,
                    head_dim,
                    scores: &mut *scores,
                    parts: if is_first { &mut *merged } else { &mut *parts },
                });
                if !is_first {
                    self.isa.run(MergeParts { merged, next: parts, head_dim });
                }
            }
        }
        merged
    }

    /// Length of the parts of a KV head's query heads.
    fn heads_len(&self) -> usize {
        self.limits.q_per_kv() * part_len(self.limits.head_dim)
    }

    /// Where the query heads of `kv_head` are in row `row` of `q` and `out`.
    fn numbers_of(&self, row: usize, kv_head: usize) -> Range<usize> {
        let len = self.limits.q_per_kv() * self.limits.head_dim;
        let start = (row * self.limits.num_kv_heads + kv_head) * len;
        start..start + len
    }

    /// Divide the weighted values by the sums.
    fn write_out(&self, out: &mut [f32], parts: &[f32]) {
        let head_dim = self.limits.head_dim;
        for (out, part) in out.chunks_exact_mut(head_dim).zip(parts.chunks_exact(part_len(head_dim))) {
            for (out, value) in out.iter_mut().zip(&part[2..]) {
                *out = value / part[1];
            }
            if self.kv.activation() == ActivationType::Bf16 {
                out.iter_mut().for_each(|out| *out = round_to_bf16(*out));
            }
        }
    }
}
