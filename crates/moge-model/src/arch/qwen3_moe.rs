//! Qwen3 with experts (Qwen3-30B-A3B, Qwen3-235B-A22B): plain top-K routing, no shared expert.

use moge_kernels::RopeLayout;

use crate::arch::fields::{Fields, shortened};
use crate::arch::pangu_embedded::dense;
use crate::arch::qwen3::{TEXT, TOKENIZER, biases, config_json, sampling};
use crate::arch::spec::{Arch, RopeDefaults, SynthSpec, TensorNames};
use crate::network::config::{Architecture, ConfigError, MlpConfig, MoeConfig, NormPlacement, Router};
use crate::synth::sizes::{Preset, SynthSizes, SynthTokenizer};

pub(super) const ARCH: Arch = Arch {
    hf_name: "Qwen3MoeForCausalLM",
    reads: &["norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"],
    biases,
    default_rms_norm_eps: 1e-6,
    rope: RopeDefaults { theta: None, partial_rotary_factor: 1.0, layout: RopeLayout::RotateHalf },
    norms: NormPlacement::Pre,
    qk_norm: true,
    mlp: |fields, layer| match is_dense(fields, layer)? {
        true => dense(fields, layer),
        false => Ok(MlpConfig::Experts(moe(fields)?)),
    },
    names: TensorNames::COMMON,
    text: TEXT,
    synth: SynthSpec {
        presets: PRESETS,
        tokenizer: SynthTokenizer::ByteLevel(TOKENIZER),
        config_json: |config, ids| {
            let mut json = config_json(config, ids, "qwen3_moe");
            json["decoder_sparse_step"] = 1.into();
            json["mlp_only_layers"] = Vec::<usize>::new().into();
            json["norm_topk_prob"] = true.into();
            json["output_router_logits"] = false.into();
            json["router_aux_loss_coef"] = 0.001.into();
            json
        },
        sampling,
    },
};

/// True for the layers that `mlp_only_layers` names, and those that `decoder_sparse_step` leaves out.
fn is_dense(fields: &Fields<'_>, layer: usize) -> Result<bool, ConfigError> {
    let num_layers = fields.size("num_hidden_layers")?;
    let step = fields.optional_size("decoder_sparse_step")?.unwrap_or(1);
    let wrong =
        |found: String| fields.bad("mlp_only_layers", format!("{found} is not a list of layers below {num_layers}"));
    let mut is_named = false;
    if let Some(named) = fields.get("mlp_only_layers") {
        for named in named.as_array().ok_or_else(|| wrong(shortened(named)))? {
            let index = named.as_u64().filter(|&index| index < num_layers as u64);
            is_named |= index.ok_or_else(|| wrong(shortened(named)))? == layer as u64;
        }
    }
    Ok(is_named || !(layer + 1).is_multiple_of(step))
}

fn moe(fields: &Fields<'_>) -> Result<MoeConfig, ConfigError> {
    let (num_experts, top_k) = (fields.size("num_experts")?, fields.size("num_experts_per_tok")?);
    if top_k > num_experts {
        let problem = format!("{top_k} is more than the {num_experts} of num_experts");
        return Err(fields.bad("num_experts_per_tok", problem));
    }
    for field in ["num_expert_groups", "shared_expert_intermediate_size"] {
        if let Some(value) = fields.get(field) {
            let problem = format!("{} is not a field of {}", shortened(value), ARCH.hf_name);
            return Err(fields.bad(field, problem));
        }
    }
    Ok(MoeConfig {
        num_experts,
        router: Router::TopKSoftmax { top_k, renormalize: fields.flag("norm_topk_prob")?.unwrap_or(false) },
        router_scale: false,
        expert_intermediate_size: fields.size("moe_intermediate_size")?,
        shared_intermediate_size: None,
    })
}

const PRESETS: &[Preset] = &[
    Preset {
        name: "tiny",
        about: "0.5 MB: 5 layers, 10 experts",
        config: SynthSizes::new([5, 40, 6, 2, 8], 512, 1024).experts(Architecture::Qwen3Moe, [10, 1, 3, 28], None),
    },
    Preset {
        name: "small",
        about: "49 MB: 6 layers, 24 experts",
        config: SynthSizes::new([6, 256, 8, 2, 32], 4096, 4096).experts(Architecture::Qwen3Moe, [24, 1, 4, 192], None),
    },
    Preset {
        name: "qwen3-30b-a3b-4l",
        about: "6.3 GB: 4 layers of Qwen3-30B-A3B at full width",
        config: SynthSizes::new([4, 2048, 32, 4, 128], 151_936, 40_960).experts(
            Architecture::Qwen3Moe,
            [128, 1, 8, 768],
            None,
        ),
    },
    Preset {
        name: "qwen3-30b-a3b",
        about: "61 GB: Qwen3-30B-A3B",
        config: SynthSizes::new([48, 2048, 32, 4, 128], 151_936, 40_960).experts(
            Architecture::Qwen3Moe,
            [128, 1, 8, 768],
            None,
        ),
    },
];
