//! Qwen3, all dense sizes.

use moge_kernels::RopeLayout;
use serde_json::{Value, json};

use crate::arch::fields::Fields;
use crate::arch::pangu_embedded::dense;
use crate::arch::spec::{Arch, Biases, RopeDefaults, SynthSpec, TensorNames, TextSpec, ToolFormat};
use crate::network::config::{Architecture, ConfigError, NormPlacement};
use crate::synth::sizes::{ByteLevelTokenizer, Preset, SpecialIds, SynthConfig, SynthSizes, SynthTokenizer};

pub(super) const ARCH: Arch = Arch {
    hf_name: "Qwen3ForCausalLM",
    reads: &[],
    biases,
    default_rms_norm_eps: 1e-6,
    rope: RopeDefaults { theta: None, partial_rotary_factor: 1.0, layout: RopeLayout::RotateHalf },
    norms: NormPlacement::Pre,
    qk_norm: true,
    mlp: dense,
    names: TensorNames::COMMON,
    text: TEXT,
    synth: SynthSpec {
        presets: PRESETS,
        tokenizer: SynthTokenizer::ByteLevel(TOKENIZER),
        config_json: |config, ids| config_json(config, ids, "qwen3"),
        sampling,
    },
};

/// The text of both Qwen3 kinds.
pub(super) const TEXT: TextSpec = TextSpec {
    thinking: ("<think>", "</think>"),
    tool_calls: ToolFormat::Hermes,
    begins_on_new_line: false,
    chat_template: None,
    reads_no_think: false,
};

/// The flag covers all four projections; false where it is not stated.
pub(super) fn biases(fields: &Fields<'_>) -> Result<Biases, ConfigError> {
    let bias = fields.flag("attention_bias")?.unwrap_or(false);
    Ok(Biases { qkv: bias, o: bias })
}

/// What both Qwen3 kinds state.
pub(super) fn config_json(config: &SynthConfig, ids: &SpecialIds, model_type: &str) -> Value {
    json!({
        "attention_bias": config.attention_bias,
        "eos_token_id": ids.eos[0],
        "head_dim": config.head_dim,
        "max_window_layers": config.num_layers,
        "model_type": model_type,
        "rms_norm_eps": 1e-6,
        "rope_scaling": null,
        "rope_theta": 1_000_000,
        "sliding_window": null,
        "use_sliding_window": false,
    })
}

pub(super) fn sampling() -> Value {
    json!({ "do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95 })
}

pub(super) const TOKENIZER: ByteLevelTokenizer = ByteLevelTokenizer {
    special: &["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    prefix: &[],
    bos: None,
    eos: &["<|im_end|>", "<|endoftext|>"],
    pad: "<|endoftext|>",
    config: tokenizer_config,
};

/// With ChatML and Qwen3's switch for thinking.
fn tokenizer_config() -> Value {
    json!({
        "add_bos_token": false,
        "add_prefix_space": false,
        "bos_token": null,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": null,
    })
}

const CHAT_TEMPLATE: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\
    {% endfor %}\
    {% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\\n' }}\
    {% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}\
    {% endif %}";

const PRESETS: &[Preset] = &[
    Preset {
        name: "tiny",
        about: "0.2 MB: 5 layers, tied embeddings",
        config: SynthSizes::new([5, 40, 6, 2, 8], 512, 1024).tied().dense(Architecture::Qwen3, 104),
    },
    Preset {
        name: "small",
        about: "37 MB: 8 layers",
        config: SynthSizes::new([8, 320, 12, 4, 32], 8192, 4096).dense(Architecture::Qwen3, 1408),
    },
    Preset {
        name: "qwen3-0.6b",
        about: "1.2 GB: Qwen3-0.6B",
        config: SynthSizes::new([28, 1024, 16, 8, 128], 151_936, 40_960).tied().dense(Architecture::Qwen3, 3072),
    },
    Preset {
        name: "qwen3-32b",
        about: "66 GB: Qwen3-32B",
        config: SynthSizes::new([64, 5120, 64, 8, 128], 151_936, 40_960).dense(Architecture::Qwen3, 25_600),
    },
];
