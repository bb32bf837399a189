//! Small checkpoints, and runs on them.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use moge_kernels::{Cpu, Isa, PackedFormat, PackedMatrix};
use moge_model::synth::{SynthConfig, SynthMlp, presets, write_checkpoint};
use moge_model::{
    Architecture, Checkpoint, LayerFormats, LoadMode, ModelConfig, QuantScheme, TensorSpec, expected_tensors,
    tensor_problems,
};
use moge_quant::{Job, QuantizeError, RoundingErrors};

/// A small network whose widths 32 divides.
pub(crate) fn synth_config(architecture: Architecture) -> SynthConfig {
    let is_tiny =
        |preset: &&moge_model::synth::Preset| preset.name == "tiny" && preset.config.architecture == architecture;
    let tiny = presets().find(is_tiny).unwrap().config;
    let mlp = match tiny.mlp {
        SynthMlp::Dense { .. } => SynthMlp::Dense { intermediate_size: 160 },
        SynthMlp::Experts { num_expert_groups, shared_intermediate_size, .. } => SynthMlp::Experts {
            num_experts: 6,
            num_expert_groups: num_expert_groups.min(2),
            experts_per_token: 2,
            expert_intermediate_size: 32,
            shared_intermediate_size: shared_intermediate_size.map(|_| 128),
        },
    };
    SynthConfig { num_layers: 2, hidden_size: 96, num_q_heads: 4, num_kv_heads: 1, head_dim: 16, mlp, ..tiny }
}

pub(crate) fn synth(dir: &Path, config: &SynthConfig) {
    write_checkpoint(dir, config, &mut |_, _| ()).unwrap();
}

/// Four bits where it is the default, eight for attention.
pub(crate) fn mixed_scheme() -> QuantScheme {
    let uniform = QuantScheme::uniform(PackedFormat::W4A8);
    let layers = LayerFormats { attention: Some(PackedFormat::W8A8), ..uniform.layers };
    QuantScheme { layers, ..uniform }
}

pub(crate) fn quantize(model: &Path, out: &Path, scheme: QuantScheme) -> Result<RoundingErrors, QuantizeError> {
    quantize_with(model, out, scheme, 2, usize::MAX)
}

/// Quantise, and stop after `num_pieces`.
#[expect(clippy::needless_pass_by_value, reason = "a scheme is made where it is used")]
pub(crate) fn quantize_with(
    model: &Path,
    out: &Path,
    scheme: QuantScheme,
    num_threads: usize,
    num_pieces: usize,
) -> Result<RoundingErrors, QuantizeError> {
    let cpu = Cpu::new(Isa::best(), num_threads);
    let mut left = num_pieces;
    Job::open(model, out, &scheme)?.run(&cpu, &mut |_, _| match left.checked_sub(1) {
        Some(less) => {
            left = less;
            ControlFlow::Continue(())
        }
        None => ControlFlow::Break(()),
    })
}

/// All files by name.
pub(crate) fn files_in(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect()
}

/// A quantised checkpoint, found whole.
pub(crate) struct Quantized {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) specs: Vec<TensorSpec>,
}

impl Quantized {
    pub(crate) fn open(dir: &Path) -> Quantized {
        let config = ModelConfig::load(dir).unwrap();
        let checkpoint = Checkpoint::open(dir, LoadMode::Mmap, &|_, _| ()).unwrap();
        assert_eq!(tensor_problems(&config, &checkpoint), []);
        Quantized { checkpoint, specs: expected_tensors(&config) }
    }

    /// The numbers of a tensor, its parts one after another.
    pub(crate) fn numbers(&self, name: &str) -> Vec<f32> {
        let spec = self.specs.iter().find(|spec| spec.name == name).unwrap();
        let tensor = self.checkpoint.get(name).unwrap();
        let Some(packed) = spec.packed else { return numbers_of(&self.checkpoint, name) };
        let parts = tensor.bytes().chunks_exact(packed.format.weight_bytes(packed.rows, packed.cols));
        let mut numbers = vec![0.0; spec.shape.iter().product()];
        for (part, out) in parts.zip(numbers.chunks_exact_mut(packed.rows * packed.cols)) {
            let matrix = PackedMatrix::new(part, packed.format, packed.rows, packed.cols);
            for (row, out) in out.chunks_exact_mut(packed.cols).enumerate() {
                matrix.dequantize_row(row, out);
            }
        }
        numbers
    }
}

/// The numbers of a tensor in f32 or bf16.
pub(crate) fn numbers_of(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let tensor = checkpoint.get(name).unwrap();
    match tensor.dtype() {
        safetensors::Dtype::F32 => {
            tensor.bytes().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
        }
        safetensors::Dtype::BF16 => {
            tensor.bytes().as_chunks::<2>().0.iter().map(|bytes| half::bf16::from_le_bytes(*bytes).to_f32()).collect()
        }
        dtype => panic!("{name} is {dtype:?}"),
    }
}
