//! One file per architecture, with all that is particular to it: accepted fields and their defaults, tensor names, markers
//! of thinking and tool calls, random checkpoints. To add one: its file, a variant of [`Architecture`], a line here.

pub(crate) mod fields;
mod glm4;
mod llama;
mod pangu_embedded;
mod pangu_pro_moe;
mod qwen3;
mod qwen3_moe;
pub(crate) mod spec;

use crate::arch::spec::{Arch, ToolFormat};
use crate::network::config::Architecture;

impl Architecture {
    /// All of them.
    pub const ALL: [Architecture; 6] = [
        Architecture::PanguProMoe,
        Architecture::PanguEmbedded,
        Architecture::Qwen3,
        Architecture::Qwen3Moe,
        Architecture::Glm4,
        Architecture::Llama,
    ];

    pub(crate) fn spec(self) -> &'static Arch {
        match self {
            Architecture::PanguProMoe => &pangu_pro_moe::ARCH,
            Architecture::PanguEmbedded => &pangu_embedded::ARCH,
            Architecture::Qwen3 => &qwen3::ARCH,
            Architecture::Qwen3Moe => &qwen3_moe::ARCH,
            Architecture::Glm4 => &glm4::ARCH,
            Architecture::Llama => &llama::ARCH,
        }
    }

    /// The name in `architectures` of a `config.json`.
    pub fn hf_name(self) -> &'static str {
        self.spec().hf_name
    }

    /// The form in which the network writes tool calls.
    pub fn tool_format(self) -> ToolFormat {
        self.spec().text.tool_calls
    }

    /// True if a turn's text begins on the line after the speaker's name.
    pub fn begins_on_new_line(self) -> bool {
        self.spec().text.begins_on_new_line
    }
}
