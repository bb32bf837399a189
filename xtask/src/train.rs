//! `bench train`: training steps of moge beside eager PyTorch, from the same weights and on the same tokens.
//!
//! The speed of a shared machine drifts, so the engines take turns: in each round every one trains the same first steps
//! again, in a process of its own. Everything lives in `target/train`: weights, tokens, and a Python with PyTorch. All of it
//! is made where it is missing; delete it, or a part of it, to have it made again.

mod options;
mod report;
mod session;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::command::{require_program, run_visibly};
use crate::{peers, root, venv};

use options::Options;
pub(crate) use options::print_options;
use report::Row;
use session::Session;

/// A network and the rows of a step.
#[derive(Debug, PartialEq, Eq)]
struct Model {
    /// Of `moge synth`.
    preset: &'static str,
    vocab_size: usize,
    num_sequences: usize,
}

const MODELS: &[Model] = &[
    Model { preset: "train-22m", vocab_size: 4096, num_sequences: 16 },
    Model { preset: "train-104m", vocab_size: 8192, num_sequences: 8 },
];

/// Tokens of a sequence.
const SEQUENCE_LENGTH: usize = 256;
/// Steps that there are tokens for.
const MAX_STEPS: usize = 64;
/// An engine with less than this share of the speed of its program's best in the first round is not run again.
const WORTH_REPEATING: f64 = 0.8;

/// A program, and the type that its matrix products read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    PyTorch(&'static str),
    Moge(&'static str),
}

/// In the order of a round. The first one's losses are what the others' are compared with.
const ENGINES: [Engine; 4] =
    [Engine::PyTorch("f32"), Engine::Moge("f32"), Engine::PyTorch("bf16"), Engine::Moge("bf16")];

impl Engine {
    fn name(self) -> String {
        match self {
            Engine::PyTorch("f32") => "PyTorch f32".to_string(),
            Engine::PyTorch(dtype) => format!("PyTorch {dtype} autocast"),
            Engine::Moge(dtype) => format!("moge {dtype}"),
        }
    }

    fn dtype(self) -> &'static str {
        match self {
            Engine::PyTorch(dtype) | Engine::Moge(dtype) => dtype,
        }
    }

    fn is_ours(self) -> bool {
        matches!(self, Engine::Moge(_))
    }
}

/// Measure, print the table, write the reports that the options ask for, and fail if the losses differ.
pub(crate) fn run(words: &[String]) -> Result<()> {
    let options = Options::parse(words)?;
    let dir = root().join("target/train");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let dir = dir.canonicalize().with_context(|| format!("cannot find {}", dir.display()))?;
    let bench = Bench::prepare(&dir, &options)?;
    let mut rows = Vec::new();
    for model in &options.models {
        eprintln!("==> {}", model.preset);
        rows.extend(bench.measure(model)?);
    }
    print!("\n{}", report::table(&rows));
    for path in &options.out {
        fs::write(path, report::page(&rows, &options)).with_context(|| format!("cannot write {}", path.display()))?;
    }
    match rows.iter().find(|row| row.is_wrong()) {
        Some(row) => bail!("{}: the losses of {} are not those of PyTorch", row.model, row.engine.name()),
        None => Ok(()),
    }
}

/// Both programs, with what they train on.
struct Bench<'a> {
    dir: PathBuf,
    reference: PathBuf,
    python: PathBuf,
    moge: PathBuf,
    options: &'a Options,
}

impl Bench<'_> {
    fn prepare<'a>(dir: &Path, options: &'a Options) -> Result<Bench<'a>> {
        let reference = root().join("reference").canonicalize().context("cannot find reference/")?;
        let python = match &options.python {
            Some(python) => python.clone(),
            None => {
                require_program("python3", "PyTorch needs Python 3.11 or newer, with its module `venv`")?;
                venv::install(&reference.join("requirements.txt"), &dir.join("venv"), &[])?
            }
        };
        let moge = peers::build_moge()?;
        let bench = Bench { dir: dir.to_path_buf(), reference, python, moge, options };
        // All files first, so that nothing is written while something is measured.
        for model in &options.models {
            bench.make_files(model)?;
        }
        Ok(bench)
    }

    fn checkpoint(&self, model: &Model) -> PathBuf {
        self.dir.join(model.preset)
    }

    fn batches(&self, model: &Model) -> PathBuf {
        self.dir.join(format!("{}.safetensors", model.preset))
    }

    /// The weights to begin with and the tokens of every step.
    fn make_files(&self, model: &Model) -> Result<()> {
        once_complete(&self.checkpoint(model), |partial| {
            if partial.exists() {
                fs::remove_dir_all(partial).with_context(|| format!("cannot remove {}", partial.display()))?;
            }
            let mut synth = Command::new(&self.moge);
            synth.arg("synth").arg(partial).args(["--preset", model.preset, "--dtype", "f32"]);
            run_visibly("make random weights", &mut synth)
        })?;
        once_complete(&self.batches(model), |partial| {
            let mut python = Command::new(&self.python);
            python.arg(self.reference.join("train_batches.py")).arg(partial);
            python.args(["--vocab-size", &model.vocab_size.to_string(), "--num-steps", &MAX_STEPS.to_string()]);
            run_visibly("draw tokens", python.args(shape_options(model)))
        })
    }

    /// Every round of every engine, and what came of them.
    fn measure(&self, model: &Model) -> Result<Vec<Row>> {
        let mut rows: Vec<Row> = self.options.engines.iter().map(|&engine| Row::new(model, engine)).collect();
        for round in 0..self.options.num_rounds {
            for index in 0..rows.len() {
                let engine = rows[index].engine;
                let best = report::best(&rows, engine.is_ours()).filter(|best| best.engine != engine);
                // The slower type of a program may be slower by far, on processors that do not have it.
                let limit =
                    best.filter(|_| round == 0).map(|best| best.slowest_session().mul_f64(1.0 / WORTH_REPEATING));
                if round > 0 && best.is_some_and(|best| rows[index].rate() < WORTH_REPEATING * best.rate()) {
                    continue;
                }
                match self.train(model, engine, limit)? {
                    Some(session) => {
                        eprintln!("  {:24} {:9.1} tokens/s", engine.name(), session.tokens_per_s());
                        rows[index].sessions.push(session);
                    }
                    None => eprintln!("  {:24} given up, being slower", engine.name()),
                }
            }
        }
        report::compare_losses(&mut rows);
        Ok(rows)
    }

    /// The first steps with one engine; `None` if they take longer than `limit`.
    fn train(&self, model: &Model, engine: Engine, limit: Option<Duration>) -> Result<Option<Session>> {
        let mut command = Command::new(if engine.is_ours() { &self.moge } else { &self.python });
        if engine.is_ours() {
            command.args(["bench", "train"]);
        } else {
            command.arg(self.reference.join("train_peer.py"));
        }
        command.arg(self.checkpoint(model)).arg(self.batches(model)).args(shape_options(model));
        command.args(["--num-steps", &self.options.num_steps.to_string(), "--dtype", engine.dtype()]);
        command.args(["--threads", &self.options.num_threads.to_string()]);
        Session::run(&mut command, limit)
    }
}

fn shape_options(model: &Model) -> [String; 4] {
    let [num_sequences, length] = [model.num_sequences, SEQUENCE_LENGTH].map(|number| number.to_string());
    ["--num-sequences".to_string(), num_sequences, "--sequence-length".to_string(), length]
}

/// Make `path` if it is not there: under another name until it is complete.
fn once_complete(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    make(&partial)?;
    fs::rename(&partial, path).with_context(|| format!("cannot rename {}", partial.display()))
}
