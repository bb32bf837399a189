//! The steps of the decoder on a CPU: each one or a few kernels on the buffers of a [`Workspace`].

mod attention;
mod input;
mod mlp;
#[cfg(test)]
mod tests;
mod workspace;

use moge_kernels::{Cpu, Precision, RmsNormParams, add, embed, rms_norm_in_place};

use crate::network::batch::Batch;
use crate::network::config::ModelConfig;
use crate::network::cpu::input::Input;
use crate::network::kv_cache::KvCache;
use crate::network::output::StepOutput;
use crate::network::profile::Operator;
use crate::network::weight::Weight;
use crate::network::weights::{Layer, LayerMlp};
pub use workspace::{StepLimits, Workspace};

/// One step of a network on a CPU. Each method computes one step of the decoder, in place.
pub(crate) struct CpuStep<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) cpu: &'a Cpu,
    pub(crate) batch: &'a Batch,
    pub(crate) kv_cache: &'a mut KvCache,
    pub(crate) work: &'a mut Workspace,
    pub(crate) output: &'a mut StepOutput,
}

impl CpuStep<'_> {
    /// Make room for the batch, and compute the RoPE angles of its positions from the `frequencies` of
    /// [`crate::RopeConfig::inverse_frequencies`].
    ///
    /// # Panics
    /// If the batch is larger than the workspace.
    pub(crate) fn begin(&mut self, frequencies: &[f32]) {
        self.output.clear();
        self.work.begin(self.batch, frequencies);
    }

    /// `hidden` = the tokens' embeddings.
    pub(crate) fn embed(&mut self, embedding: &Weight) {
        embed(self.cpu, &mut self.work.hidden, embedding.matrix(), &self.work.tokens);
        self.work.profile.mark(Operator::Embed);
    }

    /// `hidden += [norm] projected`.
    pub(crate) fn add_to_residual(&mut self, post_norm: Option<&[f32]>) {
        let Workspace { hidden, projected, profile, .. } = &mut *self.work;
        if let Some(weight) = post_norm {
            rms_norm_in_place(self.cpu, projected, weight, self.config.rms_norm_eps, Precision::F32);
        }
        add(self.cpu, hidden, projected);
        profile.mark(Operator::Norm);
    }

    /// After the last attention a row matters only to its own results: go on with those rows that the batch wants. A
    /// traced step goes on with all.
    pub(crate) fn keep_wanted_rows(&mut self, layer: &Layer) {
        if self.output.trace.is_some() {
            return;
        }
        if let (LayerMlp::Experts(experts), false) = (&layer.mlp, self.batch.route_rows.is_empty()) {
            self.norm_for_mlp(layer);
            self.route(experts);
            self.work.profile.mark(Operator::Router);
        }
        // No experts are to be recorded any more.
        self.work.route_rows.clear();
        self.work.keep_rows(|row| {
            let wants = |rows: &[u32]| rows.binary_search(&row).is_ok();
            wants(&self.batch.logit_rows) || wants(&self.batch.hidden_rows)
        });
    }

    /// Hand out the hidden states that are wanted, and go on with the rows whose logits are wanted.
    pub(crate) fn keep_logit_rows(&mut self) {
        let width = self.config.hidden_size;
        for (row, hidden) in self.work.rows.iter().zip(self.work.hidden.chunks_exact(width)) {
            if self.batch.hidden_rows.binary_search(row).is_ok() {
                self.output.hidden_rows.extend_from_slice(hidden);
            }
        }
        self.work.keep_rows(|row| self.batch.logit_rows.binary_search(&row).is_ok());
    }

    /// `logits = head(norm(hidden))` of the rows that are left.
    pub(crate) fn logits(&mut self, final_norm: &[f32], head: &Weight) {
        let norm = self.norm(final_norm);
        let Workspace { hidden, normed, quantized, profile, num_rows, .. } = &mut *self.work;
        self.output.logits.resize(*num_rows * self.config.vocab_size, 0.0);
        Input::normed(self.cpu, normed, quantized, hidden, norm, head).product(self.cpu, &mut self.output.logits, head);
        profile.mark(Operator::Head);
    }

    /// Record the residual stream, if that is wanted.
    pub(crate) fn trace_hidden(&mut self) {
        if let Some(trace) = &mut self.output.trace {
            trace.hidden.push(self.work.hidden.clone());
        }
    }

    fn norm<'w>(&self, weight: &'w [f32]) -> RmsNormParams<'w> {
        RmsNormParams { weight, eps: self.config.rms_norm_eps, activation: self.work.activation }
    }
}
