use moge_kernels::RopeLayout;

use super::*;
use crate::network::config::Router;

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
    let moe = config.moe().unwrap();
    assert_eq!((moe.num_expert_groups(), moe.experts_per_group(), moe.top_k_per_group()), (8, 8, 1));
    assert_eq!((config.head_dim, config.rope.rotary_dim), (128, 128));
    assert!(config.qkv_bias && config.o_bias && !config.qk_norm);
    assert_eq!(config.eos_token_ids, [45892]);
}

#[test]
fn stated_expert_groups_give_several_experts_per_group() {
    let mut config = with("num_expert_groups", 2.into());
    config["num_experts"] = 10.into();
    config["num_experts_per_tok"] = 6.into();
    let moe = *parse(&config).unwrap().moe().unwrap();
    assert_eq!((moe.experts_per_group(), moe.top_k_per_group(), moe.experts_per_token()), (5, 3, 6));
}

#[test]
fn plain_top_k_is_one_expert_group() {
    let config = parse(&with("num_expert_groups", 1.into())).unwrap();
    let moe = config.moe().unwrap();
    assert_eq!((moe.experts_per_group(), moe.top_k_per_group()), (64, 8));
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
    for (field, neutral) in UNSUPPORTED_FIELDS {
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
    let config = with("architectures", serde_json::json!(["MixtralForCausalLM"]));
    assert_refused(
        &config,
        "supported: PanguProMoEForCausalLM, PanguEmbeddedForCausalLM, Qwen3ForCausalLM, Qwen3MoeFor",
    );
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

fn qwen3_30b_a3b() -> Value {
    serde_json::json!({
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "decoder_sparse_step": 1,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": [],
        "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 1000000.0, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 151936
    })
}

#[test]
fn qwen3_with_experts_is_plain_top_k_without_shared_expert() {
    let config = parse(&qwen3_30b_a3b()).unwrap();
    let moe = config.moe().unwrap();
    assert_eq!(moe.router, Router::TopKSoftmax { top_k: 8, renormalize: true });
    assert_eq!((moe.num_experts, moe.experts_per_group(), moe.experts_per_token()), (128, 128, 8));
    assert!(!moe.router_scale && moe.shared_intermediate_size.is_none());
    assert!(config.qk_norm && !config.qkv_bias && !config.o_bias);
    let mut config = qwen3_30b_a3b();
    config["norm_topk_prob"] = Value::Null;
    assert!(!parse(&config).unwrap().moe().unwrap().router.renormalizes(), "the default of the reference");
}

#[test]
fn layers_of_qwen3_are_dense_where_the_file_says_so() {
    let mut config = qwen3_30b_a3b();
    config["num_hidden_layers"] = 7.into();
    config["mlp_only_layers"] = serde_json::json!([3]);
    config["decoder_sparse_step"] = 2.into();
    let config = parse(&config).unwrap();
    let routed: Vec<Option<usize>> = (0..7).map(|layer| config.routed_index(layer)).collect();
    assert_eq!(routed, [None, Some(0), None, None, None, Some(1), None]);
    assert_eq!((config.num_layers(), config.num_routed_layers()), (7, 2));
    assert_eq!(config.layers[3].mlp, MlpConfig::Dense { intermediate_size: 6144 });
}

#[test]
fn wrong_fields_of_qwen3_with_experts_are_refused_by_name() {
    for (field, value, message) in [
        ("mlp_only_layers", serde_json::json!([2, 48]), "mlp_only_layers: 48 is not a list of layers below 48"),
        ("mlp_only_layers", serde_json::json!("all"), "mlp_only_layers: \"all\" is not a list of layers below 48"),
        ("mlp_only_layers", serde_json::json!([-1]), "mlp_only_layers: -1"),
        ("decoder_sparse_step", 0.into(), "decoder_sparse_step: 0 is not a whole number in 1..="),
        ("num_experts_per_tok", 129.into(), "num_experts_per_tok: 129 is more than the 128 of num_experts"),
        ("num_expert_groups", 8.into(), "num_expert_groups: 8 is not a field of Qwen3MoeForCausalLM"),
        ("norm_topk_prob", 1.into(), "norm_topk_prob: 1 is not true or false"),
        ("num_experts", 6000.into(), "num_experts: 6000 in 48 layers are more than 262144"),
        (
            "rope_scaling",
            serde_json::json!({"rope_type": "yarn", "factor": 4.0}),
            "rope_scaling.rope_type: \"yarn\" is not",
        ),
    ] {
        let mut config = qwen3_30b_a3b();
        config[field] = value;
        assert_refused(&config, message);
    }
}

fn llama() -> Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 500, "max_position_embeddings": 2048
    })
}

#[test]
fn a_llama_without_optional_fields_has_the_defaults_of_the_reference() {
    let config = parse(&llama()).unwrap();
    assert_eq!((config.rope.theta, config.rope.scaling, config.rms_norm_eps), (1e4, RopeScaling::None, 1e-6));
    assert!(!config.qkv_bias && !config.o_bias && !config.qk_norm && !config.tie_word_embeddings);
}

#[test]
fn rope_scaling_is_read_from_both_places_and_refused_where_unknown_or_incomplete() {
    let llama3 = serde_json::json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192
    });
    for field in ["rope_scaling", "rope_parameters"] {
        let mut config = llama();
        config[field] = llama3.clone();
        let scaling = parse(&config).unwrap().rope.scaling;
        let expected =
            RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 };
        assert_eq!(scaling, expected);
        config[field] = serde_json::json!({"type": "linear", "factor": 2.5});
        assert_eq!(parse(&config).unwrap().rope.scaling, RopeScaling::Linear { factor: 2.5 });
        for (change, value, message) in [
            (
                "rope_type",
                "dynamic".into(),
                "rope_type: \"dynamic\" is not implemented; there are default, linear, llama3",
            ),
            ("factor", Value::Null, "factor: missing"),
            ("factor", 0.into(), "factor: 0 is not a number above 0"),
            ("high_freq_factor", 1.into(), "high_freq_factor: 1 is not above the 1 of low_freq_factor"),
        ] {
            config[field] = llama3.clone();
            config[field][change] = value;
            assert_refused(&config, &format!("{field}.{message}"));
        }
    }
    assert_refused(&with("rope_scaling", "long".into()), "rope_scaling: a text is not an object");
    assert_refused(&with("rope_scaling", serde_json::json!({"factor": 2})), "rope_scaling.rope_type: missing");
}

#[test]
fn llama3_scaling_keeps_high_frequencies_and_divides_low_ones() {
    let mut config = llama();
    config["rope_scaling"] = serde_json::json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64
    });
    let scaled = parse(&config).unwrap().rope.inverse_frequencies();
    let plain = parse(&llama()).unwrap().rope.inverse_frequencies();
    // Periods in 64 tokens: 10.2, 3.2, 1.02, 0.3 and fewer.
    let ratios: Vec<f32> = scaled.iter().zip(&plain).map(|(scaled, plain)| scaled / plain).collect();
    assert_eq!((ratios[0], ratios[4], ratios[7]), (1.0, 0.125, 0.125));
    assert!((0.7..0.8).contains(&ratios[1]) && (0.125..0.14).contains(&ratios[2]), "{ratios:?}");
}

#[test]
fn a_pangu_config_may_spell_its_biases_as_other_programs_do() {
    assert!(!parse(&with("attention_bias", false.into())).unwrap().qkv_bias);
    let mut config = with("attention_bias", false.into());
    config["bias"] = true.into();
    assert!(parse(&config).unwrap().o_bias, "the field of the releases counts first");
}
