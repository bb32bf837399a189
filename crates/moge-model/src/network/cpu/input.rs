//! What products read: activations, or their quantised rows.

use moge_kernels::{Cpu, GroupedRows, PackedProduct, QuantizedRows, RmsNormParams, gemm, packed_gemm, rms_norm};

use crate::network::weight::{InputKind, Weight, WeightView};
use crate::network::weights::Linear;

/// The rows that a product reads, in the form that its weight wants.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    pub(super) values: &'a [f32],
    /// The same rows, if the weight reads int8.
    pub(super) quantized: &'a QuantizedRows,
}

impl<'a> Input<'a> {
    /// Rows for products with `weight` and others that read the same kind; `quantized` is the place for quantised rows.
    pub(super) fn new(cpu: &Cpu, values: &'a [f32], quantized: &'a mut QuantizedRows, weight: &Weight) -> Input<'a> {
        if weight.input_kind() == InputKind::Int8 {
            let rows = GroupedRows { offsets: &[0, values.len() / weight.cols()], source_rows: None };
            quantized.quantize(cpu, values, weight.cols(), rows);
        }
        Input { values, quantized }
    }

    /// As [`Input::new`], of the norm of `x`, which `values` holds afterwards.
    pub(super) fn normed(
        cpu: &Cpu,
        values: &'a mut [f32],
        quantized: &'a mut QuantizedRows,
        x: &[f32],
        norm: RmsNormParams<'_>,
        weight: &Weight,
    ) -> Input<'a> {
        match weight.input_kind() {
            InputKind::Int8 => quantized.quantize_normed(cpu, values, x, norm),
            InputKind::Float => rms_norm(cpu, values, x, norm),
        }
        Input { values, quantized }
    }

    /// A product without bias.
    pub(super) fn product(self, cpu: &Cpu, out: &mut [f32], weight: &Weight) {
        match weight.view() {
            WeightView::Plain(weight) => gemm(cpu, out, self.values, weight, None),
            WeightView::Packed(weight) => {
                packed_gemm(cpu, self.quantized, [PackedProduct { out, weight, bias: None }]);
            }
        }
    }

    /// Projections whose weights read the same kind of input.
    pub(super) fn linears<const N: usize>(self, cpu: &Cpu, outputs: [(&mut Vec<f32>, &Linear); N]) {
        if outputs.iter().all(|(_, linear)| linear.weight.input_kind() == InputKind::Int8) {
            let products = outputs.map(|(out, linear)| PackedProduct {
                out,
                weight: linear.weight.packed(),
                bias: linear.bias.as_deref(),
            });
            return packed_gemm(cpu, self.quantized, products);
        }
        for (out, linear) in outputs {
            gemm(cpu, out, self.values, linear.weight.matrix(), linear.bias.as_deref());
        }
    }
}
