//! Scratch memory of attention, and how a step's work is cut.

use std::ops::Range;

use super::chunk::{CHUNK_LEN, Worker, part_len};
use super::paged_kv::Layout;
use super::{SequenceRows, write::WriteRun};
use crate::cpu::Cpu;
use crate::simd::MAX_LANES;

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
    fn num_slots(self) -> usize {
        self.max_context.div_ceil(CHUNK_LEN)
    }

    /// Numbers of the parts of a KV head's query heads.
    pub(super) fn heads_len(self) -> usize {
        self.q_per_kv() * part_len(self.width())
    }

    /// Numbers of a chunk that waits to be merged.
    pub(super) fn slot_len(self) -> usize {
        self.num_kv_heads * self.heads_len()
    }

    /// Bytes that the scratch takes.
    pub fn scratch_bytes(self) -> usize {
        let workers = self.num_threads * Worker::bytes(RUN_ROWS * self.q_per_kv(), self.width());
        let slots = self.num_slots() * (4 * self.slot_len() + size_of::<Work>() + size_of::<SpreadRow>());
        workers + slots + self.max_rows * (size_of::<Work>() + size_of::<WriteRun>())
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
    /// For one chunk of spread rows: where its parts wait.
    pub(super) waiting: Option<Waiting>,
}

/// Where the parts of one chunk wait to be merged.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    /// Slot of the first row.
    slot: usize,
    /// Slots of each row.
    slots_per_row: usize,
}

impl Waiting {
    /// Slot of the row `index` of the work.
    pub(super) fn slot_of(&self, index: usize) -> usize {
        self.slot + index * self.slots_per_row
    }
}

/// A row whose chunks wait in `slots` to be merged.
#[derive(Clone, Debug)]
pub(super) struct SpreadRow {
    pub(super) row: usize,
    pub(super) slots: Range<usize>,
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
            slots: vec![0.0; limits.num_slots() * limits.slot_len()],
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
                waiting: None,
            };
            let (num_rows, slots_per_row) = (sequence.num_rows, num_chunks(sequence.num_rows));
            let end_slot = first_slot + num_rows * slots_per_row;
            if num_rows <= MAX_SPREAD_ROWS && slots_per_row > 1 && end_slot <= self.limits.num_slots() {
                self.work.extend((0..slots_per_row).map(|chunk| Work {
                    chunks: chunk..chunk + 1,
                    waiting: Some(Waiting { slot: first_slot + chunk, slots_per_row }),
                    ..work(0, num_rows)
                }));
                self.spread_rows.extend((0..num_rows).map(|row| {
                    let slot = first_slot + row * slots_per_row;
                    SpreadRow { row: first_row + row, slots: slot..slot + num_chunks(row + 1) }
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
