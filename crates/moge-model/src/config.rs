//! `config.json` to a checked [`ModelConfig`].

use moge_kernels::{Dtype, RopeLayout};
use thiserror::Error;

/// The networks that the one decoder runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// `PanguProMoEForCausalLM`: Mixture of Grouped Experts (arXiv 2505.21411).
    PanguProMoe,
    /// `PanguEmbeddedForCausalLM`: dense.
    PanguEmbedded,
    /// `Qwen3ForCausalLM`: dense, q/k norm.
    Qwen3,
    /// `Glm4ForCausalLM`: dense, sandwich norms, interleaved partial RoPE.
    Glm4,
}

/// Where a layer normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and before the MLP.
    Pre,
    /// Before and after both.
    Sandwich,
}

/// Rotary position embedding. See [`moge_kernels`] for the arithmetic.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How many leading numbers of a head turn; even, at most `head_dim`.
    pub rotary_dim: usize,
    /// Which numbers of a head turn together.
    pub layout: RopeLayout,
}

/// Shape of a routed layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoeConfig {
    /// Routed experts of a layer; shared ones are not counted.
    pub num_experts: usize,
    /// Disjoint sets of consecutive experts; divides `num_experts`.
    pub num_expert_groups: usize,
    /// Experts taken inside each expert group.
    pub top_k_per_group: usize,
    /// Inner width of a routed expert.
    pub expert_intermediate_size: usize,
    /// Inner width of the shared expert.
    pub shared_intermediate_size: usize,
}

/// The MLP of every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpConfig {
    /// One SwiGLU of this inner width.
    Dense {
        /// Inner width.
        intermediate_size: usize,
    },
    /// Routed experts in groups and a shared expert.
    GroupedExperts(MoeConfig),
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
    /// Number of layers.
    pub num_layers: usize,
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
    /// Where a layer normalises.
    pub norms: NormPlacement,
    /// RMSNorm on every q and k head before RoPE.
    pub qk_norm: bool,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub o_bias: bool,
    /// The MLP of every layer.
    pub mlp: MlpConfig,
    /// Type that the file says its weights have.
    pub dtype: Dtype,
    /// End-of-sequence tokens that the file names.
    pub eos_token_ids: Vec<u32>,
}

/// Why a `config.json` is refused.
#[derive(Debug, Error)]
pub enum ConfigError {
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

impl MoeConfig {
    /// Experts of one expert group.
    pub fn experts_per_group(&self) -> usize {
        self.num_experts / self.num_expert_groups
    }

    /// Experts that one token uses.
    pub fn experts_per_token(&self) -> usize {
        self.num_expert_groups * self.top_k_per_group
    }
}
