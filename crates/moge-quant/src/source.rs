//! What is quantised: a checkpoint in a float type, or an int8 checkpoint of another program.

use std::path::{Path, PathBuf};

use moge_model::{
    Checkpoint, CheckpointError, ConfigError, LoadMode, ModelConfig, PlannedTensor, QuantScheme, StoredTensor,
    TensorSpec, expected_tensors, read_file, source_name, tensor_problems,
};
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::error::QuantizeError;
use crate::import::{Import, Levels, StaticBias};

/// A checkpoint, opened and checked, and what will be made of it.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) dir: PathBuf,
    pub(crate) config: ModelConfig,
    /// Of the output.
    pub(crate) config_json: Map<String, Value>,
    /// The tensors of the output.
    pub(crate) items: Vec<Item>,
}

/// A tensor of the output, and where its numbers come from.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) spec: TensorSpec,
    pub(crate) input: Input,
}

/// Where numbers come from.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    /// A tensor of floats.
    Floats(StoredTensor),
    /// A tensor of int8 with scales.
    Levels(Levels),
    /// A bias that other tensors hold.
    Bias(StaticBias),
}

impl Source {
    /// Open the checkpoint in `dir`, to be quantised as `scheme` says.
    ///
    /// # Errors
    /// If it is refused, or does not fit its config or `scheme`.
    pub(crate) fn open(dir: &Path, scheme: &QuantScheme) -> Result<Source, QuantizeError> {
        let import = Import::find(dir)?;
        let (config, mut config_json) = load_config(dir, import.is_some())?;
        if !config.quant.is_none() {
            return Err(QuantizeError::AlreadyQuantized { dir: dir.to_owned() });
        }
        let packed_config = ModelConfig { quant: scheme.clone(), ..config.clone() };
        let specs = expected_tensors(&packed_config);
        refuse(dir, specs.iter().filter_map(TensorSpec::width_problem).collect())?;
        let items = match import {
            Some(import) => import.items(&config, specs)?,
            None => {
                let checkpoint = Checkpoint::open(dir, LoadMode::Mmap, &|_, _| ())?;
                refuse(dir, tensor_problems(&config, &checkpoint))?;
                let floats = |spec: TensorSpec| {
                    let tensor = checkpoint.get(source_name(&config, &spec.name)).expect("checked to be there");
                    Item { input: Input::Floats(tensor.clone()), spec }
                };
                specs.into_iter().map(floats).collect()
            }
        };
        config_json.insert("quantization_config".to_owned(), scheme.to_json());
        Ok(Source { dir: dir.to_owned(), config, config_json, items })
    }
}

/// `config.json`, checked and as it lies. That of an int8 checkpoint may say how it was quantised, which its description
/// says better.
fn load_config(dir: &Path, is_import: bool) -> Result<(ModelConfig, Map<String, Value>), QuantizeError> {
    let path = dir.join("config.json");
    let file = path.display().to_string();
    if !is_import {
        ModelConfig::load(dir)?;
    }
    let bytes = read_file(&path).map_err(|source| ConfigError::Read { file: file.clone(), source })?;
    let mut fields: Map<String, Value> = serde_json::from_slice(&bytes)
        .map_err(|error| ConfigError::NotJson { file: file.clone(), problem: error.to_string() })?;
    if is_import {
        for field in ["quantization_config", "quantize"] {
            fields.remove(field);
        }
    }
    let bytes = serde_json::to_vec(&fields).expect("it was JSON");
    Ok((ModelConfig::from_json(&bytes, &file)?, fields))
}

/// Fail if there are problems.
pub(crate) fn refuse(dir: &Path, problems: Vec<moge_model::TensorProblem>) -> Result<(), QuantizeError> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(CheckpointError::Tensors { dir: dir.display().to_string(), problems }.into())
}

impl Item {
    /// As it will be written.
    pub(crate) fn planned(&self) -> PlannedTensor {
        let dtype = match (&self.spec.packed, &self.input) {
            (Some(_), _) => Dtype::U8,
            (None, Input::Floats(tensor)) => tensor.dtype(),
            (None, _) => Dtype::F32,
        };
        PlannedTensor { name: self.spec.name.clone(), dtype, shape: self.spec.stored_shape() }
    }

    /// The large tensor that is read for it.
    pub(crate) fn tensor(&self) -> &StoredTensor {
        match &self.input {
            Input::Floats(tensor) => tensor,
            Input::Levels(levels) => &levels.levels,
            Input::Bias(bias) => &bias.levels,
        }
    }
}
