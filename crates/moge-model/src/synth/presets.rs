//! Named sizes: tiny ones for tests, one for demonstrations, and the published networks.

use moge_kernels::Dtype;

use super::{SynthConfig, SynthMlp};
use crate::network::config::Architecture;

/// A named set of sizes.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// What the command line calls it; unique among the presets of an architecture.
    pub name: &'static str,
    /// What it is, for people.
    pub about: &'static str,
    /// The sizes; bf16, seed 0.
    pub config: SynthConfig,
}

/// All presets. Tiny ones have dimensions that differ from one another, so that swapped names show.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "tiny",
        about: "0.6 MB: 5 layers, 12 experts in 3 expert groups",
        config: pangu_pro_moe(Common::new([5, 48, 6, 2, 8], 512, 1024), [12, 3, 3, 20, 44]),
    },
    Preset {
        name: "small",
        about: "48 MB: 6 layers, 24 experts in 4 expert groups",
        config: pangu_pro_moe(Common::new([6, 256, 8, 2, 32], 4096, 4096), [24, 4, 4, 160, 640]),
    },
    Preset {
        name: "train-22m",
        about: "44 MB: to measure training; 6 layers, 20 experts in 5 expert groups",
        config: pangu_pro_moe(Common::new([6, 256, 6, 2, 48], 4096, 4096), [20, 5, 5, 192, 256]),
    },
    Preset {
        name: "train-104m",
        about: "0.2 GB: to measure training; 4 layers, 32 experts in 8 expert groups",
        config: pangu_pro_moe(Common::new([4, 768, 12, 4, 64], 8192, 4096), [32, 8, 8, 256, 1024]),
    },
    Preset {
        name: "pangu-pro-moe-4l",
        about: "12 GB: 4 layers at full width, vocabulary 32000",
        config: pangu_pro_moe(Common::new([4, 5120, 40, 8, 128], 32_000, 131_072), [64, 8, 8, 1344, 5376]),
    },
    Preset {
        name: "pangu-pro-moe",
        about: "144 GB: Pangu Pro MoE 72B-A16B",
        config: pangu_pro_moe(Common::new([48, 5120, 40, 8, 128], 153_376, 131_072), [64, 8, 8, 1344, 5376]),
    },
    Preset {
        name: "tiny",
        about: "0.3 MB: 5 layers",
        config: dense(Architecture::PanguEmbedded, Common::new([5, 48, 6, 2, 8], 512, 1024), 112),
    },
    Preset {
        name: "small",
        about: "43 MB: 8 layers",
        config: dense(Architecture::PanguEmbedded, Common::new([8, 384, 12, 4, 32], 8192, 4096), 1280),
    },
    Preset {
        name: "pangu-embedded-1b",
        about: "2.3 GB: openPangu-Embedded-1B",
        config: dense(Architecture::PanguEmbedded, Common::new([26, 1536, 12, 6, 128], 153_376, 32_768).tied(), 6144),
    },
    Preset {
        name: "pangu-embedded-7b",
        about: "16 GB: openPangu-Embedded-7B",
        config: dense(Architecture::PanguEmbedded, Common::new([34, 4096, 32, 8, 128], 153_376, 32_768), 12_800),
    },
    Preset {
        name: "tiny",
        about: "0.2 MB: 5 layers, tied embeddings",
        config: dense(Architecture::Qwen3, Common::new([5, 40, 6, 2, 8], 512, 1024).tied(), 104),
    },
    Preset {
        name: "small",
        about: "37 MB: 8 layers",
        config: dense(Architecture::Qwen3, Common::new([8, 320, 12, 4, 32], 8192, 4096), 1408),
    },
    Preset {
        name: "qwen3-0.6b",
        about: "1.2 GB: Qwen3-0.6B",
        config: dense(Architecture::Qwen3, Common::new([28, 1024, 16, 8, 128], 151_936, 40_960).tied(), 3072),
    },
    Preset {
        name: "qwen3-32b",
        about: "66 GB: Qwen3-32B",
        config: dense(Architecture::Qwen3, Common::new([64, 5120, 64, 8, 128], 151_936, 40_960), 25_600),
    },
    Preset {
        name: "tiny",
        about: "0.4 MB: 5 layers, biases on q, k, v",
        config: dense(Architecture::Glm4, Common::new([5, 56, 6, 2, 12], 512, 1024).biased(), 88),
    },
    Preset {
        name: "small",
        about: "39 MB: 8 layers",
        config: dense(Architecture::Glm4, Common::new([8, 320, 12, 4, 32], 8192, 4096), 1536),
    },
    Preset {
        name: "glm-z1-32b",
        about: "65 GB: GLM-Z1-32B-0414",
        config: dense(Architecture::Glm4, Common::new([61, 6144, 48, 2, 128], 151_552, 32_768), 23_040),
    },
];

/// What every architecture has.
#[derive(Clone, Copy)]
struct Common {
    /// Layers, hidden size, query heads, key/value heads, head width.
    sizes: [usize; 5],
    vocab_size: usize,
    max_position_embeddings: usize,
    tie_word_embeddings: bool,
    attention_bias: bool,
}

impl Common {
    const fn new(sizes: [usize; 5], vocab_size: usize, max_position_embeddings: usize) -> Common {
        Common { sizes, vocab_size, max_position_embeddings, tie_word_embeddings: false, attention_bias: false }
    }

    const fn tied(self) -> Common {
        Common { tie_word_embeddings: true, ..self }
    }

    const fn biased(self) -> Common {
        Common { attention_bias: true, ..self }
    }
}

/// `experts`: number, expert groups, experts per token, inner width of a routed and of the shared expert.
const fn pangu_pro_moe(common: Common, experts: [usize; 5]) -> SynthConfig {
    let [num_experts, num_expert_groups, experts_per_token, expert_intermediate_size, shared_intermediate_size] =
        experts;
    let mlp = SynthMlp::GroupedExperts {
        num_experts,
        num_expert_groups,
        experts_per_token,
        expert_intermediate_size,
        shared_intermediate_size,
    };
    with_mlp(Architecture::PanguProMoe, common, mlp)
}

const fn dense(architecture: Architecture, common: Common, intermediate_size: usize) -> SynthConfig {
    with_mlp(architecture, common, SynthMlp::Dense { intermediate_size })
}

const fn with_mlp(architecture: Architecture, common: Common, mlp: SynthMlp) -> SynthConfig {
    let [num_layers, hidden_size, num_q_heads, num_kv_heads, head_dim] = common.sizes;
    SynthConfig {
        architecture,
        num_layers,
        hidden_size,
        num_q_heads,
        num_kv_heads,
        head_dim,
        mlp,
        vocab_size: common.vocab_size,
        max_position_embeddings: common.max_position_embeddings,
        tie_word_embeddings: common.tie_word_embeddings,
        attention_bias: common.attention_bias,
        dtype: Dtype::Bf16,
        seed: 0,
    }
}
