//! The network on one screen.

use std::path::Path;

use moge_kernels::{
    ActivationType, AttentionRows, Cpu, GroupedRows, PagedKv, QkvParams, RopeAngles, RopeHead, add, combine, embed,
    gemm, grouped_gemm, grouped_swiglu, paged_attention, rms_norm, rms_norm_in_place, rope_inverse_frequencies,
    write_qkv,
};
use thiserror::Error;

use crate::router::route_token;
use crate::weights::{Experts, Layer, LayerMlp, Linear, Network, Swiglu};
use crate::{
    Batch, Checkpoint, CheckpointError, ConfigError, KvCache, LoadMode, MlpConfig, ModelConfig, RopeConfig, Workspace,
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
        let inverse_frequencies = rope_inverse_frequencies(config.rope.theta, config.rope.rotary_dim);
        Ok(Model { config, network, inverse_frequencies, checkpoint })
    }

    /// The network's description.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The files that the weights lie in.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// One step: write the keys and values of all rows, leave the wanted logits in `work`.
    ///
    /// The numbers of a row depend on its sequence alone, bit for bit: not on the other rows of the batch, on how a
    /// prompt is cut into chunks, or on the number of threads.
    ///
    /// # Panics
    /// If `batch` is larger than `work`, names a token outside the vocabulary or a block outside `kv_cache`, or if
    /// `kv_cache` is that of another network.
    pub fn forward(&self, cpu: &Cpu, batch: &Batch, kv_cache: &mut KvCache, work: &mut Workspace) {
        assert_eq!(kv_cache.layers.len(), self.network.layers.len(), "layers of the KV cache and of the network");
        work.begin(batch, &self.inverse_frequencies);
        embed(cpu, &mut work.hidden, self.network.embedding.matrix(), &work.tokens);
        for (layer, kv) in self.network.layers.iter().zip(&mut kv_cache.layers) {
            work.trace_hidden();
            self.attention(cpu, layer, batch, kv, work);
            self.mlp(cpu, layer, work);
        }
        work.trace_hidden();
        self.logits(cpu, batch, work);
    }

    /// `hidden += [norm] o(attention(rope([norm] q), rope([norm] k), v))`, each of q, k, v from the normed `hidden`.
    fn attention(&self, cpu: &Cpu, layer: &Layer, batch: &Batch, kv: &mut PagedKv, work: &mut Workspace) {
        let Workspace { hidden, normed, q, k, v, attention, projected, activation, .. } = work;
        let eps = self.config.rms_norm_eps;
        rms_norm(cpu, normed, hidden, &layer.attention_norm, eps, *activation);
        linear(cpu, q, normed, &layer.q);
        linear(cpu, k, normed, &layer.k);
        linear(cpu, v, normed, &layer.v);
        let params = QkvParams {
            norms: layer.qk_norms.as_ref().map(|norms| norms.each_ref().map(|norm| &norm[..])),
            eps,
            angles: RopeAngles { cos: &work.cos, sin: &work.sin },
            rope: self.rope_head(),
            activation: *activation,
        };
        let scratch = &mut work.attention_scratch;
        write_qkv(cpu, [q, k, v], params, kv, &batch.sequences, scratch);
        let rows = AttentionRows { q, sequences: &batch.sequences, activation: *activation };
        paged_attention(cpu, attention, rows, kv, scratch);
        linear(cpu, projected, attention, &layer.o);
        if let Some(post_norms) = &layer.post_norms {
            rms_norm_in_place(cpu, projected, &post_norms.attention, eps, ActivationType::F32);
        }
        add(cpu, hidden, projected);
    }

    /// `hidden += [norm] mlp(norm(hidden))`.
    fn mlp(&self, cpu: &Cpu, layer: &Layer, work: &mut Workspace) {
        let eps = self.config.rms_norm_eps;
        rms_norm(cpu, &mut work.normed, &work.hidden, &layer.mlp_norm, eps, work.activation);
        match &layer.mlp {
            LayerMlp::Dense(mlp) => {
                dense_mlp(cpu, mlp, work);
                if let Some(post_norms) = &layer.post_norms {
                    rms_norm_in_place(cpu, &mut work.projected, &post_norms.mlp, eps, ActivationType::F32);
                }
                add(cpu, &mut work.hidden, &work.projected);
            }
            LayerMlp::GroupedExperts(experts) => self.experts(cpu, experts, work),
        }
    }

    /// Routed experts and the shared one (arXiv 2505.21411 §2.2):
    /// `hidden += sum of weight * expert(normed) over the chosen experts + shared(normed)`.
    fn experts(&self, cpu: &Cpu, experts: &Experts, work: &mut Workspace) {
        let MlpConfig::GroupedExperts(moe) = &self.config.mlp else { unreachable!("the layer has experts") };
        gemm(cpu, &mut work.router_logits, &work.normed, experts.router.matrix(), None);
        let rows = work.router_logits.chunks_exact_mut(moe.num_experts);
        for (logits, routes) in rows.zip(work.routes.chunks_exact_mut(moe.experts_per_token())) {
            route_token(cpu.isa(), moe, logits, &experts.router_scale, routes);
        }
        work.trace_routes();
        work.dispatch.sort(moe, &work.routes);
        dense_mlp(cpu, &experts.shared, work);
        let Workspace { hidden, normed, inner, expert_out, projected, dispatch, activation, .. } = work;
        let rows = GroupedRows { offsets: &dispatch.offsets, source_rows: Some(&dispatch.source_rows) };
        let inner = &mut inner[..dispatch.source_rows.len() * moe.expert_intermediate_size];
        let gate_up = |e: usize| experts.routed[e].gate_up.each_ref().map(|weight| weight.matrix());
        grouped_swiglu(cpu, inner, normed, rows, &gate_up, *activation);
        let rows = GroupedRows { source_rows: None, ..rows };
        grouped_gemm(cpu, expert_out, inner, rows, &|e| experts.routed[e].down.matrix());
        combine(cpu, hidden, expert_out, &dispatch.slots, &dispatch.weights, projected);
    }

    fn rope_head(&self) -> RopeHead {
        let RopeConfig { rotary_dim, layout, .. } = self.config.rope;
        RopeHead { head_dim: self.config.head_dim, rotary_dim, layout }
    }

    /// Logits of the rows that want them.
    fn logits(&self, cpu: &Cpu, batch: &Batch, work: &mut Workspace) {
        let hidden_size = self.config.hidden_size;
        let eps = self.config.rms_norm_eps;
        // The wanted rows move to the front of `projected`; all later work is on those alone.
        work.projected.truncate(batch.logit_rows.len() * hidden_size);
        for (place, &row) in work.projected.chunks_exact_mut(hidden_size).zip(&batch.logit_rows) {
            place.copy_from_slice(&work.hidden[row as usize * hidden_size..][..hidden_size]);
        }
        work.normed.truncate(work.projected.len());
        rms_norm(cpu, &mut work.normed, &work.projected, &self.network.final_norm, eps, work.activation);
        gemm(cpu, &mut work.logits, &work.normed, self.network.head.matrix(), None);
    }
}

fn linear(cpu: &Cpu, out: &mut [f32], x: &[f32], linear: &Linear) {
    gemm(cpu, out, x, linear.weight.matrix(), linear.bias.as_deref());
}

/// `projected = down(silu(gate(normed)) * up(normed))`: one expert that every row goes to.
fn dense_mlp(cpu: &Cpu, mlp: &Swiglu, work: &mut Workspace) {
    let Workspace { normed, inner, projected, activation, num_rows, .. } = work;
    let rows = GroupedRows { offsets: &[0, *num_rows], source_rows: None };
    let inner = &mut inner[..*num_rows * mlp.down.matrix().cols()];
    let gate_up = |_| mlp.gate_up.each_ref().map(|weight| weight.matrix());
    grouped_swiglu(cpu, inner, normed, rows, &gate_up, *activation);
    gemm(cpu, projected, inner, mlp.down.matrix(), None);
}
