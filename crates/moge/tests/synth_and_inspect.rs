//! `moge synth` and `moge inspect` through the real binary.

// Helpers of tests are tests too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn moge(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moge")).args(args).output().unwrap()
}

fn synth(dir: &Path, arch: &str) {
    let output = moge(&["synth", dir.to_str().unwrap(), "--arch", arch]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The report as JSON, what went to standard error, and whether the command succeeded.
fn inspect(dir: &Path, options: &[&str]) -> (Value, String, bool) {
    let output = moge(&[&["inspect", dir.to_str().unwrap(), "--format", "json"], options].concat());
    let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (report, String::from_utf8(output.stderr).unwrap(), output.status.success())
}

#[test]
fn a_synthetic_checkpoint_of_every_architecture_passes_inspection() {
    for (arch, architecture) in [
        ("pangu-pro-moe", "PanguProMoEForCausalLM"),
        ("pangu-embedded", "PanguEmbeddedForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
        ("glm4", "Glm4ForCausalLM"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        synth(dir.path(), arch);
        let (report, stderr, success) = inspect(dir.path(), &["--deep"]);
        assert!(success, "{arch}: {stderr}");
        assert_eq!(report["architecture"], architecture);
        assert_eq!(report["tensor_problems"], Value::Array(vec![]));
        assert_eq!(report["non_finite"], Value::Array(vec![]));
        let total = report["parameters"]["total"].as_u64().unwrap();
        assert!(report["stored_bytes"].as_u64().unwrap() > 2 * total);
        assert_eq!(report["weight_bytes"]["bf16"], 2 * total);
    }
}

/// `config.json` of the published model.
const PANGU_PRO_MOE: &str = r#"{
    "architectures": ["PanguProMoEForCausalLM"], "model_type": "PanguProMoE", "vocab_size": 153376,
    "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
    "moe_intermediate_size": 1344, "shared_expert_intermediate_size": 5376, "num_experts": 64,
    "num_experts_per_tok": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 16000000.0,
    "max_position_embeddings": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
}"#;

#[test]
fn the_published_config_alone_tells_parameters_and_memory() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), PANGU_PRO_MOE).unwrap();
    let (report, stderr, success) = inspect(dir.path(), &[]);
    assert!(success, "{stderr}");
    assert_eq!(report["parameters"]["total"], 71_988_781_056_u64);
    let active = report["parameters"]["active_per_token"].as_f64().unwrap();
    assert!((active / 1e9 - 16.50).abs() < 0.005, "{active}");
    assert_eq!(report["kv_bytes_per_1024_tokens"]["bf16"], 1024 * 192 * 1024);
    assert_eq!(report["stored_bytes"], Value::Null);
    let text = moge(&["inspect", dir.path().to_str().unwrap()]).stdout;
    assert!(String::from_utf8(text).unwrap().contains("71,988,781,056"));
    let (_, stderr, success) = inspect(dir.path(), &["--deep"]);
    assert!(!success && stderr.contains("no weights"), "{stderr}");
}

#[test]
fn missing_and_unexpected_tensors_are_listed_and_fail() {
    let dir = tempfile::tempdir().unwrap();
    synth(dir.path(), "pangu-embedded");
    let config = dir.path().join("config.json");
    let changed = fs::read_to_string(&config).unwrap().replace("\"bias\": true", "\"bias\": false");
    fs::write(&config, changed.replace("\"num_hidden_layers\": 5", "\"num_hidden_layers\": 6")).unwrap();
    let (report, stderr, success) = inspect(dir.path(), &[]);
    assert!(!success && stderr.contains("tensors do not fit"), "{stderr}");
    let problems = report["tensor_problems"].to_string();
    assert!(problems.contains("model.layers.0.self_attn.q_proj.bias: unexpected"), "{problems}");
    assert!(problems.contains("model.layers.5.mlp.up_proj.weight: missing"), "{problems}");
}

#[test]
fn deep_inspection_names_the_tensor_that_holds_nan() {
    let dir = tempfile::tempdir().unwrap();
    synth(dir.path(), "qwen3");
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    // The last tensor in the order of names is the final norm; its last two numbers become bf16 NaN and infinity.
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&[0xc0, 0x7f, 0x80, 0xff]);
    fs::write(&path, bytes).unwrap();
    assert!(inspect(dir.path(), &[]).2, "only --deep reads the data");
    let (report, stderr, success) = inspect(dir.path(), &["--deep"]);
    assert!(!success && stderr.contains("NaN"), "{stderr}");
    let expected = serde_json::json!([{ "name": "model.norm.weight", "num_nan": 1, "num_infinite": 1 }]);
    assert_eq!(report["non_finite"], expected);
}

#[test]
fn a_directory_without_a_config_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (_, stderr, success) = inspect(dir.path(), &[]);
    assert!(!success && stderr.contains("config.json"), "{stderr}");
}
