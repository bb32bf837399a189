//! Damaged checkpoint files: each gives a clear error, and none a panic or a huge allocation.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::path::{Path, PathBuf};

use common::{Golden, run_whole};
use moge_model::{Checkpoint, CheckpointError, LoadMode, Model, Precision};
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens").join(name)
}

/// A copy of a golden checkpoint that a test may break.
fn copy_of(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    dir
}

#[track_caller]
fn assert_refused(dir: &Path, parts: &[&str]) {
    let error = Model::load(dir, LoadMode::Mmap, &|_, _| ()).expect_err("the checkpoint should be refused").to_string();
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
}

/// Header and data of a safetensors file.
fn split_file(path: &Path) -> (Value, Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + header_len]).unwrap(), bytes[8 + header_len..].to_vec())
}

fn join_file(path: &Path, header: &Value, data: &[u8]) {
    let header = header.to_string();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
    std::fs::write(path, bytes).unwrap();
}

/// A seeded stream of numbers below the bound it is given.
fn seeded(mut state: u64) -> impl FnMut(usize) -> usize {
    move |bound| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % bound
    }
}

#[test]
fn truncated_shard_is_refused_with_its_name() {
    let dir = copy_of("pangu-pro-moe-v1");
    let shard = dir.path().join("model-00002-of-00002.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    for len in [bytes.len() - 1, bytes.len() / 2, 9, 8, 7, 0] {
        std::fs::write(&shard, &bytes[..len]).unwrap();
        assert_refused(dir.path(), &["model-00002-of-00002.safetensors", "not a valid safetensors file"]);
    }
}

#[test]
fn trailing_bytes_are_refused() {
    let dir = copy_of("qwen3");
    let file = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes.push(0);
    std::fs::write(&file, bytes).unwrap();
    assert_refused(dir.path(), &["model.safetensors", "not a valid safetensors file"]);
}

#[test]
fn header_length_that_lies_is_refused() {
    let dir = copy_of("qwen3");
    let file = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    for len in [0, 1, 1 << 20, 1 << 40, u64::MAX, u64::MAX - 7] {
        let mut bad = bytes.clone();
        bad[..8].copy_from_slice(&len.to_le_bytes());
        std::fs::write(&file, &bad).unwrap();
        assert_refused(dir.path(), &["model.safetensors", "not a valid safetensors file"]);
    }
}

#[test]
fn overlapping_or_wild_offsets_are_refused() {
    let dir = copy_of("qwen3");
    let file = dir.path().join("model.safetensors");
    let (header, data) = split_file(&file);
    for offsets in [json!([0, 16]), json!([16, 0]), json!([0, u64::MAX]), json!([u64::MAX, u64::MAX])] {
        let mut bad = header.clone();
        bad["model.norm.weight"]["data_offsets"] = offsets;
        join_file(&file, &bad, &data);
        assert_refused(dir.path(), &["model.safetensors", "not a valid safetensors file"]);
    }
    let mut bad = header.clone();
    bad["model.norm.weight"]["shape"] = json!([u64::MAX, u64::MAX]);
    join_file(&file, &bad, &data);
    assert_refused(dir.path(), &["not a valid safetensors file"]);
    // Each tensor is one that can be, and together they reach almost to the end of 64 bits.
    let size = (1u64 << 61) - 1;
    let tensor = |i: u64| json!({"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]});
    let bad: Value = (0..8).map(|i| (format!("t{i}"), tensor(i))).collect();
    join_file(&file, &bad, &data);
    assert_refused(dir.path(), &["not a valid safetensors file", "describes 18446744073709551608 bytes of data"]);
}

#[test]
fn wrong_shape_wrong_dtype_missing_and_unexpected_tensors_are_all_listed() {
    let dir = copy_of("qwen3");
    let file = dir.path().join("model.safetensors");
    let (mut header, data) = split_file(&file);
    let fields = header.as_object_mut().unwrap();
    let shape = &mut fields["model.embed_tokens.weight"]["shape"];
    *shape = json!([shape[1], shape[0]]);
    fields["model.layers.0.self_attn.q_proj.weight"]["dtype"] = json!("I16");
    let norm = fields.remove("model.norm.weight").unwrap();
    fields.insert("model.norm.bias".to_owned(), norm);
    join_file(&file, &header, &data);
    let q_proj = "model.layers.0.self_attn.q_proj.weight: dtype is I16, allowed are F32, F16, BF16";
    let expected = ["4 of the tensors", "model.embed_tokens.weight: shape is", q_proj, "model.norm.weight: missing"];
    assert_refused(dir.path(), &expected);
    assert_refused(dir.path(), &["model.norm.bias: unexpected"]);
}

/// A copy of a golden checkpoint with one more tensor, a single number of this name.
fn with_extra_tensor(name: &str) -> tempfile::TempDir {
    let dir = copy_of("qwen3");
    let file = dir.path().join("model.safetensors");
    let (mut header, mut data) = split_file(&file);
    let end = data.len();
    data.extend([0; 4]);
    header[name] = json!({"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]});
    join_file(&file, &header, &data);
    dir
}

#[test]
fn tensors_of_other_software_that_carry_no_weights_are_ignored() {
    for name in ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.k_proj.kv_cache_offset"] {
        Model::load(with_extra_tensor(name).path(), LoadMode::Mmap, &|_, _| ()).unwrap();
    }
}

#[test]
fn a_tensor_whose_name_merely_contains_that_of_an_ignored_one_is_refused() {
    for name in ["model.layers.0.mlp.module.bias", "model.rotary_emb.inv_freq.weight", "kv_cache_offset_proj.weight"] {
        assert_refused(with_extra_tensor(name).path(), &["1 of the tensors", &format!("{name}: unexpected")]);
    }
}

#[test]
fn index_that_names_an_absent_shard_or_a_path_is_refused() {
    let dir = copy_of("pangu-pro-moe-v1");
    let path = dir.path().join("model.safetensors.index.json");
    let index: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for shard in ["model-00003-of-00002.safetensors", "../secret.safetensors", "/etc/passwd", "", ".."] {
        let mut bad = index.clone();
        bad["weight_map"]["model.norm.weight"] = json!(shard);
        std::fs::write(&path, bad.to_string()).unwrap();
        assert_refused(dir.path(), &["index.json", "model.norm.weight", shard]);
    }
    for bad in ["{}", "[]", "no json", r#"{"weight_map": {}}"#, r#"{"weight_map": {"a": 1}}"#] {
        std::fs::write(&path, bad).unwrap();
        assert_refused(dir.path(), &["index.json"]);
    }
}

#[test]
fn index_and_shards_that_disagree_are_refused() {
    let dir = copy_of("pangu-pro-moe-v1");
    let path = dir.path().join("model.safetensors.index.json");
    let mut index: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let shard = index["weight_map"]["model.norm.weight"].as_str().unwrap();
    let other = if shard.contains("00001-") { "model-00002-of-00002" } else { "model-00001-of-00002" };
    index["weight_map"]["model.norm.weight"] = json!(format!("{other}.safetensors"));
    std::fs::write(&path, index.to_string()).unwrap();
    assert_refused(dir.path(), &["index.json", "model.norm.weight"]);
}

#[test]
fn missing_files_are_named() {
    let dir = copy_of("pangu-pro-moe-v1");
    std::fs::remove_file(dir.path().join("model-00001-of-00002.safetensors")).unwrap();
    assert_refused(dir.path(), &["model-00001-of-00002.safetensors", "which is not in"]);
    std::fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
    assert_refused(dir.path(), &["no model.safetensors.index.json and no model.safetensors"]);
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    assert_refused(dir.path(), &["config.json", "No such file"]);
}

#[test]
fn a_config_of_another_size_lists_the_tensors_that_do_not_fit() {
    let dir = copy_of("pangu-embedded");
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["vocab_size"] = json!(2_000_000);
    std::fs::write(&path, config.to_string()).unwrap();
    assert_refused(dir.path(), &["2 of the tensors", "model.embed_tokens.weight", "should be [2000000"]);
}

#[test]
fn unaligned_tensors_give_the_same_logits_as_aligned_ones() {
    for case in ["pangu-embedded", "qwen3", "qwen3-tied", "glm4"] {
        let dir = copy_of(case);
        move_data_to_an_odd_place(&dir.path().join("model.safetensors"));
        let moved = Model::load(dir.path(), LoadMode::Mmap, &|_, _| ()).unwrap();
        let golden = Golden::load(case);
        let [expected, found] =
            [&golden.model, &moved].map(|model| run_whole(model, &golden.tokens("tokens"), Precision::F32).logits);
        assert_eq!(found, expected, "{case}");
    }
}

fn move_data_to_an_odd_place(file: &Path) {
    let (header, data) = split_file(file);
    let mut text = header.to_string();
    text.push_str(if text.len() % 2 == 0 { " " } else { "  " });
    assert_eq!((8 + text.len()) % 2, 1, "the data must start at an odd place");
    std::fs::write(file, [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data].concat()).unwrap();
}

#[test]
fn reading_gives_the_same_bytes_as_mapping_and_reports_progress() {
    let mapped = Checkpoint::open(&golden("pangu-pro-moe-v1"), LoadMode::Mmap, &|_, _| ()).unwrap();
    let last = std::sync::Mutex::new((0, 0));
    let progress = |done, total| *last.lock().unwrap() = (done, total);
    let read = Checkpoint::open(&golden("pangu-pro-moe-v1"), LoadMode::Read, &progress).unwrap();
    assert_eq!(*last.lock().unwrap(), (read.total_bytes(), read.total_bytes()));
    assert!(mapped.tensors().count() > 100);
    for ((name, a), (other, b)) in mapped.tensors().zip(read.tensors()) {
        assert_eq!((name, a.dtype(), a.shape(), a.bytes()), (other, b.dtype(), b.shape(), b.bytes()));
    }
}

/// Seeded mutation of a valid file: always an answer, never a panic.
#[test]
fn hostile_bytes_never_panic() {
    let mut random = seeded(11);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.safetensors");
    let header = json!({
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "__metadata__": {"format": "pt"},
    });
    let text = header.to_string();
    let valid = [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &[1; 32]].concat();
    let mut accepted = 0;
    for _ in 0..5_000 {
        let mut bytes = valid.clone();
        for _ in 0..=random(3) {
            let at = random(bytes.len().min(text.len() + 8));
            match random(4) {
                0 => bytes[at] = random(256) as u8,
                1 => bytes.truncate(at.max(1)),
                2 => bytes.insert(at, b"0123456789-.e{}[],\""[random(19)]),
                _ if bytes.len() > 1 => drop(bytes.remove(at)),
                _ => {}
            }
        }
        std::fs::write(&file, &bytes).unwrap();
        match Checkpoint::open(dir.path(), LoadMode::Mmap, &|_, _| ()) {
            Ok(checkpoint) => {
                accepted += 1;
                checkpoint.tensors().for_each(|(_, tensor)| assert!(tensor.bytes().len() <= 32));
            }
            Err(error) => assert!(matches!(error, CheckpointError::Header { .. }), "{error}"),
        }
    }
    assert!(accepted > 0, "some mutations leave the file valid");
}
