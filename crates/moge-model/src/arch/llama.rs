//! Llama 2 and 3, and the many small models that share its network (SmolLM2, TinyLlama).

use moge_kernels::RopeLayout;
use serde_json::{Value, json};

use crate::arch::pangu_embedded::dense;
use crate::arch::qwen3::biases;
use crate::arch::spec::{Arch, RopeDefaults, SynthSpec, TensorNames, TextSpec, ToolFormat};
use crate::network::config::{Architecture, NormPlacement};
use crate::synth::sizes::{ByteLevelTokenizer, Preset, SynthSizes, SynthTokenizer};

pub(super) const ARCH: Arch = Arch {
    hf_name: "LlamaForCausalLM",
    reads: &[],
    biases,
    default_rms_norm_eps: 1e-6,
    rope: RopeDefaults { theta: Some(10_000.0), partial_rotary_factor: 1.0, layout: RopeLayout::RotateHalf },
    norms: NormPlacement::Pre,
    qk_norm: false,
    mlp: dense,
    names: TensorNames::COMMON,
    text: TextSpec {
        thinking: ("<think>", "</think>"),
        // The releases differ; models tuned for calls on top of them write Hermes' form.
        tool_calls: ToolFormat::Hermes,
        begins_on_new_line: false,
        chat_template: None,
        reads_no_think: false,
    },
    synth: SynthSpec {
        presets: PRESETS,
        tokenizer: SynthTokenizer::ByteLevel(ByteLevelTokenizer {
            special: &["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            prefix: &[],
            bos: Some("<|im_start|>"),
            eos: &["<|im_end|>"],
            pad: "<|im_end|>",
            config: tokenizer_config,
        }),
        config_json: |config, ids| {
            json!({
                "attention_bias": config.attention_bias,
                "bos_token_id": ids.bos,
                "mlp_bias": false,
                "model_type": "llama",
                "pad_token_id": ids.pad,
                "pretraining_tp": 1,
                "rms_norm_eps": 1e-5,
                "rope_scaling": null,
                "rope_theta": 100_000,
            })
        },
        sampling: || json!({ "do_sample": true, "temperature": 0.2, "top_p": 0.9 }),
    },
};

fn tokenizer_config() -> Value {
    json!({
        "add_prefix_space": false,
        "bos_token": "<|im_start|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
    })
}

const CHAT_TEMPLATE: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\
    {% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

const PRESETS: &[Preset] = &[
    Preset {
        name: "tiny",
        about: "0.23 MB: 5 layers, tied embeddings",
        config: SynthSizes::new([5, 48, 6, 3, 8], 512, 1024).tied().dense(Architecture::Llama, 80),
    },
    Preset {
        name: "small",
        about: "36 MB: 8 layers",
        config: SynthSizes::new([8, 320, 10, 5, 32], 8192, 4096).dense(Architecture::Llama, 1344),
    },
    Preset {
        name: "smollm2-135m",
        about: "0.27 GB: SmolLM2-135M",
        config: SynthSizes::new([30, 576, 9, 3, 64], 49_152, 8192).tied().dense(Architecture::Llama, 1536),
    },
    Preset {
        name: "llama-3.1-8b",
        about: "16 GB: Llama-3.1-8B",
        config: SynthSizes::new([32, 4096, 32, 8, 128], 128_256, 131_072).dense(Architecture::Llama, 14_336),
    },
];
