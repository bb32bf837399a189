use super::*;

fn pangu_v1() -> Value {
    serde_json::json!({
        "architectures": ["PanguProMoEForCausalLM"], "model_type": "PanguProMoE", "vocab_size": 153376,
        "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "moe_intermediate_size": 1344, "shared_expert_intermediate_size": 5376, "num_experts": 64,
        "num_experts_per_tok": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 16000000.0,
        "max_position_embeddings": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "eos_token_id": 45892
    })
}

fn parse(value: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_json(value.to_string().as_bytes(), "config.json")
}

fn with(field: &str, value: Value) -> Value {
    let mut config = pangu_v1();
    config[field] = value;
    config
}

#[track_caller]
fn assert_refused(config: &Value, message: &str) {
    let error = parse(config).expect_err("the config should be refused").to_string();
    assert!(error.contains(message), "got: {error}");
}

#[test]
fn official_v1_config_has_one_expert_per_group_and_derived_head_dim() {
    let config = parse(&pangu_v1()).unwrap();
    let MlpConfig::GroupedExperts(moe) = config.mlp else { panic!("no experts") };
    assert_eq!((moe.num_expert_groups, moe.experts_per_group(), moe.top_k_per_group), (8, 8, 1));
    assert_eq!((config.head_dim, config.rope.rotary_dim), (128, 128));
    assert!(config.qkv_bias && config.o_bias && !config.qk_norm);
    assert_eq!(config.eos_token_ids, [45892]);
}

#[test]
fn stated_expert_groups_give_several_experts_per_group() {
    let mut config = with("num_expert_groups", 2.into());
    config["num_experts"] = 10.into();
    config["num_experts_per_tok"] = 6.into();
    let MlpConfig::GroupedExperts(moe) = parse(&config).unwrap().mlp else { panic!("no experts") };
    assert_eq!((moe.experts_per_group(), moe.top_k_per_group, moe.experts_per_token()), (5, 3, 6));
}

#[test]
fn plain_top_k_is_one_expert_group() {
    let config = parse(&with("num_expert_groups", 1.into())).unwrap();
    let MlpConfig::GroupedExperts(moe) = config.mlp else { panic!("no experts") };
    assert_eq!((moe.experts_per_group(), moe.top_k_per_group), (64, 8));
}

#[test]
fn fields_that_change_the_numbers_are_refused_by_name() {
    assert_refused(&with("rope_scaling", serde_json::json!({"type": "yarn"})), "rope_scaling");
    assert_refused(&with("sliding_window", 4096.into()), "sliding_window: 4096 is not implemented");
    assert_refused(&with("hidden_act", "gelu".into()), "hidden_act: \"gelu\" is not implemented; only silu is");
    assert_refused(&with("norm_topk_prob", true.into()), "norm_topk_prob");
    assert_refused(&with("layer_types", serde_json::json!(["full_attention", "sliding_attention"])), "layer_types");
    assert_refused(
        &with("rope_parameters", serde_json::json!({"rope_type": "yarn", "rope_theta": 1e4})),
        "rope_parameters.rope_type: \"yarn\"",
    );
    assert_refused(&with("quantization_config", serde_json::json!({"bits": 4})), "quantization_config");
}

#[test]
fn every_field_on_the_list_is_refused_unless_neutral() {
    for (field, neutral) in NEUTRAL {
        assert_refused(
            &with(field, serde_json::json!({"other": 1})),
            &format!("{field}: {{\"other\":1}} is not implemented"),
        );
        let value = match neutral {
            Neutral::Null => Value::Null,
            Neutral::False => false.into(),
            Neutral::Zero => 0.into(),
            Neutral::One => 1.0.into(),
            Neutral::Empty => Vec::<Value>::new().into(),
            Neutral::Text(text) => (*text).into(),
        };
        parse(&with(field, value)).unwrap();
    }
}

#[test]
fn neutral_values_of_such_fields_are_accepted() {
    let mut config = with("sliding_window", 4096.into());
    config["use_sliding_window"] = false.into();
    config["rope_scaling"] = Value::Null;
    config["layer_types"] = serde_json::json!(["full_attention"]);
    parse(&config).unwrap();
}

#[test]
fn sizes_that_cannot_be_are_refused_with_field_value_and_range() {
    assert_refused(&with("hidden_size", 0.into()), "config.json: hidden_size: 0 is not a whole number in 1..=2097152");
    assert_refused(&with("vocab_size", (1u64 << 60).into()), "vocab_size: 1152921504606846976 is not");
    assert_refused(&with("num_hidden_layers", (-3).into()), "num_hidden_layers: -3");
    assert_refused(&with("num_attention_heads", "forty".into()), "num_attention_heads: \"forty\"");
    assert_refused(&with("num_attention_heads", 48.into()), "48 does not divide the 5120 of hidden_size");
    assert_refused(&with("num_key_value_heads", 7.into()), "7 does not divide the 40 of num_attention_heads");
    assert_refused(&with("num_experts", 63.into()), "63 is not a multiple of the 8 expert groups");
    assert_refused(&with("num_expert_groups", 16.into()), "num_experts_per_tok: 8 is not a multiple of the 16");
    assert_refused(&with("num_experts_per_tok", 128.into()), "num_experts: 64 is not a multiple of the 128");
    assert_refused(&with("num_hidden_layers", 5000.into()), "num_hidden_layers: 5000 is more than 4096");
    assert_refused(&with("num_experts", 1_000_000.into()), "num_experts: 1000000 in 48 layers are more than 262144");
    assert_refused(&with("head_dim", 100_000.into()), "head_dim: 40 heads of 100000 are wider than 2097152");
    assert_refused(&with("head_dim", 7.into()), "head_dim: 7 is odd");
    assert_refused(&with("rms_norm_eps", 0.into()), "rms_norm_eps: 0");
    assert_refused(&with("rms_norm_eps", 1e-60.into()), "rms_norm_eps");
    assert_refused(&with("torch_dtype", "int4".into()), "torch_dtype: \"int4\" is not one of");
    assert_refused(&with("eos_token_id", serde_json::json!([1, "x"])), "eos_token_id");
}

#[test]
fn missing_fields_and_other_files_are_named() {
    let mut config = pangu_v1();
    config.as_object_mut().unwrap().remove("moe_intermediate_size");
    assert_refused(&config, "moe_intermediate_size: missing");
    let error = ModelConfig::from_json(b"hello", "some/config.json").unwrap_err().to_string();
    assert!(error.starts_with("some/config.json: not a JSON object"), "{error}");
    assert!(ModelConfig::from_json(b"[1]", "c").unwrap_err().to_string().contains("found a list"));
}

#[test]
fn an_unknown_architecture_lists_what_is_supported() {
    let config = with("architectures", serde_json::json!(["LlamaForCausalLM"]));
    assert_refused(&config, "supported: PanguProMoEForCausalLM, PanguEmbeddedForCausalLM, Qwen3ForCausalLM, Glm4For");
}

#[test]
fn a_field_that_is_not_stated_has_the_value_of_the_reference_implementation() {
    for (architecture, eps, qkv_bias, o_bias) in [
        (Architecture::PanguEmbedded, 1e-5, true, true),
        (Architecture::Qwen3, 1e-6, false, false),
        (Architecture::Glm4, 1.5625e-7, true, false),
    ] {
        let config = parse(&serde_json::json!({
            "architectures": [architecture.hf_name()], "vocab_size": 307, "hidden_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 44, "rope_theta": 10000.0,
            "max_position_embeddings": 512
        }))
        .unwrap();
        assert_eq!((config.rms_norm_eps, config.qkv_bias, config.o_bias), (eps, qkv_bias, o_bias), "{architecture:?}");
        assert!(!config.tie_word_embeddings);
    }
}

#[test]
fn glm4_reads_rope_settings_from_both_places() {
    let mut config = serde_json::json!({
        "architectures": ["Glm4ForCausalLM"], "vocab_size": 151552, "hidden_size": 6144, "num_hidden_layers": 61,
        "num_attention_heads": 48, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 23040,
        "max_position_embeddings": 32768, "attention_bias": false,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    });
    let rope = parse(&config).unwrap().rope;
    assert_eq!((rope.theta, rope.rotary_dim, rope.layout), (10000.0, 32, RopeLayout::Interleaved));
    config.as_object_mut().unwrap().remove("rope_parameters");
    config["rope_theta"] = 20000.0.into();
    let rope = parse(&config).unwrap().rope;
    assert_eq!((rope.theta, rope.rotary_dim), (20000.0, 64));
}

/// Seeded mutation of a valid file: never a panic, whatever the bytes.
#[test]
fn hostile_bytes_never_panic() {
    let valid = pangu_v1().to_string().into_bytes();
    let mut state = 7u64;
    let mut random = move |bound: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % bound
    };
    for _ in 0..20_000 {
        let mut bytes = valid.clone();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            match random(4) {
                0 => bytes[at] = random(256) as u8,
                1 => bytes.truncate(at.max(1)),
                2 => bytes.insert(at, b"0123456789-.e{}[]\"n"[random(19)]),
                _ => drop(bytes.remove(at)),
            }
            if bytes.is_empty() {
                break;
            }
        }
        let _ = ModelConfig::from_json(&bytes, "config.json");
    }
}
