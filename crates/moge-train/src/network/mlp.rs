//! The MLP half of a layer: one dense MLP, or grouped experts and a shared one; forward and backward.

use moge_kernels::{
    Accumulate, Begin, ExpertOutputs, ExpertWeights, ProductRows, RowWeights, add, combine, swiglu_backward,
    swiglu_rows,
};
use moge_model::{Dispatch, MoeConfig, Swiglu};

use super::spans::{Gradients, Linear, MatrixSpan};
use super::workspace::{Activations, Routed, Scratch};
use super::{ExpertParams, LayerParams, Pass, PassScratch};

impl Pass<'_> {
    /// `output = kept.middle + [norm] mlp(norm(kept.middle))`.
    pub(super) fn mlp(
        &self,
        layer: &LayerParams,
        output: &mut [f32],
        kept: &mut Activations,
        tools: &mut PassScratch<'_>,
    ) {
        let Activations { middle, mlp_normed, gate_up, mlp_projected, routed, .. } = kept;
        self.norm(mlp_normed, middle, &layer.spans.mlp_norm);
        match &layer.experts {
            None => {
                if let Some(mlp) = layer.dense() {
                    self.swiglu(tools, mlp, (output, mlp_normed), gate_up);
                }
            }
            Some(experts) => {
                self.route(experts, mlp_normed, routed, tools);
                self.experts(layer, experts, (output, mlp_normed), (gate_up, routed), tools);
            }
        }
        if let Some(norms) = &layer.spans.post_norms {
            mlp_projected.copy_from_slice(output);
            self.norm(output, mlp_projected, &norms.mlp);
        }
        add(self.cpu, output, middle);
    }

    /// `output = sum of weight * expert(x) over the chosen experts + shared(x)` (arXiv 2505.21411 §2.2).
    fn experts(
        &self,
        layer: &LayerParams,
        experts: &ExpertParams,
        (output, x): (&mut [f32], &[f32]),
        (gate_up, routed): (&mut [f32], &mut Routed),
        tools: &mut PassScratch<'_>,
    ) {
        let mut shared = std::mem::take(&mut tools.scratch.hidden[0]);
        if let Some(mlp) = layer.dense() {
            self.swiglu(tools, mlp, (&mut shared, x), gate_up);
        }
        let dispatch = &routed.dispatch;
        let Scratch { inner, expert_rows, .. } = &mut *tools.scratch;
        let inner = &mut inner[..dispatch.source_rows.len() * experts.moe.expert_intermediate_size];
        let (into, out_of) = experts.weights(dispatch);
        let rows = ProductRows { source_rows: Some(&dispatch.source_rows), ..ProductRows::new(x, into.cols) };
        tools.products.forward(self.cpu, &mut routed.gate_up, rows, (self.params, into), None);
        swiglu_rows(self.cpu, inner, &routed.gate_up, out_of.cols);
        let rows = ProductRows::new(inner, out_of.cols);
        tools.products.forward(self.cpu, expert_rows, rows, (self.params, out_of), None);
        let outputs = ExpertOutputs { rows: expert_rows, slots: &dispatch.slots, weights: &dispatch.weights };
        combine(self.cpu, output, Begin::Zero, outputs, layer.dense().map(|_| &shared[..]));
        tools.scratch.hidden[0] = shared;
    }

    /// `out = down(silu(gate(x)) * up(x))` of every row; `gate_up` keeps gates and ups.
    fn swiglu(
        &self,
        tools: &mut PassScratch<'_>,
        spans: &Swiglu<MatrixSpan>,
        (out, x): (&mut [f32], &[f32]),
        gate_up: &mut [f32],
    ) {
        let span = MatrixSpan::joined(spans.gate_up);
        let gate_up = &mut gate_up[..x.len() / span.cols * span.rows];
        Linear { cpu: self.cpu, products: tools.products, span }.forward(self.params, gate_up, x, None);
        let inner = &mut tools.scratch.inner[..gate_up.len() / 2];
        swiglu_rows(self.cpu, inner, gate_up, spans.down.cols);
        Linear { cpu: self.cpu, products: tools.products, span: spans.down }.forward(self.params, out, inner, None);
    }

    /// `d_stream`, the gradient of the layer's output, becomes that of `kept.middle`.
    pub(super) fn mlp_backward(
        &self,
        layer: &LayerParams,
        d_stream: &mut [f32],
        kept: &mut Activations,
        tools: &mut PassScratch<'_>,
        grads: &mut Gradients<'_>,
    ) {
        let [mut d_projected, mut d_normed, mut d_router] = std::mem::take(&mut tools.scratch.hidden);
        let Activations { middle, mlp_normed, gate_up, mlp_projected, routed, .. } = kept;
        let d_out: &[f32] = match &layer.spans.post_norms {
            None => d_stream,
            Some(norms) => {
                let (out, partials) = ((&mut d_projected[..], Accumulate::Set), &mut tools.scratch.partials);
                self.norm_backward(out, (d_stream, mlp_projected), &norms.mlp, partials, grads);
                &d_projected
            }
        };
        match layer.dense() {
            Some(mlp) => self.swiglu_backward(tools, mlp, (&mut d_normed, d_out), (gate_up, mlp_normed), grads),
            None => d_normed.fill(0.0),
        }
        if let Some(experts) = &layer.experts {
            self.experts_backward(experts, d_out, (mlp_normed, routed), tools, grads);
            self.route_backward(experts, (&mut d_router, mlp_normed), routed, tools, grads);
            let dispatch = &routed.dispatch;
            let Scratch { expert_rows, ones, .. } = &mut *tools.scratch;
            let outputs = ExpertOutputs { rows: expert_rows, slots: &dispatch.slots, weights: ones };
            combine(self.cpu, &mut d_normed, Begin::Residual, outputs, Some(&d_router));
        }
        let partials = &mut tools.scratch.partials;
        self.norm_backward((d_stream, Accumulate::Add), (&d_normed, middle), &layer.spans.mlp_norm, partials, grads);
        tools.scratch.hidden = [d_projected, d_normed, d_router];
    }

    /// The gradients of [`Pass::swiglu`]: of its weights, and `dx`.
    fn swiglu_backward(
        &self,
        tools: &mut PassScratch<'_>,
        spans: &Swiglu<MatrixSpan>,
        (dx, dy): (&mut [f32], &[f32]),
        (gate_up, x): (&mut [f32], &[f32]),
        grads: &mut Gradients<'_>,
    ) {
        let joined = MatrixSpan::joined(spans.gate_up);
        let gate_up = &mut gate_up[..x.len() / joined.cols * joined.rows];
        let (products, inner) = (&mut *tools.products, &mut tools.scratch.inner[..gate_up.len() / 2]);
        let cpu = self.cpu;
        Linear { cpu, products, span: spans.down }.backward_input(self.params, inner, dy, Accumulate::Set);
        swiglu_backward(self.cpu, gate_up, inner, spans.down.cols, None);
        Linear { cpu, products, span: spans.down }.backward_weight(grads, dy, inner);
        Linear { cpu, products, span: joined }.backward_weight(grads, gate_up, x);
        Linear { cpu, products, span: joined }.backward_input(self.params, dx, gate_up, Accumulate::Set);
    }

    /// The gradients of the routed experts' weights, of the weights of the routes, and of each dispatched row.
    fn experts_backward(
        &self,
        experts: &ExpertParams,
        d_out: &[f32],
        (x, routed): (&[f32], &mut Routed),
        tools: &mut PassScratch<'_>,
        grads: &mut Gradients<'_>,
    ) {
        let dispatch = &routed.dispatch;
        let Scratch { inner, expert_rows, d_weights, .. } = &mut *tools.scratch;
        let inner = &mut inner[..dispatch.source_rows.len() * experts.moe.expert_intermediate_size];
        let (into, out_of) = experts.weights(dispatch);
        let gathered = |numbers| ProductRows { numbers, width: into.cols, source_rows: Some(&dispatch.source_rows) };
        let products = &mut *tools.products;
        products.backward_input(self.cpu, inner, gathered(d_out), (self.params, out_of), Accumulate::Set);
        let weights = RowWeights { weights: &dispatch.row_weights, dweights: d_weights };
        swiglu_backward(self.cpu, &mut routed.gate_up, inner, out_of.cols, Some(weights));
        let inner = ProductRows::new(inner, out_of.cols);
        products.backward_weight(self.cpu, (grads.numbers, out_of), gathered(d_out), inner, grads.store);
        let d_gate_up = ProductRows::new(&routed.gate_up, into.rows);
        products.backward_weight(self.cpu, (grads.numbers, into), d_gate_up, gathered(x), grads.store);
        products.backward_input(self.cpu, expert_rows, d_gate_up, (self.params, into), Accumulate::Set);
    }
}

impl ExpertParams {
    /// The weights into and out of the inner rows of the routed experts, with the rows that each has.
    fn weights<'a>(&'a self, dispatch: &'a Dispatch) -> (ExpertWeights<'a>, ExpertWeights<'a>) {
        let MoeConfig { expert_intermediate_size: inner, .. } = self.moe;
        let (offsets, hidden) = (&dispatch.offsets[..], self.router.cols);
        (
            ExpertWeights { offsets, starts: &self.gate_up_starts, rows: 2 * inner, cols: hidden },
            ExpertWeights { offsets, starts: &self.down_starts, rows: hidden, cols: inner },
        )
    }
}
