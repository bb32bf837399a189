//! The official int8 checkpoints (msmodelslim): which tensors hold a weight, and what they mean.
//!
//! A description names the type of every tensor. Next to an int8 `X.weight`, `[out, in]`, there are, by type:
//!
//! - `W8A8_DYNAMIC`: `X.weight_scale`, `[out]` or `[out, 1]`; `X.weight_offset`, all zero. Weight = scale * level.
//! - `W8A8`, for inputs of one fixed scale: `X.input_scale` and `X.input_offset`, one number each; `X.quant_bias`, int32
//!   `[out]`; `X.deq_scale`, `[out]`, f32 or int64 that carries the bits of an f32. What it computes is
//!   `y = ((x / input_scale + input_offset) . level + quant_bias) * deq_scale`, so for inputs with a scale of their own the
//!   weight is `deq_scale / input_scale * level`, and the bias `(quant_bias + input_offset * sum of levels) * deq_scale`.
//!
//! What else such checkpoints may have is left out where it changes nothing here (scales of an int8 KV cache), else refused
//! by name.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use moge_model::{Checkpoint, LoadMode, ModelConfig, StoredTensor, TensorProblem, TensorSpec, read_file};
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::damage::role_name;
use crate::error::QuantizeError;
use crate::source::{Input, Item, refuse, tensor_for};

/// How the names of a description, of an index and of weight files begin.
const DESCRIPTION_PREFIX: &str = "quant_model_description";
const WEIGHTS_PREFIX: &str = "quant_model_weight";

/// Largest remainder of a bias that is rounding: half a step of the int32 that was stored, and as much again.
const MAX_ROUNDING: f64 = 1.0;

/// An int8 weight.
#[derive(Clone, Debug)]
pub(crate) struct Levels {
    /// `[out, in]`.
    pub(crate) levels: StoredTensor,
    /// `[out]`.
    scales: StoredTensor,
    scale_divisor: f32,
    /// The bias that must vanish, as the network has no place for it.
    vanishing_bias: Option<StaticBias>,
}

/// A bias that is folded into what a static weight has.
#[derive(Clone, Debug)]
pub(crate) struct StaticBias {
    /// `[out, in]`.
    pub(crate) levels: StoredTensor,
    quant_bias: StoredTensor,
    input_offset: f64,
    deq_scale: StoredTensor,
}

/// The type of a tensor in the description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Float,
    Static,
    Dynamic,
}

/// An int8 checkpoint.
#[derive(Debug)]
pub(crate) struct Import {
    dir: PathBuf,
    description_file: String,
    types: Map<String, Value>,
    checkpoint: Checkpoint,
}

impl Levels {
    /// Scales of the rows from `first_row` on, as many as `out` has.
    pub(crate) fn scales(&self, first_row: usize, out: &mut [f32]) {
        for (row, scale) in (first_row..).zip(out) {
            *scale = number(&self.scales, row) as f32 / self.scale_divisor;
        }
    }

    /// True if the bias of row `row` with the levels `levels` vanishes, or there is none.
    pub(crate) fn bias_vanishes(&self, row: usize, levels: &[i8]) -> bool {
        self.vanishing_bias.as_ref().is_none_or(|bias| {
            let shift = bias.input_offset * sum(levels);
            // The int32 may come from arithmetic in f32.
            (number(&bias.quant_bias, row) + shift).abs() <= MAX_ROUNDING + f64::from(f32::EPSILON) * shift.abs()
        })
    }
}

impl StaticBias {
    /// The bias, `[out]`.
    pub(crate) fn numbers(&self) -> Vec<f32> {
        let cols = self.levels.shape()[1];
        let rows = self.levels.bytes().chunks_exact(cols).enumerate();
        let bias = rows.map(|(row, levels)| {
            let sum = sum(bytemuck::cast_slice(levels));
            (number(&self.quant_bias, row) + self.input_offset * sum) * number(&self.deq_scale, row)
        });
        bias.map(|bias| bias as f32).collect()
    }
}

fn sum(levels: &[i8]) -> f64 {
    levels.iter().map(|&level| i64::from(level)).sum::<i64>() as f64
}

/// Number `index` of a tensor of a type that [`Import::check_numbers`] allows; int64 carries the bits of an f32.
fn number(tensor: &StoredTensor, index: usize) -> f64 {
    let bytes = tensor.bytes();
    match tensor.dtype() {
        Dtype::F32 => f32::from_le_bytes(element(bytes, index)).into(),
        Dtype::F16 => half::f16::from_le_bytes(element(bytes, index)).into(),
        Dtype::BF16 => half::bf16::from_le_bytes(element(bytes, index)).into(),
        Dtype::I32 => i32::from_le_bytes(element(bytes, index)).into(),
        Dtype::I8 => i8::from_le_bytes(element(bytes, index)).into(),
        Dtype::I64 => f32::from_bits(i64::from_le_bytes(element(bytes, index)) as u32).into(),
        dtype => unreachable!("{dtype:?} was refused"),
    }
}

fn element<const N: usize>(bytes: &[u8], index: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[index * N + i])
}

impl Import {
    /// Open the int8 checkpoint in `dir`; `None` if what is there has no description.
    pub(crate) fn find(dir: &Path) -> Result<Option<Import>, QuantizeError> {
        let Some(description) = find_one(dir, DESCRIPTION_PREFIX, ".json")? else { return Ok(None) };
        let description_file = description.display().to_string();
        let bad = |problem: String| QuantizeError::Description {
            file: description_file.clone(),
            field: "(whole file)".to_owned(),
            problem,
        };
        let bytes = read_file(&description).map_err(|error| bad(error.to_string()))?;
        let types = serde_json::from_slice(&bytes).map_err(|error| bad(format!("not a JSON object: {error}")))?;
        let weights = match find_one(dir, WEIGHTS_PREFIX, ".safetensors.index.json")? {
            Some(index) => Some(index),
            None => find_one(dir, WEIGHTS_PREFIX, ".safetensors")?,
        };
        let checkpoint = match weights {
            Some(file) => Checkpoint::open_named(&file, LoadMode::Mmap, &|_, _| ())?,
            None => Checkpoint::open(dir, LoadMode::Mmap, &|_, _| ())?,
        };
        Ok(Some(Import { dir: dir.to_owned(), description_file, types, checkpoint }))
    }

    /// What the tensors of `specs` are made of; `config` is that of the checkpoint.
    pub(crate) fn items(&self, config: &ModelConfig, specs: Vec<TensorSpec>) -> Result<Vec<Item>, QuantizeError> {
        let expected: HashSet<String> = specs.iter().map(|spec| spec.name.clone()).collect();
        let mut used = HashSet::new();
        let mut items = Vec::new();
        let mut problems = Vec::new();
        for spec in specs {
            match self.input(config, &spec, &expected, &mut used)? {
                Ok(input) => items.push(Item { spec, input }),
                Err(problem) => problems.push(problem),
            }
        }
        for (name, tensor) in self.checkpoint.tensors().filter(|(name, _)| !used.contains(*name)) {
            if !self.is_ignored(config, name, tensor)? {
                problems.push(TensorProblem::Unexpected { name: name.to_owned(), shape: tensor.shape().to_vec() });
            }
        }
        refuse(&self.dir, problems)?;
        Ok(items)
    }

    /// Where the numbers of one tensor come from, or what is wrong with the tensor that has its name.
    fn input(
        &self,
        config: &ModelConfig,
        spec: &TensorSpec,
        expected: &HashSet<String>,
        used: &mut HashSet<String>,
    ) -> Result<Result<Input, TensorProblem>, QuantizeError> {
        let name = &spec.name;
        used.insert(name.clone());
        if let Some(base) = name.strip_suffix(".bias") {
            let weight = format!("{base}.weight");
            if self.kind(&weight)? == Kind::Static {
                return Ok(Ok(Input::Bias(self.static_bias(base, &[spec.shape[0]], used)?)));
            }
        }
        let Some(tensor) = tensor_for(&self.checkpoint, config, name) else {
            return Ok(Err(TensorProblem::Missing { name: name.clone(), shape: spec.shape.clone() }));
        };
        if tensor.shape() != spec.shape {
            let (found, expected) = (tensor.shape().to_vec(), spec.shape.clone());
            return Ok(Err(TensorProblem::Shape { name: name.clone(), found, expected }));
        }
        let kind = self.kind(name)?;
        let allowed = if kind == Kind::Float { "F32, F16, BF16" } else { "I8" };
        let is_allowed = match kind {
            Kind::Float => matches!(tensor.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16),
            Kind::Static | Kind::Dynamic => tensor.dtype() == Dtype::I8,
        };
        if !is_allowed {
            let found = format!("{:?}", tensor.dtype());
            return Ok(Err(TensorProblem::Dtype { name: name.clone(), found, allowed }));
        }
        if kind == Kind::Float {
            return Ok(Ok(Input::Floats(tensor.clone())));
        }
        if spec.packed.is_none() {
            return Err(self.bad_tensor(name, "is int8 and cannot stay so; allowed for it: w8a8, w4a8".to_owned()));
        }
        let base = name.strip_suffix(".weight").unwrap_or(name);
        Ok(Ok(Input::Levels(self.levels(base, kind, tensor, expected, used)?)))
    }

    fn levels(
        &self,
        base: &str,
        kind: Kind,
        levels: &StoredTensor,
        expected: &HashSet<String>,
        used: &mut HashSet<String>,
    ) -> Result<Levels, QuantizeError> {
        let num_rows = levels.shape()[0];
        if kind == Kind::Dynamic {
            let offset = format!("{base}.weight_offset");
            if let Some(tensor) = self.checkpoint.get(&offset) {
                self.check_numbers(&offset, tensor, num_rows)?;
                if let Some(row) = (0..num_rows).find(|&row| number(tensor, row) != 0.0) {
                    let problem = format!("{} at row {row}; allowed: 0, as in symmetric weights", number(tensor, row));
                    return Err(self.bad_tensor(&offset, problem));
                }
                used.insert(offset);
            }
            let scales = self.part(base, "weight_scale", "W8A8_DYNAMIC", num_rows, used)?;
            return Ok(Levels { levels: levels.clone(), scales, scale_divisor: 1.0, vanishing_bias: None });
        }
        let input_scale = self.part(base, "input_scale", "W8A8", 1, used)?;
        let scale_divisor = number(&input_scale, 0) as f32;
        if !scale_divisor.is_normal() {
            let problem = format!("{scale_divisor}; allowed: a scale, which is above 0");
            return Err(self.bad_tensor(&format!("{base}.input_scale"), problem));
        }
        let bias = self.static_bias(base, levels.shape(), used)?;
        let scales = bias.deq_scale.clone();
        let vanishing_bias = if expected.contains(&format!("{base}.bias")) { None } else { Some(bias) };
        Ok(Levels { levels: levels.clone(), scales, scale_divisor, vanishing_bias })
    }

    /// The bias that the static weight `base` holds; `shape` begins with its rows.
    fn static_bias(
        &self,
        base: &str,
        shape: &[usize],
        used: &mut HashSet<String>,
    ) -> Result<StaticBias, QuantizeError> {
        let num_rows = shape[0];
        let weight = format!("{base}.weight");
        let levels = self.checkpoint.get(&weight).filter(|tensor| tensor.shape().len() == 2);
        let Some(levels) = levels.filter(|tensor| tensor.dtype() == Dtype::I8 && tensor.shape()[0] == num_rows) else {
            return Err(self.bad_tensor(&weight, format!("missing, or not {num_rows} rows of I8")));
        };
        Ok(StaticBias {
            levels: levels.clone(),
            quant_bias: self.part(base, "quant_bias", "W8A8", num_rows, used)?,
            input_offset: number(&self.part(base, "input_offset", "W8A8", 1, used)?, 0),
            deq_scale: self.part(base, "deq_scale", "W8A8", num_rows, used)?,
        })
    }

    /// The tensor `base.suffix`, which a weight of type `kind` needs: `len` finite numbers.
    fn part(
        &self,
        base: &str,
        suffix: &str,
        kind: &str,
        len: usize,
        used: &mut HashSet<String>,
    ) -> Result<StoredTensor, QuantizeError> {
        let name = format!("{base}.{suffix}");
        let Some(tensor) = self.checkpoint.get(&name) else {
            return Err(self.bad_tensor(&name, format!("missing; {base}.weight is {kind} and needs it")));
        };
        self.check_numbers(&name, tensor, len)?;
        used.insert(name);
        Ok(tensor.clone())
    }

    fn check_numbers(&self, name: &str, tensor: &StoredTensor, len: usize) -> Result<(), QuantizeError> {
        let (shape, dtype) = (tensor.shape(), tensor.dtype());
        let is_vector = shape.iter().product::<usize>() == len && shape.iter().all(|&size| size == 1 || size == len);
        if !is_vector {
            return Err(self.bad_tensor(name, format!("shape is {shape:?}, should be [{len}] or [{len}, 1]")));
        }
        let is_integer = matches!(dtype, Dtype::I32 | Dtype::I8);
        let is_float = matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        let allowed = match name.rsplit('.').next() {
            Some("deq_scale") if is_float || dtype == Dtype::I64 => None,
            Some("deq_scale") => Some("F32, F16, BF16, or I64 with the bits of F32"),
            Some("quant_bias") if dtype == Dtype::I32 => None,
            Some("quant_bias") => Some("I32"),
            Some("input_offset" | "weight_offset") if is_float || is_integer => None,
            Some("input_offset" | "weight_offset") => Some("F32, F16, BF16, I8, I32"),
            _ if is_float => None,
            _ => Some("F32, F16, BF16"),
        };
        if let Some(allowed) = allowed {
            return Err(self.bad_tensor(name, format!("dtype is {dtype:?}, allowed are {allowed}")));
        }
        match (0..len).find(|&index| !number(tensor, index).is_finite()) {
            Some(index) => Err(self.bad_tensor(name, format!("{} at {index}", number(tensor, index)))),
            None => Ok(()),
        }
    }

    /// What the description says of a tensor. What it does not name is a float.
    fn kind(&self, name: &str) -> Result<Kind, QuantizeError> {
        match self.types.get(name).map(|kind| (kind, kind.as_str())) {
            None | Some((_, Some("FLOAT"))) => Ok(Kind::Float),
            Some((_, Some("W8A8"))) => Ok(Kind::Static),
            Some((_, Some("W8A8_DYNAMIC"))) => Ok(Kind::Dynamic),
            Some((kind, _)) => Err(QuantizeError::Description {
                file: self.description_file.clone(),
                field: name.to_owned(),
                problem: format!("{kind} is not implemented; there are FLOAT, W8A8, W8A8_DYNAMIC"),
            }),
        }
    }

    /// True if a tensor that has no place changes nothing.
    fn is_ignored(&self, config: &ModelConfig, name: &str, tensor: &StoredTensor) -> Result<bool, QuantizeError> {
        // The KV cache has a precision and scales of its own, whatever these were measured for.
        let is_left_over = ["rotary_emb.inv_freq", "kv_cache_scale", "kv_cache_offset"];
        if is_left_over.iter().any(|part| name.contains(part)) {
            return Ok(true);
        }
        if name.ends_with("norm.bias") && matches!(tensor.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let len = tensor.shape().iter().product();
            if (0..len).all(|index| number(tensor, index) == 0.0) {
                return Ok(true);
            }
            let problem = "a norm with a bias, as some outlier suppression makes, is not implemented; allowed: zeros";
            return Err(self.bad_tensor(name, problem.to_owned()));
        }
        Ok(config.tie_word_embeddings && name == "lm_head.weight")
    }

    fn bad_tensor(&self, name: &str, problem: String) -> QuantizeError {
        QuantizeError::Tensor { dir: self.dir.display().to_string(), name: name.to_owned(), problem }
    }
}

/// The file in `dir` whose name begins and ends so; `None` if there is none.
fn find_one(dir: &Path, prefix: &str, suffix: &str) -> Result<Option<PathBuf>, QuantizeError> {
    // A directory that cannot be listed is reported by the one who reads its config.
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut found: Vec<String> = names.filter(|name| name.starts_with(prefix) && name.ends_with(suffix)).collect();
    found.sort();
    match &found[..] {
        [] => Ok(None),
        [name] => Ok(Some(dir.join(name))),
        [first, second, ..] => Err(QuantizeError::Description {
            file: dir.join(first).display().to_string(),
            field: "(file name)".to_owned(),
            problem: format!("{second} is there, too; allowed: one {prefix}*{suffix}"),
        }),
    }
}

/// That row `row` of the tensor `name` has a bias that its projection has no place for.
pub(crate) fn misplaced_bias(dir: &Path, item: &Item, row: usize) -> QuantizeError {
    let role = item.spec.packed.map_or("", |packed| role_name(packed.role));
    QuantizeError::Tensor {
        dir: dir.display().to_string(),
        name: item.spec.name.replace(".weight", ".quant_bias"),
        problem: format!("row {row} is a bias, and by config.json this projection ({role}) has none; allowed: 0"),
    }
}
