//! What a step reads of the weights: their sizes as they are stored, by what uses them.

use crate::network::weights::{Experts, Layer, LayerMlp, Network, Swiglu};

/// Bytes of the stored matrices. Biases, norms and rows of the embedding, a fraction of a percent, are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightBytes {
    /// The layers in order.
    pub layers: Vec<LayerBytes>,
    /// The output head.
    pub head: u64,
}

/// Bytes of one layer's matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerBytes {
    /// Query, key, value and output projections.
    pub attention: u64,
    /// What every row goes through after the attention: a dense layer's MLP, or router and shared expert.
    pub shared_mlp: u64,
    /// One routed expert; 0 in a dense layer.
    pub expert: u64,
}

impl WeightBytes {
    pub(crate) fn of(network: &Network) -> WeightBytes {
        WeightBytes { layers: network.layers.iter().map(LayerBytes::of).collect(), head: network.head.num_bytes() }
    }
}

impl LayerBytes {
    fn of(layer: &Layer) -> LayerBytes {
        let attention = [&layer.q, &layer.k, &layer.v, &layer.o].iter().map(|linear| linear.weight.num_bytes()).sum();
        match &layer.mlp {
            LayerMlp::Dense(mlp) => LayerBytes { attention, shared_mlp: swiglu_bytes(mlp), expert: 0 },
            LayerMlp::Experts(Experts { router, routed, shared, .. }) => LayerBytes {
                attention,
                shared_mlp: router.num_bytes() + shared.as_ref().map_or(0, swiglu_bytes),
                // Experts of a layer are alike.
                expert: routed.first().map_or(0, swiglu_bytes),
            },
        }
    }
}

fn swiglu_bytes(mlp: &Swiglu) -> u64 {
    mlp.gate_up.iter().chain([&mlp.down]).map(|weight| weight.num_bytes()).sum()
}
