//! From the projections to attention: norm and turn queries and keys, store keys and values.

use half::bf16;
use half::slice::HalfBitsSliceExt;

use super::encode::{integer_scale, max_abs};
use super::numbers::KvNumber;
use super::paged_kv::{KvBuffers, KvStorage, Layout};
use super::scratch::WriteRun;
use super::{AttentionScratch, PagedKv, SequenceRows};
use crate::cpu::{Cpu, SharedMut};
use crate::elements::Precision;
use crate::norm::norm_row;
use crate::rope::{RopeAngles, RopeHead, rope_head};
use crate::simd::{Simd, SimdOp, map};

/// What happens to queries and keys after their projections.
#[derive(Clone, Copy, Debug)]
pub struct QkvParams<'a> {
    /// Weights of the norms of each query head and each key head, `[head_dim]`.
    pub norms: Option<[&'a [f32]; 2]>,
    /// Added to the mean square of a norm.
    pub eps: f32,
    /// Angles of the rows.
    pub angles: RopeAngles<'a>,
    /// What of a head turns.
    pub rope: RopeHead,
    /// Precision of queries and keys.
    pub activation: Precision,
}

/// Norm every query and key head if `params` says so, turn them ([`crate::RopeLayout`]), round them if `params` says
/// so, and store keys and values in `kv`, rounded as it stores them.
///
/// Shapes: `q` `[num_rows, num_q_heads * head_dim]`, `k` and `v` `[num_rows, num_kv_heads * head_dim]`, where `num_rows`
/// is the sum over `sequences`, whose rows follow one another; the angles `[num_rows, rotary_dim / 2]`. What `k` and
/// `v` hold afterwards is unspecified.
///
/// # Panics
/// If a length does not fit, `rotary_dim` is odd, 0 or above `head_dim`, a block table is too short, a block is out of
/// bounds or written to by two sequences, or the step exceeds the limits of `scratch`.
pub fn write_qkv(
    cpu: &Cpu,
    [q, k, v]: [&mut [f32]; 3],
    params: QkvParams<'_>,
    kv: &mut PagedKv,
    sequences: &[SequenceRows],
    scratch: &mut AttentionScratch,
) {
    let layout = kv.layout;
    let num_rows = layout.check(sequences);
    let limits = scratch.limits;
    limits.check(cpu, num_rows, layout);
    let (q_width, kv_width) = (limits.num_q_heads * limits.head_dim, limits.num_kv_heads * limits.head_dim);
    assert_eq!(q.len(), num_rows * q_width, "q of {num_rows} x {q_width}");
    assert_eq!(k.len(), num_rows * kv_width, "k of {num_rows} x {kv_width}");
    assert_eq!(v.len(), k.len(), "v and k");
    params.check(num_rows, limits.head_dim);
    kv.begin_write(sequences);
    scratch.list_writes(sequences, layout.block_size);
    let runs = &scratch.write_runs;
    match &mut kv.store {
        KvStorage::F32(numbers) => Places::new(numbers, layout).write(cpu, [q, k, v], params, runs),
        KvStorage::Bf16(KvBuffers { keys, values, key_scales, value_scales }) => {
            let (keys, values) = (keys.reinterpret_cast_mut::<bf16>(), values.reinterpret_cast_mut());
            let [keys, values] = [keys, values].map(SharedMut::new);
            let [key_scales, value_scales] = [key_scales, value_scales].map(|scales| SharedMut::new(scales));
            Places { keys, values, key_scales, value_scales, layout }.write(cpu, [q, k, v], params, runs);
        }
        KvStorage::Int8(numbers) => Places::new(numbers, layout).write(cpu, [q, k, v], params, runs),
    }
}

impl QkvParams<'_> {
    fn check(&self, num_rows: usize, head_dim: usize) {
        let rotary_dim = self.rope.rotary_dim;
        let is_allowed = rotary_dim.is_multiple_of(2) && (2..=head_dim).contains(&rotary_dim);
        assert!(is_allowed, "rotary_dim {rotary_dim} of head_dim {head_dim}");
        assert_eq!(self.rope.head_dim, head_dim, "head_dim of RoPE and of the KV cache");
        assert_eq!(self.angles.cos.len(), num_rows * rotary_dim / 2, "cos of {num_rows} rows");
        assert_eq!(self.angles.sin.len(), self.angles.cos.len(), "sin and cos");
        for norm in self.norms.iter().flatten() {
            assert_eq!(norm.len(), head_dim, "norm of a head");
        }
    }
}

impl AttentionScratch {
    /// List the runs of a step's rows that lie in one block.
    fn list_writes(&mut self, sequences: &[SequenceRows], block_size: usize) {
        self.write_runs.clear();
        let mut row = 0;
        for sequence in sequences {
            let (mut position, end) = (sequence.first_position, sequence.first_position + sequence.num_rows);
            while position < end {
                let slot = position % block_size;
                let num_rows = (end - position).min(block_size - slot);
                let block = sequence.block_table[position / block_size].0 as usize;
                self.write_runs.push(WriteRun { rows: row..row + num_rows, block, slot });
                row += num_rows;
                position += num_rows;
            }
        }
    }
}

/// A KV cache of which threads write different heads of different blocks.
struct Places<'a, T> {
    keys: SharedMut<'a, T>,
    values: SharedMut<'a, T>,
    key_scales: SharedMut<'a, f32>,
    value_scales: SharedMut<'a, f32>,
    layout: Layout,
}

/// One head of one block.
struct HeadPlaces<'a, T> {
    keys: &'a mut [T],
    values: &'a mut [T],
    /// `[block_size]` for int8, else empty.
    key_scales: &'a mut [f32],
    value_scales: &'a mut [f32],
    layout: Layout,
}

impl<'a, T: StoreNumbers> Places<'a, T> {
    fn new(numbers: &'a mut KvBuffers<T>, layout: Layout) -> Places<'a, T> {
        let KvBuffers { keys, values, key_scales, value_scales } = numbers;
        let [keys, values] = [keys, values].map(|numbers| SharedMut::new(numbers));
        let [key_scales, value_scales] = [key_scales, value_scales].map(|scales| SharedMut::new(scales));
        Places { keys, values, key_scales, value_scales, layout }
    }

    fn write(&self, cpu: &Cpu, [q, k, v]: [&mut [f32]; 3], params: QkvParams<'_>, runs: &[WriteRun]) {
        let Layout { num_kv_heads, head_dim, .. } = self.layout;
        let num_rows = runs.last().map_or(0, |run| run.rows.end);
        let q_len = q.len() / (num_rows * num_kv_heads).max(1);
        let [q, k, v] = [q, k, v].map(SharedMut::new);
        let isa = cpu.isa();
        cpu.for_each(runs.len() * num_kv_heads, |index| {
            let (run, kv_head) = (&runs[index / num_kv_heads], index % num_kv_heads);
            // SAFETY: Each block is in one run only, which `begin_write` checked, and each KV head of it in one item.
            let mut places = unsafe { self.head(run.block * num_kv_heads + kv_head) };
            for (row, slot) in run.rows.clone().zip(run.slot..) {
                let head = row * num_kv_heads + kv_head;
                // SAFETY: Each row and KV head is in one item only.
                let [q, k, v] = unsafe {
                    let kv = head * head_dim..(head + 1) * head_dim;
                    [q.slice(head * q_len..(head + 1) * q_len), k.slice(kv.clone()), v.slice(kv)]
                };
                isa.run(WriteToken { q, k, v, params, row, places: &mut places, slot });
            }
        });
    }

    /// # Safety
    /// No other places of this head that are alive.
    unsafe fn head(&self, head: usize) -> HeadPlaces<'_, T> {
        let (len, block_size) = (self.layout.head_len(), self.layout.block_size);
        let numbers = head * len..(head + 1) * len;
        let scales = if T::HAS_SCALES { head * block_size..(head + 1) * block_size } else { 0..0 };
        // SAFETY: Heads have different places, and this one is alone by the caller's promise.
        unsafe {
            HeadPlaces {
                keys: self.keys.slice(numbers.clone()),
                values: self.values.slice(numbers),
                key_scales: self.key_scales.slice(scales.clone()),
                value_scales: self.value_scales.slice(scales),
                layout: self.layout,
            }
        }
    }
}

/// All heads that belong to a KV head, of one row.
struct WriteToken<'a, 'p, T> {
    /// `[q_per_kv, head_dim]`.
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    params: QkvParams<'a>,
    row: usize,
    places: &'a mut HeadPlaces<'p, T>,
    slot: usize,
}

impl<T: StoreNumbers> SimdOp for WriteToken<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let QkvParams { norms, eps, angles, rope, activation } = self.params;
        let half = rope.rotary_dim / 2;
        let angles = [angles.cos, angles.sin].map(
            #[inline(always)]
            |x| &x[self.row * half..(self.row + 1) * half],
        );
        for (x, index) in [(self.q, 0), (&mut *self.k, 1)] {
            for head in x.chunks_exact_mut(rope.head_dim) {
                if let Some(norms) = norms {
                    norm_row(simd, head, norms[index], eps, Precision::F32);
                }
                rope_head(simd, head, angles, rope, activation);
            }
        }
        let HeadPlaces { keys, values, key_scales, value_scales, layout } = self.places;
        let (block_size, width) = (layout.block_size, layout.width());
        T::round(simd, self.k, key_scales.get_mut(self.slot));
        for (i, &x) in self.k.iter().enumerate() {
            keys[T::place(i, self.slot, block_size)] = T::from_rounded(x);
        }
        T::round(simd, self.v, value_scales.get_mut(self.slot));
        for (i, &x) in self.v.iter().enumerate() {
            values[T::place(self.slot, i, width)] = T::from_rounded(x);
        }
    }
}

/// How numbers come into the cache.
trait StoreNumbers: KvNumber {
    /// True if each token of each head has scales.
    const HAS_SCALES: bool;

    /// Make `x` numbers that [`StoreNumbers::from_rounded`] takes as they are, with their scale.
    fn round<S: Simd>(simd: S, x: &mut [f32], scale: Option<&mut f32>);

    /// The number, which is one that the cache can hold.
    fn from_rounded(x: f32) -> Self;
}

impl StoreNumbers for f32 {
    const HAS_SCALES: bool = false;

    #[inline(always)]
    fn round<S: Simd>(_: S, _: &mut [f32], _: Option<&mut f32>) {}

    #[inline(always)]
    fn from_rounded(x: f32) -> f32 {
        x
    }
}

impl StoreNumbers for bf16 {
    const HAS_SCALES: bool = false;

    #[inline(always)]
    fn round<S: Simd>(simd: S, x: &mut [f32], _: Option<&mut f32>) {
        map(
            simd,
            x,
            #[inline(always)]
            |x| simd.round_to_bf16(x),
        );
    }

    #[inline(always)]
    fn from_rounded(x: f32) -> bf16 {
        bf16::from_bits((x.to_bits() >> 16) as u16)
    }
}

impl StoreNumbers for i8 {
    const HAS_SCALES: bool = true;

    #[inline(always)]
    fn round<S: Simd>(simd: S, x: &mut [f32], scale: Option<&mut f32>) {
        let [new_scale, inverse] = integer_scale(max_abs(simd, x), 127.0);
        if let Some(scale) = scale {
            *scale = new_scale;
        }
        let inverse = simd.splat(inverse);
        map(
            simd,
            x,
            #[inline(always)]
            |x| simd.round(simd.mul(x, inverse)),
        );
    }

    #[inline(always)]
    fn from_rounded(x: f32) -> i8 {
        x as i8
    }
}
