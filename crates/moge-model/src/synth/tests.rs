use std::collections::BTreeMap;

use moge_kernels::Dtype;

use super::*;
use crate::checkpoint::reader::{Checkpoint, LoadMode};
use crate::network::load::tensor_problems;

fn preset(architecture: Architecture, name: &str) -> SynthConfig {
    let found = presets().find(|preset| preset.config.architecture == architecture && preset.name == name);
    found.unwrap().config
}

fn tiny_presets() -> impl Iterator<Item = SynthConfig> {
    Architecture::ALL.into_iter().map(|architecture| preset(architecture, "tiny"))
}

/// Write the checkpoint and read all of its files.
fn files_of(config: &SynthConfig, num_threads: usize) -> BTreeMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    write_with_threads(dir.path(), config, num_threads, &mut |_, _| ()).unwrap();
    let entries = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn tiny_checkpoints_are_complete_and_small() {
    for config in tiny_presets() {
        let dir = tempfile::tempdir().unwrap();
        let mut reports = Vec::new();
        write_checkpoint(dir.path(), &config, &mut |done, total| reports.push((done, total))).unwrap();
        let read = ModelConfig::load(dir.path()).unwrap();
        assert_eq!(read, config.model_config().unwrap());
        let checkpoint = Checkpoint::open(dir.path(), LoadMode::Mmap, &|_, _| ()).unwrap();
        assert_eq!(tensor_problems(&read, &checkpoint), []);
        let total = config.weight_bytes().unwrap();
        assert!((100_000..700_000).contains(&total), "{total}");
        assert_eq!(reports.last(), Some(&(total, total)));
        assert!(reports.is_sorted());
    }
}

#[test]
fn the_official_layout_is_kept() {
    for config in tiny_presets() {
        let tokenizer = match config.architecture {
            Architecture::PanguProMoe | Architecture::PanguEmbedded => "tokenizer.model",
            _ => "tokenizer.json",
        };
        let names: Vec<String> = files_of(&config, 1).into_keys().collect();
        assert_eq!(
            names,
            ["config.json", "generation_config.json", "model.safetensors", tokenizer, "tokenizer_config.json"]
        );
    }
}

#[test]
fn the_seed_alone_decides_the_bytes() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let config = SynthConfig { dtype, ..preset(Architecture::PanguProMoe, "tiny") };
        let first = files_of(&config, 1);
        for num_threads in [2, 3] {
            assert!(first == files_of(&config, num_threads), "{dtype:?}, {num_threads} threads");
        }
        let other = files_of(&SynthConfig { seed: 7, ..config }, 1);
        assert!(first["model.safetensors"] != other["model.safetensors"]);
        assert!(first["config.json"] == other["config.json"]);
    }
}

#[test]
fn a_tensor_of_several_chunks_does_not_depend_on_threads() {
    // The embedding of 3000 x 700 is larger than a chunk.
    let config =
        SynthConfig { vocab_size: 3000, hidden_size: 700, num_layers: 1, ..preset(Architecture::Qwen3, "tiny") };
    assert!(files_of(&config, 1) == files_of(&config, 3));
}

#[test]
fn presets_have_the_published_numbers_of_parameters() {
    let expected = [
        (Architecture::PanguProMoe, "pangu-pro-moe", 71_988_781_056),
        (Architecture::Qwen3, "qwen3-0.6b", 596_049_920),
        (Architecture::Qwen3, "qwen3-32b", 32_762_123_264),
        (Architecture::Glm4, "glm-z1-32b", 32_566_081_536),
        (Architecture::Qwen3Moe, "qwen3-30b-a3b", 30_532_122_624),
        (Architecture::Llama, "smollm2-135m", 134_515_008),
        (Architecture::Llama, "llama-3.1-8b", 8_030_261_248),
    ];
    for (architecture, name, num_parameters) in expected {
        let config = preset(architecture, name);
        assert_eq!(config.weight_bytes().unwrap() / 2, num_parameters, "{name}");
    }
}

#[test]
fn presets_are_valid_and_of_the_size_that_they_state() {
    for preset in presets() {
        let bytes = preset.config.weight_bytes().unwrap() as f64;
        let (number, rest) = preset.about.split_once(' ').unwrap();
        let unit = if rest.starts_with("GB") { 1e9 } else { 1e6 };
        let stated = number.parse::<f64>().unwrap() * unit;
        assert!((bytes / stated - 1.0).abs() < 0.1, "{}: {bytes} bytes, stated {stated}", preset.name);
    }
}

#[test]
fn the_official_config_states_only_what_it_must() {
    let official = preset(Architecture::PanguProMoe, "pangu-pro-moe").config_json().unwrap();
    assert!(!official.contains("head_dim") && !official.contains("num_expert_groups"), "{official}");
    assert!(!official.contains("\"intermediate_size\""), "{official}");
    let mlp = SynthMlp::Experts {
        num_experts: 12,
        num_expert_groups: 3,
        experts_per_token: 6,
        expert_intermediate_size: 20,
        shared_intermediate_size: Some(44),
    };
    let ours = SynthConfig { mlp, head_dim: 10, ..preset(Architecture::PanguProMoe, "tiny") };
    let read = ours.model_config().unwrap();
    assert_eq!(read.head_dim, 10);
    let moe = read.moe().unwrap();
    assert_eq!((moe.num_expert_groups(), moe.experts_per_group(), moe.top_k_per_group()), (3, 4, 2));
}

#[test]
fn sizes_that_make_no_network_are_refused_by_field() {
    let tiny = preset(Architecture::PanguProMoe, "tiny");
    let with_experts = |num_experts, num_expert_groups, experts_per_token| SynthConfig {
        mlp: SynthMlp::Experts {
            num_experts,
            num_expert_groups,
            experts_per_token,
            expert_intermediate_size: 20,
            shared_intermediate_size: Some(44),
        },
        ..tiny
    };
    let cases = [
        (with_experts(13, 3, 3), "num_experts"),
        (with_experts(12, 3, 4), "num_experts_per_tok"),
        (SynthConfig { num_kv_heads: 4, ..tiny }, "num_key_value_heads"),
        (SynthConfig { num_layers: 0, ..tiny }, "num_hidden_layers"),
        (SynthConfig { head_dim: 7, ..tiny }, "head_dim"),
        (SynthConfig { hidden_size: usize::MAX, ..tiny }, "hidden_size"),
        (SynthConfig { vocab_size: usize::MAX, ..tiny }, "vocab_size"),
        (SynthConfig { vocab_size: 100, ..tiny }, "vocab_size"),
    ];
    for (config, field) in cases {
        let dir = tempfile::tempdir().unwrap();
        let error = write_checkpoint(dir.path(), &config, &mut |_, _| ()).unwrap_err().to_string();
        assert!(error.contains(&format!("{field}:")), "{field}: {error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_directory_with_files_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    let config = preset(Architecture::Qwen3, "tiny");
    let error = write_checkpoint(dir.path(), &config, &mut |_, _| ()).unwrap_err();
    assert!(matches!(&error, SynthError::DirectoryNotEmpty { .. }), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn an_interrupted_checkpoint_is_not_taken_for_one() {
    let dir = tempfile::tempdir().unwrap();
    let config = preset(Architecture::Glm4, "tiny");
    let interrupted = std::panic::catch_unwind(|| {
        write_with_threads(dir.path(), &config, 2, &mut |done, _| assert!(done < 200_000, "interrupted"))
    });
    assert!(interrupted.is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
