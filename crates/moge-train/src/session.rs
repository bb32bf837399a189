//! A run, from its start or where it was stopped to its end: steps, checkpoints, metrics, the report.

use std::fmt::{self, Display, Formatter};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use moge_model::{CheckpointError, Cpu};
use thiserror::Error;

use crate::checkpoint::{Checkpoints, CheckpointsError, CorruptCheckpoint, load_weights};
use crate::config::{Init, RunConfig};
use crate::data::{DataError, DataLoader, DataProgress};
use crate::init::initial_weights;
use crate::metrics::{MetricsError, MetricsLog, StepMetrics};
use crate::params::Layout;
use crate::report::{Report, ReportError};
use crate::trainer::{TrainError, TrainState, Trainer};

/// Name of the metrics in a run's output directory.
const METRICS_FILE: &str = "metrics.jsonl";
/// Name of the report there.
const REPORT_FILE: &str = "report.html";

/// A run that is open.
#[derive(Debug)]
pub struct Session {
    cpu: Cpu,
    trainer: Trainer,
    data: DataLoader,
    checkpoints: Checkpoints,
    metrics: MetricsLog,
    report: Report,
    checkpoint_every: u64,
    num_steps: u64,
    last: LastCheckpoint,
    damaged: Vec<CorruptCheckpoint>,
    changes: Vec<String>,
}

/// The last checkpoint that is whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LastCheckpoint(pub Option<PathBuf>);

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Done,
    /// It was asked to stop, wrote a checkpoint, and can go on.
    Stopped,
}

/// Why a run did not start or stopped.
#[derive(Debug, Error)]
pub enum SessionError {
    /// Checkpoints cannot be taken up.
    #[error(transparent)]
    Checkpoints(#[from] CheckpointsError),
    /// The checkpoint to start from is refused.
    #[error("model.init: {0}; allowed: \"random\" or a directory with a checkpoint of the run's network")]
    Init(CheckpointError),
    /// There is no data, or not that of the checkpoint.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The metrics of earlier steps cannot be taken up.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The report cannot be made.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// A step failed.
    #[error("step {step}: {problem}; {last}")]
    Step {
        /// The step.
        step: u64,
        /// Why.
        problem: Box<TrainError>,
        /// Where the run can go on.
        last: LastCheckpoint,
    },
    /// What a step did cannot be written.
    #[error("step {step}: {problem}; {last}; when that is mended the same command, run again, goes on")]
    Output {
        /// The step.
        step: u64,
        /// Why.
        problem: Box<OutputError>,
        /// Where the run can go on.
        last: LastCheckpoint,
    },
}

/// Why what a run did cannot be written.
#[derive(Debug, Error)]
pub enum OutputError {
    /// A line of metrics.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointsError),
    /// The report.
    #[error(transparent)]
    Report(#[from] ReportError),
}

impl Display for LastCheckpoint {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(dir) => write!(f, "the last good checkpoint is {}", dir.display()),
            None => write!(f, "there is no checkpoint yet"),
        }
    }
}

impl Session {
    /// Open a run where its newest whole checkpoint is, or at its beginning. The imbalance score of the report is that for
    /// `num_devices`; `progress` is told of the data's preparation, which stops if it breaks.
    ///
    /// # Errors
    /// If another process has the run, its checkpoints, data or metrics cannot be taken up, or they are not those of the
    /// run file.
    pub fn open(
        run: &RunConfig,
        cpu: Cpu,
        num_devices: Option<usize>,
        progress: &mut dyn FnMut(DataProgress<'_>) -> ControlFlow<()>,
    ) -> Result<Session, SessionError> {
        let report = Session::report(run, num_devices);
        report.num_devices()?;
        let checkpoints = Checkpoints::open(run)?;
        let layout = Layout::new(&run.model.config);
        let resumed = checkpoints.load_newest(&layout)?;
        let mut data = DataLoader::open(run, progress)?;
        let (mut last, mut damaged, mut changes) = Default::default();
        let state = match resumed {
            Some(resumed) => {
                data.restore(resumed.data)?;
                (last, damaged, changes) = (LastCheckpoint(Some(resumed.dir)), resumed.damaged, resumed.changes);
                resumed.state
            }
            None => first_state(run, &layout)?,
        };
        Ok(Session {
            metrics: MetricsLog::open(&report.metrics, state.step)?,
            trainer: Trainer::new(&run.model.config, run, &cpu, state),
            cpu,
            data,
            checkpoints,
            report,
            checkpoint_every: run.output.checkpoint_every,
            num_steps: run.schedule().num_steps(),
            last,
            damaged,
            changes,
        })
    }

    /// What makes the report of a run.
    pub fn report(run: &RunConfig, num_devices: Option<usize>) -> Report {
        let moe = run.model.config.moe().copied();
        Report {
            metrics: run.output.dir.join(METRICS_FILE),
            title: run.output.dir.display().to_string(),
            moe,
            num_devices,
        }
    }

    /// Where the report of a run is.
    pub fn report_path(run: &RunConfig) -> PathBuf {
        run.output.dir.join(REPORT_FILE)
    }

    /// Do all steps that are left, with a checkpoint and a report now and then and at the end. `on_step` is told of each
    /// step; if it breaks, the run writes a checkpoint and stops.
    ///
    /// # Errors
    /// If a step fails, or what it did cannot be written. What was written before stays, and a later run goes on there.
    pub fn run(&mut self, on_step: &mut dyn FnMut(&StepMetrics) -> ControlFlow<()>) -> Result<Outcome, SessionError> {
        if self.step() >= self.num_steps {
            // It may have been killed between its last checkpoint and the report, or be asked for other devices.
            self.write_report()?;
        }
        while self.step() < self.num_steps {
            let step = self.step() + 1;
            let metrics = self.trainer.step(&self.cpu, &mut self.data);
            let metrics = metrics.map_err(|error| self.step_error(step, error))?;
            self.metrics.append(&metrics).map_err(|error| self.output_error(error))?;
            let is_stopped = on_step(&metrics).is_break();
            let is_last = step == self.num_steps;
            if is_stopped || is_last || step.is_multiple_of(self.checkpoint_every) {
                self.save()?;
            }
            if is_stopped && !is_last {
                return Ok(Outcome::Stopped);
            }
        }
        Ok(Outcome::Done)
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.trainer.state().step
    }

    /// Steps of the whole run.
    pub fn num_steps(&self) -> u64 {
        self.num_steps
    }

    /// The last checkpoint that is whole.
    pub fn last_checkpoint(&self) -> Option<&Path> {
        self.last.0.as_deref()
    }

    /// Checkpoints that were found not to be whole when the run was opened.
    pub fn damaged(&self) -> &[CorruptCheckpoint] {
        &self.damaged
    }

    /// What the run file says otherwise than when the checkpoint was written, a sentence each.
    pub fn changes(&self) -> &[String] {
        &self.changes
    }

    /// The data.
    pub fn data(&self) -> &DataLoader {
        &self.data
    }

    fn save(&mut self) -> Result<(), SessionError> {
        self.trainer.check_state(&self.cpu).map_err(|error| self.step_error(self.step(), error))?;
        // The lines of a checkpoint's steps are on the disk before it is.
        self.metrics.sync().map_err(|error| self.output_error(error))?;
        let saved = self.checkpoints.save(self.trainer.state(), self.trainer.layout(), self.data.state());
        self.last = LastCheckpoint(Some(saved.map_err(|error| self.output_error(error))?));
        self.write_report()
    }

    fn write_report(&self) -> Result<(), SessionError> {
        let path = self.checkpoints.dir().join(REPORT_FILE);
        self.report.write(&path).map_err(|error| self.output_error(error))
    }

    fn step_error(&self, step: u64, problem: TrainError) -> SessionError {
        SessionError::Step { step, problem: Box::new(problem), last: self.last.clone() }
    }

    fn output_error(&self, problem: impl Into<OutputError>) -> SessionError {
        SessionError::Output { step: self.step(), problem: Box::new(problem.into()), last: self.last.clone() }
    }
}

/// The state before the first step.
fn first_state(run: &RunConfig, layout: &Layout) -> Result<TrainState, SessionError> {
    Ok(match &run.model.init {
        Init::Random => TrainState::new(initial_weights(&run.model.config, layout, run.model.seed)),
        Init::Checkpoint(dir) => {
            TrainState::new(load_weights(dir, &run.model.config, layout).map_err(SessionError::Init)?)
        }
    })
}

#[cfg(test)]
mod tests;
