//! Int8 checkpoints made to their description: what they become, and what of them is refused.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moge_kernels::PackedFormat;
use moge_model::{
    Architecture, Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, LoadMode, ModelConfig, PlannedTensor,
    QuantScheme, expected_tensors,
};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use common::{Quantized, quantize, synth, synth_config};

/// A tensor of a file that a test makes.
#[derive(Clone)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    fn f32(shape: &[usize], numbers: &[f32]) -> Tensor {
        let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        Tensor { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }
}

/// An int8 checkpoint before it is written.
struct Int8 {
    dir: tempfile::TempDir,
    tensors: BTreeMap<String, Tensor>,
    description: Map<String, Value>,
}

/// Whole numbers that look random, in `-limit..=limit`.
fn integers(seed: usize, len: usize, limit: i64) -> Vec<i64> {
    let mix = |i: usize| (seed * 7919 + i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
    (0..len).map(|i| mix(i) as i64 % (2 * limit + 1) - limit).collect()
}

/// Numbers between 0.5 and 1.5 times `middle`.
fn scales(seed: usize, len: usize, middle: f32) -> Vec<f32> {
    integers(seed, len, 500).iter().map(|&x| middle * (1.0 + x as f32 / 1000.0)).collect()
}

impl Int8 {
    /// Attention and half of the experts static, the others dynamic, the rest as it was.
    fn new(architecture: Architecture) -> Int8 {
        let dir = tempfile::tempdir().unwrap();
        synth(&dir.path().join("m"), &synth_config(architecture));
        let float = Checkpoint::open(&dir.path().join("m"), LoadMode::Read, &|_, _| ()).unwrap();
        let mut int8 = Int8 { tensors: BTreeMap::new(), description: Map::new(), dir };
        for (name, tensor) in float.tensors() {
            let bytes = tensor.bytes().to_vec();
            let tensor = Tensor { dtype: tensor.dtype(), shape: tensor.shape().to_vec(), bytes };
            int8.tensors.insert(name.to_owned(), tensor);
            int8.description.insert(name.to_owned(), "FLOAT".into());
        }
        let config = ModelConfig::load(&int8.model()).unwrap();
        let packed = ModelConfig { quant: QuantScheme::uniform(PackedFormat::W8A8), ..config };
        let specs = expected_tensors(&packed).into_iter();
        let weights = specs.filter(|spec| spec.packed.is_some() && spec.name != "lm_head.weight");
        for (seed, spec) in weights.enumerate() {
            int8.quantize(seed, &spec.name, seed % 2 == 0 || spec.name.contains("self_attn"));
        }
        int8.description.insert("model_quant_type".to_owned(), "W8A8".into());
        int8
    }

    /// Make an int8 tensor of a weight, with what its kind needs.
    fn quantize(&mut self, seed: usize, name: &str, is_static: bool) {
        let base = name.strip_suffix(".weight").unwrap();
        let shape = self.tensors[name].shape.clone();
        let (rows, cols) = (shape[0], shape[1]);
        let levels = integers(seed, rows * cols, 127);
        let bytes = levels.iter().map(|&level| level as i8 as u8).collect();
        self.tensors.insert(name.to_owned(), Tensor { dtype: Dtype::I8, shape, bytes });
        let mut add = |suffix: &str, tensor: Tensor| {
            self.tensors.insert(format!("{base}.{suffix}"), tensor);
            self.description.insert(format!("{base}.{suffix}"), if is_static { "W8A8" } else { "W8A8_DYNAMIC" }.into());
        };
        let weight_scales = scales(seed, rows, 0.002);
        if !is_static {
            add("weight_scale", Tensor::f32(&[rows, 1], &weight_scales));
            add("weight_offset", Tensor::f32(&[rows, 1], &vec![0.0; rows]));
            self.description[name] = "W8A8_DYNAMIC".into();
            return;
        }
        let (input_scale, input_offset) = (0.03 + 0.001 * seed as f32, -(seed as f32 % 50.0) - 3.0);
        let has_bias = base.contains("self_attn");
        let biases = integers(seed + 1, rows, if has_bias { 3000 } else { 0 });
        let sums = levels.chunks_exact(cols).map(|row| row.iter().sum::<i64>());
        let quant_bias = sums.zip(biases).flat_map(|(sum, bias)| {
            ((bias as f64 - f64::from(input_offset) * sum as f64).round() as i32).to_le_bytes()
        });
        add("input_scale", Tensor::f32(&[1], &[input_scale]));
        add("input_offset", Tensor::f32(&[1], &[input_offset]));
        add("quant_bias", Tensor { dtype: Dtype::I32, shape: vec![rows], bytes: quant_bias.collect() });
        let deq_scale: Vec<f32> = weight_scales.iter().map(|scale| scale * input_scale).collect();
        add("deq_scale", Tensor::f32(&[rows], &deq_scale));
        self.description[name] = "W8A8".into();
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("m")
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Write the files under the names that such checkpoints have.
    fn write(&self, max_shard_bytes: u64) {
        for (name, _) in common::files_in(&self.model()) {
            if name.contains("safetensors") || name.starts_with("quant_model") {
                fs::remove_file(self.model().join(name)).unwrap();
            }
        }
        let planned = self.tensors.iter().map(|(name, tensor)| PlannedTensor {
            name: name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        });
        let mut writer = CheckpointWriter::create(&self.model(), planned.collect(), max_shard_bytes).unwrap();
        for tensor in writer.tensors().to_vec() {
            writer.append(&self.tensors[&tensor.name].bytes).unwrap();
        }
        writer.finish().unwrap();
        rename_to_official(&self.model());
        let description = serde_json::to_vec(&self.description).unwrap();
        fs::write(self.model().join("quant_model_description_w8a8.json"), description).unwrap();
    }

    /// The message with which the checkpoint is refused.
    fn refused(&self) -> String {
        self.refused_as(QuantScheme::uniform(PackedFormat::W8A8))
    }

    fn refused_as(&self, scheme: QuantScheme) -> String {
        self.write(DEFAULT_MAX_SHARD_BYTES);
        let out = tempfile::tempdir().unwrap();
        let message = quantize(&self.model(), &out.path().join("q"), scheme).unwrap_err().to_string();
        assert!(!out.path().join("q/config.json").exists());
        message
    }

    /// `x . row` of every row of the weight `base`, plus the bias, by the formulas of the int8 checkpoint in f64.
    fn products(&self, base: &str, x: &[f64]) -> Vec<f64> {
        let number = |suffix: &str, row: usize| {
            let bytes = &self.tensors[&format!("{base}.{suffix}")].bytes;
            f64::from(f32::from_le_bytes(bytes[4 * row..4 * row + 4].try_into().unwrap()))
        };
        let weight = &self.tensors[&format!("{base}.weight")];
        let is_static = self.tensors.contains_key(&format!("{base}.deq_scale"));
        let rows = weight.bytes.chunks_exact(weight.shape[1]).enumerate();
        rows.map(|(row, levels)| {
            let dot = |f: &dyn Fn(f64) -> f64| {
                levels.iter().zip(x).map(|(&level, &x)| f64::from(level as i8) * f(x)).sum::<f64>()
            };
            if !is_static {
                return dot(&|x| x) * number("weight_scale", row);
            }
            let bytes = &self.tensors[&format!("{base}.quant_bias")].bytes;
            let bias = i32::from_le_bytes(bytes[4 * row..4 * row + 4].try_into().unwrap());
            let (scale, offset) = (number("input_scale", 0), number("input_offset", 0));
            (dot(&|x| x / scale + offset) + f64::from(bias)) * number("deq_scale", row)
        })
        .collect()
    }

    fn int8_weights(&self) -> Vec<String> {
        let int8 = self.tensors.iter().filter(|(_, tensor)| tensor.dtype == Dtype::I8);
        int8.map(|(name, _)| name.strip_suffix(".weight").unwrap().to_owned()).collect()
    }
}

fn rename_to_official(dir: &Path) {
    for (name, bytes) in common::files_in(dir) {
        if name.contains("safetensors") {
            let text = if name.ends_with(".json") {
                String::from_utf8(bytes).unwrap().replace("\"model-", "\"quant_model_weights-").into_bytes()
            } else {
                bytes
            };
            fs::remove_file(dir.join(&name)).unwrap();
            fs::write(dir.join(name.replacen("model", "quant_model_weights", 1)), text).unwrap();
        }
    }
}

/// Every projection of the imported checkpoint computes what the formulas say, up to `tolerance` of the largest product.
#[track_caller]
fn assert_computes(int8: &Int8, out: &Path, tolerance: f64) {
    let quantized = Quantized::open(out);
    let weights = int8.int8_weights();
    assert!(weights.len() > 10);
    for base in weights {
        let cols = int8.tensors[&format!("{base}.weight")].shape[1];
        let x: Vec<f64> = integers(5, cols, 1000).iter().map(|&x| x as f64 / 700.0).collect();
        let expected = int8.products(&base, &x);
        let weight = quantized.numbers(&format!("{base}.weight"));
        let bias =
            quantized.checkpoint.get(&format!("{base}.bias")).map(|_| quantized.numbers(&format!("{base}.bias")));
        let largest = expected.iter().fold(0.0, |largest: f64, y| largest.max(y.abs()));
        for (row, expected) in expected.iter().enumerate() {
            let weights = &weight[row * cols..(row + 1) * cols];
            let product: f64 = weights.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum();
            let found = product + bias.as_ref().map_or(0.0, |bias| f64::from(bias[row]));
            assert!((found - expected).abs() <= tolerance * largest, "{base} row {row}: {found} for {expected}");
        }
    }
}

#[test]
fn static_and_dynamic_int8_weights_are_kept_exactly_in_eight_bits() {
    for architecture in [Architecture::PanguProMoe, Architecture::PanguEmbedded] {
        for max_shard_bytes in [DEFAULT_MAX_SHARD_BYTES, 100_000] {
            let int8 = Int8::new(architecture);
            int8.write(max_shard_bytes);
            let out = int8.out("q");
            let damage = quantize(&int8.model(), &out, QuantScheme::uniform(PackedFormat::W8A8)).unwrap();
            assert_computes(&int8, &out, 1e-6);
            assert!(
                damage.tensors.iter().all(|tensor| tensor.name == "lm_head.weight" || tensor.relative_error == 0.0)
            );
            assert!(common::files_in(&out).keys().all(|name| !name.starts_with("quant_model")));
        }
    }
}

#[test]
fn int8_weights_are_rounded_again_in_four_bits() {
    let int8 = Int8::new(Architecture::PanguProMoe);
    int8.write(DEFAULT_MAX_SHARD_BYTES);
    let out = int8.out("q");
    quantize(&int8.model(), &out, QuantScheme::uniform(PackedFormat::W4A8)).unwrap();
    assert_computes(&int8, &out, 0.15);
}

#[test]
fn a_scale_may_be_the_bits_of_an_f32_in_an_int64() {
    let mut int8 = Int8::new(Architecture::PanguProMoe);
    let plain = Int8::new(Architecture::PanguProMoe);
    for (name, tensor) in &mut int8.tensors {
        if name.ends_with("deq_scale") {
            let words = tensor.bytes.as_chunks::<4>().0;
            tensor.bytes = words.iter().flat_map(|word| i64::from(u32::from_le_bytes(*word)).to_le_bytes()).collect();
            tensor.dtype = Dtype::I64;
        }
    }
    int8.write(DEFAULT_MAX_SHARD_BYTES);
    let out = int8.out("q");
    quantize(&int8.model(), &out, QuantScheme::uniform(PackedFormat::W8A8)).unwrap();
    assert_computes(&plain, &out, 1e-6);
}

#[test]
fn an_int64_that_is_more_than_the_bits_of_an_f32_is_refused_by_place() {
    let name = "model.layers.0.self_attn.q_proj.deq_scale";
    let mut int8 = Int8::new(Architecture::PanguProMoe);
    let tensor = int8.tensors.get_mut(name).unwrap();
    let words: Vec<i64> =
        tensor.bytes.as_chunks::<4>().0.iter().map(|word| i64::from(u32::from_le_bytes(*word))).collect();
    let value = words[5] | 3 << 32;
    let bytes = words.iter().enumerate().flat_map(|(i, word)| if i == 5 { value } else { *word }.to_le_bytes());
    *tensor = Tensor { dtype: Dtype::I64, shape: tensor.shape.clone(), bytes: bytes.collect() };
    let message = int8.refused();
    assert!(message.contains(&format!("{name}: {value} at 5; allowed")), "{message}");
}

#[test]
fn the_type_of_a_projection_says_nothing_of_its_float_bias() {
    let mut int8 = Int8::new(Architecture::PanguEmbedded);
    let base = "model.layers.0.self_attn.q_proj";
    for suffix in ["deq_scale", "input_scale", "input_offset", "quant_bias"] {
        int8.tensors.remove(&format!("{base}.{suffix}")).unwrap();
    }
    int8.quantize(3, &format!("{base}.weight"), false);
    let name = format!("{base}.bias");
    int8.description[&name] = "W8A8_DYNAMIC".into();
    int8.write(DEFAULT_MAX_SHARD_BYTES);
    quantize(&int8.model(), &int8.out("q"), QuantScheme::uniform(PackedFormat::W8A8)).unwrap();
    let written = Quantized::open(&int8.out("q"));
    assert_eq!(written.checkpoint.get(&name).unwrap().bytes(), int8.tensors[&name].bytes);
}

#[test]
fn a_missing_or_wrong_companion_of_a_weight_is_named() {
    let moe = "model.layers.1.mlp.experts.0.up_proj";
    let q = "model.layers.0.self_attn.q_proj";
    let dynamic = Int8::new(Architecture::PanguProMoe).int8_weights().into_iter();
    let dynamic = dynamic
        .filter(|base| !base.contains("self_attn"))
        .find(|base| Int8::new(Architecture::PanguProMoe).tensors.contains_key(&format!("{base}.weight_scale")));
    let dynamic = dynamic.unwrap();
    for name in [
        format!("{q}.deq_scale"),
        format!("{q}.input_scale"),
        format!("{q}.input_offset"),
        format!("{q}.quant_bias"),
        format!("{dynamic}.weight_scale"),
    ] {
        let mut int8 = Int8::new(Architecture::PanguProMoe);
        int8.tensors.remove(&name).unwrap();
        let message = int8.refused();
        assert!(message.contains(&format!("tensor {name}: missing")), "{message}");
    }
    let mut int8 = Int8::new(Architecture::PanguProMoe);
    int8.tensors.remove(&format!("{moe}.weight")).unwrap();
    assert!(int8.refused().contains(&format!("{moe}.weight: missing")));
    let changes: [(String, Tensor, &str); 4] = [
        (format!("{q}.input_scale"), Tensor::f32(&[1], &[0.0]), "allowed: a scale, which is above 0"),
        (format!("{q}.deq_scale"), Tensor::f32(&[3], &[1.0; 3]), "shape is [3]"),
        (format!("{q}.input_offset"), Tensor::f32(&[1], &[f32::NAN]), "NaN at 0"),
        (format!("{q}.quant_bias"), Tensor::f32(&[64], &[0.0; 64]), "dtype is F32, allowed are I32"),
    ];
    for (name, tensor, part) in changes {
        let mut int8 = Int8::new(Architecture::PanguProMoe);
        int8.tensors.insert(name.clone(), tensor);
        let message = int8.refused();
        assert!(message.contains(&name) && message.contains(part), "{message}");
    }
}

#[test]
fn types_that_are_not_implemented_are_refused_by_name() {
    for kind in ["W4A8_DYNAMIC", "W8A8_MIX", "W8A16"] {
        let mut int8 = Int8::new(Architecture::PanguProMoe);
        int8.description["model.layers.0.mlp.experts.3.gate_proj.weight"] = kind.into();
        let message = int8.refused();
        assert!(message.contains("experts.3.gate_proj.weight") && message.contains(kind), "{message}");
        assert!(message.contains("there are FLOAT, W8A8, W8A8_DYNAMIC"), "{message}");
    }
    let int8 = Int8::new(Architecture::PanguProMoe);
    let mut scheme = QuantScheme::uniform(PackedFormat::W8A8);
    scheme.layers.attention = None;
    assert!(
        int8.refused_as(scheme).contains("q_proj.weight: int8 weights cannot stay as they are; give --attention w8a8")
    );
    let mut int8 = Int8::new(Architecture::PanguProMoe);
    int8.description["model.norm.weight"] = "W8A8".into();
    assert!(int8.refused().contains("model.norm.weight: is described as int8; it must be FLOAT"));
}

#[test]
fn what_changes_nothing_is_left_out_and_what_has_no_place_is_refused() {
    let mut int8 = Int8::new(Architecture::PanguProMoe);
    int8.tensors.insert("model.layers.0.self_attn.k_proj.kv_cache_scale".to_owned(), Tensor::f32(&[16], &[0.5; 16]));
    int8.tensors.insert("model.layers.0.input_layernorm.bias".to_owned(), Tensor::f32(&[96], &[0.0; 96]));
    int8.write(DEFAULT_MAX_SHARD_BYTES);
    quantize(&int8.model(), &int8.out("q"), QuantScheme::uniform(PackedFormat::W8A8)).unwrap();
    assert_computes(&int8, &int8.out("q"), 1e-6);
    int8.tensors.insert("model.layers.0.input_layernorm.bias".to_owned(), Tensor::f32(&[96], &[0.5; 96]));
    assert!(int8.refused().contains("input_layernorm.bias: a norm with a bias"));

    let mut int8 = Int8::new(Architecture::PanguProMoe);
    int8.tensors.insert("model.layers.0.mlp.smooth".to_owned(), Tensor::f32(&[1], &[0.5]));
    assert!(int8.refused().contains("model.layers.0.mlp.smooth: unexpected"));

    // An expert has no bias: what its zero point leaves must vanish.
    let mut int8 = Int8::new(Architecture::PanguProMoe);
    let name =
        int8.tensors.keys().find(|name| name.contains("experts") && name.ends_with("quant_bias")).unwrap().clone();
    let bytes = &mut int8.tensors.get_mut(&name).unwrap().bytes;
    let bias = i32::from_le_bytes(bytes[8..12].try_into().unwrap()) + 90;
    bytes[8..12].copy_from_slice(&bias.to_le_bytes());
    let message = int8.refused();
    assert!(message.contains(&format!("{name}: row 2 is a bias")), "{message}");
}

#[test]
fn a_description_that_is_damaged_or_one_of_two_is_refused() {
    let int8 = Int8::new(Architecture::PanguProMoe);
    int8.write(DEFAULT_MAX_SHARD_BYTES);
    let path = int8.model().join("quant_model_description_w8a8.json");
    let refused = |part: &str| {
        let error = quantize(&int8.model(), &int8.out("q"), QuantScheme::uniform(PackedFormat::W8A8)).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    };
    fs::write(&path, "[1]").unwrap();
    refused("quant_model_description_w8a8.json: (whole file): not a JSON object");
    fs::write(&path, json!({ "model.embed_tokens.weight": 8 }).to_string()).unwrap();
    refused("model.embed_tokens.weight: 8 is not implemented");
    fs::write(int8.model().join("quant_model_description.json"), "{}").unwrap();
    refused("is there, too; allowed: one quant_model_description*.json");
}
