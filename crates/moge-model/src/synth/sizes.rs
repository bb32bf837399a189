//! The sizes of a random checkpoint, stated by a user or by the presets of an architecture.

use moge_kernels::Dtype;
use serde_json::Value;

use crate::network::config::Architecture;

/// The sizes that a user asks for, not yet checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SynthConfig {
    /// The architecture.
    pub architecture: Architecture,
    /// Number of layers.
    pub num_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The MLP of every layer.
    pub mlp: SynthMlp,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// The head uses the embedding's weights.
    pub tie_word_embeddings: bool,
    /// Biases on the attention's projections, where the architecture leaves the choice; the Pangu kinds always have them.
    pub attention_bias: bool,
    /// Type of the weights.
    pub dtype: Dtype,
    /// Seed of the weights.
    pub seed: u64,
}

/// The MLP of every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SynthMlp {
    /// One SwiGLU.
    Dense {
        /// Inner width.
        intermediate_size: usize,
    },
    /// Routed experts, and perhaps a shared one.
    Experts {
        /// Routed experts of a layer.
        num_experts: usize,
        /// Expert groups; 1 for plain top-K.
        num_expert_groups: usize,
        /// Experts that one token uses, over all expert groups.
        experts_per_token: usize,
        /// Inner width of a routed expert.
        expert_intermediate_size: usize,
        /// Inner width of the shared expert, if there is one.
        shared_intermediate_size: Option<usize>,
    },
}

/// A named set of sizes.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// Name on the command line; unique among the presets of an architecture.
    pub name: &'static str,
    /// A description for people.
    pub about: &'static str,
    /// The sizes; bf16, seed 0.
    pub config: SynthConfig,
}

/// The sizes of a preset other than those of its MLP.
#[derive(Clone, Copy)]
pub(crate) struct SynthSizes {
    /// Layers, hidden size, query heads, key/value heads, head width.
    sizes: [usize; 5],
    vocab_size: usize,
    max_position_embeddings: usize,
    tie_word_embeddings: bool,
    attention_bias: bool,
}

impl SynthSizes {
    pub(crate) const fn new(sizes: [usize; 5], vocab_size: usize, max_position_embeddings: usize) -> SynthSizes {
        SynthSizes { sizes, vocab_size, max_position_embeddings, tie_word_embeddings: false, attention_bias: false }
    }

    pub(crate) const fn tied(self) -> SynthSizes {
        SynthSizes { tie_word_embeddings: true, ..self }
    }

    pub(crate) const fn biased(self) -> SynthSizes {
        SynthSizes { attention_bias: true, ..self }
    }

    pub(crate) const fn dense(self, architecture: Architecture, intermediate_size: usize) -> SynthConfig {
        self.with_mlp(architecture, SynthMlp::Dense { intermediate_size })
    }

    /// `experts`: number, expert groups, experts per token, inner width of each.
    pub(crate) const fn experts(
        self,
        architecture: Architecture,
        experts: [usize; 4],
        shared_intermediate_size: Option<usize>,
    ) -> SynthConfig {
        let [num_experts, num_expert_groups, experts_per_token, expert_intermediate_size] = experts;
        let mlp = SynthMlp::Experts {
            num_experts,
            num_expert_groups,
            experts_per_token,
            expert_intermediate_size,
            shared_intermediate_size,
        };
        self.with_mlp(architecture, mlp)
    }

    const fn with_mlp(self, architecture: Architecture, mlp: SynthMlp) -> SynthConfig {
        let [num_layers, hidden_size, num_q_heads, num_kv_heads, head_dim] = self.sizes;
        SynthConfig {
            architecture,
            num_layers,
            hidden_size,
            num_q_heads,
            num_kv_heads,
            head_dim,
            mlp,
            vocab_size: self.vocab_size,
            max_position_embeddings: self.max_position_embeddings,
            tie_word_embeddings: self.tie_word_embeddings,
            attention_bias: self.attention_bias,
            dtype: Dtype::Bf16,
            seed: 0,
        }
    }
}

/// The tokenizer of an architecture's random checkpoints.
#[derive(Clone, Copy)]
pub(crate) enum SynthTokenizer {
    /// A SentencePiece `tokenizer.model`: Pangu.
    SentencePiece,
    /// A byte-level `tokenizer.json`.
    ByteLevel(ByteLevelTokenizer),
}

/// The tokens of a byte-level tokenizer beyond bytes and words.
#[derive(Clone, Copy)]
pub(crate) struct ByteLevelTokenizer {
    /// Special tokens, the last entries of the vocabulary.
    pub(crate) special: &'static [&'static str],
    /// Those of them that begin every text.
    pub(crate) prefix: &'static [&'static str],
    /// Begin of sequence.
    pub(crate) bos: Option<&'static str>,
    /// Ends of a sequence.
    pub(crate) eos: &'static [&'static str],
    /// Padding.
    pub(crate) pad: &'static str,
    /// `tokenizer_config.json`.
    pub(crate) config: fn() -> Value,
}

/// The ids that config.json names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpecialIds {
    /// Begin of sequence, where the network has one.
    pub(crate) bos: Option<usize>,
    /// Ends of a sequence.
    pub(crate) eos: Vec<usize>,
    /// Padding.
    pub(crate) pad: usize,
}
