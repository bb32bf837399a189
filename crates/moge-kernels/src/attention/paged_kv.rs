//! Keys and values of one layer, in blocks.

use half::bf16;
use half::slice::HalfBitsSliceExt;

use super::SequenceRows;
use crate::elements::Precision;
use crate::simd::MAX_LANES;

/// Blocks are read by registers of keys, two at once, so their size is a multiple of this.
pub(super) const MIN_BLOCK_SIZE: usize = 2 * MAX_LANES;

/// How a KV cache stores its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// f32.
    F32,
    /// bf16, rounded to nearest, ties to even.
    Bf16,
    /// int8 with one f32 scale for the key and one for the value of each token and head: `scale = max |x| / 127`, and
    /// `x` becomes `x / scale` rounded to nearest, ties to even. So a number is off by half a scale at most.
    Int8,
}

impl From<Precision> for KvType {
    /// The precision of the activations.
    fn from(activation: Precision) -> KvType {
        match activation {
            Precision::F32 => KvType::F32,
            Precision::Bf16 => KvType::Bf16,
        }
    }
}

/// Keys and values of one layer.
///
/// Each head of each block is one run of memory: of keys `[head_dim, block_size]`, of values `[block_size, head_dim]`,
/// with `head_dim` filled up to whole registers by zeros. bf16 and int8 numbers lie there in pairs along the first
/// dimension.
pub struct PagedKv {
    pub(super) store: KvStorage,
    pub(super) layout: Layout,
    /// The last write that touched each block: no two sequences may write to one block at once.
    last_write: Vec<u64>,
    num_writes: u64,
}

/// Where each head of each token is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) num_blocks: usize,
    pub(super) block_size: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
}

/// Numbers of one type. Scales are there only for int8: `[num_blocks, num_kv_heads, block_size]`.
pub(super) struct KvBuffers<T> {
    pub(super) keys: Vec<T>,
    pub(super) values: Vec<T>,
    pub(super) key_scales: Vec<f32>,
    pub(super) value_scales: Vec<f32>,
}

/// bf16 numbers are kept as bits, because zeroed integers cost nothing until they are touched.
pub(super) enum KvStorage {
    F32(KvBuffers<f32>),
    Bf16(KvBuffers<u16>),
    Int8(KvBuffers<i8>),
}

/// [`Numbers`] to read, with bf16 as such.
#[derive(Clone, Copy)]
pub(super) struct KvView<'a, T> {
    pub(super) layout: Layout,
    pub(super) keys: &'a [T],
    pub(super) values: &'a [T],
    pub(super) key_scales: &'a [f32],
    pub(super) value_scales: &'a [f32],
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
    /// If a size is zero, their product does not fit `usize`, or `block_size` is not 32, 64, 128 or 256.
    pub fn new(kv_type: KvType, num_blocks: usize, block_size: usize, num_kv_heads: usize, head_dim: usize) -> PagedKv {
        assert!(
            block_size.is_multiple_of(MIN_BLOCK_SIZE) && super::CHUNK_LEN.is_multiple_of(block_size),
            "block_size {block_size} of a KV cache is not 32, 64, 128 or 256"
        );
        let layout = Layout { num_blocks, block_size, num_kv_heads, head_dim };
        let num_tokens = [num_blocks, num_kv_heads, block_size].into_iter().try_fold(1usize, usize::checked_mul);
        let len = num_tokens.and_then(|tokens| tokens.checked_mul(head_dim.checked_next_multiple_of(MAX_LANES)?));
        let len = len.filter(|&len| len > 0).unwrap_or_else(|| panic!("sizes of a KV cache: {layout:?}"));
        let num_scales = len / layout.width();
        let store = match kv_type {
            KvType::F32 => KvStorage::F32(KvBuffers::new(len, 0)),
            KvType::Bf16 => KvStorage::Bf16(KvBuffers::new(len, 0)),
            KvType::Int8 => KvStorage::Int8(KvBuffers::new(len, num_scales)),
        };
        PagedKv { store, layout, last_write: vec![0; num_blocks], num_writes: 0 }
    }

    /// Bytes of one block: what [`PagedKv::new`] takes for each.
    pub fn block_bytes(kv_type: KvType, block_size: usize, num_kv_heads: usize, head_dim: usize) -> u64 {
        let [block_size, num_kv_heads, width] =
            [block_size, num_kv_heads, head_dim.next_multiple_of(MAX_LANES)].map(|size| size as u64);
        let head_bytes = match kv_type {
            KvType::F32 => 4 * width,
            KvType::Bf16 => 2 * width,
            KvType::Int8 => width + size_of::<f32>() as u64,
        };
        2 * block_size * num_kv_heads * head_bytes + size_of::<u64>() as u64
    }

    /// How its numbers are stored.
    pub fn kv_type(&self) -> KvType {
        match self.store {
            KvStorage::F32(_) => KvType::F32,
            KvStorage::Bf16(_) => KvType::Bf16,
            KvStorage::Int8(_) => KvType::Int8,
        }
    }

    /// Check that the rows of `sequences` have places of their own, as for writing them.
    pub(super) fn begin_write(&mut self, sequences: &[SequenceRows]) {
        self.num_writes += 1;
        let block_size = self.layout.block_size;
        for sequence in sequences {
            let end = sequence.first_position + sequence.num_rows;
            for block in &sequence.block_table[sequence.first_position / block_size..end.div_ceil(block_size)] {
                let last_write = &mut self.last_write[block.0 as usize];
                assert!(*last_write != self.num_writes, "block {} is written to twice in one step", block.0);
                *last_write = self.num_writes;
            }
        }
    }
}

impl<T: Copy + Default> KvBuffers<T> {
    fn new(len: usize, num_scales: usize) -> KvBuffers<T> {
        KvBuffers {
            keys: vec![T::default(); len],
            values: vec![T::default(); len],
            key_scales: vec![0.0; num_scales],
            value_scales: vec![0.0; num_scales],
        }
    }

    pub(super) fn view(&self, layout: Layout) -> KvView<'_, T> {
        let KvBuffers { keys, values, key_scales, value_scales } = self;
        KvView { layout, keys, values, key_scales, value_scales }
    }
}

impl<'a> KvView<'a, u16> {
    pub(super) fn as_bf16(self) -> KvView<'a, bf16> {
        let KvView { layout, keys, values, key_scales, value_scales } = self;
        KvView { layout, keys: keys.reinterpret_cast(), values: values.reinterpret_cast(), key_scales, value_scales }
    }
}

impl Layout {
    /// Width of a head with the zeros behind it.
    pub(super) fn width(self) -> usize {
        self.head_dim.next_multiple_of(MAX_LANES)
    }

    /// Numbers of one head of one block.
    pub(super) fn head_len(self) -> usize {
        self.block_size * self.width()
    }

    /// Which run of memory has `kv_head` of the sequence's block `index`: it begins at this times [`Layout::head_len`].
    pub(super) fn head_index(self, sequence: &SequenceRows, kv_head: usize, index: usize) -> usize {
        sequence.block_table[index].0 as usize * self.num_kv_heads + kv_head
    }

    /// Check that every row of `sequences` has a place; returns the number of rows.
    pub(super) fn check(self, sequences: &[SequenceRows]) -> usize {
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
