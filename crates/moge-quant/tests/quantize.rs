//! Checkpoints to the packed layout: what is written, what survives a kill, what is refused.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;

use moge_kernels::{Cpu, Isa, PackedFormat};
use moge_model::{
    Architecture, Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, JOURNAL_NAME, LoadMode, ModelConfig,
    PlannedTensor, QuantScheme,
};
use moge_quant::{Job, QuantizeError};
use safetensors::Dtype;

use common::{Quantized, files_in, mixed_scheme, numbers_of, quantize, quantize_with, synth, synth_config};

#[test]
fn every_network_is_quantised_to_a_whole_checkpoint_near_the_original() {
    for architecture in Architecture::ALL {
        let dir = tempfile::tempdir().unwrap();
        let (model, out) = (dir.path().join("m"), dir.path().join("q"));
        for tied in [false, true] {
            synth(
                &model,
                &moge_model::synth::SynthConfig {
                    tie_word_embeddings: tied && architecture == Architecture::Qwen3,
                    ..synth_config(architecture)
                },
            );
            let damage = quantize(&model, &out, mixed_scheme()).unwrap();
            let original = Checkpoint::open(&model, LoadMode::Mmap, &|_, _| ()).unwrap();
            let quantized = Quantized::open(&out);
            for spec in &quantized.specs {
                let source = if original.get(&spec.name).is_some() { &spec.name } else { "model.embed_tokens.weight" };
                let (found, expected) = (quantized.numbers(&spec.name), numbers_of(&original, source));
                let square = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
                let error = square(&mut found.iter().zip(&expected).map(|(a, b)| f64::from(a - b)));
                let relative = (error / square(&mut expected.iter().map(|x| f64::from(*x)))).sqrt();
                let bound = match spec.packed.map(|packed| packed.format) {
                    Some(PackedFormat::W4A8) => 0.09,
                    Some(PackedFormat::W8A8) => 0.009,
                    None => 0.0,
                };
                assert!(relative <= bound, "{}: {relative}", spec.name);
                if let Some(tensor) = damage.tensors.iter().find(|tensor| tensor.name == spec.name) {
                    assert!((tensor.relative_error - relative).abs() < 1e-4, "{}: {tensor:?}", spec.name);
                }
            }
            assert_eq!(damage.tensors.len(), quantized.specs.iter().filter(|spec| spec.packed.is_some()).count());
            fs::remove_dir_all(&model).unwrap();
            fs::remove_dir_all(&out).unwrap();
        }
    }
}

#[test]
fn every_packed_tensor_begins_at_a_cache_line_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("m"), dir.path().join("q"));
    synth(&model, &synth_config(Architecture::PanguProMoe));
    quantize(&model, &out, mixed_scheme()).unwrap();
    let file = fs::read(out.join("model.safetensors")).unwrap();
    let header_len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&file[8..8 + header_len]).unwrap();
    let mut num_packed = 0;
    for (name, tensor) in header.as_object().unwrap() {
        if tensor["dtype"] == "U8" {
            let start = 8 + header_len + tensor["data_offsets"][0].as_u64().unwrap() as usize;
            assert!(start.is_multiple_of(64), "{name} begins at {start}");
            num_packed += 1;
        }
    }
    assert_eq!(num_packed, 2 * (4 + 3 * 7) + 1);
}

#[test]
fn the_number_of_threads_and_a_stop_anywhere_change_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m");
    synth(&model, &synth_config(Architecture::PanguProMoe));
    let out = |name: &str| dir.path().join(name);
    quantize_with(&model, &out("whole"), mixed_scheme(), 1, usize::MAX).unwrap();
    let whole = files_in(&out("whole"));
    for num_threads in [2, 3, 5] {
        let out = out(&format!("threads{num_threads}"));
        quantize_with(&model, &out, mixed_scheme(), num_threads, usize::MAX).unwrap();
        assert!(files_in(&out) == whole, "{num_threads} threads");
    }
    for num_pieces in [0, 1, 17, 40] {
        let out = out(&format!("stopped{num_pieces}"));
        let stopped = quantize_with(&model, &out, mixed_scheme(), 2, num_pieces).unwrap_err();
        assert!(matches!(stopped, QuantizeError::Stopped { .. }), "{stopped}");
        let message = ModelConfig::load(&out).unwrap_err().to_string();
        assert!(message.contains("not finished; the `moge quantize`"), "{message}");
        let damage = quantize(&model, &out, mixed_scheme()).unwrap();
        assert!(files_in(&out) == whole, "stopped after {num_pieces}");
        assert_eq!(damage.tensors.len(), 51, "the damage of all tensors is known");
    }
}

#[test]
fn a_journal_that_lags_behind_the_data_or_was_cut_in_a_line_is_enough() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("m"), dir.path().join("q"));
    synth(&model, &synth_config(Architecture::PanguProMoe));
    quantize(&model, &dir.path().join("whole"), mixed_scheme()).unwrap();
    quantize_with(&model, &out, mixed_scheme(), 2, 30).unwrap_err();
    let journal = fs::read_to_string(out.join(JOURNAL_NAME)).unwrap();
    let lines: Vec<&str> = journal.lines().collect();
    assert_eq!(lines.len(), 1 + 30);
    fs::write(out.join(JOURNAL_NAME), format!("{}\n{}", lines[..9].join("\n"), &lines[9][..20])).unwrap();
    quantize(&model, &out, mixed_scheme()).unwrap();
    assert!(files_in(&out) == files_in(&dir.path().join("whole")));
}

#[test]
fn unfinished_work_is_not_continued_with_another_scheme_or_source_or_by_two() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("m"), dir.path().join("q"));
    let config = synth_config(Architecture::PanguEmbedded);
    synth(&model, &config);
    quantize_with(&model, &out, mixed_scheme(), 2, 3).unwrap_err();
    let refused = |scheme, part: &str| {
        let error = quantize(&model, &out, scheme).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(QuantScheme::uniform(PackedFormat::W8A8), "begun with another scheme");
    let lock = fs::File::open(out.join(JOURNAL_NAME)).unwrap();
    lock.lock().unwrap();
    refused(mixed_scheme(), "another process is writing it");
    drop(lock);
    fs::remove_dir_all(&model).unwrap();
    synth(&model, &moge_model::synth::SynthConfig { seed: 9, ..config });
    refused(mixed_scheme(), "the source was changed since");
    fs::write(out.join(JOURNAL_NAME), "{}\n").unwrap();
    refused(mixed_scheme(), "unfinished.jsonl: line 1");
}

#[test]
fn what_another_run_did_since_the_job_was_opened_counts() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("m"), dir.path().join("q"));
    synth(&model, &synth_config(Architecture::PanguEmbedded));
    quantize(&model, &dir.path().join("whole"), mixed_scheme()).unwrap();
    let whole = files_in(&dir.path().join("whole"));
    let cpu = Cpu::new(Isa::best(), 2);
    let open = || Job::open(&model, &out, &mixed_scheme()).unwrap();
    let begun = open();
    quantize_with(&model, &out, mixed_scheme(), 2, 5).unwrap_err();
    let early = open();
    begun.run(&cpu, &mut |_, _| ControlFlow::Continue(())).unwrap();
    assert!(files_in(&out) == whole);
    let error = early.run(&cpu, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, QuantizeError::NotEmpty { .. }), "{error}");
    assert!(files_in(&out) == whole, "no journal is left");
}

#[test]
fn a_tied_head_is_the_embedding_whatever_copy_lies_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("m"), dir.path().join("q"));
    let config = synth_config(Architecture::Qwen3);
    synth(&model, &moge_model::synth::SynthConfig { tie_word_embeddings: true, ..config });
    quantize(&model, &dir.path().join("whole"), mixed_scheme()).unwrap();
    let source = Checkpoint::open(&model, LoadMode::Read, &|_, _| ()).unwrap();
    let mut tensors: BTreeMap<String, PlannedTensor> = BTreeMap::new();
    for (name, tensor) in source.tensors() {
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        tensors.insert(name.to_owned(), PlannedTensor { name: name.to_owned(), dtype, shape });
    }
    let name = "lm_head.weight".to_owned();
    tensors.insert(name.clone(), PlannedTensor { name, dtype: Dtype::I8, shape: vec![3] });
    fs::remove_file(model.join("model.safetensors")).unwrap();
    let plan = tensors.into_values().collect();
    let mut writer = CheckpointWriter::create(&model, plan, DEFAULT_MAX_SHARD_BYTES).unwrap();
    for tensor in writer.tensors().to_vec() {
        writer.append(source.get(&tensor.name).map_or(&[1, 2, 3], |tensor| tensor.bytes())).unwrap();
    }
    writer.finish().unwrap();
    quantize(&model, &out, mixed_scheme()).unwrap();
    assert!(files_in(&out) == files_in(&dir.path().join("whole")));
}

#[cfg(unix)]
#[test]
fn a_small_file_that_cannot_be_read_is_named_before_the_work_and_a_directory_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("m"), dir.path().join("q"));
    synth(&model, &synth_config(Architecture::PanguEmbedded));
    fs::create_dir(model.join("tokenizer_files")).unwrap();
    std::os::unix::fs::symlink("absent", model.join("README.md")).unwrap();
    let error = quantize(&model, &out, mixed_scheme()).unwrap_err().to_string();
    assert!(error.contains("README.md: a link that leads nowhere") && !out.exists(), "{error}");
    fs::remove_file(model.join("README.md")).unwrap();
    std::os::unix::fs::symlink("absent", model.join("extra.json")).unwrap();
    let error = quantize(&model, &out, mixed_scheme()).unwrap_err().to_string();
    assert!(error.contains("extra.json: "), "{error}");
    fs::remove_file(model.join("extra.json")).unwrap();
    quantize(&model, &out, mixed_scheme()).unwrap();
}

#[test]
fn a_directory_with_other_files_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m");
    synth(&model, &synth_config(Architecture::PanguEmbedded));
    let before = files_in(&model);
    let error = quantize(&model, &model, mixed_scheme()).unwrap_err();
    assert!(matches!(error, QuantizeError::NotEmpty { .. }), "{error}");
    assert!(files_in(&model) == before);
    let out = dir.path().join("q");
    quantize(&model, &out, mixed_scheme()).unwrap();
    let error = quantize(&out, &dir.path().join("again"), mixed_scheme()).unwrap_err().to_string();
    assert!(error.contains("quantised already"), "{error}");
}

#[test]
fn a_weight_that_is_no_number_is_named_with_its_count() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m");
    synth(&model, &synth_config(Architecture::PanguEmbedded));
    let path = model.join("model.safetensors");
    let clean = fs::read(&path).unwrap();
    for name in ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"] {
        let header_len = u64::from_le_bytes(clean[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&clean[8..8 + header_len]).unwrap();
        let start = 8 + header_len + header[name]["data_offsets"][0].as_u64().unwrap() as usize;
        let mut bytes = clean.clone();
        for place in [0, 2 * 300, 2 * 9000] {
            bytes[start + place..start + place + 2].copy_from_slice(&[0x80, 0x7f]);
        }
        fs::write(&path, bytes).unwrap();
        let error = quantize(&model, &dir.path().join(name), mixed_scheme()).unwrap_err().to_string();
        assert!(error.contains(&format!("{name}: 3 of its numbers are NaN or infinite")), "{error}");
        assert!(!dir.path().join(name).join("config.json").exists());
    }
}

#[test]
fn a_width_that_32_does_not_divide_is_refused_by_tensor_in_four_bits_only() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m");
    let config = synth_config(Architecture::PanguEmbedded);
    let mlp = moge_model::synth::SynthMlp::Dense { intermediate_size: 100 };
    synth(&model, &moge_model::synth::SynthConfig { mlp, ..config });
    let error = quantize(&model, &dir.path().join("q4"), QuantScheme::uniform(PackedFormat::W4A8)).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("mlp.down_proj.weight: 100 columns cannot be w4a8"), "{message}");
    quantize(&model, &dir.path().join("q8"), QuantScheme::uniform(PackedFormat::W8A8)).unwrap();
    Quantized::open(&dir.path().join("q8"));
}
