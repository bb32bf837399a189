//! The run file, `RUN.toml`, to a checked [`RunConfig`]. What the file can get wrong ends here; `docs/training.md` describes
//! it for its writers.

mod raw;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use moge_kernels::{Dtype, Precision};
use moge_model::{ConfigError, ModelConfig, read_file};
use thiserror::Error;

use crate::network::{MAX_ROWS, TrainMemory};
use raw::{
    RawCompute, RawFormat, RawLoss, RawModel, RawOnBadLine, RawOptimizer, RawOutput, RawPhase, RawRun, RawSource,
};

/// What `model.init` says where weights are drawn.
const RANDOM: &str = "random";

/// No phase may have more tokens; keeps every sum and product of them inside 64 bits.
const MAX_TOKENS: u64 = 1 << 50;

/// No batch of a step may have more rows.
const MAX_BATCH_TOKENS: u64 = 1 << 31;

/// No weight of a mixture may be larger; their sum is a number.
const MAX_WEIGHT: f64 = 1e9;

/// Longest name of a source: its file is called after it.
const MAX_NAME_BYTES: usize = 64;

/// A complete, checked description of a training run; has no invalid state. Paths are as the run file states them, seen
/// from where it lies.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    /// The run file.
    pub file: PathBuf,
    /// What is trained.
    pub model: RunModel,
    /// What is written where.
    pub output: OutputConfig,
    /// How it is computed.
    pub compute: ComputeConfig,
    /// What is added to the cross-entropy.
    pub loss: LossConfig,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// Sources of documents by name; a phase may leave some unused.
    pub sources: BTreeMap<String, SourceConfig>,
    /// Phases in the order in which they are trained; at least one.
    pub phases: Vec<PhaseConfig>,
}

/// `[model]`
#[derive(Clone, Debug, PartialEq)]
pub struct RunModel {
    /// Directory with `config.json` and the tokenizer's files.
    pub dir: PathBuf,
    /// Its `config.json`. Nothing in it is quantised.
    pub config: ModelConfig,
    /// Weights of the first step.
    pub init: Init,
    /// Seed of random weights and of the order of documents.
    pub seed: u64,
}

/// Weights of the first step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Init {
    /// Drawn with the seed.
    Random,
    /// Those of the checkpoint in this directory.
    Checkpoint(PathBuf),
}

/// `[output]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputConfig {
    /// The directory of all that the run writes.
    pub dir: PathBuf,
    /// Steps from one checkpoint to the next; at least 1.
    pub checkpoint_every: u64,
    /// Newest checkpoints that stay; at least 1.
    pub keep: usize,
    /// Type of the weights in checkpoints, f32 or bf16.
    pub dtype: Dtype,
}

/// `[compute]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComputeConfig {
    /// What matrix products round their operands to.
    pub dtype: Precision,
    /// Keep only the inputs of layers for backward, and compute the rest again.
    pub recompute: bool,
}

/// `[loss]`: finite, at least 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossConfig {
    /// Factor of the auxiliary loss that balances experts, alpha of arXiv 2505.21411 §2.
    pub aux: f64,
    /// Factor of the mean square of the logsumexp of router logits.
    pub z: f64,
}

/// `[optimizer]`: AdamW with decoupled weight decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerConfig {
    /// Decay of the mean of gradients, in [0, 1).
    pub beta1: f64,
    /// Decay of the mean of squared gradients, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the latter; above 0, as an f32 too.
    pub eps: f64,
    /// Times the learning rate is what a step takes off a parameter; at least 0.
    pub weight_decay: f64,
    /// Weight decay takes norms, biases and `router_scale` too, not matrices alone.
    pub decay_norms_and_biases: bool,
    /// Norm that the gradient of a step is scaled down to; above 0, infinite for none.
    pub clip: f64,
}

/// `[data.NAME]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceConfig {
    /// Files, or patterns with `*` in the file name.
    pub patterns: Vec<PathBuf>,
    /// What they hold.
    pub format: SourceFormat,
}

/// What the files of a source hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceFormat {
    /// A file is a document.
    Text,
    /// A line is a JSON object, and the string in one field of it a document.
    Jsonl {
        /// The field.
        field: String,
        /// Leave out lines that hold no document, instead of stopping at the first.
        skip_bad_lines: bool,
    },
    /// Safetensors with the tensors `tokens` and `document_offsets`.
    Tokens,
}

/// `[[phases]]`
#[derive(Clone, Debug, PartialEq)]
pub struct PhaseConfig {
    /// For reports.
    pub name: String,
    /// Steps that have all its tokens, the last one rounded up; at least 1.
    pub num_steps: u64,
    /// Rows of a sequence; at most the model's `max_position_embeddings`.
    pub sequence_length: usize,
    /// Rows of a step; a multiple of `micro_batch_tokens`.
    pub batch_tokens: usize,
    /// Rows of one forward and backward; a multiple of `sequence_length`.
    pub micro_batch_tokens: usize,
    /// Learning rates of the first step after the warm-up and of the last step; finite, the first above 0.
    pub learning_rate: [f64; 2],
    /// Steps of the linear warm-up; less than `num_steps`.
    pub warmup_steps: u64,
    /// Weight of each source, above 0; all shares together make the whole.
    pub mixture: BTreeMap<String, f64>,
}

/// Why a run file is refused.
#[derive(Debug, Error)]
pub enum RunConfigError {
    /// It cannot be read.
    #[error("{file}: {source}")]
    Read {
        /// The run file.
        file: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not TOML, has a key that is unknown, lacks one, or has a value of another type.
    #[error("{file}: {problem}")]
    Toml {
        /// The run file.
        file: String,
        /// What is wrong, and where.
        problem: String,
    },
    /// A value that cannot be.
    #[error("{file}: {field}: {problem}")]
    Field {
        /// The run file.
        file: String,
        /// The key.
        field: String,
        /// What was found and what is allowed.
        problem: String,
    },
    /// The model's `config.json` is refused.
    #[error(transparent)]
    Model(#[from] ConfigError),
}

impl RunConfig {
    /// Read and check a run file and the `config.json` that it names.
    ///
    /// # Errors
    /// If a file cannot be read, or a key is unknown or missing, or a value is wrong by itself or beside others.
    pub fn load(path: &Path) -> Result<RunConfig, RunConfigError> {
        let file = path.display().to_string();
        let bytes = read_file(path).map_err(|source| RunConfigError::Read { file: file.clone(), source })?;
        let raw: RawRun = toml::from_slice(&bytes)
            .map_err(|error| RunConfigError::Toml { file: file.clone(), problem: toml_problem(&bytes, &error) })?;
        Checker { file, dir: path.parent().unwrap_or(Path::new("")) }.check(path, raw)
    }

    /// The directory of the run file, which paths in it are seen from.
    pub fn dir(&self) -> &Path {
        self.file.parent().unwrap_or(Path::new(""))
    }

    /// What the run holds in memory.
    pub fn memory(&self) -> TrainMemory {
        TrainMemory::new(&self.model.config, self.max_rows(), self.compute.recompute)
    }

    /// Rows of the largest micro-batch.
    pub(crate) fn max_rows(&self) -> usize {
        self.phases.iter().map(|phase| phase.micro_batch_tokens).max().unwrap_or(0)
    }
}

/// What is wrong with the TOML of a run file in one line, with the line where it is.
fn toml_problem(bytes: &[u8], error: &toml::de::Error) -> String {
    let message = error.message().replace('\n', ", ");
    let Some(span) = error.span() else { return message };
    let (before, after) = bytes.split_at(span.start.min(bytes.len()));
    let start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |place| place + 1);
    let len = after.iter().position(|&byte| byte == b'\n').unwrap_or(after.len());
    let line = String::from_utf8_lossy(&bytes[start..before.len() + len]);
    let number = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
    format!("line {number}: {}: {message}", line.trim())
}

/// Readers of the parts of one file, which name the key when it is wrong.
struct Checker<'a> {
    file: String,
    /// What paths are seen from.
    dir: &'a Path,
}

impl Checker<'_> {
    fn check(&self, path: &Path, raw: RawRun) -> Result<RunConfig, RunConfigError> {
        let model = self.model(&raw.model)?;
        let (compute, micro_batch_tokens) = self.compute(&raw.compute)?;
        let loss = self.loss(&raw.loss)?;
        let optimizer = self.optimizer(&raw.optimizer)?;
        let mut sources = BTreeMap::new();
        for (name, source) in raw.data {
            let config = self.source(&name, source)?;
            sources.insert(name, config);
        }
        let limits = PhaseLimits {
            micro_batch_tokens,
            max_sequence_length: model.config.max_position_embeddings as u64,
            sources: &sources,
        };
        self.ensure(!raw.phases.is_empty(), "phases", "there is none; allowed: at least one [[phases]]")?;
        let phases = raw.phases.into_iter().enumerate();
        let phases = phases.map(|(index, phase)| self.phase(index, phase, &limits)).collect::<Result<_, _>>()?;
        let output = self.output(&raw.output)?;
        Ok(RunConfig { file: path.to_owned(), model, output, compute, loss, optimizer, sources, phases })
    }

    fn model(&self, raw: &RawModel) -> Result<RunModel, RunConfigError> {
        self.ensure(!raw.config.is_empty(), "model.config", "it is empty; allowed: a directory with config.json")?;
        let dir = self.dir.join(&raw.config);
        let config = ModelConfig::load(&dir)?;
        let problem = "its weights are quantised; allowed: a config.json without quantization_config";
        self.ensure(config.quant.is_none(), "model.config", problem)?;
        let problem = "it is empty; allowed: \"random\" or a directory with a checkpoint";
        self.ensure(!raw.init.is_empty(), "model.init", problem)?;
        let init = if raw.init == RANDOM { Init::Random } else { Init::Checkpoint(self.dir.join(&raw.init)) };
        Ok(RunModel { dir, config, init, seed: raw.seed })
    }

    fn output(&self, raw: &RawOutput) -> Result<OutputConfig, RunConfigError> {
        self.ensure(!raw.dir.is_empty(), "output.dir", "it is empty; allowed: a directory")?;
        self.at_least_one("output.checkpoint_every", raw.checkpoint_every)?;
        self.at_least_one("output.keep", raw.keep as u64)?;
        Ok(OutputConfig {
            dir: self.dir.join(&raw.dir),
            checkpoint_every: raw.checkpoint_every,
            keep: raw.keep,
            dtype: raw.dtype.into(),
        })
    }

    /// The section, and the rows that it allows in one forward and backward.
    fn compute(&self, raw: &RawCompute) -> Result<(ComputeConfig, u64), RunConfigError> {
        let rows = raw.micro_batch_tokens;
        let range = 1..=MAX_ROWS as u64;
        self.allow(range.contains(&rows), "compute.micro_batch_tokens", rows, format!("1 to {MAX_ROWS}"))?;
        Ok((ComputeConfig { dtype: raw.dtype.into(), recompute: raw.recompute }, rows))
    }

    fn loss(&self, raw: &RawLoss) -> Result<LossConfig, RunConfigError> {
        for (field, value) in [("loss.aux", raw.aux), ("loss.z", raw.z)] {
            self.allow(value.is_finite() && value >= 0.0, field, value, "a number from 0 on")?;
        }
        Ok(LossConfig { aux: raw.aux, z: raw.z })
    }

    fn optimizer(&self, raw: &RawOptimizer) -> Result<OptimizerConfig, RunConfigError> {
        let &RawOptimizer { beta1, beta2, eps, weight_decay, decay_norms_and_biases, clip } = raw;
        for (field, value) in [("optimizer.beta1", beta1), ("optimizer.beta2", beta2)] {
            self.allow((0.0..1.0).contains(&value), field, value, "a number in [0, 1)")?;
        }
        // Of a weight that never had a gradient the update is 0 / eps, computed in f32.
        let is_allowed = eps.is_finite() && eps >= f64::from(f32::MIN_POSITIVE);
        self.allow(is_allowed, "optimizer.eps", eps, format!("a number of at least {:e}", f32::MIN_POSITIVE))?;
        let is_allowed = weight_decay.is_finite() && weight_decay >= 0.0;
        self.allow(is_allowed, "optimizer.weight_decay", weight_decay, "a number from 0 on")?;
        self.allow(clip > 0.0, "optimizer.clip", clip, "a number above 0, or inf")?;
        Ok(OptimizerConfig { beta1, beta2, eps, weight_decay, decay_norms_and_biases, clip })
    }

    fn source(&self, name: &str, raw: RawSource) -> Result<SourceConfig, RunConfigError> {
        let section = format!("data.{name}");
        // The file of its tokens is called after it.
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let is_name = !name.is_empty() && name.len() <= MAX_NAME_BYTES && name.chars().all(is_plain);
        let problem = format!("not a name; allowed: 1 to {MAX_NAME_BYTES} of the letters a to z, digits, - and _");
        self.ensure(is_name, &section, problem)?;
        let files = format!("{section}.files");
        self.ensure(!raw.files.is_empty(), &files, "it is empty; allowed: at least one file")?;
        let mut patterns = Vec::with_capacity(raw.files.len());
        for pattern in &raw.files {
            let pattern = Path::new(pattern);
            let dir = pattern.parent().unwrap_or(Path::new(""));
            let is_pattern = pattern.file_name().is_some() && !dir.to_string_lossy().contains('*');
            self.allow(is_pattern, &files, format!("{pattern:?}"), "a path of a file, with * in its file name only")?;
            patterns.push(self.dir.join(pattern));
        }
        if raw.format != RawFormat::Jsonl {
            let problem = "only a source in the format \"jsonl\" has it";
            self.ensure(raw.field.is_none(), &format!("{section}.field"), problem)?;
            self.ensure(raw.on_bad_line.is_none(), &format!("{section}.on_bad_line"), problem)?;
        }
        let format = match raw.format {
            RawFormat::Text => SourceFormat::Text,
            RawFormat::Jsonl => SourceFormat::Jsonl {
                field: raw.field.unwrap_or_else(|| "text".to_owned()),
                skip_bad_lines: raw.on_bad_line == Some(RawOnBadLine::Skip),
            },
            RawFormat::Tokens => SourceFormat::Tokens,
        };
        Ok(SourceConfig { patterns, format })
    }

    fn phase(&self, index: usize, raw: RawPhase, limits: &PhaseLimits) -> Result<PhaseConfig, RunConfigError> {
        let field = |name: &str| format!("phases[{index}].{name}");
        let RawPhase { tokens, sequence_length, batch_tokens, .. } = raw;
        let max = limits.max_sequence_length;
        let allowed = format!("1 to {max}, the model's max_position_embeddings");
        self.allow((1..=max).contains(&sequence_length), &field("sequence_length"), sequence_length, allowed)?;
        let is_multiple = (1..=MAX_BATCH_TOKENS).contains(&batch_tokens) && batch_tokens % sequence_length == 0;
        let allowed = format!("a multiple of sequence_length = {sequence_length}, at most {MAX_BATCH_TOKENS}");
        self.allow(is_multiple, &field("batch_tokens"), batch_tokens, allowed)?;
        let micro_batch_tokens = limits.micro_batch_tokens.min(batch_tokens);
        let does_divide = micro_batch_tokens % sequence_length == 0 && batch_tokens % micro_batch_tokens == 0;
        let allowed = format!(
            "a multiple of {} = {sequence_length} that divides {} = {batch_tokens}",
            field("sequence_length"),
            field("batch_tokens")
        );
        self.allow(does_divide, "compute.micro_batch_tokens", limits.micro_batch_tokens, allowed)?;
        self.allow((1..=MAX_TOKENS).contains(&tokens), &field("tokens"), tokens, format!("1 to {MAX_TOKENS}"))?;
        let num_steps = tokens.div_ceil(batch_tokens);
        let warmup_steps = raw.warmup_tokens.div_ceil(batch_tokens);
        let allowed = format!("at most {}, a step less than the phase", (num_steps - 1) * batch_tokens);
        self.allow(warmup_steps < num_steps, &field("warmup_tokens"), raw.warmup_tokens, allowed)?;
        let learning_rate = self.learning_rate(&field("learning_rate"), &raw.learning_rate)?;
        self.mixture(&field("mixture"), &raw.mixture, limits.sources)?;
        Ok(PhaseConfig {
            name: raw.name,
            num_steps,
            sequence_length: sequence_length as usize,
            batch_tokens: batch_tokens as usize,
            micro_batch_tokens: micro_batch_tokens as usize,
            learning_rate,
            warmup_steps,
            mixture: raw.mixture,
        })
    }

    fn learning_rate(&self, field: &str, rates: &[f64]) -> Result<[f64; 2], RunConfigError> {
        let allowed = "[first, last], the first above 0, the last from 0 on";
        match *rates {
            [first, last] if first > 0.0 && last >= 0.0 && first.is_finite() && last.is_finite() => Ok([first, last]),
            _ => Err(self.error(field, format_args!("{rates:?} is not allowed; allowed: {allowed}"))),
        }
    }

    fn mixture(
        &self,
        field: &str,
        mixture: &BTreeMap<String, f64>,
        sources: &BTreeMap<String, SourceConfig>,
    ) -> Result<(), RunConfigError> {
        self.ensure(!mixture.is_empty(), field, "it is empty; allowed: at least one source")?;
        for (name, &weight) in mixture {
            if !sources.contains_key(name) {
                let names: Vec<&str> = sources.keys().map(String::as_str).collect();
                return self.ensure(false, field, format!("no source {name}; allowed: {}", names.join(", ")));
            }
            let field = format!("{field}.{name}");
            let is_allowed = weight > 0.0 && weight <= MAX_WEIGHT;
            self.allow(is_allowed, &field, weight, format!("a number above 0, at most {MAX_WEIGHT}"))?;
        }
        Ok(())
    }

    fn at_least_one(&self, field: &str, value: u64) -> Result<(), RunConfigError> {
        self.allow(value > 0, field, value, "1 or more")
    }

    fn allow(
        &self,
        is_allowed: bool,
        field: &str,
        value: impl Display,
        allowed: impl Display,
    ) -> Result<(), RunConfigError> {
        self.ensure(is_allowed, field, format_args!("{value} is not allowed; allowed: {allowed}"))
    }

    fn ensure(&self, holds: bool, field: &str, problem: impl Display) -> Result<(), RunConfigError> {
        if holds { Ok(()) } else { Err(self.error(field, problem)) }
    }

    fn error(&self, field: &str, problem: impl Display) -> RunConfigError {
        RunConfigError::Field { file: self.file.clone(), field: field.to_owned(), problem: problem.to_string() }
    }
}

/// What the rest of the file allows a phase.
struct PhaseLimits<'a> {
    micro_batch_tokens: u64,
    max_sequence_length: u64,
    sources: &'a BTreeMap<String, SourceConfig>,
}

#[cfg(test)]
mod tests;
