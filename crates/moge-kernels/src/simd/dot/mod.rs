//! Products of small integers: a block of unsigned weights, of four or eight bits, with signed eight-bit inputs.
//!
//! All sums are exact in i32, so every ISA gives the same ones. A block is [`BLOCK_LEN`] inputs of [`PANEL_ROWS`] weight
//! rows, its bytes in an order in which one load gives every lane four inputs of its own weight row (see [`crate::quant`]).

#[cfg(target_arch = "x86_64")]
mod avx2;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod vnni;

#[cfg(target_arch = "x86_64")]
pub(crate) use vnni::{Avx512Vnni, AvxVnni};

/// Inputs of a block: those that share a scale in W4A8.
pub(crate) const BLOCK_LEN: usize = 32;
/// Weight rows of a block.
pub(crate) const PANEL_ROWS: usize = 32;
/// Weight rows that lie side by side: a block is two halves.
pub(crate) const HALF_ROWS: usize = 16;
/// Bytes from one run of four inputs to the next.
pub(crate) const RUN_STRIDE: usize = 4 * HALF_ROWS;
/// Bytes of the scales, one f16 for each weight row, that a W4A8 block begins with: it is read from front to back.
pub(crate) const SCALE_BYTES: usize = 2 * PANEL_ROWS;
/// Bytes of the weights of a W4A8 block; they follow its scales.
pub(crate) const NIBBLE_BYTES: usize = PANEL_ROWS * BLOCK_LEN / 2;
/// Bytes of a W8A8 block.
pub(crate) const BYTE_BYTES: usize = PANEL_ROWS * BLOCK_LEN;

/// A kernel body on integers that [`crate::Isa::run_dot`] compiles for each ISA. Its fields are the arguments.
pub(crate) trait DotOp {
    /// What the body returns.
    type Output;

    /// The body; must be `inline(always)`.
    fn run<D: Dot>(self, dot: D) -> Self::Output;
}

/// The inputs that meet a block: `num_rows` rows of [`BLOCK_LEN`] numbers, one after another.
#[derive(Clone, Copy)]
pub(crate) struct BlockInputs {
    /// `[num_rows, BLOCK_LEN]`, none of them -128.
    pub(crate) levels: *const i8,
    /// What to add to the sum of each row, `[num_rows]`.
    pub(crate) corrections: *const i32,
    pub(crate) num_rows: usize,
}

/// Proof that the CPU has an ISA's features, and its products of small integers.
pub(crate) trait Dot: Copy {
    /// Ask for the cache line at `address`, which need not be readable.
    fn prefetch(self, address: *const u8);

    /// `sums[r][n] += scale[n] * (corrections[r] + sum over k of w[n][k] * x[r][k])` for a W4A8 block: after the scales, in
    /// each half of the weight rows, at `j * RUN_STRIDE` for `j` below 4, each row has four bytes; their low nibbles are
    /// inputs `4 * j..`, their high nibbles inputs `16 + 4 * j..`.
    ///
    /// # Safety
    /// The block with its scales is readable, `x` as it says, and `[num_rows, PANEL_ROWS]` numbers are writable at `sums`.
    unsafe fn add_nibbles(self, block: *const u8, x: BlockInputs, sums: *mut f32);

    /// `sums[r][n] += sum over k of w[n][k] * x[r][k]` for a W8A8 block: in each half, at `j * RUN_STRIDE` for `j` below 8,
    /// each row has inputs `4 * j..`. Corrections are not looked at.
    ///
    /// # Safety
    /// As for [`Dot::add_nibbles`].
    unsafe fn add_bytes(self, block: *const u8, x: BlockInputs, sums: *mut i32);
}

/// Memory that begins at a cache line: registers that straddle two take twice the loads.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Aligned<T>(pub(crate) T);
