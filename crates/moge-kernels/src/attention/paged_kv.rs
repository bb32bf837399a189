//! Keys and values of one layer, in blocks.

use half::bf16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::SequenceRows;
use crate::cpu::{Cpu, SharedMut};
use crate::elements::{ActivationType, Elements};

/// Keys and values of one layer: each `[num_blocks, num_kv_heads, block_size, head_dim]`.
pub struct PagedKv {
    store: Store,
    layout: Layout,
}

/// Where each head of each token is.
#[derive(Clone, Copy, Debug)]
struct Layout {
    num_blocks: usize,
    block_size: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

/// bf16 numbers are kept as bits, because zeroed integers cost nothing until they are touched.
enum Store {
    F32 { keys: Vec<f32>, values: Vec<f32> },
    Bf16 { keys: Vec<u16>, values: Vec<u16> },
}

impl std::fmt::Debug for PagedKv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PagedKv").field("layout", &self.layout).finish_non_exhaustive()
    }
}

impl PagedKv {
    /// Room for `num_blocks` blocks of `block_size` tokens, all zero. The system supplies the memory when it is first written.
    ///
    /// # Panics
    /// If a size is zero or their product does not fit `usize`.
    pub fn new(
        activation: ActivationType,
        num_blocks: usize,
        block_size: usize,
        num_kv_heads: usize,
        head_dim: usize,
    ) -> PagedKv {
        let sizes = [num_blocks, block_size, num_kv_heads, head_dim];
        let len = sizes.iter().try_fold(1usize, |len, &size| len.checked_mul(size));
        let len = len.filter(|&len| len > 0).unwrap_or_else(|| panic!("sizes of a KV cache: {sizes:?}"));
        let store = match activation {
            ActivationType::F32 => Store::F32 { keys: vec![0.0; len], values: vec![0.0; len] },
            ActivationType::Bf16 => Store::Bf16 { keys: vec![0; len], values: vec![0; len] },
        };
        PagedKv { store, layout: Layout { num_blocks, block_size, num_kv_heads, head_dim } }
    }

    /// The precision of its numbers.
    pub fn activation(&self) -> ActivationType {
        match self.store {
            Store::F32 { .. } => ActivationType::F32,
            Store::Bf16 { .. } => ActivationType::Bf16,
        }
    }

    /// Number of key/value heads.
    pub fn num_kv_heads(&self) -> usize {
        self.layout.num_kv_heads
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.layout.head_dim
    }

    pub(super) fn keys(&self) -> Elements<'_> {
        match &self.store {
            Store::F32 { keys, .. } => Elements::F32(keys),
            Store::Bf16 { keys, .. } => Elements::Bf16(keys.reinterpret_cast()),
        }
    }

    pub(super) fn values(&self) -> Elements<'_> {
        match &self.store {
            Store::F32 { values, .. } => Elements::F32(values),
            Store::Bf16 { values, .. } => Elements::Bf16(values.reinterpret_cast()),
        }
    }

    /// Where the numbers of `kv_head` for the token at `position` begin, in keys and in values.
    #[inline]
    pub(super) fn offset(&self, sequence: &SequenceRows, kv_head: usize, position: usize) -> usize {
        self.layout.offset(sequence, kv_head, position)
    }

    /// Check that every row of `sequences` has a place; returns the number of rows.
    pub(super) fn check(&self, sequences: &[SequenceRows]) -> usize {
        self.layout.check(sequences)
    }

    /// Store the keys and values of a step's rows, rounded to the cache's precision.
    ///
    /// Shapes: `k` and `v` `[num_rows, num_kv_heads * head_dim]`, where `num_rows` is the sum over `sequences`, whose
    /// rows follow one another. If sequences share a block they write to, the later one's numbers stay.
    ///
    /// # Panics
    /// If a length does not fit, a block table is too short, or a block is not below `num_blocks`.
    pub fn write(&mut self, cpu: &Cpu, k: &[f32], v: &[f32], sequences: &[SequenceRows]) {
        let layout = self.layout;
        let num_rows = layout.check(sequences);
        let width = layout.num_kv_heads * layout.head_dim;
        assert_eq!(k.len(), num_rows * width, "keys of {num_rows} x {width}");
        assert_eq!(v.len(), k.len(), "values and keys");
        match &mut self.store {
            Store::F32 { keys, values } => {
                layout.write(cpu, keys, k, sequences, <[f32]>::copy_from_slice);
                layout.write(cpu, values, v, sequences, <[f32]>::copy_from_slice);
            }
            Store::Bf16 { keys, values } => {
                let convert = |place: &mut [bf16], x: &[f32]| place.convert_from_f32_slice(x);
                layout.write(cpu, keys.reinterpret_cast_mut(), k, sequences, convert);
                layout.write(cpu, values.reinterpret_cast_mut(), v, sequences, convert);
            }
        }
    }
}

impl Layout {
    #[inline]
    fn offset(self, sequence: &SequenceRows, kv_head: usize, position: usize) -> usize {
        let block = sequence.block_table[position / self.block_size].0 as usize;
        let row = (block * self.num_kv_heads + kv_head) * self.block_size + position % self.block_size;
        row * self.head_dim
    }

    /// Write `x` to `store`. Threads take heads, whose places differ whatever the block tables say.
    fn write<T: Send>(
        self,
        cpu: &Cpu,
        store: &mut [T],
        x: &[f32],
        sequences: &[SequenceRows],
        convert: impl Fn(&mut [T], &[f32]) + Sync,
    ) {
        let head_dim = self.head_dim;
        let store = SharedMut::new(store);
        cpu.for_each(self.num_kv_heads, |head| {
            let mut rows = x.chunks_exact(self.num_kv_heads * head_dim);
            for sequence in sequences {
                let positions = sequence.first_position..sequence.first_position + sequence.num_rows;
                for (position, x) in positions.zip(&mut rows) {
                    let start = self.offset(sequence, head, position);
                    // SAFETY: Places of different heads are disjoint, and one thread has all rows of a head.
                    let place = unsafe { store.slice(start..start + head_dim) };
                    convert(place, &x[head * head_dim..(head + 1) * head_dim]);
                }
            }
        });
    }

    fn check(self, sequences: &[SequenceRows]) -> usize {
        for sequence in sequences {
            let num_tokens = sequence.first_position + sequence.num_rows;
            assert!(sequence.num_rows > 0, "a sequence without rows");
            assert!(
                num_tokens.div_ceil(self.block_size) <= sequence.block_table.len(),
                "{} blocks for {num_tokens} tokens",
                sequence.block_table.len()
            );
            for block in &sequence.block_table {
                assert!((block.0 as usize) < self.num_blocks, "block {} is not below {}", block.0, self.num_blocks);
            }
        }
        sequences.iter().map(|sequence| sequence.num_rows).sum()
    }
}
