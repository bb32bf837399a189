//! Scratch memory of attention, and how a step's work is cut.

use std::ops::Range;

use super::SequenceRows;
use super::chunk::Worker;
use super::paged_kv::Layout;
use super::split::{CHUNK_LEN, part_len};
use crate::cpu::Cpu;
use crate::simd::MAX_LANES;

/// Rows of a sequence whose places are in one block.
#[derive(Clone, Debug)]
pub(super) struct WriteRun {
    /// The rows, counted over the step.
    pub(super) rows: Range<usize>,
    pub(super) block: usize,
    /// Place of the first row in the block.
    pub(super) slot: usize,
}

/// Most rows of a sequence that one thread takes at once, so that a chunk's keys come from memory once for all of them.
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
    pub(super) fn q_per_kv(self) -> usize {
        self.num_q_heads / self.num_kv_heads
    }

    /// Width of a head with the zeros behind it.
    fn width(self) -> usize {
        self.head_dim.next_multiple_of(MAX_LANES)
    }

    /// Chunks that can wait to be merged: those of one row with the longest context.
    pub(super) fn num_slots(self) -> usize {
        self.max_context.div_ceil(CHUNK_LEN)
    }

    /// Numbers of the parts of a KV head's query heads.
    pub(super) fn heads_len(self) -> usize {
        self.q_per_kv() * part_len(self.width())
    }

    /// Numbers of the parts of a run.
    pub(super) fn run_len(self) -> usize {
        RUN_ROWS * self.heads_len()
    }

    /// Bytes that the scratch takes.
    pub fn scratch_bytes(self) -> usize {
        let worker_bytes = Worker::bytes(RUN_ROWS * self.q_per_kv(), self.width()) + 4 * self.run_len();
        let slot_bytes = 4 * self.num_kv_heads * self.heads_len() + size_of::<Work>() + size_of::<SpreadRow>();
        let row_bytes = size_of::<Work>() + size_of::<WriteRun>();
        self.num_threads * worker_bytes + self.num_slots() * slot_bytes + self.max_rows * row_bytes
    }

    /// Panics unless a step of `num_rows` on a cache of `layout` is within these limits.
    pub(super) fn check(self, cpu: &Cpu, num_rows: usize, layout: Layout) {
        assert!(num_rows <= self.max_rows, "{num_rows} rows in scratch for {}", self.max_rows);
        let num_threads = cpu.num_threads();
        assert!(num_threads <= self.num_threads, "{num_threads} threads in scratch for {}", self.num_threads);
        let heads = (layout.num_kv_heads, layout.head_dim);
        assert_eq!(heads, (self.num_kv_heads, self.head_dim), "KV cache and scratch");
    }
}

/// Scratch memory of [`super::write_qkv`] and [`super::paged_attention`], allocated once.
#[derive(Debug)]
pub struct AttentionScratch {
    pub(super) limits: AttentionLimits,
    pub(super) workers: Vec<Worker>,
    /// Merged parts of a run, for each thread.
    pub(super) merged: Vec<f32>,
    /// Parts that wait to be merged, `[num_kv_heads, num_slots, heads_len]`.
    pub(super) slots: Vec<f32>,
    pub(super) work: Vec<Work>,
    pub(super) spread_rows: Vec<SpreadRow>,
    pub(super) write_runs: Vec<WriteRun>,
}

/// Rows and chunks that one thread takes at once, for one KV head.
#[derive(Clone, Debug)]
pub(super) struct Work {
    /// Index of the sequence.
    pub(super) sequence: usize,
    /// The rows, counted over the step.
    pub(super) rows: Range<usize>,
    /// Position of the first row in its sequence.
    pub(super) position: usize,
    pub(super) chunks: Range<usize>,
    /// For one chunk of spread rows: the slot where the first row's parts wait, those of the others behind it.
    pub(super) first_slot: Option<usize>,
}

/// A row whose chunks wait in slots to be merged.
#[derive(Clone, Debug)]
pub(super) struct SpreadRow {
    pub(super) row: usize,
    /// Slot of the first chunk, how many slots on the next one is, and how many there are.
    pub(super) first_slot: usize,
    pub(super) slot_step: usize,
    pub(super) num_chunks: usize,
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
        let worker = |_| Worker::new(RUN_ROWS * limits.q_per_kv(), limits.width());
        AttentionScratch {
            limits,
            workers: (0..limits.num_threads).map(worker).collect(),
            merged: vec![0.0; limits.num_threads * limits.run_len()],
            slots: vec![0.0; limits.num_kv_heads * limits.num_slots() * limits.heads_len()],
            work: Vec::with_capacity(limits.max_rows + limits.num_slots()),
            spread_rows: Vec::with_capacity(limits.num_slots()),
            write_runs: Vec::with_capacity(limits.max_rows),
        }
    }

    /// List the work of a step. How it is cut changes no result.
    pub(super) fn list_work(&mut self, sequences: &[SequenceRows]) {
        self.work.clear();
        self.spread_rows.clear();
        let (mut first_row, mut first_slot) = (0, 0);
        for (index, sequence) in sequences.iter().enumerate() {
            let num_chunks = |num_rows: usize| (sequence.first_position + num_rows).div_ceil(CHUNK_LEN);
            let work = |start: usize, end: usize| Work {
                sequence: index,
                rows: first_row + start..first_row + end,
                position: sequence.first_position + start,
                chunks: 0..num_chunks(end),
                first_slot: None,
            };
            let (num_rows, most_chunks) = (sequence.num_rows, num_chunks(sequence.num_rows));
            let end_slot = first_slot + num_rows * most_chunks;
            if num_rows <= MAX_SPREAD_ROWS && most_chunks > 1 && end_slot <= self.limits.num_slots() {
                self.work.extend((0..most_chunks).map(|chunk| Work {
                    chunks: chunk..chunk + 1,
                    first_slot: Some(first_slot + chunk * num_rows),
                    ..work(0, num_rows)
                }));
                self.spread_rows.extend((0..num_rows).map(|row| SpreadRow {
                    row: first_row + row,
                    first_slot: first_slot + row,
                    slot_step: num_rows,
                    num_chunks: num_chunks(row + 1),
                }));
                first_slot = end_slot;
            } else {
                let starts = (0..num_rows).step_by(RUN_ROWS);
                self.work.extend(starts.map(|start| work(start, num_rows.min(start + RUN_ROWS))));
            }
            first_row += num_rows;
        }
    }
}
