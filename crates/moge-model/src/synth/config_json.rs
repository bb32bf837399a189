//! `config.json` and `generation_config.json` as the official releases spell them.

use moge_kernels::Dtype;
use serde_json::{Value, json};

use crate::network::config::Architecture;
use crate::synth::sizes::{SpecialIds, SynthConfig, SynthMlp};

/// The text of `config.json`: what all architectures state alike, what this one states, and the sizes of its MLP.
pub(super) fn config_json(config: &SynthConfig, ids: &SpecialIds) -> String {
    let mut json = json!({
        "architectures": [config.architecture.hf_name()],
        "attention_dropout": 0.0,
        "eos_token_id": eos_value(ids),
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_q_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype_name(config.dtype),
        "use_cache": true,
        "vocab_size": config.vocab_size,
    });
    extend(&mut json, (config.architecture.spec().synth.config_json)(config, ids));
    state_what_cannot_be_derived(config, &mut json);
    json.sort_all_objects();
    format!("{json:#}\n")
}

/// The text of `generation_config.json`: the sampling that the releases recommend.
pub(super) fn generation_config_json(architecture: Architecture, ids: &SpecialIds) -> String {
    let mut json = json!({ "eos_token_id": eos_value(ids), "pad_token_id": ids.pad });
    if let Some(bos) = ids.bos {
        json["bos_token_id"] = bos.into();
    }
    extend(&mut json, (architecture.spec().synth.sampling)());
    json.sort_all_objects();
    format!("{json:#}\n")
}

/// Add the fields of `more`, in place of those that are there.
fn extend(json: &mut Value, more: Value) {
    if let (Value::Object(fields), Value::Object(more)) = (json, more) {
        fields.extend(more);
    }
}

/// The MLP's sizes, and the two fields that the Pangu releases leave out, where their value is not the derived one.
fn state_what_cannot_be_derived(config: &SynthConfig, json: &mut Value) {
    match config.mlp {
        SynthMlp::Dense { intermediate_size } => json["intermediate_size"] = intermediate_size.into(),
        SynthMlp::Experts {
            num_experts,
            num_expert_groups,
            experts_per_token,
            expert_intermediate_size,
            shared_intermediate_size,
        } => {
            json["moe_intermediate_size"] = expert_intermediate_size.into();
            json["num_experts"] = num_experts.into();
            json["num_experts_per_tok"] = experts_per_token.into();
            if let Some(size) = shared_intermediate_size {
                json["shared_expert_intermediate_size"] = size.into();
            }
            let derived = if config.architecture == Architecture::Qwen3Moe { 1 } else { experts_per_token };
            if num_expert_groups != derived {
                json["num_expert_groups"] = num_expert_groups.into();
            }
        }
    }
    if config.head_dim.checked_mul(config.num_q_heads) != Some(config.hidden_size) {
        json["head_dim"] = config.head_dim.into();
    }
}

/// One id as a number, several as a list.
fn eos_value(ids: &SpecialIds) -> Value {
    match ids.eos[..] {
        [id] => id.into(),
        _ => json!(ids.eos),
    }
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::Bf16 => "bfloat16",
    }
}
