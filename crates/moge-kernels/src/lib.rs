//! Arithmetic on slices: the only crate that computes, and the only one that knows CPU features.
//!
//! Invariants: no kernel allocates, does I/O or keeps global state; all scratch memory comes from the caller, but for
//! 32 KiB of sums per thread in products with packed weights (`quant/tile.rs`). Each output element is reduced in one
//! fixed order that depends on the format and the [`Isa`], never on the number of rows, the number of threads or the
//! place in a batch.
//!
//! A kernel is one generic body, compiled for every [`Isa`] (see `simd`), and a checked function that spreads it
//! over the threads of a [`Cpu`]. Wrong lengths are bugs of the caller and panic; numbers never do, NaN included.

#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // Loops over registers read better with their indices.

mod adamw;
mod attention;
mod combine;
mod cpu;
mod cross_entropy;
mod elements;
mod embedding;
mod exp;
mod gemm;
mod isa;
mod norm;
mod pool;
mod quant;
mod roofline;
mod rope;
mod simd;
mod softmax;
mod sums;
mod swiglu;
#[cfg(all(test, not(loom)))]
mod testing;

pub use adamw::{AdamW, adamw};
pub use attention::{
    AttentionKept, AttentionLimits, AttentionRows, AttentionScratch, BlockId, KvType, PagedKv, QkvParams,
    SegmentAttention, SegmentAttentionScratch, SequenceRows, attention_backward, attention_forward, paged_attention,
    write_qkv,
};
pub use combine::{Begin, ExpertOutputs, combine};
pub use cpu::{Cpu, available_threads};
pub use cross_entropy::{IGNORED_TARGET, cross_entropy};
pub use elements::{Accumulate, Dtype, Elements, Matrix, Precision};
pub use embedding::{embed, embed_backward};
pub use gemm::{ExpertWeights, GroupedRows, ProductRows, TrainGemm, gemm, grouped_gemm, grouped_swiglu};
pub use isa::{Isa, UnknownIsa};
pub use norm::{
    RmsNormBackward, RmsNormParams, add, rms_norm, rms_norm_backward, rms_norm_in_place, rms_norm_scratch_len,
};
pub use pool::MAX_THREADS;
pub use quant::{
    ExpertsDown, PACKED_LAYOUT_VERSION, PANEL_ROWS, PackError, PackedFormat, PackedMatrix, PackedProduct,
    QUANT_BLOCK_LEN, QuantizedRows, pack_int8, pack_panel, packed_experts_down, packed_gemm, packed_swiglu,
};
pub use roofline::{Int8Product, MemoryRead, f32_flops_per_s, int8_ops_per_s};
pub use rope::{RopeAngles, RopeHead, RopeLayout, rope, rope_angles, rope_backward, rope_inverse_frequencies};
pub use simd::round_to_bf16;
pub use softmax::softmax;
pub use sums::{column_sums, sum_of_squares, sum_of_squares_scratch_len};
pub use swiglu::{RowWeights, swiglu_backward, swiglu_rows};
