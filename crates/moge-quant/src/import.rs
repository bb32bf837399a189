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

use moge_kernels::PackedFormat;
use moge_model::{
    Checkpoint, LoadMode, ModelConfig, QuantScheme, StoredTensor, TensorProblem, TensorSpec, WeightRole,
    expected_tensors, read_file, source_name,
};
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::error::QuantizeError;
use crate::item::{Input, Item, Levels, StaticBias, int64, number, refuse};
use crate::rounding::role_name;

/// How the names of a description, of an index and of weight files begin.
const DESCRIPTION_PREFIX: &str = "quant_model_description";
const WEIGHTS_PREFIX: &str = "quant_model_weight";

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

/// True if `value` is 32 bits, extended by zeros or by their sign.
fn is_f32(value: i64) -> bool {
    u32::try_from(value).is_ok() || i32::try_from(value).is_ok()
}

/// What was found while the tensors of a network were looked for.
struct Search<'a> {
    import: &'a Import,
    config: &'a ModelConfig,
    /// Names of the tensors that the network has.
    expected: HashSet<String>,
    /// Names of the tensors of the checkpoint that have a place.
    used: HashSet<String>,
    /// What is wrong with tensors that the network has.
    problems: Vec<TensorProblem>,
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
        let expected = specs.iter().map(|spec| spec.name.clone()).collect();
        let mut search = Search { import: self, config, expected, used: HashSet::new(), problems: Vec::new() };
        let mut items = Vec::new();
        for spec in specs {
            if let Some(input) = search.input(&spec)? {
                items.push(Item { spec, input });
            }
        }
        for (name, tensor) in self.checkpoint.tensors() {
            if !search.used.contains(name) && !self.is_ignored(config, name, tensor)? {
                let (name, shape) = (name.to_owned(), tensor.shape().to_vec());
                search.problems.push(TensorProblem::Unexpected { name, shape });
            }
        }
        refuse(&self.dir, search.problems)?;
        Ok(items)
    }

    /// Refuse a tensor that is not `len` finite numbers of a type that its name allows.
    fn check_numbers(&self, name: &str, tensor: &StoredTensor, len: usize) -> Result<(), QuantizeError> {
        let (shape, dtype) = (tensor.shape(), tensor.dtype());
        let is_vector = shape.iter().product::<usize>() == len && shape.iter().all(|&size| size == 1 || size == len);
        if !is_vector {
            return Err(self.bad_tensor(name, format!("shape is {shape:?}, should be [{len}] or [{len}, 1]")));
        }
        let (is_allowed, allowed) = match name.rsplit('.').next() {
            Some("deq_scale") => {
                (is_float(dtype) || dtype == Dtype::I64, "F32, F16, BF16, or I64 with the bits of F32")
            }
            Some("quant_bias") => (dtype == Dtype::I32, "I32"),
            Some("input_offset" | "weight_offset") => {
                (is_float(dtype) || matches!(dtype, Dtype::I8 | Dtype::I32), "F32, F16, BF16, I8, I32")
            }
            _ => (is_float(dtype), "F32, F16, BF16"),
        };
        if !is_allowed {
            return Err(self.bad_tensor(name, format!("dtype is {dtype:?}, allowed are {allowed}")));
        }
        if dtype == Dtype::I64
            && let Some((index, value)) = (0..len).map(|index| (index, int64(tensor, index))).find(|(_, x)| !is_f32(*x))
        {
            let problem = format!("{value} at {index}; allowed: the bits of an F32, in the lower half of the I64");
            return Err(self.bad_tensor(name, problem));
        }
        match (0..len).find(|&index| !number(tensor, index).is_finite()) {
            Some(index) => Err(self.bad_tensor(name, format!("{} at {index}", number(tensor, index)))),
            None => Ok(()),
        }
    }

    /// What the description says of a weight. What it does not name is a float, and so is what is no weight: there the
    /// description has the type of the projection that it belongs to.
    fn kind(&self, name: &str) -> Result<Kind, QuantizeError> {
        if !name.ends_with(".weight") {
            return Ok(Kind::Float);
        }
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
        const LEFT_OVER: [&str; 3] = [".rotary_emb.inv_freq", ".kv_cache_scale", ".kv_cache_offset"];
        if LEFT_OVER.iter().any(|suffix| name.ends_with(suffix)) {
            return Ok(true);
        }
        if name.ends_with("norm.bias") && is_float(tensor.dtype()) {
            let len = tensor.shape().iter().product();
            if (0..len).all(|index| number(tensor, index) == 0.0) {
                return Ok(true);
            }
            let problem = "a norm with a bias, as some outlier suppression makes, is not implemented; allowed: zeros";
            return Err(self.bad_tensor(name, problem.to_owned()));
        }
        // The embedding's copy, where the head is not packed.
        Ok(config.tie_word_embeddings && name == "lm_head.weight")
    }

    fn bad_tensor(&self, name: &str, problem: String) -> QuantizeError {
        QuantizeError::Tensor { dir: self.dir.display().to_string(), name: name.to_owned(), problem }
    }
}

impl Search<'_> {
    /// Where the numbers of one tensor come from; none if the tensor that has its name is not what the network needs.
    fn input(&mut self, spec: &TensorSpec) -> Result<Option<Input>, QuantizeError> {
        let name = &spec.name;
        self.used.insert(name.clone());
        if let Some(base) = name.strip_suffix(".bias")
            && self.import.kind(&format!("{base}.weight"))? == Kind::Static
        {
            return Ok(Some(Input::Bias(self.static_bias(base, spec.shape[0])?)));
        }
        let name = source_name(self.config, name);
        let kind = self.import.kind(name)?;
        if kind != Kind::Float && spec.packed.is_none() {
            return Err(self.import.bad_tensor(name, self.why_not_int8(name)));
        }
        let Some(tensor) = self.tensor(spec, kind) else { return Ok(None) };
        if kind == Kind::Float {
            return Ok(Some(Input::Floats(tensor)));
        }
        let base = name.strip_suffix(".weight").unwrap_or(name);
        Ok(Some(Input::Levels(self.levels(base, kind, tensor)?)))
    }

    /// Why the tensor `name`, which the scheme leaves as it is, may not be int8.
    fn why_not_int8(&self, name: &str) -> String {
        let packed = ModelConfig { quant: QuantScheme::uniform(PackedFormat::W8A8), ..self.config.clone() };
        let spec = expected_tensors(&packed).into_iter().find(|spec| spec.name == name);
        match spec.and_then(|spec| spec.packed).map(|packed| packed.role) {
            None => "is described as int8; it must be FLOAT (F32, F16, BF16)".to_owned(),
            Some(role) => {
                let option = match role {
                    WeightRole::RoutedExpert | WeightRole::DenseMlp => "scheme".to_owned(),
                    role => role_name(role).replace('_', "-"),
                };
                format!("int8 weights cannot stay as they are; give --{option} w8a8 or w4a8")
            }
        }
    }

    /// The tensor for `spec`, of the right shape and type for its kind; else the problem is noted.
    fn tensor(&mut self, spec: &TensorSpec, kind: Kind) -> Option<StoredTensor> {
        let name = source_name(self.config, &spec.name).to_owned();
        let Some(tensor) = self.import.checkpoint.get(&name) else {
            self.problems.push(TensorProblem::Missing { name, shape: spec.shape.clone() });
            return None;
        };
        if tensor.shape() != spec.shape {
            let (found, expected) = (tensor.shape().to_vec(), spec.shape.clone());
            self.problems.push(TensorProblem::Shape { name, found, expected });
            return None;
        }
        let (is_allowed, allowed) = match kind {
            Kind::Float => (is_float(tensor.dtype()), "F32, F16, BF16"),
            Kind::Static | Kind::Dynamic => (tensor.dtype() == Dtype::I8, "I8"),
        };
        if !is_allowed {
            let found = format!("{:?}", tensor.dtype());
            self.problems.push(TensorProblem::Dtype { name, found, allowed });
            return None;
        }
        Some(tensor.clone())
    }

    /// The int8 weight of `base`, `levels`, with its scales.
    fn levels(&mut self, base: &str, kind: Kind, levels: StoredTensor) -> Result<Levels, QuantizeError> {
        let num_rows = levels.shape()[0];
        if kind == Kind::Dynamic {
            self.check_weight_offset(base, num_rows)?;
            let scales = self.part(base, "weight_scale", "W8A8_DYNAMIC", num_rows)?;
            return Ok(Levels { levels, scales, scale_divisor: 1.0, vanishing_bias: None });
        }
        let input_scale = self.part(base, "input_scale", "W8A8", 1)?;
        let scale_divisor = number(&input_scale, 0) as f32;
        if !scale_divisor.is_normal() || scale_divisor < 0.0 {
            let problem = format!("{scale_divisor}; allowed: a scale, which is above 0");
            return Err(self.import.bad_tensor(&format!("{base}.input_scale"), problem));
        }
        let bias = self.static_bias(base, num_rows)?;
        let scales = bias.deq_scale.clone();
        if let Some(row) = (0..num_rows).find(|&row| !(number(&scales, row) as f32 / scale_divisor).is_finite()) {
            let problem = format!("{} at {row}, over {scale_divisor}, is no number", number(&scales, row));
            return Err(self.import.bad_tensor(&format!("{base}.deq_scale"), problem));
        }
        let has_place = self.expected.contains(&format!("{base}.bias"));
        Ok(Levels { levels, scales, scale_divisor, vanishing_bias: (!has_place).then_some(bias) })
    }

    /// The bias, `[num_rows]`, that the static weight `base` holds.
    fn static_bias(&mut self, base: &str, num_rows: usize) -> Result<StaticBias, QuantizeError> {
        let weight = format!("{base}.weight");
        let is_right = |tensor: &&StoredTensor| {
            tensor.dtype() == Dtype::I8 && matches!(tensor.shape(), &[rows, cols] if rows == num_rows && cols > 0)
        };
        let Some(levels) = self.import.checkpoint.get(&weight).filter(is_right) else {
            return Err(self.import.bad_tensor(&weight, format!("missing, or not {num_rows} rows of I8")));
        };
        Ok(StaticBias {
            levels: levels.clone(),
            quant_bias: self.part(base, "quant_bias", "W8A8", num_rows)?,
            input_offset: number(&self.part(base, "input_offset", "W8A8", 1)?, 0),
            deq_scale: self.part(base, "deq_scale", "W8A8", num_rows)?,
        })
    }

    /// Refuse a weight that is not symmetric.
    fn check_weight_offset(&mut self, base: &str, num_rows: usize) -> Result<(), QuantizeError> {
        let name = format!("{base}.weight_offset");
        let Some(tensor) = self.import.checkpoint.get(&name) else { return Ok(()) };
        self.import.check_numbers(&name, tensor, num_rows)?;
        if let Some(row) = (0..num_rows).find(|&row| number(tensor, row) != 0.0) {
            let problem = format!("{} at row {row}; allowed: 0, as in symmetric weights", number(tensor, row));
            return Err(self.import.bad_tensor(&name, problem));
        }
        self.used.insert(name);
        Ok(())
    }

    /// The tensor `base.suffix`, which a weight of type `kind` needs: `len` finite numbers.
    fn part(&mut self, base: &str, suffix: &str, kind: &str, len: usize) -> Result<StoredTensor, QuantizeError> {
        let name = format!("{base}.{suffix}");
        let Some(tensor) = self.import.checkpoint.get(&name) else {
            return Err(self.import.bad_tensor(&name, format!("missing; {base}.weight is {kind} and needs it")));
        };
        self.import.check_numbers(&name, tensor, len)?;
        self.used.insert(name);
        Ok(tensor.clone())
    }
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
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
