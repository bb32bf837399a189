//! Matrix products: activations times a weight's transpose, for one weight or one per expert.
//!
//! All of them share one tile ([`tile`]), so that a row gives the same bits through any of them. Work is
//! cut into (expert, run of output columns); a weight is read from memory once per call however many rows
//! it meets, and experts without rows are not touched.

mod grouped;
pub(crate) mod panel;
mod products;
#[cfg(all(test, not(loom)))]
mod tests;
pub(crate) mod tile;

pub use grouped::{GroupedRows, grouped_gemm, grouped_swiglu};
pub use products::{ExpertWeights, ProductRows, TrainGemm};

use crate::cpu::Cpu;
use crate::elements::Matrix;
use grouped::multiply;
use tile::InputRows;

/// `out[t, n] = bias[n] + sum over k of x[t, k] * w[n, k]`; no bias adds nothing.
///
/// Shapes: `out` `[num_rows, w.rows()]`, `x` `[num_rows, w.cols()]`, `bias` `[w.rows()]`. The weight is widened to f32
/// in registers; products and sums are f32. The order of the sum over `k` depends on the ISA alone.
///
/// # Panics
/// If a length does not fit.
pub fn gemm(cpu: &Cpu, out: &mut [f32], x: &[f32], w: Matrix<'_>, bias: Option<&[f32]>) {
    if w.rows() == 0 {
        return assert!(out.is_empty(), "out has {} numbers, the weight no row", out.len());
    }
    assert!(out.len().is_multiple_of(w.rows()), "out has {} numbers for {} columns", out.len(), w.rows());
    let offsets = [0, out.len() / w.rows()];
    let input = InputRows { x, width: w.cols(), source_rows: None };
    multiply(cpu, out, input, &offsets, &|_| w, bias);
}
