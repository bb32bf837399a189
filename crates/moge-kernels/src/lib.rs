//! Arithmetic on slices: the only crate that computes, and the only one that knows CPU features.
//!
//! Invariants: no kernel allocates, does I/O or keeps global state; all scratch memory comes from the
//! caller. Each output element is reduced in one fixed order that depends on the format and the
//! [`Isa`], never on the number of rows, the number of threads or the place in a batch.
//!
//! A kernel is one generic body, compiled for every [`Isa`] (see `simd`), and a checked function that spreads it
//! over the threads of a [`Cpu`]. Wrong lengths are bugs of the caller and panic; numbers never do, NaN included.

#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // Loops over registers read better with their indices.

mod attention;
mod ceilings;
mod combine;
mod cpu;
mod elements;
mod embedding;
mod exp;
mod gemm;
mod isa;
mod norm;
mod pool;
mod quant;
mod rope;
mod simd;
mod softmax;
mod swiglu;
#[cfg(all(test, not(loom)))]
mod testing;

pub use attention::{
    AttentionLimits, AttentionRows, AttentionScratch, BlockId, KvType, PagedKv, QkvParams, SequenceRows,
    paged_attention, write_qkv,
};
pub use ceilings::{Int8Product, MemoryRead, f32_flops_per_s, int8_ops_per_s};
pub use combine::combine;
pub use cpu::{Cpu, available_threads};
pub use elements::{ActivationType, Dtype, Elements, Matrix, round_to_bf16};
pub use embedding::embed;
pub use gemm::{GroupedRows, gemm, grouped_gemm, grouped_swiglu};
pub use isa::{Isa, UnknownIsa};
pub use norm::{RmsNormParams, add, rms_norm, rms_norm_in_place};
pub use pool::MAX_THREADS;
pub use quant::{
    ExpertsDown, PACKED_LAYOUT_VERSION, PANEL_ROWS, PackError, PackedFormat, PackedMatrix, PackedProduct,
    QUANT_BLOCK_LEN, QuantizedRows, pack_levels, pack_panel, packed_experts_down, packed_gemm, packed_swiglu,
};
pub use rope::{RopeAngles, RopeHead, RopeLayout, rope_angles, rope_inverse_frequencies};
pub use softmax::softmax;
