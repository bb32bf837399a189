//! `config.json` and `generation_config.json` as the official releases spell them.

use moge_kernels::Dtype;
use serde_json::{Value, json};

use super::tokenizer::SpecialIds;
use super::{SynthConfig, SynthMlp};
use crate::network::config::Architecture;

/// The text of `config.json`.
pub(super) fn config_json(config: &SynthConfig, ids: &SpecialIds) -> String {
    let mut json = match config.architecture {
        Architecture::PanguProMoe => pangu_pro_moe(config, ids),
        Architecture::PanguEmbedded => pangu_embedded(config, ids),
        Architecture::Qwen3 => qwen3(config, ids),
        Architecture::Glm4 => glm4(config, ids),
    };
    state_what_cannot_be_derived(config, &mut json);
    format!("{json:#}\n")
}

/// The text of `generation_config.json`: the sampling that the releases recommend.
pub(super) fn generation_config_json(architecture: Architecture, ids: &SpecialIds) -> String {
    let eos = eos_value(ids);
    let json = match architecture {
        Architecture::PanguProMoe | Architecture::PanguEmbedded => json!({
            "bos_token_id": ids.bos,
            "do_sample": true,
            "eos_token_id": eos,
            "pad_token_id": ids.pad,
            "temperature": 0.6,
            "top_k": 50,
            "top_p": 0.95,
        }),
        Architecture::Qwen3 => json!({
            "do_sample": true,
            "eos_token_id": eos,
            "pad_token_id": ids.pad,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
        }),
        Architecture::Glm4 => json!({
            "do_sample": true,
            "eos_token_id": eos,
            "pad_token_id": ids.pad,
            "temperature": 0.6,
            "top_p": 0.95,
        }),
    };
    format!("{json:#}\n")
}

fn pangu_pro_moe(config: &SynthConfig, ids: &SpecialIds) -> Value {
    json!({
        "architectures": [config.architecture.hf_name()],
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos,
        "eos_token_id": eos_value(ids),
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "PanguProMoE",
        "num_attention_heads": config.num_q_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "output_router_logits": false,
        "pad_token_id": ids.pad,
        "rms_norm_eps": 1e-5,
        "rope_theta": 16_000_000.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype_name(config.dtype),
        "use_cache": true,
        "vocab_size": config.vocab_size,
    })
}

fn pangu_embedded(config: &SynthConfig, ids: &SpecialIds) -> Value {
    json!({
        "architectures": [config.architecture.hf_name()],
        "attention_dropout": 0.0,
        "bias": true,
        "bos_token_id": ids.bos,
        "eos_token_id": eos_value(ids),
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "PanguEmbedded",
        "num_attention_heads": config.num_q_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": ids.pad,
        "rms_norm_eps": 1e-5,
        "rope_theta": 16_000_000.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype_name(config.dtype),
        "use_cache": true,
        "vocab_size": config.vocab_size,
    })
}

fn qwen3(config: &SynthConfig, ids: &SpecialIds) -> Value {
    json!({
        "architectures": [config.architecture.hf_name()],
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "eos_token_id": ids.eos[0],
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": config.num_layers,
        "model_type": "qwen3",
        "num_attention_heads": config.num_q_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": null,
        "rope_theta": 1_000_000,
        "sliding_window": null,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype_name(config.dtype),
        "use_cache": true,
        "use_sliding_window": false,
        "vocab_size": config.vocab_size,
    })
}

fn glm4(config: &SynthConfig, ids: &SpecialIds) -> Value {
    json!({
        "architectures": [config.architecture.hf_name()],
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "eos_token_id": eos_value(ids),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "glm4",
        "num_attention_heads": config.num_q_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": ids.pad,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype_name(config.dtype),
        "use_cache": true,
        "vocab_size": config.vocab_size,
    })
}

/// The MLP's sizes, and the two fields that the Pangu releases leave out, where their value is not the derived one.
fn state_what_cannot_be_derived(config: &SynthConfig, json: &mut Value) {
    match config.mlp {
        SynthMlp::Dense { intermediate_size } => json["intermediate_size"] = intermediate_size.into(),
        SynthMlp::GroupedExperts {
            num_experts,
            num_expert_groups,
            experts_per_token,
            expert_intermediate_size,
            shared_intermediate_size,
        } => {
            json["moe_intermediate_size"] = expert_intermediate_size.into();
            json["num_experts"] = num_experts.into();
            json["num_experts_per_tok"] = experts_per_token.into();
            json["shared_expert_intermediate_size"] = shared_intermediate_size.into();
            if num_expert_groups != experts_per_token {
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
