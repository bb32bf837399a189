//! openPangu-Embedded 1B and 7B.

use moge_kernels::RopeLayout;
use serde_json::{Value, json};

use crate::arch::fields::Fields;
use crate::arch::spec::{Arch, Biases, RopeDefaults, SynthSpec, TensorNames, TextSpec, ToolFormat};
use crate::network::config::{Architecture, ConfigError, MlpConfig, NormPlacement};
use crate::synth::sizes::{Preset, SynthSizes, SynthTokenizer};

pub(super) const ARCH: Arch = Arch {
    hf_name: "PanguEmbeddedForCausalLM",
    reads: &[],
    biases,
    default_rms_norm_eps: 1e-5,
    rope: RopeDefaults { theta: None, partial_rotary_factor: 1.0, layout: RopeLayout::RotateHalf },
    norms: NormPlacement::Pre,
    qk_norm: false,
    mlp: dense,
    names: TensorNames::COMMON,
    text: TEXT,
    synth: SynthSpec {
        presets: PRESETS,
        tokenizer: SynthTokenizer::SentencePiece,
        config_json: |_, ids| {
            json!({
                "bias": true,
                "bos_token_id": ids.bos,
                "model_type": "PanguEmbedded",
                "pad_token_id": ids.pad,
                "rms_norm_eps": 1e-5,
                "rope_theta": 16_000_000.0,
            })
        },
        sampling,
    },
};

/// The text of both Pangu kinds.
pub(super) const TEXT: TextSpec = TextSpec {
    thinking: ("[unused16]", "[unused17]"),
    tool_calls: ToolFormat::PanguList,
    begins_on_new_line: false,
    chat_template: Some(include_str!("pangu.jinja")),
    reads_no_think: true,
};

/// `bias` in the releases, `attention_bias` in files that other programs wrote; true where neither is stated.
pub(super) fn biases(fields: &Fields<'_>) -> Result<Biases, ConfigError> {
    let bias = match fields.flag("bias")? {
        Some(bias) => Some(bias),
        None => fields.flag("attention_bias")?,
    };
    let bias = bias.unwrap_or(true);
    Ok(Biases { qkv: bias, o: bias })
}

/// The MLP of a dense network.
pub(super) fn dense(fields: &Fields<'_>, _: usize) -> Result<MlpConfig, ConfigError> {
    Ok(MlpConfig::Dense { intermediate_size: fields.size("intermediate_size")? })
}

pub(super) fn sampling() -> Value {
    json!({ "do_sample": true, "temperature": 0.6, "top_k": 50, "top_p": 0.95 })
}

const PRESETS: &[Preset] = &[
    Preset {
        name: "tiny",
        about: "0.3 MB: 5 layers",
        config: SynthSizes::new([5, 48, 6, 2, 8], 512, 1024).dense(Architecture::PanguEmbedded, 112),
    },
    Preset {
        name: "small",
        about: "43 MB: 8 layers",
        config: SynthSizes::new([8, 384, 12, 4, 32], 8192, 4096).dense(Architecture::PanguEmbedded, 1280),
    },
    Preset {
        name: "pangu-embedded-1b",
        about: "2.3 GB: openPangu-Embedded-1B",
        config: SynthSizes::new([26, 1536, 12, 6, 128], 153_376, 32_768)
            .tied()
            .dense(Architecture::PanguEmbedded, 6144),
    },
    Preset {
        name: "pangu-embedded-7b",
        about: "16 GB: openPangu-Embedded-7B",
        config: SynthSizes::new([34, 4096, 32, 8, 128], 153_376, 32_768).dense(Architecture::PanguEmbedded, 12_800),
    },
];
