//! Tensors between flat vectors and files.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use half::{bf16, f16};
use moge_kernels::Dtype;
use moge_model::{
    Checkpoint, CheckpointError, CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, LoadMode, ModelConfig, PlannedTensor,
    StoredTensor, WriteError, expected_tensors, tensor_problems,
};
use safetensors::Dtype as StoredDtype;

use crate::params::Layout;

/// Numbers that are converted at a time.
const CHUNK_LEN: usize = 1 << 16;

/// What the trainer's own files hold of each parameter.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part {
    /// Mean of the gradients.
    M,
    /// Mean of the squared gradients.
    V,
    /// The weight in f32, where the checkpoint's own is rounded.
    Master,
}

impl Part {
    /// What stands before the names of its tensors.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Part::M => "m.",
            Part::V => "v.",
            Part::Master => "master.",
        }
    }
}

/// Write the tensors of several flat vectors, each with a prefix of its names, as a checkpoint in `dir`.
pub(super) fn write(dir: &Path, layout: &Layout, dtype: Dtype, parts: &[(&str, &[f32])]) -> Result<(), WriteError> {
    let stored = match dtype {
        Dtype::F32 => StoredDtype::F32,
        Dtype::F16 => StoredDtype::F16,
        Dtype::Bf16 => StoredDtype::BF16,
    };
    let mut plan = Vec::new();
    let mut numbers = HashMap::new();
    for (prefix, values) in parts {
        for tensor in &layout.tensors {
            let name = format!("{prefix}{}", tensor.name);
            numbers.insert(name.clone(), &values[tensor.range.clone()]);
            plan.push(PlannedTensor { name, dtype: stored, shape: tensor.shape.clone() });
        }
    }
    let mut writer = CheckpointWriter::create(dir, plan, DEFAULT_MAX_SHARD_BYTES)?;
    let order: Vec<String> = writer.tensors().iter().map(|tensor| tensor.name.clone()).collect();
    for name in order {
        for chunk in numbers[&name].chunks(CHUNK_LEN) {
            match dtype {
                Dtype::F32 => writer.append(bytemuck::cast_slice(chunk))?,
                Dtype::F16 => writer.append(bytemuck::cast_slice(&round(chunk, f16::from_f32)))?,
                Dtype::Bf16 => writer.append(bytemuck::cast_slice(&round(chunk, bf16::from_f32)))?,
            }
        }
    }
    writer.finish()
}

fn round<T>(numbers: &[f32], to: fn(f32) -> T) -> Vec<T> {
    numbers.iter().map(|&x| to(x)).collect()
}

/// The tensors of `layout`, with `prefix` before their names, as one flat vector.
///
/// # Errors
/// If one is missing, or of another shape or type; the text names it.
pub(super) fn read(checkpoint: &Checkpoint, prefix: &str, layout: &Layout) -> Result<Vec<f32>, String> {
    let mut numbers = Vec::with_capacity(layout.len);
    for tensor in &layout.tensors {
        let name = format!("{prefix}{}", tensor.name);
        let stored = checkpoint.get(&name).ok_or_else(|| format!("{name}: missing"))?;
        if stored.shape() != tensor.shape {
            return Err(format!("{name}: shape is {:?}, should be {:?}", stored.shape(), tensor.shape));
        }
        decode(stored, &mut numbers).map_err(|dtype| format!("{name}: dtype is {dtype}"))?;
        // The numbers are in memory once.
        stored.release();
    }
    Ok(numbers)
}

/// Append a tensor's numbers; the error is a type that is not of numbers that weights have.
fn decode(tensor: &StoredTensor, numbers: &mut Vec<f32>) -> Result<(), StoredDtype> {
    let (words, halves) = (tensor.bytes().as_chunks::<4>().0, tensor.bytes().as_chunks::<2>().0);
    match tensor.dtype() {
        StoredDtype::F32 => numbers.extend(words.iter().map(|&bytes| f32::from_le_bytes(bytes))),
        StoredDtype::F16 => numbers.extend(halves.iter().map(|&bytes| f16::from_le_bytes(bytes).to_f32())),
        StoredDtype::BF16 => numbers.extend(halves.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32())),
        other => return Err(other),
    }
    Ok(())
}

/// The weights of the checkpoint in `dir`, of any type, for the network that `config` describes, as one flat vector.
///
/// # Errors
/// If the checkpoint cannot be read, or its tensors are not those of the network; every one that does not fit is named.
pub fn load_weights(dir: &Path, config: &ModelConfig, layout: &Layout) -> Result<Vec<f32>, CheckpointError> {
    let checkpoint = Checkpoint::open(dir, LoadMode::Mmap, &|_, _| ())?;
    let problems = tensor_problems(config, &checkpoint);
    if !problems.is_empty() {
        return Err(CheckpointError::Tensors { dir: dir.display().to_string(), problems });
    }
    Ok(read(&checkpoint, "", layout).expect("the tensors have just been checked"))
}

/// The first tensor that two networks do not share: its name, and its shape in both.
pub(super) fn first_difference(found: &ModelConfig, expected: &ModelConfig) -> Option<(String, String, String)> {
    let shapes = |config| -> BTreeMap<String, Vec<usize>> {
        expected_tensors(config).into_iter().map(|spec| (spec.name, spec.shape)).collect()
    };
    let [found, expected] = [found, expected].map(shapes);
    let name = expected.keys().chain(found.keys()).find(|&name| found.get(name) != expected.get(name))?;
    let text =
        |shapes: &BTreeMap<_, _>| shapes.get(name).map_or_else(|| "absent".to_owned(), |shape| format!("{shape:?}"));
    Some((name.clone(), text(&found), text(&expected)))
}
