//! What an architecture's file states.

use moge_kernels::RopeLayout;
use serde_json::Value;

use crate::arch::fields::Fields;
use crate::network::config::{ConfigError, MlpConfig, NormPlacement};
use crate::synth::sizes::{Preset, SpecialIds, SynthConfig, SynthTokenizer};

/// All that is particular to an architecture.
pub(crate) struct Arch {
    /// The name in `architectures`.
    pub(crate) hf_name: &'static str,
    /// Fields that other architectures refuse unless they are neutral (see `UNSUPPORTED_FIELDS`), and this one reads.
    pub(crate) reads: &'static [&'static str],
    /// Presence of biases.
    pub(crate) biases: fn(&Fields<'_>) -> Result<Biases, ConfigError>,
    /// `rms_norm_eps` where the file does not state it.
    pub(crate) default_rms_norm_eps: f64,
    pub(crate) rope: RopeDefaults,
    pub(crate) norms: NormPlacement,
    /// RMSNorm on every q and k head before RoPE.
    pub(crate) qk_norm: bool,
    /// The MLP of the layer of this index.
    pub(crate) mlp: fn(&Fields<'_>, usize) -> Result<MlpConfig, ConfigError>,
    pub(crate) names: TensorNames,
    pub(crate) text: TextSpec,
    pub(crate) synth: SynthSpec,
}

/// Which projections of attention have biases.
pub(crate) struct Biases {
    pub(crate) qkv: bool,
    pub(crate) o: bool,
}

/// RoPE where the file does not state it.
pub(crate) struct RopeDefaults {
    /// Base of the frequencies; `None`: the file must state it.
    pub(crate) theta: Option<f64>,
    /// The rotated part of a head.
    pub(crate) partial_rotary_factor: f64,
    pub(crate) layout: RopeLayout,
}

/// Names of tensors within a layer, those that differ between architectures.
pub(crate) struct TensorNames {
    /// Norm of the attention's output, where there is one.
    pub(crate) post_attention_norm: &'static str,
    /// Norm of the MLP's output, where there is one.
    pub(crate) post_mlp_norm: &'static str,
    /// Gate and up of a dense MLP are one tensor, gate first.
    pub(crate) fused_gate_up: bool,
}

impl TensorNames {
    /// Most architectures'.
    pub(crate) const COMMON: TensorNames = TensorNames {
        post_attention_norm: "post_self_attn_layernorm",
        post_mlp_norm: "post_mlp_layernorm",
        fused_gate_up: false,
    };
}

/// What the network writes and reads as text.
pub(crate) struct TextSpec {
    /// Delimiters of the model's thinking.
    pub(crate) thinking: (&'static str, &'static str),
    pub(crate) tool_calls: ToolFormat,
    /// A turn's text begins on the line after the speaker's name.
    pub(crate) begins_on_new_line: bool,
    /// The chat template of checkpoints that have none.
    pub(crate) chat_template: Option<&'static str>,
    /// ` /no_think` at the end of a user's message asks for no thinking; the template has no switch.
    pub(crate) reads_no_think: bool,
}

/// The form of tool calls in a network's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// One JSON list of calls between `[unused11]` and `[unused12]`: Pangu.
    PanguList,
    /// A JSON object per call between `<tool_call>` and `</tool_call>`: Hermes, Qwen3.
    Hermes,
    /// The name on a line of its own after `<|assistant|>`, then the arguments: GLM-4.
    Glm4,
}

impl ToolFormat {
    /// The text before a call, or a list of them. GLM-4 writes it before all but the first.
    pub fn open(self) -> &'static str {
        match self {
            ToolFormat::PanguList => "[unused11]",
            ToolFormat::Hermes => "<tool_call>",
            ToolFormat::Glm4 => "<|assistant|>",
        }
    }

    /// The text after it.
    pub fn close(self) -> Option<&'static str> {
        match self {
            ToolFormat::PanguList => Some("[unused12]"),
            ToolFormat::Hermes => Some("</tool_call>"),
            ToolFormat::Glm4 => None,
        }
    }
}

/// Random checkpoints of the architecture.
pub(crate) struct SynthSpec {
    pub(crate) presets: &'static [Preset],
    pub(crate) tokenizer: SynthTokenizer,
    /// The fields of `config.json` beyond those that all architectures state alike.
    pub(crate) config_json: fn(&SynthConfig, &SpecialIds) -> Value,
    /// The sampling that `generation_config.json` recommends.
    pub(crate) sampling: fn() -> Value,
}
