//! The network on one screen.

use std::path::Path;

use moge_kernels::{
    AttentionRows, Cpu, ExpertsDown, GroupedRows, PackedProduct, PagedKv, Precision, QkvParams, QuantizedRows,
    RmsNormParams, RopeAngles, RopeHead, add, combine, embed, gemm, grouped_gemm, grouped_swiglu, packed_experts_down,
    packed_gemm, packed_swiglu, paged_attention, rms_norm, rms_norm_in_place, write_qkv,
};
use thiserror::Error;

use crate::network::router::route_token;
use crate::network::weights::{Experts, Layer, LayerMlp, Linear, Network, Swiglu, Weight, WeightView};
use crate::{
    Batch, Checkpoint, CheckpointError, ConfigError, KvCache, LoadMode, ModelConfig, MoeConfig, Operator, QuantScheme,
    RopeConfig, WeightBytes, Workspace,
};

/// Why a model cannot be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Its `config.json` is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its weights are refused.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A checkpoint is to be quantised that is so already.
    #[error("{dir}: is quantised already; it can only run as it is")]
    QuantizedAlready {
        /// The checkpoint's directory.
        dir: String,
    },
}

/// A loaded network.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    network: Network,
    inverse_frequencies: Vec<f32>,
    checkpoint: Checkpoint,
}

impl Model {
    /// Load the checkpoint in `dir`. `progress` gets the bytes read so far and in all.
    ///
    /// # Errors
    /// If the config or the weights are refused.
    pub fn load(dir: &Path, mode: LoadMode, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Model, LoadError> {
        let config = ModelConfig::load(dir)?;
        let checkpoint = Checkpoint::open(dir, mode, progress)?;
        let network = Network::load(&config, &checkpoint)?;
        Ok(Model::new(config, network, checkpoint))
    }

    /// As [`Model::load`], mapped, quantising the weights in memory as `scheme` says.
    ///
    /// # Errors
    /// As [`Model::load`], and if the checkpoint is quantised already or a weight has a width that its format does not
    /// allow.
    pub fn load_quantizing(
        dir: &Path,
        cpu: &Cpu,
        scheme: QuantScheme,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Model, LoadError> {
        let config = ModelConfig::load(dir)?;
        if !config.quant.is_none() {
            return Err(LoadError::QuantizedAlready { dir: dir.display().to_string() });
        }
        let checkpoint = Checkpoint::open(dir, LoadMode::Mmap, &|_, _| {})?;
        let total = checkpoint.total_bytes();
        let network = Network::load_packing(&config, &checkpoint, cpu, scheme, &|read| progress(read, total))?;
        Ok(Model::new(ModelConfig { quant: scheme, ..config }, network, checkpoint))
    }

    fn new(config: ModelConfig, network: Network, checkpoint: Checkpoint) -> Model {
        let inverse_frequencies = config.rope.inverse_frequencies();
        Model { config, network, inverse_frequencies, checkpoint }
    }

    /// The network's description.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The files that the weights lie in.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Sizes of the weights as they are stored.
    pub fn weight_bytes(&self) -> WeightBytes {
        WeightBytes::of(&self.network)
    }

    /// One step: write the keys and values of all rows, leave the wanted logits and experts in `work`.
    ///
    /// The numbers of a row depend on its sequence alone, bit for bit: not on the other rows of the batch, on how a
    /// prompt is cut into chunks, or on the number of threads.
    ///
    /// # Panics
    /// If `batch` is larger than `work`, names a token outside the vocabulary, a block outside `kv_cache` or a row that
    /// it has not, or if `kv_cache` is that of another network.
    pub fn forward(&self, cpu: &Cpu, batch: &Batch, kv_cache: &mut KvCache, work: &mut Workspace) {
        assert_eq!(kv_cache.layers.len(), self.network.layers.len(), "layers of the KV cache and of the network");
        work.begin(batch, &self.inverse_frequencies);
        embed(cpu, &mut work.hidden, self.network.embedding.matrix(), &work.tokens);
        work.profile.mark(Operator::Embed);
        let last = self.network.layers.len() - 1;
        for (index, (layer, kv)) in self.network.layers.iter().zip(&mut kv_cache.layers).enumerate() {
            work.trace_hidden();
            self.attention(cpu, layer, batch, kv, work);
            if index == last && !work.is_traced() {
                // After the last attention a row matters to nobody but its own logits; its experts can be asked for.
                if let (LayerMlp::Experts(experts), false) = (&layer.mlp, batch.route_rows.is_empty()) {
                    self.mlp_input(cpu, layer, work);
                    self.route(cpu, experts, work);
                    work.profile.mark(Operator::Router);
                }
                work.keep_rows(&batch.logit_rows);
            }
            self.mlp(cpu, layer, work);
        }
        if work.is_traced() {
            work.trace_hidden();
            work.keep_rows(&batch.logit_rows);
        }
        self.logits(cpu, work);
    }

    /// `hidden += [norm] o(attention(rope([norm] q), rope([norm] k), v))`, each of q, k, v from the normed `hidden`.
    fn attention(&self, cpu: &Cpu, layer: &Layer, batch: &Batch, kv: &mut PagedKv, work: &mut Workspace) {
        let Workspace { hidden, normed, q, k, v, attention, projected, quantized, activation, .. } = work;
        let eps = self.config.rms_norm_eps;
        let norm = RmsNormParams { weight: &layer.attention_norm, eps, activation: *activation };
        let input = Input::normed(cpu, normed, quantized, hidden, norm, &layer.q.weight);
        work.profile.mark(Operator::Norm);
        linears(cpu, input, [(q, &layer.q), (k, &layer.k), (v, &layer.v)]);
        work.profile.mark(Operator::Qkv);
        let params = QkvParams {
            norms: layer.qk_norms.as_ref().map(|norms| norms.each_ref().map(|norm| &norm[..])),
            eps,
            angles: RopeAngles { cos: &work.cos, sin: &work.sin },
            rope: self.rope_head(),
            activation: *activation,
        };
        let scratch = &mut work.attention_scratch;
        write_qkv(cpu, [q, k, v], params, kv, &batch.sequences, scratch);
        work.profile.mark(Operator::RopeAndKvWrite);
        let rows = AttentionRows { q, sequences: &batch.sequences, activation: *activation };
        paged_attention(cpu, attention, rows, kv, scratch);
        work.profile.mark(Operator::Attention);
        linears(cpu, Input::new(cpu, attention, quantized, &layer.o.weight), [(projected, &layer.o)]);
        work.profile.mark(Operator::OutputProjection);
        if let Some(post_norms) = &layer.post_norms {
            rms_norm_in_place(cpu, projected, &post_norms.attention, eps, Precision::F32);
        }
        add(cpu, hidden, projected);
        work.profile.mark(Operator::Norm);
    }

    /// `normed = norm(hidden)`: what the MLP of `layer` and its router read.
    fn mlp_input(&self, cpu: &Cpu, layer: &Layer, work: &mut Workspace) {
        let dense = match &layer.mlp {
            LayerMlp::Dense(mlp) => Some(mlp),
            LayerMlp::Experts(experts) => experts.shared.as_ref(),
        };
        let Workspace { hidden, normed, quantized, activation, .. } = work;
        let eps = self.config.rms_norm_eps;
        let norm = RmsNormParams { weight: &layer.mlp_norm, eps, activation: *activation };
        match dense {
            Some(dense) => {
                Input::normed(cpu, normed, quantized, hidden, norm, &dense.gate_up[0]);
            }
            None => rms_norm(cpu, normed, hidden, norm),
        }
        work.profile.mark(Operator::Norm);
    }

    /// `hidden += [norm] mlp(norm(hidden))`.
    fn mlp(&self, cpu: &Cpu, layer: &Layer, work: &mut Workspace) {
        self.mlp_input(cpu, layer, work);
        match &layer.mlp {
            LayerMlp::Dense(mlp) => {
                dense_mlp(cpu, mlp, work);
                work.profile.mark(Operator::DenseMlp);
                if let Some(post_norms) = &layer.post_norms {
                    let eps = self.config.rms_norm_eps;
                    rms_norm_in_place(cpu, &mut work.projected, &post_norms.mlp, eps, Precision::F32);
                }
                add(cpu, &mut work.hidden, &work.projected);
                work.profile.mark(Operator::Norm);
            }
            LayerMlp::Experts(experts) => self.experts(cpu, experts, work),
        }
    }

    /// `routes` of the rows of `normed`.
    fn route(&self, cpu: &Cpu, experts: &Experts, work: &mut Workspace) {
        let moe = self.moe_config();
        gemm(cpu, &mut work.router_logits, &work.normed, experts.router.matrix(), None);
        let rows = work.router_logits.chunks_exact_mut(moe.num_experts);
        for (logits, routes) in rows.zip(work.routes.chunks_exact_mut(moe.experts_per_token())) {
            route_token(cpu.isa(), moe, logits, experts.router_scale.as_deref(), routes);
        }
        work.record_routes();
    }

    /// Routed experts and the shared one (arXiv 2505.21411 §2.2):
    /// `hidden += sum of weight * expert(normed) over the chosen experts + shared(normed)`.
    fn experts(&self, cpu: &Cpu, experts: &Experts, work: &mut Workspace) {
        self.route(cpu, experts, work);
        work.dispatch.sort(self.moe_config(), &work.routes);
        work.rows_per_expert.extend(work.dispatch.rows_per_expert());
        work.profile.mark(Operator::Router);
        match &experts.shared {
            Some(shared) => dense_mlp(cpu, shared, work),
            None => work.projected.fill(0.0),
        }
        work.profile.mark(Operator::SharedExpert);
        if experts.routed[0].down.is_packed() {
            packed_experts(cpu, experts, work);
        } else {
            plain_experts(cpu, experts, work);
        }
        work.profile.mark(Operator::Combine);
    }

    fn moe_config(&self) -> &MoeConfig {
        self.config.moe().expect("only layers with experts ask")
    }

    fn rope_head(&self) -> RopeHead {
        let RopeConfig { rotary_dim, layout, .. } = self.config.rope;
        RopeHead { head_dim: self.config.head_dim, rotary_dim, layout }
    }

    /// Logits of the rows that were kept.
    fn logits(&self, cpu: &Cpu, work: &mut Workspace) {
        let Workspace { hidden, normed, quantized, logits, activation, .. } = work;
        let Network { final_norm, head, .. } = &self.network;
        let norm = RmsNormParams { weight: final_norm, eps: self.config.rms_norm_eps, activation: *activation };
        product(cpu, logits, Input::normed(cpu, normed, quantized, hidden, norm, head), head);
        work.profile.mark(Operator::Head);
    }
}

/// What a product reads, in the form that its weight wants.
#[derive(Clone, Copy)]
struct Input<'a> {
    values: &'a [f32],
    /// Of the same rows, if the weight is packed.
    quantized: &'a QuantizedRows,
}

impl<'a> Input<'a> {
    /// Rows for products with `weight` and others of its format; `quantized` is the place for quantised rows.
    fn new(cpu: &Cpu, values: &'a [f32], quantized: &'a mut QuantizedRows, weight: &Weight) -> Input<'a> {
        if weight.is_packed() {
            let rows = GroupedRows { offsets: &[0, values.len() / weight.cols()], source_rows: None };
            quantized.quantize(cpu, values, weight.cols(), rows);
        }
        Input { values, quantized }
    }

    /// As [`Input::new`], of the norm of `x`, which `values` holds afterwards.
    fn normed(
        cpu: &Cpu,
        values: &'a mut [f32],
        quantized: &'a mut QuantizedRows,
        x: &[f32],
        norm: RmsNormParams<'_>,
        weight: &Weight,
    ) -> Input<'a> {
        if weight.is_packed() {
            quantized.quantize_normed(cpu, values, x, norm);
        } else {
            rms_norm(cpu, values, x, norm);
        }
        Input { values, quantized }
    }
}

/// Projections of one input; their weights have one format.
fn linears<const N: usize>(cpu: &Cpu, x: Input<'_>, outputs: [(&mut Vec<f32>, &Linear); N]) {
    if outputs.iter().all(|(_, linear)| linear.weight.is_packed()) {
        let products = outputs.map(|(out, linear)| PackedProduct {
            out,
            weight: linear.weight.packed(),
            bias: linear.bias.as_deref(),
        });
        return packed_gemm(cpu, x.quantized, products);
    }
    for (out, linear) in outputs {
        gemm(cpu, out, x.values, linear.weight.matrix(), linear.bias.as_deref());
    }
}

/// A product without bias.
fn product(cpu: &Cpu, out: &mut [f32], x: Input<'_>, weight: &Weight) {
    match weight.view() {
        WeightView::Plain(weight) => gemm(cpu, out, x.values, weight, None),
        WeightView::Packed(weight) => packed_gemm(cpu, x.quantized, [PackedProduct { out, weight, bias: None }]),
    }
}

/// `projected = down(silu(gate(normed)) * up(normed))`: one expert that every row goes to. Where gate and up are packed,
/// `quantized` holds the rows of `normed`.
fn dense_mlp(cpu: &Cpu, mlp: &Swiglu, work: &mut Workspace) {
    let Workspace { normed, inner, projected, quantized, activation, num_rows, .. } = work;
    let inner = &mut inner[..*num_rows * mlp.down.cols()];
    if mlp.gate_up[0].is_packed() {
        packed_swiglu(cpu, inner, quantized, &|_| mlp.gate_up.each_ref().map(Weight::packed));
    } else {
        let rows = GroupedRows { offsets: &[0, *num_rows], source_rows: None };
        grouped_swiglu(cpu, inner, normed, rows, &|_| mlp.gate_up.each_ref().map(Weight::matrix), *activation);
    }
    product(cpu, projected, Input::new(cpu, inner, quantized, &mlp.down), &mlp.down);
}

/// The routed experts of weights that are not packed, and the shared one, whose output is in `projected`.
fn plain_experts(cpu: &Cpu, experts: &Experts, work: &mut Workspace) {
    let Workspace { hidden, normed, inner, expert_out, projected, dispatch, activation, profile, .. } = work;
    let rows = GroupedRows { offsets: &dispatch.offsets, source_rows: Some(&dispatch.source_rows) };
    let inner = &mut inner[..dispatch.source_rows.len() * experts.routed[0].down.cols()];
    let gate_up = |e: usize| experts.routed[e].gate_up.each_ref().map(Weight::matrix);
    grouped_swiglu(cpu, inner, normed, rows, &gate_up, *activation);
    profile.mark(Operator::RoutedGateUp);
    let rows = GroupedRows { source_rows: None, ..rows };
    grouped_gemm(cpu, expert_out, inner, rows, &|e| experts.routed[e].down.matrix());
    profile.mark(Operator::RoutedDown);
    combine(cpu, hidden, expert_out, &dispatch.slots, &dispatch.weights, projected);
}

/// As [`plain_experts`], of packed weights.
fn packed_experts(cpu: &Cpu, experts: &Experts, work: &mut Workspace) {
    let Workspace { hidden, normed, inner, dispatched, projected, dispatch, widths, profile, .. } = work;
    let rows = GroupedRows { offsets: &dispatch.offsets, source_rows: Some(&dispatch.source_rows) };
    let inter = experts.routed[0].down.cols();
    let inner = &mut inner[..dispatch.source_rows.len() * inter];
    dispatched.quantize(cpu, normed, widths.hidden, rows);
    packed_swiglu(cpu, inner, dispatched, &|e| experts.routed[e].gate_up.each_ref().map(Weight::packed));
    profile.mark(Operator::RoutedGateUp);
    dispatched.quantize(cpu, inner, inter, GroupedRows { source_rows: None, ..rows });
    let down = ExpertsDown {
        inner: dispatched,
        down: &|e| experts.routed[e].down.packed(),
        source_rows: &dispatch.source_rows,
        row_weights: &dispatch.row_weights,
    };
    packed_experts_down(cpu, hidden, widths.hidden, down);
    profile.mark(Operator::RoutedDown);
    add(cpu, hidden, projected);
}
