//! GLM-4-0414 and GLM-Z1.

use moge_kernels::RopeLayout;
use serde_json::{Value, json};

use crate::arch::pangu_embedded::dense;
use crate::arch::spec::{Arch, Biases, RopeDefaults, SynthSpec, TensorNames, TextSpec, ToolFormat};
use crate::network::config::{Architecture, NormPlacement};
use crate::synth::sizes::{ByteLevelTokenizer, Preset, SynthSizes, SynthTokenizer};

pub(super) const ARCH: Arch = Arch {
    hf_name: "Glm4ForCausalLM",
    reads: &[],
    // The flag covers q, k and v only.
    biases: |fields| Ok(Biases { qkv: fields.flag("attention_bias")?.unwrap_or(true), o: false }),
    default_rms_norm_eps: 1.5625e-7,
    rope: RopeDefaults { theta: None, partial_rotary_factor: 0.5, layout: RopeLayout::Interleaved },
    norms: NormPlacement::Sandwich,
    qk_norm: false,
    mlp: dense,
    // "post_attention_layernorm" is the norm before the MLP, as in the other architectures.
    names: TensorNames { fused_gate_up: true, ..TensorNames::COMMON },
    text: TextSpec {
        thinking: ("<think>", "</think>"),
        tool_calls: ToolFormat::Glm4,
        begins_on_new_line: true,
        chat_template: None,
        reads_no_think: false,
    },
    synth: SynthSpec {
        presets: PRESETS,
        tokenizer: SynthTokenizer::ByteLevel(ByteLevelTokenizer {
            special: &[
                "<|endoftext|>",
                "[gMASK]",
                "<sop>",
                "<|system|>",
                "<|user|>",
                "<|assistant|>",
                "<|observation|>",
            ],
            prefix: &["[gMASK]", "<sop>"],
            bos: None,
            eos: &["<|endoftext|>", "<|user|>", "<|observation|>"],
            pad: "<|endoftext|>",
            config: tokenizer_config,
        }),
        config_json: |config, ids| {
            json!({
                "attention_bias": config.attention_bias,
                "head_dim": config.head_dim,
                "model_type": "glm4",
                "pad_token_id": ids.pad,
                "partial_rotary_factor": 0.5,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10_000.0,
            })
        },
        sampling: || json!({ "do_sample": true, "temperature": 0.6, "top_p": 0.95 }),
    },
};

/// The template states the prefix itself.
fn tokenizer_config() -> Value {
    json!({
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}

const CHAT_TEMPLATE: &str = "[gMASK]<sop>{% for message in messages %}\
    {{ '<|' + ('observation' if message.role == 'tool' else message.role) + '|>\\n' + message.content }}\
    {% endfor %}\
    {% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}";

const PRESETS: &[Preset] = &[
    Preset {
        name: "tiny",
        about: "0.4 MB: 5 layers, biases on q, k, v",
        config: SynthSizes::new([5, 56, 6, 2, 12], 512, 1024).biased().dense(Architecture::Glm4, 88),
    },
    Preset {
        name: "small",
        about: "39 MB: 8 layers",
        config: SynthSizes::new([8, 320, 12, 4, 32], 8192, 4096).dense(Architecture::Glm4, 1536),
    },
    Preset {
        name: "glm-z1-32b",
        about: "65 GB: GLM-Z1-32B-0414",
        config: SynthSizes::new([61, 6144, 48, 2, 128], 151_552, 32_768).dense(Architecture::Glm4, 23_040),
    },
];
