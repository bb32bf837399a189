//! The weights of a network: which tensors there are, under which names. The only place that knows the names.

use std::ops::Range;

use crate::arch::spec::TensorNames;
use crate::checkpoint::quant_scheme::{QuantScheme, WeightRole};
use crate::network::config::{LayerConfig, MlpConfig, ModelConfig, MoeConfig, NormPlacement};
use crate::network::tensors::{EMBEDDING_NAME, HEAD_NAME, MatrixSpec, PackedSpec, Part, TensorSource, TensorSpec};
use crate::network::weight::Weight;

/// All weights of a network.
#[derive(Debug, Default)]
pub struct Network<M = Weight, V = Vec<f32>> {
    /// Token embedding `[vocab_size, hidden_size]`.
    pub embedding: M,
    /// The layers in order.
    pub layers: Vec<Layer<M, V>>,
    /// Weight of the last norm, `[hidden_size]`.
    pub final_norm: V,
    /// Output head `[vocab_size, hidden_size]`.
    pub head: M,
}

/// One layer.
#[derive(Debug)]
pub struct Layer<M = Weight, V = Vec<f32>> {
    /// Norm before attention, `[hidden_size]`.
    pub attention_norm: V,
    /// Norm before the MLP, `[hidden_size]`.
    pub mlp_norm: V,
    /// Norms after attention and after the MLP, where the network has them.
    pub post_norms: Option<PostNorms<V>>,
    /// Query projection.
    pub q: Linear<M, V>,
    /// Key projection.
    pub k: Linear<M, V>,
    /// Value projection.
    pub v: Linear<M, V>,
    /// Output projection.
    pub o: Linear<M, V>,
    /// Norms of each q and k head, `[head_dim]`, where the network has them.
    pub qk_norms: Option<[V; 2]>,
    /// The MLP.
    pub mlp: LayerMlp<M, V>,
}

/// Norms of a sandwich layer that come after its two halves.
#[derive(Debug)]
pub struct PostNorms<V = Vec<f32>> {
    /// Of the attention's output, `[hidden_size]`.
    pub attention: V,
    /// Of the MLP's output, `[hidden_size]`.
    pub mlp: V,
}

/// A projection.
#[derive(Debug)]
pub struct Linear<M = Weight, V = Vec<f32>> {
    /// `[output width, input width]`.
    pub weight: M,
    /// `[output width]`.
    pub bias: Option<V>,
}

/// The MLP of a layer.
#[derive(Debug)]
pub enum LayerMlp<M = Weight, V = Vec<f32>> {
    /// One SwiGLU.
    Dense(Swiglu<M>),
    /// Routed experts, and perhaps a shared one.
    Experts(Experts<M, V>),
}

/// `down(silu(gate(x)) * up(x))`.
#[derive(Debug)]
pub struct Swiglu<M = Weight> {
    /// Gate and up, `[intermediate_size, hidden_size]` each.
    pub gate_up: [M; 2],
    /// `[hidden_size, intermediate_size]`.
    pub down: M,
}

/// Weights of a layer's experts.
#[derive(Debug)]
pub struct Experts<M = Weight, V = Vec<f32>> {
    /// The router, `[num_experts, hidden_size]`.
    pub router: M,
    /// Learned factor of each expert's weight, `[num_experts]`, where the network has it.
    pub router_scale: Option<V>,
    /// Routed experts in order; an expert group is a run of `experts_per_group`.
    pub routed: Vec<Swiglu<M>>,
    /// The shared expert, if there is one.
    pub shared: Option<Swiglu<M>>,
}

/// A rank's share of every layer, where `num_ranks` ranks hold a network together: some query and key/value heads, and
/// some of the inner width of every MLP. What the ranks compute of an attention or an MLP adds up to the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Which rank, from 0.
    pub rank: usize,
    /// Ranks in all; divides the numbers of heads and the inner widths.
    pub num_ranks: usize,
}

impl Share {
    /// The only rank's: everything.
    pub const WHOLE: Share = Share { rank: 0, num_ranks: 1 };

    /// The description of the network as this rank computes it.
    ///
    /// # Panics
    /// If the number of ranks does not divide what is shared.
    pub fn of_config(self, config: &ModelConfig) -> ModelConfig {
        let mut shared = config.clone();
        for size in [&mut shared.num_q_heads, &mut shared.num_kv_heads] {
            *size = self.part_of(*size).len();
        }
        for layer in &mut shared.layers {
            match &mut layer.mlp {
                MlpConfig::Dense { intermediate_size } => *intermediate_size = self.part_of(*intermediate_size).len(),
                MlpConfig::Experts(moe) => {
                    moe.expert_intermediate_size = self.part_of(moe.expert_intermediate_size).len();
                    moe.shared_intermediate_size = moe.shared_intermediate_size.map(|size| self.part_of(size).len());
                }
            }
        }
        shared
    }

    /// This rank's part of `count` things.
    fn part_of(self, count: usize) -> Range<usize> {
        assert!(count.is_multiple_of(self.num_ranks), "{} ranks do not divide {count}", self.num_ranks);
        let len = count / self.num_ranks;
        self.rank * len..(self.rank + 1) * len
    }

    /// This rank's rows of a matrix: whole multiples of `unit`.
    fn rows(self, rows: usize, unit: usize) -> Part {
        if self == Share::WHOLE { Part::Whole } else { Part::Rows(scaled(self.part_of(rows / unit), unit)) }
    }

    /// This rank's columns of a matrix: whole multiples of `unit`.
    fn cols(self, cols: usize, unit: usize) -> Part {
        if self == Share::WHOLE { Part::Whole } else { Part::Cols(scaled(self.part_of(cols / unit), unit)) }
    }
}

fn scaled(range: Range<usize>, unit: usize) -> Range<usize> {
    range.start * unit..range.end * unit
}

/// Where the tensors of a layer come from.
struct LayerBuilder<'a, S> {
    config: &'a ModelConfig,
    share: Share,
    layer: usize,
    names: &'a TensorNames,
    source: &'a mut S,
}

impl<M: Clone, V> Network<M, V> {
    /// Ask `source` for every tensor of the network that `config` describes, in the order of [`expected_tensors`]; of
    /// attention and MLPs only the parts that `share` names.
    ///
    /// # Panics
    /// If the number of ranks does not divide what is shared.
    pub fn build<S>(config: &ModelConfig, share: Share, source: &mut S) -> Network<M, V>
    where
        S: TensorSource<Matrix = M, Vector = V>,
    {
        let whole = |role| MatrixSpec {
            role,
            layer: None,
            rows: config.vocab_size,
            cols: config.hidden_size,
            part: Part::Whole,
        };
        let embedding = source.matrix(EMBEDDING_NAME.to_owned(), &whole(WeightRole::Embedding));
        let names = &config.architecture.spec().names;
        let layers = (0..config.num_layers())
            .map(|layer| LayerBuilder { config, share, layer, names, source: &mut *source }.build())
            .collect();
        let final_norm = source.vector("model.norm.weight".to_owned(), &[config.hidden_size], &Part::Whole);
        // A quantised head has its own bytes, tied or not.
        let head = if config.tie_word_embeddings && config.quant.lm_head.is_none() {
            embedding.clone()
        } else {
            source.matrix(HEAD_NAME.to_owned(), &whole(WeightRole::Head))
        };
        Network { embedding, layers, final_norm, head }
    }
}

impl<M: Clone, V, S: TensorSource<Matrix = M, Vector = V>> LayerBuilder<'_, S> {
    fn build(mut self) -> Layer<M, V> {
        let config = self.config;
        let LayerConfig { norms, mlp } = config.layers[self.layer];
        let post_norms = (norms == NormPlacement::Sandwich).then(|| PostNorms {
            attention: self.norm(self.names.post_attention_norm),
            mlp: self.norm(self.names.post_mlp_norm),
        });
        Layer {
            attention_norm: self.norm("input_layernorm"),
            mlp_norm: self.norm("post_attention_layernorm"),
            post_norms,
            q: self.heads("q_proj", config.q_size()),
            k: self.heads("k_proj", config.kv_size()),
            v: self.heads("v_proj", config.kv_size()),
            o: self.attention_output(),
            qk_norms: config.qk_norm.then(|| {
                ["q_norm", "k_norm"]
                    .map(|name| self.vector(&format!("self_attn.{name}.weight"), &[config.head_dim], &Part::Whole))
            }),
            mlp: match mlp {
                MlpConfig::Experts(moe) => LayerMlp::Experts(self.experts(&moe)),
                MlpConfig::Dense { intermediate_size } => {
                    LayerMlp::Dense(self.swiglu("mlp", WeightRole::DenseMlp, intermediate_size))
                }
            },
        }
    }

    fn experts(&mut self, moe: &MoeConfig) -> Experts<M, V> {
        let routed = (0..moe.num_experts)
            .map(|e| self.swiglu(&format!("mlp.experts.{e}"), WeightRole::RoutedExpert, moe.expert_intermediate_size))
            .collect();
        let shared =
            moe.shared_intermediate_size.map(|width| self.swiglu("mlp.shared_expert", WeightRole::SharedExpert, width));
        let router = self.spec(WeightRole::Router, moe.num_experts, self.config.hidden_size, Part::Whole);
        Experts {
            router: self.matrix("mlp.gate.weight", &router),
            router_scale: moe
                .router_scale
                .then(|| self.vector("mlp.router_scale", &[1, moe.num_experts], &Part::Whole)),
            routed,
            shared,
        }
    }

    /// The SwiGLU of inner width `width` below `name`: ranks share the width.
    fn swiglu(&mut self, name: &str, role: WeightRole, width: usize) -> Swiglu<M> {
        let hidden = self.config.hidden_size;
        let inner = self.spec(role, width, hidden, self.share.rows(width, 1));
        let gate_up = if role == WeightRole::DenseMlp && self.names.fused_gate_up {
            let name = self.name(&format!("{name}.gate_up_proj.weight"));
            self.source.halves(name, &inner)
        } else {
            ["gate_proj", "up_proj"].map(|part| self.matrix(&format!("{name}.{part}.weight"), &inner))
        };
        let down = self.spec(role, hidden, width, self.share.cols(width, 1));
        Swiglu { gate_up, down: self.matrix(&format!("{name}.down_proj.weight"), &down) }
    }

    /// A projection to heads, `rows` wide in all: ranks share the heads.
    fn heads(&mut self, name: &str, rows: usize) -> Linear<M, V> {
        let part = self.share.rows(rows, self.config.head_dim);
        let spec = self.spec(WeightRole::Attention, rows, self.config.hidden_size, part);
        let weight = self.matrix(&format!("self_attn.{name}.weight"), &spec);
        let name = format!("self_attn.{name}.bias");
        Linear { weight, bias: self.config.qkv_bias.then(|| self.vector(&name, &[rows], &spec.part)) }
    }

    /// The projection of the heads' outputs. All ranks add to all of its outputs, so the bias is the first rank's.
    fn attention_output(&mut self) -> Linear<M, V> {
        let (hidden, q) = (self.config.hidden_size, self.config.q_size());
        let spec = self.spec(WeightRole::Attention, hidden, q, self.share.cols(q, self.config.head_dim));
        let weight = self.matrix("self_attn.o_proj.weight", &spec);
        let has_bias = self.config.o_bias && self.share.rank == 0;
        Linear { weight, bias: has_bias.then(|| self.vector("self_attn.o_proj.bias", &[hidden], &Part::Whole)) }
    }

    fn norm(&mut self, name: &str) -> V {
        self.vector(&format!("{name}.weight"), &[self.config.hidden_size], &Part::Whole)
    }

    fn vector(&mut self, name: &str, shape: &[usize], part: &Part) -> V {
        self.source.vector(self.name(name), shape, part)
    }

    fn matrix(&mut self, name: &str, spec: &MatrixSpec) -> M {
        self.source.matrix(self.name(name), spec)
    }

    fn spec(&self, role: WeightRole, rows: usize, cols: usize, part: Part) -> MatrixSpec {
        MatrixSpec { role, layer: Some(self.layer), rows, cols, part }
    }

    fn name(&self, name: &str) -> String {
        format!("model.layers.{}.{name}", self.layer)
    }
}

/// Every tensor of the network that `config` describes.
pub fn expected_tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut list = SpecList { quant: config.quant.clone(), specs: Vec::new() };
    Network::build(config, Share::WHOLE, &mut list);
    list.specs
}

struct SpecList {
    quant: QuantScheme,
    specs: Vec<TensorSpec>,
}

impl SpecList {
    fn add(&mut self, name: String, num_parts: usize, spec: &MatrixSpec) {
        let MatrixSpec { role, layer, rows, cols, .. } = *spec;
        let packed = self.quant.format(role, layer).map(|format| PackedSpec { role, format, num_parts, rows, cols });
        self.specs.push(TensorSpec { name, shape: vec![num_parts * rows, cols], packed });
    }
}

impl TensorSource for SpecList {
    type Matrix = ();
    type Vector = ();

    fn matrix(&mut self, name: String, spec: &MatrixSpec) {
        self.add(name, 1, spec);
    }

    fn halves(&mut self, name: String, spec: &MatrixSpec) -> [(); 2] {
        self.add(name, 2, spec);
        [(); 2]
    }

    fn vector(&mut self, name: String, shape: &[usize], _: &Part) {
        self.specs.push(TensorSpec { name, shape: shape.to_vec(), packed: None });
    }
}
