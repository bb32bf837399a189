//! A run's checkpoints: `step-00000100` and so on in its output directory.
//!
//! Each is a checkpoint in the official layout, which the engine runs as it is, and a directory `trainer` inside it with
//! what only a training needs: the moments (and the f32 weights, if the others are rounded) as one more checkpoint, the place in
//! the data, and the checksums of all files. It is written under another name, brought to the disk and renamed, so that
//! what has the name of a checkpoint is whole, or was damaged later, which the checksums tell.

mod error;
mod files;
mod tensors;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Display;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use moge_kernels::Dtype;
use moge_model::{Checkpoint, LoadMode, ModelConfig, WriteError, io_error, read_file, small_files, sync_directory};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::RunConfig;
use crate::data::DataState;
use crate::params::Layout;
use crate::trainer::TrainState;
use files::{FileSum, discard};
use tensors::Part;

pub use error::CheckpointsError;
pub use tensors::load_weights;

/// Names of checkpoints are this and a number of eight digits or more, the steps done.
const PREFIX: &str = "step-";
/// What follows the name of a checkpoint that is being written or removed.
const TEMPORARY: &str = ".tmp";
/// What follows the name of a checkpoint that was found to be damaged.
const DAMAGED: &str = ".damaged";
/// What a checkpoint has for the trainer alone.
const TRAINER_DIR: &str = "trainer";
const STATE_FILE: &str = "state.json";
const SUMS_FILE: &str = "checksums.json";
const CONFIG_FILE: &str = "config.json";
/// Version of the layout of `trainer`.
const VERSION: u32 = 1;

/// The checkpoints of one run; nobody else writes there while this lives.
#[derive(Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
    dtype: Dtype,
    model: ModelConfig,
    /// `config.json` as checkpoints have it.
    config_json: Value,
    /// The tokenizer and the like, read when the run starts, so that they cannot fail later.
    small_files: Vec<(OsString, Vec<u8>)>,
    settings: Settings,
    _lock: File,
}

/// What the run file says that changes the numbers, as key and value.
type Settings = BTreeMap<String, String>;

/// `trainer/state.json`.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    version: u32,
    step: u64,
    tokens: u64,
    settings: Settings,
    data: DataState,
}

/// Where a run goes on.
#[derive(Debug)]
pub struct Resumed {
    /// The checkpoint.
    pub dir: PathBuf,
    /// Parameters and moments.
    pub state: TrainState,
    /// The place in the data.
    pub data: DataState,
    /// Newer checkpoints that are not whole; they were renamed.
    pub damaged: Vec<CorruptCheckpoint>,
    /// What the run file says otherwise than when the checkpoint was written, a sentence each.
    pub changes: Vec<String>,
}

/// A checkpoint that is not whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct CorruptCheckpoint {
    /// The file or directory that is not as it was written.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: String,
}

/// Why a checkpoint is not taken up.
enum LoadError {
    /// It is not whole: an older one may be.
    Damaged(CorruptCheckpoint),
    /// It is whole, and not one of this run.
    Refused(CheckpointsError),
}

impl Checkpoints {
    /// Make the output directory of `run`, keep others from writing there, and remove what a kill left half written.
    ///
    /// # Errors
    /// If another process writes there, or the file system refuses.
    pub fn open(run: &RunConfig) -> Result<Checkpoints, CheckpointsError> {
        let dir = run.output.dir.clone();
        fs::create_dir_all(&dir).map_err(|source| io_error(&dir, source))?;
        let lock = lock(&dir)?;
        for name in names_in(&dir)?.into_iter().filter(|name| name.starts_with(PREFIX) && name.ends_with(TEMPORARY)) {
            let path = dir.join(name);
            fs::remove_dir_all(&path).map_err(|source| io_error(&path, source))?;
        }
        Ok(Checkpoints {
            keep: run.output.keep,
            dtype: run.output.dtype,
            model: run.model.config.clone(),
            config_json: config_json(&run.model.dir, run.output.dtype)?,
            small_files: small_files(&run.model.dir)?,
            settings: settings(run),
            dir,
            _lock: lock,
        })
    }

    /// Write a checkpoint, whole or not at all, and remove those that are too old. Returns its directory.
    ///
    /// # Errors
    /// If the file system refuses; nothing of the checkpoint is left then.
    pub fn save(&self, state: &TrainState, layout: &Layout, data: &DataState) -> Result<PathBuf, CheckpointsError> {
        let target = self.path(state.step);
        let temporary = with_suffix(&target, TEMPORARY);
        if let Err(error) = self.write(&temporary, state, layout, data) {
            // The first error is what the caller must see; what stays is removed at the next start.
            let _ = fs::remove_dir_all(&temporary);
            return Err(error);
        }
        if target.exists() {
            discard(&target)?;
        }
        fs::rename(&temporary, &target).map_err(|source| io_error(&target, source))?;
        sync_directory(&self.dir)?;
        for step in self.steps()?.into_iter().rev().skip(self.keep) {
            discard(&self.path(step))?;
        }
        Ok(target)
    }

    /// The newest checkpoint that is whole; `None` if there are none at all.
    ///
    /// # Errors
    /// If none of those that are there is whole, the newest whole one is not of this run's network, or the file system
    /// refuses.
    pub fn load_newest(&self, layout: &Layout) -> Result<Option<Resumed>, CheckpointsError> {
        let mut damaged = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            let dir = self.path(step);
            match self.load(&dir, step, layout) {
                Ok((state, data, settings)) => {
                    self.set_aside(step)?;
                    let changes = changes(&settings, &self.settings);
                    return Ok(Some(Resumed { dir, state, data, damaged, changes }));
                }
                Err(LoadError::Damaged(damage)) => damaged.push(damage),
                Err(LoadError::Refused(error)) => return Err(error),
            }
        }
        if damaged.is_empty() { Ok(None) } else { Err(CheckpointsError::NoneWhole { dir: self.dir.clone(), damaged }) }
    }

    /// The run's output directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("{PREFIX}{step:08}"))
    }

    /// The steps that have a checkpoint, rising.
    fn steps(&self) -> Result<Vec<u64>, WriteError> {
        let step = |name: String| name.strip_prefix(PREFIX)?.parse().ok();
        let mut steps: Vec<u64> = names_in(&self.dir)?.into_iter().filter_map(step).collect();
        steps.retain(|&step| self.path(step).is_dir());
        steps.sort_unstable();
        // Somebody may have made a `step-5` beside `step-00000005`.
        steps.dedup();
        Ok(steps)
    }

    fn write(&self, dir: &Path, state: &TrainState, layout: &Layout, data: &DataState) -> Result<(), CheckpointsError> {
        let trainer = dir.join(TRAINER_DIR);
        fs::create_dir_all(&trainer).map_err(|source| io_error(&trainer, source))?;
        tensors::write(dir, layout, self.dtype, &[("", &state.params)])?;
        let master = (self.dtype != Dtype::F32).then_some((Part::Master.prefix(), &state.params[..]));
        let parts = [(Part::M.prefix(), &state.m[..]), (Part::V.prefix(), &state.v[..])];
        tensors::write(&trainer, layout, Dtype::F32, &parts.into_iter().chain(master).collect::<Vec<_>>())?;
        let TrainState { step, tokens, .. } = *state;
        let settings = self.settings.clone();
        write_json(&trainer.join(STATE_FILE), &State { version: VERSION, step, tokens, settings, data: data.clone() })?;
        for (name, bytes) in &self.small_files {
            moge_model::write_file(&dir.join(name), bytes)?;
        }
        write_json(&dir.join(CONFIG_FILE), &self.config_json)?;
        let sums = FileSum::of_files_below(dir)?;
        write_json(&trainer.join(SUMS_FILE), &sums)?;
        sync_directory(&trainer)?;
        Ok(sync_directory(dir)?)
    }

    fn load(&self, dir: &Path, step: u64, layout: &Layout) -> Result<(TrainState, DataState, Settings), LoadError> {
        let trainer = dir.join(TRAINER_DIR);
        let sums: Vec<FileSum> = read_json(&trainer.join(SUMS_FILE))?;
        sums.iter().try_for_each(|sum| sum.check(dir)).map_err(LoadError::Damaged)?;
        let state_path = trainer.join(STATE_FILE);
        // Read by itself first: another version may have other fields.
        let state: Value = read_json(&state_path)?;
        let version = state["version"].clone();
        if version != VERSION {
            let refused = CheckpointsError::Version { path: state_path, found: version.to_string(), expected: VERSION };
            return Err(LoadError::Refused(refused));
        }
        let state: State = serde_json::from_value(state).map_err(|error| damaged(&state_path, &error))?;
        if state.step != step {
            return Err(damaged(&state_path, &format_args!("step is {}, the directory says {step}", state.step)));
        }
        self.check_model(dir)?;
        let open = |dir: &Path| Checkpoint::open(dir, LoadMode::Mmap, &|_, _| ()).map_err(|error| damaged(dir, &error));
        let (weights, moments) = (open(dir)?, open(&trainer)?);
        let read = |checkpoint: &Checkpoint, prefix: &str| {
            tensors::read(checkpoint, prefix, layout).map_err(|problem| damaged(checkpoint.dir(), &problem))
        };
        let [m, v] = [Part::M, Part::V].map(|part| read(&moments, part.prefix()));
        let has_master = moments.tensors().any(|(name, _)| name.starts_with(Part::Master.prefix()));
        let params = if has_master { read(&moments, Part::Master.prefix()) } else { read(&weights, "") };
        let State { step, tokens, settings, data, .. } = state;
        Ok((TrainState { step, tokens, params: params?, m: m?, v: v? }, data, settings))
    }

    /// Refuse a checkpoint of another network than the run's.
    fn check_model(&self, dir: &Path) -> Result<(), LoadError> {
        let path = dir.join(CONFIG_FILE);
        let found_json: Value = read_json(&path)?;
        let found = ModelConfig::load(dir).map_err(|error| damaged(&path, &error))?;
        let expected = ModelConfig { dtype: found.dtype, ..self.model.clone() };
        if found == expected {
            return Ok(());
        }
        let (what, found, expected) = tensors::first_difference(&found, &expected)
            .unwrap_or_else(|| first_different_field(&found_json, &self.config_json));
        Err(LoadError::Refused(CheckpointsError::OtherModel { dir: dir.to_owned(), what, found, expected }))
    }

    /// Rename the checkpoints after `step`, all damaged, so that no later start takes them for new ones.
    fn set_aside(&self, step: u64) -> Result<(), CheckpointsError> {
        for damaged in self.steps()?.into_iter().filter(|&other| other > step) {
            let path = self.path(damaged);
            let aside = with_suffix(&path, DAMAGED);
            if aside.exists() {
                discard(&aside)?;
            }
            fs::rename(&path, &aside).map_err(|source| io_error(&path, source))?;
        }
        Ok(())
    }
}

/// Keep other processes from writing into `dir`. The system lets go of it when this one ends, however that happens.
fn lock(dir: &Path) -> Result<File, CheckpointsError> {
    let path = dir.join("lock");
    let file = File::create(&path).map_err(|source| io_error(&path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(CheckpointsError::InUse { dir: dir.to_owned() }),
        // Some network disks know no locks; that is no reason not to train there.
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(source)) => Err(io_error(&path, source).into()),
    }
}

fn names_in(dir: &Path) -> Result<Vec<String>, WriteError> {
    let entries = fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let entries = entries.map_err(|source| io_error(dir, source))?;
    Ok(entries.into_iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), WriteError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| io_error(path, io::Error::other(error)))?;
    moge_model::write_file(path, format!("{text}\n").as_bytes())
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, LoadError> {
    let bytes = read_file(path).map_err(|error| damaged(path, &error))?;
    serde_json::from_slice(&bytes).map_err(|error| damaged(path, &error))
}

fn damaged(path: &Path, problem: &dyn Display) -> LoadError {
    LoadError::Damaged(CorruptCheckpoint { path: path.to_owned(), problem: problem.to_string() })
}

/// `config.json` of the model, with the type that the weights of checkpoints have.
fn config_json(model_dir: &Path, dtype: Dtype) -> Result<Value, CheckpointsError> {
    let path = model_dir.join(CONFIG_FILE);
    let failed = |problem: String| CheckpointsError::Config { path: path.clone(), problem };
    let bytes = read_file(&path).map_err(|error| failed(error.to_string()))?;
    let mut json: Value = serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))?;
    let name = match dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::Bf16 => "bfloat16",
    };
    // Newer files call it `dtype`.
    let field = if json.get("dtype").is_some() && json.get("torch_dtype").is_none() { "dtype" } else { "torch_dtype" };
    let fields = json.as_object_mut().ok_or_else(|| failed("not a JSON object".to_owned()))?;
    fields.insert(field.to_owned(), name.into());
    Ok(json)
}

/// What `run` says that changes the numbers that come out.
fn settings(run: &RunConfig) -> Settings {
    let RunConfig { model, compute, loss, optimizer, .. } = run;
    let mut settings = Settings::from([
        ("model.seed".to_owned(), model.seed.to_string()),
        ("compute.dtype".to_owned(), format!("{:?}", compute.dtype).to_lowercase()),
        ("loss.aux".to_owned(), format!("{:?}", loss.aux)),
        ("loss.z".to_owned(), format!("{:?}", loss.z)),
        ("optimizer.beta1".to_owned(), format!("{:?}", optimizer.beta1)),
        ("optimizer.beta2".to_owned(), format!("{:?}", optimizer.beta2)),
        ("optimizer.eps".to_owned(), format!("{:?}", optimizer.eps)),
        ("optimizer.weight_decay".to_owned(), format!("{:?}", optimizer.weight_decay)),
        ("optimizer.decay_norms_and_biases".to_owned(), optimizer.decay_norms_and_biases.to_string()),
        ("optimizer.clip".to_owned(), format!("{:?}", optimizer.clip)),
    ]);
    for (index, phase) in run.phases.iter().enumerate() {
        let mixture: Vec<String> = phase.mixture.iter().map(|(name, weight)| format!("{name} = {weight:?}")).collect();
        let [first, last] = phase.learning_rate;
        settings.extend(
            [
                ("steps", phase.num_steps.to_string()),
                ("sequence_length", phase.sequence_length.to_string()),
                ("batch_tokens", phase.batch_tokens.to_string()),
                ("micro_batch_tokens", phase.micro_batch_tokens.to_string()),
                ("learning_rate", format!("[{first:?}, {last:?}]")),
                ("warmup_steps", phase.warmup_steps.to_string()),
                ("mixture", format!("{{ {} }}", mixture.join(", "))),
            ]
            .map(|(name, value)| (format!("phases[{index}].{name}"), value)),
        );
    }
    settings
}

/// What differs between two runs' settings, a sentence each.
fn changes(before: &Settings, now: &Settings) -> Vec<String> {
    let keys: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    let value = |settings: &Settings, key| settings.get(key).cloned().unwrap_or_else(|| "absent".to_owned());
    let pairs = keys.into_iter().map(|key| (key, value(before, key), value(now, key)));
    pairs
        .filter(|(_, before, now)| before != now)
        .map(|(key, before, now)| format!("{key}: {now}, was {before}"))
        .collect()
}

/// The first field of two configs that differs: its name and both values.
fn first_different_field(found: &Value, expected: &Value) -> (String, String, String) {
    let fields = expected.as_object().into_iter().chain(found.as_object()).flat_map(|object| object.keys());
    let is_different = |name: &&String| {
        name.as_str() != "torch_dtype" && name.as_str() != "dtype" && found.get(*name) != expected.get(*name)
    };
    let name = fields.into_iter().find(is_different).cloned().unwrap_or_else(|| CONFIG_FILE.to_owned());
    let value = |config: &Value| config.get(&name).map_or_else(|| "absent".to_owned(), Value::to_string);
    let (found, expected) = (value(found), value(expected));
    (name, found, expected)
}

#[cfg(test)]
mod tests;
