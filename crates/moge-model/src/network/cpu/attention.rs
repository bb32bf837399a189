//! The attention half of a layer.

use moge_kernels::{AttentionRows, QkvParams, RopeAngles, RopeHead, paged_attention, write_qkv};

use super::CpuStep;
use super::input::Input;
use super::workspace::Workspace;
use crate::network::config::RopeConfig;
use crate::network::profile::Operator;
use crate::network::weights::Layer;

impl CpuStep<'_> {
    /// `normed = norm(hidden)`: what the projections to heads read.
    pub(crate) fn norm_for_attention(&mut self, layer: &Layer) {
        let norm = self.norm(&layer.attention_norm);
        let Workspace { hidden, normed, quantized, profile, .. } = &mut *self.work;
        Input::normed(self.cpu, normed, quantized, hidden, norm, &layer.q.weight);
        profile.mark(Operator::Norm);
    }

    /// Queries, keys and values of `normed`.
    pub(crate) fn project_to_heads(&mut self, layer: &Layer) {
        let Workspace { normed, quantized, q, k, v, profile, .. } = &mut *self.work;
        Input { values: normed, quantized }.linears(self.cpu, [(q, &layer.q), (k, &layer.k), (v, &layer.v)]);
        profile.mark(Operator::Qkv);
    }

    /// Norm and RoPE of queries and keys; keys and values go to the cache of the layer `index`.
    pub(crate) fn write_kv(&mut self, layer: &Layer, index: usize) {
        let RopeConfig { rotary_dim, layout, .. } = self.config.rope;
        let Workspace { q, k, v, cos, sin, attention_scratch, activation, profile, .. } = &mut *self.work;
        let params = QkvParams {
            norms: layer.qk_norms.as_ref().map(|norms| norms.each_ref().map(|norm| &norm[..])),
            eps: self.config.rms_norm_eps,
            angles: RopeAngles { cos, sin },
            rope: RopeHead { head_dim: self.config.head_dim, rotary_dim, layout },
            activation: *activation,
        };
        let kv = &mut self.kv_cache.layers[index];
        write_qkv(self.cpu, [q, k, v], params, kv, &self.batch.sequences, attention_scratch);
        profile.mark(Operator::RopeAndKvWrite);
    }

    /// `attention` = causal attention of the queries over the cache of the layer `index`.
    pub(crate) fn attend(&mut self, index: usize) {
        let Workspace { q, attention, attention_scratch, activation, profile, .. } = &mut *self.work;
        let rows = AttentionRows { q, sequences: &self.batch.sequences, activation: *activation };
        paged_attention(self.cpu, attention, rows, &self.kv_cache.layers[index], attention_scratch);
        profile.mark(Operator::Attention);
    }

    /// `projected` = the output projection of `attention`; where ranks share the heads, this one's addend.
    pub(crate) fn project_from_heads(&mut self, layer: &Layer) {
        let Workspace { attention, projected, quantized, profile, .. } = &mut *self.work;
        let input = Input::new(self.cpu, attention, quantized, &layer.o.weight);
        input.linears(self.cpu, [(projected, &layer.o)]);
        profile.mark(Operator::OutputProjection);
    }
}
