//! The attention half of a layer, forward and backward.

use std::ops::Range;

use moge_kernels::{
    Accumulate, AttentionKept, Precision, RmsNormBackward, RmsNormParams, RopeHead, SegmentAttention, TrainGemm, add,
    attention_backward, attention_forward, column_sums, rms_norm, rms_norm_backward, rope, rope_backward,
};
use moge_model::{Layer, RopeConfig};

use super::spans::{Gradients, Linear, MatrixSpan};
use super::workspace::{Activations, Scratch};
use super::{Pass, PassScratch};

type LayerSpans = Layer<MatrixSpan, Range<usize>>;
type LinearSpans = moge_model::Linear<MatrixSpan, Range<usize>>;

impl Pass<'_> {
    /// `kept.middle = input + [norm] o(attention(rope([norm] q), rope([norm] k), v))`, each of q, k, v from the normed input.
    pub(super) fn attention(
        &self,
        layer: &LayerSpans,
        input: &[f32],
        kept: &mut Activations,
        tools: &mut PassScratch<'_>,
    ) {
        let Activations { normed, qkv, raw_qk, attention, log_sums, middle, .. } = kept;
        self.norm(normed, input, &layer.attention_norm);
        let [q, k, v] = qkv;
        for (out, linear) in [(&mut *q, &layer.q), (&mut *k, &layer.k), (&mut *v, &layer.v)] {
            self.project(tools, linear, out, normed);
        }
        if let Some(norms) = &layer.qk_norms {
            for ((x, raw), norm) in [&mut *q, &mut *k].into_iter().zip(raw_qk).zip(norms) {
                raw.copy_from_slice(x);
                self.norm(x, raw, norm);
            }
        }
        rope(self.cpu, q, self.angles, self.rope_head());
        rope(self.cpu, k, self.angles, self.rope_head());
        attention_forward(self.cpu, self.pieces(), attention, log_sums, [q, k, v], tools.attention);
        self.project(tools, &layer.o, middle, attention);
        if let Some(norms) = &layer.post_norms {
            kept.projected.copy_from_slice(middle);
            self.norm(middle, &kept.projected, &norms.attention);
        }
        add(self.cpu, middle, input);
    }

    /// `d_stream`, the gradient of `kept.middle`, becomes that of `input`.
    pub(super) fn attention_backward(
        &self,
        layer: &LayerSpans,
        (d_stream, input): (&mut [f32], &[f32]),
        kept: &Activations,
        tools: &mut PassScratch<'_>,
        grads: &mut Gradients<'_>,
    ) {
        let scratch = &mut *tools.scratch;
        let Scratch { hidden: [d_projected, d_normed, _], d_qkv: [dq, dk, dv], d_attention, partials, .. } = scratch;
        let d_projected: &[f32] = match &layer.post_norms {
            None => d_stream,
            Some(norms) => {
                let out = (&mut d_projected[..], Accumulate::Set);
                self.norm_backward(out, (d_stream, &kept.projected), &norms.attention, partials, grads);
                d_projected
            }
        };
        let products = &mut *tools.products;
        self.project_backward(products, &layer.o, d_projected, &kept.attention, grads);
        let linear = Linear { cpu: self.cpu, products, span: layer.o.weight };
        linear.backward_input(self.params, d_attention, d_projected, Accumulate::Set);
        let [q, k, v] = &kept.qkv;
        let forward = AttentionKept { qkv: [q, k, v], out: &kept.attention, log_sums: &kept.log_sums };
        attention_backward(self.cpu, self.pieces(), [dq, dk, dv], d_attention, forward, tools.attention);
        rope_backward(self.cpu, dq, self.angles, self.rope_head());
        rope_backward(self.cpu, dk, self.angles, self.rope_head());
        if let Some(norms) = &layer.qk_norms {
            for ((dx, raw), norm) in [&mut *dq, &mut *dk].into_iter().zip(&kept.raw_qk).zip(norms) {
                let dy = &mut d_attention[..dx.len()];
                dy.copy_from_slice(dx);
                self.norm_backward((dx, Accumulate::Set), (dy, raw), norm, partials, grads);
            }
        }
        let mut store = Accumulate::Set;
        for (dy, linear) in [(dq, &layer.q), (dk, &layer.k), (dv, &layer.v)] {
            self.project_backward(products, linear, dy, &kept.normed, grads);
            let product = Linear { cpu: self.cpu, products, span: linear.weight };
            product.backward_input(self.params, d_normed, dy, store);
            store = Accumulate::Add;
        }
        self.norm_backward((d_stream, Accumulate::Add), (d_normed, input), &layer.attention_norm, partials, grads);
    }

    /// `out = norm(x)`, for rows as long as the weight.
    pub(super) fn norm(&self, out: &mut [f32], x: &[f32], weight: &Range<usize>) {
        let weight = &self.params[weight.clone()];
        let params = RmsNormParams { weight, eps: self.config.rms_norm_eps, activation: Precision::F32 };
        rms_norm(self.cpu, out, x, params);
    }

    /// The gradients of [`Pass::norm`].
    pub(super) fn norm_backward(
        &self,
        (dx, dx_store): (&mut [f32], Accumulate),
        (dy, x): (&[f32], &[f32]),
        weight: &Range<usize>,
        scratch: &mut [f32],
        grads: &mut Gradients<'_>,
    ) {
        let dweight = &mut grads.numbers[weight.clone()];
        let out = RmsNormBackward { dx, dx_store, dweight, dweight_store: grads.store, scratch };
        rms_norm_backward(self.cpu, out, dy, x, &self.params[weight.clone()], self.config.rms_norm_eps);
    }

    fn project(&self, tools: &mut PassScratch<'_>, linear: &LinearSpans, out: &mut [f32], x: &[f32]) {
        let bias = linear.bias.clone().map(|bias| &self.params[bias]);
        Linear { cpu: self.cpu, products: tools.products, span: linear.weight }.forward(self.params, out, x, bias);
    }

    /// Gradients of a projection's weight and bias.
    fn project_backward(
        &self,
        products: &mut TrainGemm,
        linear: &LinearSpans,
        dy: &[f32],
        x: &[f32],
        grads: &mut Gradients<'_>,
    ) {
        if let Some(bias) = &linear.bias {
            column_sums(self.cpu, &mut grads.numbers[bias.clone()], dy, grads.store);
        }
        Linear { cpu: self.cpu, products, span: linear.weight }.backward_weight(grads, dy, x);
    }

    fn pieces(&self) -> SegmentAttention<'_> {
        SegmentAttention {
            num_q_heads: self.config.num_q_heads,
            num_kv_heads: self.config.num_kv_heads,
            head_dim: self.config.head_dim,
            offsets: self.offsets,
        }
    }

    fn rope_head(&self) -> RopeHead {
        let RopeConfig { rotary_dim, layout, .. } = self.config.rope;
        RopeHead { head_dim: self.config.head_dim, rotary_dim, layout }
    }
}
