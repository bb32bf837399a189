//! What a network costs: parameters, bytes and operations, by operator. The one count that the benchmarks, the memory
//! check, `moge inspect` and training use.
//!
//! Operations are two for each multiply-accumulate. Norms, RoPE, activations and softmax, below one percent, are not
//! counted.

use moge_kernels::KvType;

use crate::BLOCK_SIZE;
use crate::network::batch::Batch;
use crate::network::config::ModelConfig;
use crate::network::kv_cache::KvCache;
use crate::network::tensors::{MatrixSpec, Part, TensorSource};
use crate::network::weight::Weight;
use crate::network::weights::{Layer, LayerMlp, Network, Share, Swiglu};

/// Matrices that are used together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MatrixCost {
    /// Weights: each is a multiply-accumulate for every row that goes through.
    pub num_weights: u64,
    /// Bytes as they are stored.
    pub bytes: u64,
}

/// The matrices of one layer, by what rows go through them. Biases and norms are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerCost {
    /// Query, key, value and output projections: every row.
    pub attention: MatrixCost,
    /// The MLP of a dense layer, or the shared expert: every row.
    pub dense: MatrixCost,
    /// The router: every row.
    pub router: MatrixCost,
    /// One routed expert: the rows that chose it. Experts of a layer are alike.
    pub expert: MatrixCost,
}

/// The matrices of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkCost {
    /// The layers in order.
    pub layers: Vec<LayerCost>,
    /// The output head: rows whose logits are wanted.
    pub head: MatrixCost,
    /// The token embedding, of which a step reads a row for each token; tied to the head it is counted there too.
    pub embedding: MatrixCost,
    /// All tensors together, tied ones once, with norms, biases and `router_scale`.
    pub total: MatrixCost,
    experts_per_token: u64,
    num_experts: u64,
}

impl MatrixCost {
    fn plus(self, other: MatrixCost) -> MatrixCost {
        MatrixCost {
            num_weights: self.num_weights.saturating_add(other.num_weights),
            bytes: self.bytes.saturating_add(other.bytes),
        }
    }

    fn of_weight(weight: &Weight) -> MatrixCost {
        MatrixCost { num_weights: (weight.rows() * weight.cols()) as u64, bytes: weight.num_bytes() }
    }
}

impl LayerCost {
    fn of<M, V>(layer: &Layer<M, V>, cost: &impl Fn(&M) -> MatrixCost) -> LayerCost {
        let sum =
            |matrices: &[&M]| matrices.iter().map(|matrix| cost(matrix)).fold(MatrixCost::default(), MatrixCost::plus);
        let swiglu = |mlp: &Swiglu<M>| sum(&[&mlp.gate_up[0], &mlp.gate_up[1], &mlp.down]);
        let attention = sum(&[&layer.q.weight, &layer.k.weight, &layer.v.weight, &layer.o.weight]);
        match &layer.mlp {
            LayerMlp::Dense(mlp) => LayerCost { attention, dense: swiglu(mlp), ..LayerCost::default() },
            LayerMlp::Experts(experts) => LayerCost {
                attention,
                dense: experts.shared.as_ref().map(swiglu).unwrap_or_default(),
                router: cost(&experts.router),
                expert: experts.routed.first().map(swiglu).unwrap_or_default(),
            },
        }
    }

    /// Weights that one row goes through, if it takes `experts_per_token` of the routed experts.
    fn weights_per_row(&self, experts_per_token: u64) -> u64 {
        self.attention.num_weights + self.mlp_weights_per_row(experts_per_token)
    }

    fn mlp_weights_per_row(&self, experts_per_token: u64) -> u64 {
        self.dense.num_weights + self.router.num_weights + experts_per_token * self.expert.num_weights
    }
}

impl NetworkCost {
    /// Of the network that `config` describes, weights that are not packed in the type that it states. A config may
    /// describe more than 64 bits can count; sums stop there.
    pub fn of(config: &ModelConfig) -> NetworkCost {
        let mut source = Counter { config, total: MatrixCost::default() };
        let network = Network::build(config, Share::WHOLE, &mut source);
        let total = source.total;
        NetworkCost { total, ..NetworkCost::of_network(config, &network, |&cost| cost) }
    }

    /// Of the weights of a loaded network, as they are stored.
    pub(crate) fn of_loaded(config: &ModelConfig, network: &Network) -> NetworkCost {
        let total = NetworkCost::of(config).total;
        NetworkCost { total, ..NetworkCost::of_network(config, network, MatrixCost::of_weight) }
    }

    fn of_network<M, V>(config: &ModelConfig, network: &Network<M, V>, cost: impl Fn(&M) -> MatrixCost) -> NetworkCost {
        let moe = config.moe();
        NetworkCost {
            layers: network.layers.iter().map(|layer| LayerCost::of(layer, &cost)).collect(),
            head: cost(&network.head),
            embedding: cost(&network.embedding),
            total: MatrixCost::default(),
            experts_per_token: moe.map_or(0, |moe| moe.experts_per_token() as u64),
            num_experts: moe.map_or(0, |moe| moe.num_experts as u64),
        }
    }

    /// Parameters that one token uses: all but those of the experts that it does not take.
    pub fn active_per_token(&self) -> u64 {
        let num_idle = self.num_experts - self.experts_per_token;
        let idle = self.layers.iter().map(|layer| layer.expert.num_weights.saturating_mul(num_idle));
        self.total.num_weights.saturating_sub(idle.fold(0, u64::saturating_add))
    }

    /// Operations of a step: the products of every row with the weights that it really goes through, and attention's scores
    /// and weighted sums. The last layer's MLP and the head count for the rows whose logits are wanted.
    pub fn step_ops(&self, config: &ModelConfig, batch: &Batch) -> u64 {
        let (rows, wanted) = (batch.num_rows() as u64, batch.logit_rows.len() as u64);
        let last = self.layers.len() - 1;
        let in_layers = self.layers.iter().enumerate().map(|(index, layer)| {
            let mlp_rows = if index == last { wanted } else { rows };
            rows * layer.attention.num_weights + mlp_rows * layer.mlp_weights_per_row(self.experts_per_token)
        });
        // Every query head takes one product with each key and one with each value it sees.
        let attention = 2 * (config.q_size() * self.layers.len()) as u64 * keys_seen(batch);
        2 * (in_layers.sum::<u64>() + attention + wanted * self.head.num_weights)
    }

    /// Bytes that a step reads: each weight that any row goes through once, and the keys and values of every sequence.
    /// `experts_hit` has the number of experts with rows of each routed layer.
    pub fn step_bytes(&self, kv_token_bytes: u64, batch: &Batch, experts_hit: &[usize]) -> u64 {
        let mut experts_hit = experts_hit.iter();
        let layers = self.layers.iter().map(|layer| {
            let is_routed = layer.expert.num_weights > 0;
            let num_experts = is_routed.then(|| experts_hit.next()).flatten().map_or(0, |&hit| hit as u64);
            layer.attention.bytes + layer.dense.bytes + layer.router.bytes + num_experts * layer.expert.bytes
        });
        let tokens: usize = batch.sequences.iter().map(|sequence| sequence.first_position + sequence.num_rows).sum();
        layers.sum::<u64>() + self.head.bytes + kv_token_bytes * tokens as u64
    }

    /// Operations of forward and backward per token in training: three times those of forward. Attention's scores and
    /// sums and the embedding are not counted.
    pub fn training_ops_per_token(&self) -> u64 {
        let layers = self.layers.iter().map(|layer| layer.weights_per_row(self.experts_per_token));
        6 * (layers.sum::<u64>() + self.head.num_weights)
    }
}

/// Elements of the keys and values of one token over all layers.
pub fn kv_token_elements(config: &ModelConfig) -> u64 {
    2 * (config.kv_size() * config.num_layers()) as u64
}

/// Bytes that a KV cache takes for one token over all layers, with what it notes of each block.
pub fn kv_token_bytes(config: &ModelConfig, kv_type: KvType) -> u64 {
    KvCache::block_bytes(config, kv_type) / BLOCK_SIZE as u64
}

/// Keys that the rows of a step attend to: as many as each row's position, and its own.
fn keys_seen(batch: &Batch) -> u64 {
    let sum = |first: u64, rows: u64| rows * first + rows * (rows + 1) / 2;
    batch.sequences.iter().map(|sequence| sum(sequence.first_position as u64, sequence.num_rows as u64)).sum()
}

/// Counts what a network asks for.
struct Counter<'a> {
    config: &'a ModelConfig,
    total: MatrixCost,
}

impl Counter<'_> {
    fn plain(&self, num_weights: u64) -> MatrixCost {
        MatrixCost { num_weights, bytes: num_weights.saturating_mul(self.config.dtype.size_bytes() as u64) }
    }
}

impl TensorSource for Counter<'_> {
    type Matrix = MatrixCost;
    type Vector = ();

    fn matrix(&mut self, _: String, spec: &MatrixSpec) -> MatrixCost {
        let num_weights = (spec.rows * spec.cols) as u64;
        let cost = match self.config.quant.format(spec.role, spec.layer) {
            Some(format) => MatrixCost { num_weights, bytes: format.weight_bytes(spec.rows, spec.cols) as u64 },
            None => self.plain(num_weights),
        };
        self.total = self.total.plus(cost);
        cost
    }

    fn halves(&mut self, name: String, spec: &MatrixSpec) -> [MatrixCost; 2] {
        [self.matrix(name.clone(), spec), self.matrix(name, spec)]
    }

    fn vector(&mut self, _: String, shape: &[usize], _: &Part) {
        let cost = self.plain(shape.iter().map(|&size| size as u64).product());
        self.total = self.total.plus(cost);
    }
}

#[cfg(test)]
mod tests;
