//! The network on one screen: the order of its steps. What each does to the numbers is in `cpu/`.

use moge_kernels::Begin;

use crate::network::cpu::CpuStep;
use crate::network::weights::{LayerMlp, Network};

/// Take the rows of `step`'s batch through the network. With `h` the residual stream, each layer is
/// `h += [norm] attention(norm(h))`, then `h += [norm] mlp(norm(h))`, where the MLP is dense or the sum of routed experts
/// and a shared one (arXiv 2505.21411 §2.2).
pub(crate) fn decode(network: &Network, step: &mut CpuStep<'_>) {
    step.embed(&network.embedding);
    for (index, layer) in network.layers.iter().enumerate() {
        step.trace_hidden();
        step.norm_for_attention(layer);
        step.project_to_heads(layer);
        step.write_kv(layer, index);
        step.attend(index);
        step.project_from_heads(layer);
        step.add_to_residual(layer.post_norms.as_ref().map(|norms| &norms.attention[..]));
        if index + 1 == network.layers.len() {
            step.keep_wanted_rows(layer);
        }
        let post_norm = layer.post_norms.as_ref().map(|norms| &norms.mlp[..]);
        step.norm_for_mlp(layer);
        match &layer.mlp {
            LayerMlp::Dense(mlp) => {
                step.dense_mlp(mlp);
                step.add_to_residual(post_norm);
            }
            LayerMlp::Experts(experts) => {
                step.route(experts);
                step.dispatch();
                step.shared_expert(experts);
                if post_norm.is_none() {
                    step.routed_experts(experts, Begin::Residual);
                } else {
                    step.routed_experts(experts, Begin::Zero);
                    step.add_to_residual(post_norm);
                }
            }
        }
    }
    step.trace_hidden();
    step.keep_logit_rows();
    step.logits(&network.final_norm, &network.head);
}
