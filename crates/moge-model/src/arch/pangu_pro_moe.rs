//! Pangu Pro MoE 72B-A16B, first release (arXiv 2505.21411).

use moge_kernels::RopeLayout;
use serde_json::json;

use crate::arch::fields::Fields;
use crate::arch::pangu_embedded::{TEXT, biases, sampling};
use crate::arch::spec::{Arch, RopeDefaults, SynthSpec, TensorNames};
use crate::network::config::{Architecture, ConfigError, MlpConfig, MoeConfig, NormPlacement, Router};
use crate::synth::sizes::{Preset, SynthConfig, SynthSizes, SynthTokenizer};

pub(super) const ARCH: Arch = Arch {
    hf_name: "PanguProMoEForCausalLM",
    reads: &[],
    biases,
    default_rms_norm_eps: 1e-5,
    rope: RopeDefaults { theta: None, partial_rotary_factor: 1.0, layout: RopeLayout::RotateHalf },
    norms: NormPlacement::Pre,
    qk_norm: false,
    mlp: |fields, _| Ok(MlpConfig::Experts(moe(fields)?)),
    names: TensorNames::COMMON,
    text: TEXT,
    synth: SynthSpec {
        presets: PRESETS,
        tokenizer: SynthTokenizer::SentencePiece,
        config_json: |_, ids| {
            json!({
                "bos_token_id": ids.bos,
                "model_type": "PanguProMoE",
                "output_router_logits": false,
                "pad_token_id": ids.pad,
                "rms_norm_eps": 1e-5,
                "rope_theta": 16_000_000.0,
            })
        },
        sampling,
    },
};

fn moe(fields: &Fields<'_>) -> Result<MoeConfig, ConfigError> {
    let num_experts = fields.size("num_experts")?;
    let experts_per_token = fields.size("num_experts_per_tok")?;
    // Files of the first release do not state the number of expert groups: one expert comes from each.
    let num_expert_groups = fields.optional_size("num_expert_groups")?.unwrap_or(experts_per_token);
    let not_multiple = |field, value: usize| {
        fields.bad(field, format!("{value} is not a multiple of the {num_expert_groups} expert groups"))
    };
    if !num_experts.is_multiple_of(num_expert_groups) {
        return Err(not_multiple("num_experts", num_experts));
    }
    if !experts_per_token.is_multiple_of(num_expert_groups) {
        return Err(not_multiple("num_experts_per_tok", experts_per_token));
    }
    if experts_per_token > num_experts {
        let problem = format!("{experts_per_token} is more than the {num_experts} of num_experts");
        return Err(fields.bad("num_experts_per_tok", problem));
    }
    let top_k_per_group = experts_per_token / num_expert_groups;
    Ok(MoeConfig {
        num_experts,
        router: Router::GroupedSoftmax { num_expert_groups, top_k_per_group },
        router_scale: true,
        expert_intermediate_size: fields.size("moe_intermediate_size")?,
        shared_intermediate_size: Some(fields.size("shared_expert_intermediate_size")?),
    })
}

const PRESETS: &[Preset] = &[
    Preset {
        name: "tiny",
        about: "0.6 MB: 5 layers, 12 experts in 3 expert groups",
        config: preset(SynthSizes::new([5, 48, 6, 2, 8], 512, 1024), [12, 3, 3, 20, 44]),
    },
    Preset {
        name: "small",
        about: "48 MB: 6 layers, 24 experts in 4 expert groups",
        config: preset(SynthSizes::new([6, 256, 8, 2, 32], 4096, 4096), [24, 4, 4, 160, 640]),
    },
    Preset {
        name: "train-22m",
        about: "44 MB: to measure training; 6 layers, 20 experts in 5 expert groups",
        config: preset(SynthSizes::new([6, 256, 6, 2, 48], 4096, 4096), [20, 5, 5, 192, 256]),
    },
    Preset {
        name: "train-104m",
        about: "0.2 GB: to measure training; 4 layers, 32 experts in 8 expert groups",
        config: preset(SynthSizes::new([4, 768, 12, 4, 64], 8192, 4096), [32, 8, 8, 256, 1024]),
    },
    Preset {
        name: "pangu-pro-moe-4l",
        about: "12 GB: 4 layers at full width, vocabulary 32000",
        config: preset(SynthSizes::new([4, 5120, 40, 8, 128], 32_000, 131_072), [64, 8, 8, 1344, 5376]),
    },
    Preset {
        name: "pangu-pro-moe",
        about: "144 GB: Pangu Pro MoE 72B-A16B",
        config: preset(SynthSizes::new([48, 5120, 40, 8, 128], 153_376, 131_072), [64, 8, 8, 1344, 5376]),
    },
];

/// `experts`: number, expert groups, experts per token, inner width of a routed and of the shared expert.
const fn preset(sizes: SynthSizes, experts: [usize; 5]) -> SynthConfig {
    let [num_experts, num_expert_groups, experts_per_token, routed_width, shared_width] = experts;
    let experts = [num_experts, num_expert_groups, experts_per_token, routed_width];
    sizes.experts(Architecture::PanguProMoe, experts, Some(shared_width))
}
