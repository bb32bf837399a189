//! The network for training: forward that keeps activations, and its backward, written out.
//!
//! It is the decoder that [`moge_model::Model`] runs, built from the same description, with its parameters in one flat
//! vector. Forward shares the engine's kernels, products excepted: those of training pack both factors, which is faster for
//! many rows and sums in another order, so results agree to rounding. Where a choice of experts is closer than that, the
//! forced expert ids of [`Batch::forced_experts`] make both take the same.
//!
//! Every sum has an order that depends on shapes and ISA alone: gradients have the same bits at any number of threads.

mod attention;
mod mlp;
mod routing;
mod spans;
#[cfg(test)]
pub(crate) mod tests;
mod workspace;

use std::ops::Range;

use moge_kernels::{
    Accumulate, Cpu, Elements, IGNORED_TARGET, Matrix, RopeAngles, SegmentAttentionScratch, TrainGemm, cross_entropy,
    embed, embed_backward, rope_angles,
};
use moge_model::cost::NetworkCost;
use moge_model::{ExpertId, Layer, LayerMlp, ModelConfig, MoeConfig, Swiglu};

use crate::batch::TokenBatch;
pub use routing::RoutingLosses;
use spans::{Gradients, Linear, MatrixSpan, Spans};
use workspace::{Activations, Scratch, logit_rows};
pub use workspace::{MAX_ROWS, TrainMemory, Workspace};

/// A network's description and the places of its parameters.
#[derive(Debug)]
pub struct TrainNetwork {
    config: ModelConfig,
    embedding: MatrixSpan,
    layers: Vec<LayerParams>,
    final_norm: Range<usize>,
    head: MatrixSpan,
    inverse_frequencies: Vec<f32>,
    ops_per_token: u64,
}

/// A layer's places.
#[derive(Debug)]
struct LayerParams {
    spans: Layer<MatrixSpan, Range<usize>>,
    /// Those of the routed half, as products want them.
    experts: Option<ExpertParams>,
}

/// Places of a layer's router and routed experts.
#[derive(Debug)]
struct ExpertParams {
    moe: MoeConfig,
    /// Place of the layer among those with experts.
    routed_index: usize,
    router: MatrixSpan,
    router_scale: Option<Range<usize>>,
    /// Where `[gate; up]` of each expert begins.
    gate_up_starts: Vec<usize>,
    down_starts: Vec<usize>,
}

/// What a pass over a batch is told besides the parameters.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The rows.
    pub rows: &'a TokenBatch,
    /// Experts to take in place of the best ones, `[routed layers, num_rows, experts_per_token]`, each row's in the order of
    /// the expert groups: those that another program chose. Their weights are the router's.
    pub forced_experts: Option<&'a [ExpertId]>,
    /// Factor of each row's cross-entropy, `[num_rows]`; 1 without: of the tokens that a reward weighs.
    pub row_weights: Option<&'a [f32]>,
}

/// What each part of the loss counts in the gradients of a batch.
#[derive(Clone, Copy, Debug)]
pub struct LossScales {
    /// Of the weighted cross-entropy of each row: 1 / targets of the step.
    pub cross_entropy: f32,
    /// Of [`RoutingLosses::aux`].
    pub aux: f32,
    /// Of [`RoutingLosses::z`].
    pub z: f32,
}

/// What a batch lost.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Losses {
    /// Sum of the weighted cross-entropy over the rows that have a target.
    pub cross_entropy: f64,
    /// Of the routers.
    pub routing: RoutingLosses,
    /// Rows that each expert got, `[routed layers][num_experts]`.
    pub expert_load: Vec<Vec<u64>>,
}

/// What stays the same during a pass.
struct Pass<'a> {
    cpu: &'a Cpu,
    config: &'a ModelConfig,
    params: &'a [f32],
    offsets: &'a [usize],
    angles: RopeAngles<'a>,
    forced: Option<&'a [ExpertId]>,
    scales: LossScales,
}

/// Memory of a pass that no layer keeps.
struct PassScratch<'a> {
    products: &'a mut TrainGemm,
    gemm_f32: &'a mut TrainGemm,
    attention: &'a mut SegmentAttentionScratch,
    scratch: &'a mut Scratch,
}

impl LayerParams {
    fn new(config: &ModelConfig, index: usize, spans: Layer<MatrixSpan, Range<usize>>) -> LayerParams {
        let experts = match &spans.mlp {
            LayerMlp::Experts(experts) => Some(ExpertParams {
                moe: *config.moe().expect("a layer has experts"),
                routed_index: config.routed_index(index).expect("the layer has experts"),
                router: experts.router,
                router_scale: experts.router_scale.clone(),
                gate_up_starts: experts.routed.iter().map(|e| MatrixSpan::joined(e.gate_up).start).collect(),
                down_starts: experts.routed.iter().map(|e| e.down.start).collect(),
            }),
            LayerMlp::Dense(_) => None,
        };
        LayerParams { spans, experts }
    }

    /// The MLP that every row goes through: the only one, or the shared expert if there is one.
    fn dense(&self) -> Option<&Swiglu<MatrixSpan>> {
        match &self.spans.mlp {
            LayerMlp::Dense(mlp) => Some(mlp),
            LayerMlp::Experts(experts) => experts.shared.as_ref(),
        }
    }
}

impl TrainNetwork {
    /// The network that `config` describes.
    pub fn new(config: &ModelConfig) -> TrainNetwork {
        let Spans { embedding, layers, final_norm, head } = spans::spans(config);
        TrainNetwork {
            config: config.clone(),
            embedding,
            layers: layers.into_iter().enumerate().map(|(i, spans)| LayerParams::new(config, i, spans)).collect(),
            final_norm,
            head,
            inverse_frequencies: config.rope.inverse_frequencies(),
            ops_per_token: NetworkCost::of(config).training_ops_per_token(),
        }
    }

    /// Its description.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Operations of forward and backward per token, as [`NetworkCost::training_ops_per_token`] counts them.
    pub fn ops_per_token(&self) -> u64 {
        self.ops_per_token
    }

    /// Forward and backward over `batch`. `grads`, laid out as `params`, are replaced or added to as `store` says.
    ///
    /// # Panics
    /// If a length does not fit, `work` is that of another network or smaller, a token or target is not below the
    /// vocabulary's size, or a forced expert is not below their number.
    pub fn forward_backward(
        &self,
        cpu: &Cpu,
        (params, grads): (&[f32], (&mut [f32], Accumulate)),
        batch: Batch<'_>,
        scales: LossScales,
        work: &mut Workspace,
    ) -> Losses {
        let mut grads = Gradients { numbers: grads.0, store: grads.1 };
        let mut losses = Losses::default();
        let Workspace { products, gemm_f32, attention, cos, sin, stream, kept, scratch } = self.begin(batch, work);
        let (cpu, config, offsets) = (cpu, &self.config, &batch.rows.offsets[..]);
        let angles = RopeAngles { cos, sin };
        let pass = Pass { cpu, config, params, offsets, angles, forced: batch.forced_experts, scales };
        let mut tools = PassScratch { products, gemm_f32, attention, scratch };
        self.forward(&pass, &batch.rows.tokens, (stream, kept), &mut tools, &mut losses);
        let mut d_stream = std::mem::take(&mut stream[self.layers.len()]);
        losses.cross_entropy = self.head(&pass, &mut d_stream, batch, &mut tools, &mut grads);
        let recompute = kept.len() < self.layers.len();
        for (index, layer) in self.layers.iter().enumerate().rev() {
            let kept = if recompute { &mut kept[0] } else { &mut kept[index] };
            // What forward kept last is the last layer's.
            if recompute && index + 1 < self.layers.len() {
                let (inputs, outputs) = stream.split_at_mut(index + 1);
                pass.layer(layer, (&inputs[index], &mut outputs[0]), kept, &mut tools);
            }
            pass.mlp_backward(layer, &mut d_stream, kept, &mut tools, &mut grads);
            pass.attention_backward(&layer.spans, (&mut d_stream, &stream[index]), kept, &mut tools, &mut grads);
        }
        let d_table = &mut grads.numbers[self.embedding.range()];
        if grads.store == Accumulate::Set && self.head.start != self.embedding.start {
            d_table.fill(0.0);
        }
        embed_backward(cpu, d_table, &d_stream, &batch.rows.tokens);
        stream[self.layers.len()] = d_stream;
        losses
    }

    /// Logits of all rows, `[num_rows, vocab_size]`, as the forward pass of training computes them.
    ///
    /// # Panics
    /// As [`TrainNetwork::forward_backward`].
    pub fn logits(&self, cpu: &Cpu, params: &[f32], batch: Batch<'_>, work: &mut Workspace) -> Vec<f32> {
        let mut losses = Losses::default();
        let Workspace { products, gemm_f32, attention, cos, sin, stream, kept, scratch } = self.begin(batch, work);
        let (config, offsets) = (&self.config, &batch.rows.offsets[..]);
        let scales = LossScales { cross_entropy: 0.0, aux: 0.0, z: 0.0 };
        let angles = RopeAngles { cos, sin };
        let pass = Pass { cpu, config, params, offsets, angles, forced: batch.forced_experts, scales };
        let mut tools = PassScratch { products, gemm_f32, attention, scratch };
        self.forward(&pass, &batch.rows.tokens, (stream, kept), &mut tools, &mut losses);
        let normed = &mut tools.scratch.hidden[0];
        pass.norm(normed, &stream[self.layers.len()], &self.final_norm);
        let mut logits = vec![0.0; batch.rows.num_rows() * self.head.rows];
        Linear { cpu, products: tools.products, span: self.head }.forward(params, &mut logits, normed, None);
        logits
    }

    /// Set `work` to the length of `batch`, with the angles of its positions.
    fn begin<'w>(&self, batch: Batch<'_>, work: &'w mut Workspace) -> &'w mut Workspace {
        assert_eq!(batch.rows.targets.len(), batch.rows.num_rows(), "targets");
        assert_eq!(batch.rows.offsets.last(), Some(&batch.rows.num_rows()), "the last offset");
        if let Some(forced) = batch.forced_experts {
            let per_layer = |layer: &LayerParams| layer.experts.as_ref().map_or(0, |e| e.moe.experts_per_token());
            let per_row: usize = self.layers.iter().map(per_layer).sum();
            assert_eq!(forced.len(), batch.rows.num_rows() * per_row, "forced experts");
        }
        let weights = batch.row_weights.map_or(batch.rows.num_rows(), <[f32]>::len);
        assert_eq!(weights, batch.rows.num_rows(), "row weights");
        work.resize(&self.config, batch.rows.num_rows());
        rope_angles(&mut work.cos, &mut work.sin, &batch.rows.positions(), &self.inverse_frequencies);
        work
    }

    /// Forward through all layers; what backward needs goes to `kept`, as far as there is one for each layer.
    fn forward(
        &self,
        pass: &Pass<'_>,
        tokens: &[u32],
        (stream, kept): (&mut [Vec<f32>], &mut [Activations]),
        tools: &mut PassScratch<'_>,
        losses: &mut Losses,
    ) {
        let table = Elements::F32(&pass.params[self.embedding.range()]);
        embed(pass.cpu, &mut stream[0], Matrix::new(table, self.embedding.rows, self.embedding.cols), tokens);
        for (index, layer) in self.layers.iter().enumerate() {
            let kept = &mut kept[index.min(kept.len() - 1)];
            let (inputs, outputs) = stream.split_at_mut(index + 1);
            pass.layer(layer, (&inputs[index], &mut outputs[0]), kept, tools);
            if let Some(experts) = &layer.experts {
                let layer_losses = pass.routing_losses(&experts.moe, &kept.routed);
                losses.routing.aux += layer_losses.aux;
                losses.routing.z += layer_losses.z;
                let dispatch = &kept.routed.dispatch;
                losses.expert_load.push(dispatch.rows_per_expert().map(|rows| rows as u64).collect());
            }
        }
    }

    /// The sum of the weighted cross-entropy; `stream`, the residual stream after the last layer, becomes its gradient.
    /// Logits are computed, lost and multiplied back for some rows at a time, of those that have a target.
    fn head(
        &self,
        pass: &Pass<'_>,
        stream: &mut [f32],
        batch: Batch<'_>,
        tools: &mut PassScratch<'_>,
        grads: &mut Gradients<'_>,
    ) -> f64 {
        let Scratch { hidden: [normed, d_normed, _], logits, losses, partials, .. } = &mut *tools.scratch;
        let (hidden, targets) = (self.config.hidden_size, &batch.rows.targets);
        pass.norm(normed, stream, &self.final_norm);
        let rows: Vec<usize> = (0..targets.len()).filter(|&row| targets[row] != IGNORED_TARGET).collect();
        let weights: Vec<f32> = rows.iter().map(|&row| batch.row_weights.map_or(1.0, |weights| weights[row])).collect();
        let scales: Vec<f32> = weights.iter().map(|weight| weight * pass.scales.cross_entropy).collect();
        let targets: Vec<u32> = rows.iter().map(|&row| targets[row]).collect();
        for (place, &row) in rows.iter().enumerate() {
            normed.copy_within(row * hidden..(row + 1) * hidden, place * hidden);
        }
        let rows_at_once = logit_rows(&self.config, rows.len());
        let mut head_grads = Gradients { numbers: &mut *grads.numbers, store: grads.store };
        if rows.is_empty() && grads.store == Accumulate::Set {
            head_grads.numbers[self.head.range()].fill(0.0);
        }
        for start in (0..rows.len()).step_by(rows_at_once.max(1)) {
            let part = start..rows.len().min(start + rows_at_once);
            let x = &normed[part.start * hidden..part.end * hidden];
            let logits = &mut logits[..part.len() * self.head.rows];
            let (cpu, products, span) = (pass.cpu, &mut *tools.products, self.head);
            Linear { cpu, products, span }.forward(pass.params, logits, x, None);
            let losses = &mut losses[part.clone()];
            cross_entropy(pass.cpu, logits, &targets[part.clone()], &scales[part.clone()], losses);
            Linear { cpu, products, span }.backward_weight(&mut head_grads, logits, x);
            head_grads.store = Accumulate::Add;
            let dx = &mut d_normed[part.start * hidden..part.end * hidden];
            Linear { cpu, products, span }.backward_input(pass.params, dx, logits, Accumulate::Set);
        }
        spread_rows(d_normed, &rows, hidden);
        let x = &mut *normed;
        x.copy_from_slice(stream);
        pass.norm_backward((stream, Accumulate::Set), (d_normed, x), &self.final_norm, partials, grads);
        losses.iter().zip(&weights).map(|(&loss, &weight)| f64::from(weight) * f64::from(loss)).sum()
    }
}

/// Move the first rows of `x` to the places `rows`, which ascend; all others become 0.
fn spread_rows(x: &mut [f32], rows: &[usize], width: usize) {
    let mut end = x.len();
    for (place, &row) in rows.iter().enumerate().rev() {
        x.copy_within(place * width..(place + 1) * width, row * width);
        x[(row + 1) * width..end].fill(0.0);
        end = row * width;
    }
    x[..end].fill(0.0);
}

impl Pass<'_> {
    fn layer(
        &self,
        layer: &LayerParams,
        (input, output): (&[f32], &mut [f32]),
        kept: &mut Activations,
        tools: &mut PassScratch<'_>,
    ) {
        self.attention(&layer.spans, input, kept, tools);
        self.mlp(layer, output, kept, tools);
    }
}
