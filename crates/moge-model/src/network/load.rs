//! A checkpoint's tensors as a network's weights: checked against its description, then taken where they lie, or packed.

use std::collections::HashSet;

use moge_kernels::{Cpu, Dtype, Isa};
use safetensors::tensor::Dtype as StoredDtype;

use crate::checkpoint::error::{CheckpointError, TensorProblem};
use crate::checkpoint::quant_scheme::QuantScheme;
use crate::checkpoint::reader::Checkpoint;
use crate::checkpoint::storage::StoredTensor;
use crate::network::config::ModelConfig;
use crate::network::tensors::{HEAD_NAME, MatrixSpec, Part, TensorSource, TensorSpec, source_name};
use crate::network::weight::{Weight, widen};
use crate::network::weights::{Network, Share, expected_tensors};

/// The tensors of `checkpoint` that do not fit `config`; empty if it is whole.
pub fn tensor_problems(config: &ModelConfig, checkpoint: &Checkpoint) -> Vec<TensorProblem> {
    let expected = expected_tensors(config);
    let mut problems = Vec::new();
    for spec in &expected {
        if let Some(problem) = spec.width_problem() {
            problems.push(problem);
            continue;
        }
        let (name, shape) = (spec.name.clone(), spec.stored_shape());
        match checkpoint.get(&name) {
            None => problems.push(TensorProblem::Missing { name, shape }),
            Some(tensor) if *tensor.shape() != shape => {
                problems.push(TensorProblem::Shape { name, found: tensor.shape().to_vec(), expected: shape });
            }
            Some(tensor) if !has_allowed_dtype(spec, tensor.dtype()) => {
                let allowed = if spec.packed.is_some() { "U8" } else { "F32, F16, BF16" };
                problems.push(TensorProblem::Dtype { name, found: format!("{:?}", tensor.dtype()), allowed });
            }
            Some(_) => {}
        }
    }
    let expected: HashSet<&str> = expected.iter().map(|spec| spec.name.as_str()).collect();
    for (name, tensor) in checkpoint.tensors() {
        if !expected.contains(name) && !is_ignored(config, name) {
            problems.push(TensorProblem::Unexpected { name: name.to_owned(), shape: tensor.shape().to_vec() });
        }
    }
    problems
}

fn has_allowed_dtype(spec: &TensorSpec, dtype: StoredDtype) -> bool {
    match spec.packed {
        Some(_) => dtype == StoredDtype::U8,
        None => float_dtype(dtype).is_some(),
    }
}

/// Left-overs of training frameworks that carry no weights, and the head's copy of a tied embedding.
fn is_ignored(config: &ModelConfig, name: &str) -> bool {
    const IGNORED_SUFFIXES: [&str; 2] = [".rotary_emb.inv_freq", ".kv_cache_offset"];
    IGNORED_SUFFIXES.iter().any(|suffix| name.ends_with(suffix)) || (config.tie_word_embeddings && name == HEAD_NAME)
}

fn float_dtype(dtype: StoredDtype) -> Option<Dtype> {
    match dtype {
        StoredDtype::F32 => Some(Dtype::F32),
        StoredDtype::F16 => Some(Dtype::F16),
        StoredDtype::BF16 => Some(Dtype::Bf16),
        _ => None,
    }
}

/// A checkpoint whose tensors were all checked against its config.
struct CheckedCheckpoint<'a> {
    checkpoint: &'a Checkpoint,
    quant: &'a QuantScheme,
}

impl CheckedCheckpoint<'_> {
    fn tensor(&self, name: &str) -> &StoredTensor {
        self.checkpoint.get(name).expect("checked to be there")
    }

    fn plain(&self, name: &str, rows: usize, cols: usize) -> Weight {
        let tensor = self.tensor(name);
        let dtype = float_dtype(tensor.dtype()).expect("checked to be a float type");
        Weight::from_stored(tensor, dtype, rows, cols)
    }
}

impl TensorSource for CheckedCheckpoint<'_> {
    type Matrix = Weight;
    type Vector = Vec<f32>;

    fn matrix(&mut self, name: String, spec: &MatrixSpec) -> Weight {
        let MatrixSpec { role, layer, rows, cols, .. } = *spec;
        let whole = match self.quant.format(role, layer) {
            None => self.plain(&name, rows, cols),
            Some(format) => {
                let bytes = 0..format.weight_bytes(rows, cols);
                Weight::from_panels(self.tensor(&name), format, bytes, rows, cols)
            }
        };
        whole.part(&spec.part)
    }

    fn halves(&mut self, name: String, spec: &MatrixSpec) -> [Weight; 2] {
        let MatrixSpec { role, layer, rows, cols, .. } = *spec;
        let halves = match self.quant.format(role, layer) {
            None => self.plain(&name, 2 * rows, cols).halves(),
            Some(format) => {
                let len = format.weight_bytes(rows, cols);
                [0..len, len..2 * len].map(|bytes| Weight::from_panels(self.tensor(&name), format, bytes, rows, cols))
            }
        };
        halves.map(|half| half.part(&spec.part))
    }

    fn vector(&mut self, name: String, shape: &[usize], part: &Part) -> Vec<f32> {
        let whole = widen(Isa::best(), self.plain(&name, 1, shape.iter().product()).matrix().elements());
        match part {
            Part::Rows(range) => whole[range.clone()].to_vec(),
            Part::Whole | Part::Cols(_) => whole,
        }
    }
}

/// A checkpoint without packed weights, packed while it is read.
struct QuantizeOnLoad<'a> {
    /// Its scheme is the one to pack by.
    config: &'a ModelConfig,
    checkpoint: CheckedCheckpoint<'a>,
    cpu: &'a Cpu,
    progress: &'a dyn Fn(u64),
    bytes_read: u64,
}

impl QuantizeOnLoad<'_> {
    fn pack(&mut self, weight: Weight, spec: &MatrixSpec) -> Weight {
        self.bytes_read += weight.num_bytes();
        let packed = match self.config.quant.format(spec.role, spec.layer) {
            Some(format) => weight.pack(self.cpu, format),
            None => weight,
        };
        (self.progress)(self.bytes_read);
        packed
    }
}

impl TensorSource for QuantizeOnLoad<'_> {
    type Matrix = Weight;
    type Vector = Vec<f32>;

    fn matrix(&mut self, name: String, spec: &MatrixSpec) -> Weight {
        let name = source_name(self.config, &name);
        let weight = self.checkpoint.matrix(name.to_owned(), spec);
        self.pack(weight, spec)
    }

    fn halves(&mut self, name: String, spec: &MatrixSpec) -> [Weight; 2] {
        self.checkpoint.halves(name, spec).map(|weight| self.pack(weight, spec))
    }

    fn vector(&mut self, name: String, shape: &[usize], part: &Part) -> Vec<f32> {
        self.checkpoint.vector(name, shape, part)
    }
}

/// Check that `checkpoint` is whole and take the tensors of `share`; large ones stay where they lie.
///
/// # Errors
/// If a tensor is missing, unexpected, or of the wrong shape or type; all such tensors are listed.
pub(crate) fn load(config: &ModelConfig, share: Share, checkpoint: &Checkpoint) -> Result<Network, CheckpointError> {
    refuse(checkpoint, tensor_problems(config, checkpoint))?;
    Ok(Network::build(config, share, &mut CheckedCheckpoint { checkpoint, quant: &config.quant }))
}

/// As [`load`], packing the weights of a checkpoint that has none packed as `packed_config` says. `progress` gets the
/// bytes of the checkpoint that were read.
///
/// # Errors
/// As [`load`], and if a weight has a width that its format does not allow.
pub(crate) fn load_quantizing(
    packed_config: &ModelConfig,
    checkpoint: &Checkpoint,
    cpu: &Cpu,
    progress: &dyn Fn(u64),
) -> Result<Network, CheckpointError> {
    let plain = QuantScheme::default();
    let stored_config = ModelConfig { quant: plain.clone(), ..packed_config.clone() };
    refuse(checkpoint, tensor_problems(&stored_config, checkpoint))?;
    // A format that some weight's width does not allow.
    refuse(checkpoint, expected_tensors(packed_config).iter().filter_map(TensorSpec::width_problem).collect())?;
    let checkpoint = CheckedCheckpoint { checkpoint, quant: &plain };
    let mut source = QuantizeOnLoad { config: packed_config, checkpoint, cpu, progress, bytes_read: 0 };
    Ok(Network::build(packed_config, Share::WHOLE, &mut source))
}

fn refuse(checkpoint: &Checkpoint, problems: Vec<TensorProblem>) -> Result<(), CheckpointError> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(CheckpointError::Tensors { dir: checkpoint.dir().display().to_string(), problems })
}
