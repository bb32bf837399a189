//! A network's description, which every other part reads. `config_json.rs` makes it from a file.

use moge_kernels::{Dtype, RopeLayout, rope_inverse_frequencies};
use thiserror::Error;

use crate::checkpoint::quant_scheme::QuantScheme;

/// The networks that the one decoder runs. Everything particular to one of them is in its file in `arch/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// `PanguProMoEForCausalLM`: Mixture of Grouped Experts (arXiv 2505.21411).
    PanguProMoe,
    /// `PanguEmbeddedForCausalLM`: dense.
    PanguEmbedded,
    /// `Qwen3ForCausalLM`: dense, q/k norm.
    Qwen3,
    /// `Qwen3MoeForCausalLM`: q/k norm, plain top-K routing.
    Qwen3Moe,
    /// `Glm4ForCausalLM`: dense, sandwich norms, interleaved partial RoPE.
    Glm4,
    /// `LlamaForCausalLM`: dense.
    Llama,
}

/// Where a layer normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and before the MLP.
    Pre,
    /// Before and after both.
    Sandwich,
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Number of leading elements of a head that are rotated; even, at most `head_dim`.
    pub rotary_dim: usize,
    /// Which elements of a head are rotated together.
    pub layout: RopeLayout,
    /// Change of the frequencies for contexts longer than those of pre-training.
    pub scaling: RopeScaling,
}

/// Change of RoPE's frequencies: `rope_scaling` of a `config.json`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// Every frequency is divided by `factor` (position interpolation, arXiv 2306.15595).
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Low frequencies are divided by `factor`, high ones kept, those between interpolated: Llama 3.1.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Frequencies with fewer periods than this in the original context are low.
        low_freq_factor: f32,
        /// Frequencies with more periods than this in the original context are high; above `low_freq_factor`.
        high_freq_factor: f32,
        /// Tokens of the context of pre-training.
        original_context: f32,
    },
}

/// The router: which experts a token takes, and with what weights. Every kind begins with a softmax over all experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Router {
    /// The best experts of every expert group, by probability; weights are not renormalised (arXiv 2505.21411 §2.2).
    GroupedSoftmax {
        /// Disjoint sets of consecutive experts; divides `num_experts`.
        num_expert_groups: usize,
        /// Experts taken in each expert group.
        top_k_per_group: usize,
    },
    /// The best experts of all: one expert group.
    TopKSoftmax {
        /// Experts taken.
        top_k: usize,
        /// The weights of a token's experts are divided by their sum.
        renormalize: bool,
    },
}

/// Shape of a routed layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoeConfig {
    /// Routed experts of a layer; the shared one is not counted.
    pub num_experts: usize,
    /// How experts are chosen.
    pub router: Router,
    /// A learned factor for each expert's weight.
    pub router_scale: bool,
    /// Inner width of a routed expert.
    pub expert_intermediate_size: usize,
    /// Inner width of the shared expert, if there is one.
    pub shared_intermediate_size: Option<usize>,
}

/// The MLP of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpConfig {
    /// One SwiGLU.
    Dense {
        /// Inner width.
        intermediate_size: usize,
    },
    /// Routed experts, and perhaps a shared one.
    Experts(MoeConfig),
}

/// One layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerConfig {
    /// Where it normalises.
    pub norms: NormPlacement,
    /// Its MLP.
    pub mlp: MlpConfig,
}

/// A complete, checked description of a network; has no invalid state.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which network.
    pub architecture: Architecture,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key/value heads; divides `num_q_heads`.
    pub num_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Added to the variance in RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// The head uses the embedding's weights.
    pub tie_word_embeddings: bool,
    /// RMSNorm on every q and k head before RoPE.
    pub qk_norm: bool,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub o_bias: bool,
    /// The layers in order; at least one. Those with experts all have the same [`MoeConfig`].
    pub layers: Vec<LayerConfig>,
    /// Type that the file states for its weights, those that are not quantised.
    pub dtype: Dtype,
    /// Which weights are quantised.
    pub quant: QuantScheme,
    /// End-of-sequence tokens that the file names.
    pub eos_token_ids: Vec<u32>,
}

/// Why a `config.json` is refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{file}: {source}")]
    Read {
        /// The file's path.
        file: String,
        /// The I/O error.
        source: std::io::Error,
    },
    /// The directory is what `moge quantize` left when it was stopped.
    #[error("{dir}: not finished; the `moge quantize` that began it, run again, will go on")]
    Unfinished {
        /// The checkpoint's directory.
        dir: String,
    },
    /// The file is not a JSON object.
    #[error("{file}: not a JSON object: {problem}")]
    NotJson {
        /// The file's path.
        file: String,
        /// What is wrong, and where.
        problem: String,
    },
    /// A field is missing, wrong, or asks for something that is not implemented.
    #[error("{file}: {field}: {problem}")]
    Field {
        /// The file's path.
        file: String,
        /// The field's name.
        field: String,
        /// What was found and what is allowed.
        problem: String,
    },
}

impl Router {
    /// Expert groups; 1 for plain top-K.
    pub fn num_expert_groups(self) -> usize {
        match self {
            Router::GroupedSoftmax { num_expert_groups, .. } => num_expert_groups,
            Router::TopKSoftmax { .. } => 1,
        }
    }

    /// Experts taken in each expert group.
    pub fn top_k_per_group(self) -> usize {
        match self {
            Router::GroupedSoftmax { top_k_per_group, .. } => top_k_per_group,
            Router::TopKSoftmax { top_k, .. } => top_k,
        }
    }

    /// True if the weights of a token's experts are divided by their sum.
    pub fn renormalizes(self) -> bool {
        matches!(self, Router::TopKSoftmax { renormalize: true, .. })
    }
}

impl MoeConfig {
    /// Expert groups; 1 for plain top-K.
    pub fn num_expert_groups(&self) -> usize {
        self.router.num_expert_groups()
    }

    /// Experts taken in each expert group.
    pub fn top_k_per_group(&self) -> usize {
        self.router.top_k_per_group()
    }

    /// Experts of one expert group.
    pub fn experts_per_group(&self) -> usize {
        self.num_experts / self.num_expert_groups()
    }

    /// Experts that one token uses.
    pub fn experts_per_token(&self) -> usize {
        self.num_expert_groups() * self.top_k_per_group()
    }
}

impl RopeConfig {
    /// Frequency of each rotated pair, in radians per token, `[rotary_dim / 2]`.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let mut frequencies = rope_inverse_frequencies(self.theta, self.rotary_dim);
        frequencies.iter_mut().for_each(|frequency| *frequency = self.scaling.apply(*frequency));
        frequencies
    }
}

impl RopeScaling {
    fn apply(self, frequency: f32) -> f32 {
        match self {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let periods = original_context * frequency / std::f32::consts::TAU;
                let kept = ((periods - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                (1.0 - kept) * frequency / factor + kept * frequency
            }
        }
    }
}

impl ModelConfig {
    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Shape of the layers with experts; `None` if the network is dense.
    pub fn moe(&self) -> Option<&MoeConfig> {
        self.layers.iter().find_map(|layer| match &layer.mlp {
            MlpConfig::Experts(moe) => Some(moe),
            MlpConfig::Dense { .. } => None,
        })
    }

    /// Layers with routed experts.
    pub fn num_routed_layers(&self) -> usize {
        self.layers.iter().filter(|layer| layer.is_routed()).count()
    }

    /// Place of `layer` among the layers with routed experts; `None` if it is dense.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn routed_index(&self, layer: usize) -> Option<usize> {
        self.layers[layer].is_routed().then(|| self.layers[..layer].iter().filter(|layer| layer.is_routed()).count())
    }

    /// Outputs of the query projection: all query heads.
    pub fn q_size(&self) -> usize {
        self.num_q_heads * self.head_dim
    }

    /// Outputs of the key projection: all key/value heads.
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }
}

impl LayerConfig {
    /// True if it has routed experts.
    pub fn is_routed(&self) -> bool {
        matches!(self.mlp, MlpConfig::Experts(_))
    }

    /// Inner width of the MLP that every row goes through: the only one, or the shared expert; 0 if there is none.
    pub fn dense_width(&self) -> usize {
        match &self.mlp {
            MlpConfig::Dense { intermediate_size } => *intermediate_size,
            MlpConfig::Experts(moe) => moe.shared_intermediate_size.unwrap_or(0),
        }
    }
}
