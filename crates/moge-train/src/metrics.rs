//! What each step did, as the lines of `metrics.jsonl`.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use moge_model::{WriteError, io_error};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What one step did: a line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Steps done, this one counted.
    pub step: u64,
    /// Name of the phase that it belongs to.
    pub phase: String,
    /// Tokens read since the beginning, those of this step counted.
    pub tokens: u64,
    /// Mean cross-entropy of the rows that have a target, in nats.
    pub loss: f64,
    /// Auxiliary balance loss, its coefficient included.
    pub aux_loss: f64,
    /// Router z-loss, its coefficient included.
    pub z_loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// Seconds that the step took.
    pub seconds: f64,
    /// Tokens of the step by its seconds.
    pub tokens_per_s: f64,
    /// Arithmetic of the step by its seconds, in FLOP/s.
    pub flops_per_s: f64,
    /// The same as a share of what the machine was measured to reach; 1 is all of it.
    pub peak_share: f64,
    /// Rows that each routed expert got, `[routed layer][expert]`.
    pub expert_load: Vec<Vec<u64>>,
}

/// Why metrics cannot be read or written.
#[derive(Debug, Error)]
pub enum MetricsError {
    /// The file system refuses.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A line in the middle of the file is not one of ours.
    #[error("{}:{line}: {problem}; remove the file to go on without it", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// `metrics.jsonl`, open for more lines.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Open or make the file, and cut off all that comes after step `last_step`: those steps will be done again.
    ///
    /// # Errors
    /// If the file system refuses, or a line in the middle of the file is not one of ours.
    pub fn open(path: &Path, last_step: u64) -> Result<MetricsLog, MetricsError> {
        let failed = |source| io_error(path, source);
        let mut open = OpenOptions::new();
        let mut file = open.read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
        let mut keep_bytes = 0;
        for_each_line(path, &file, |metrics, num_bytes| {
            if metrics.step <= last_step {
                keep_bytes += num_bytes;
            }
            Ok(())
        })?;
        file.set_len(keep_bytes).and_then(|()| file.seek(SeekFrom::Start(keep_bytes))).map_err(failed)?;
        Ok(MetricsLog { path: path.to_owned(), file })
    }

    /// Append a line.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn append(&mut self, metrics: &StepMetrics) -> Result<(), MetricsError> {
        let line = serde_json::to_string(metrics).expect("metrics are plain numbers and lists") + "\n";
        Ok(self.file.write_all(line.as_bytes()).map_err(|source| io_error(&self.path, source))?)
    }

    /// Wait until all lines are on the disk.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn sync(&self) -> Result<(), MetricsError> {
        Ok(self.file.sync_data().map_err(|source| io_error(&self.path, source))?)
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Call `visit` with each line of a `metrics.jsonl`, in order. A last line that is cut short is passed over: whoever wrote
/// it was stopped.
///
/// # Errors
/// If the file cannot be read, or another line is not one of ours, or `visit` says what is wrong with one.
pub fn read_metrics(path: &Path, mut visit: impl FnMut(StepMetrics) -> Result<(), String>) -> Result<(), MetricsError> {
    let file = File::open(path).map_err(|source| io_error(path, source))?;
    for_each_line(path, &file, |metrics, _| visit(metrics))
}

/// The same; `visit` gets the bytes of the line, too.
fn for_each_line(
    path: &Path,
    file: &File,
    mut visit: impl FnMut(StepMetrics, u64) -> Result<(), String>,
) -> Result<(), MetricsError> {
    let mut reader = BufReader::new(file);
    let mut text = Vec::new();
    for line in 1.. {
        text.clear();
        let read = |source: io::Error| MetricsError::from(io_error(path, source));
        let num_bytes = reader.read_until(b'\n', &mut text).map_err(read)?;
        if num_bytes == 0 {
            break;
        }
        let parsed = serde_json::from_slice(&text).map_err(|error| error.to_string());
        let visited = match parsed {
            Ok(metrics) if text.ends_with(b"\n") => visit(metrics, num_bytes as u64),
            // Nothing of it counts, not even if only the end of the line is missing: another line will follow.
            _ if reader.fill_buf().map_err(read)?.is_empty() => Ok(()),
            Ok(_) => unreachable!("only the last line has no end"),
            Err(problem) => Err(problem),
        };
        visited.map_err(|problem| MetricsError::Line { path: path.to_owned(), line, problem })?;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use super::*;

    /// Step `step` of a network with two routed layers of three experts.
    pub(crate) fn metrics(step: u64) -> StepMetrics {
        let x = step as f64;
        StepMetrics {
            step,
            phase: if step <= 5 { "general" } else { "annealing" }.to_string(),
            tokens: 64 * step,
            loss: 6.0 / x,
            aux_loss: 0.001 + x / 1e5,
            z_loss: 0.0,
            learning_rate: 3e-4 / x,
            grad_norm: 1.0 + 0.1 * x,
            seconds: 0.25,
            tokens_per_s: 256.0,
            flops_per_s: 7e9,
            peak_share: 0.4,
            expert_load: vec![vec![10 + step, 50, 4], vec![30, 30, 4 + step]],
        }
    }

    fn steps(path: &Path) -> Vec<u64> {
        let mut steps = Vec::new();
        read_metrics(path, |metrics| {
            steps.push(metrics.step);
            Ok(())
        })
        .unwrap();
        steps
    }

    #[test]
    fn lines_after_the_step_of_a_checkpoint_and_a_torn_one_are_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path, 0).unwrap();
        for step in 1..=7 {
            log.append(&metrics(step)).unwrap();
        }
        log.sync().unwrap();
        let whole = fs::read(&path).unwrap();
        for torn in [1, 2, 30] {
            fs::write(&path, &whole[..whole.len() - torn]).unwrap();
            assert_eq!(steps(&path), [1, 2, 3, 4, 5, 6]);
        }
        let mut log = MetricsLog::open(&path, 4).unwrap();
        log.append(&metrics(5)).unwrap();
        assert_eq!(steps(&path), [1, 2, 3, 4, 5]);
        assert!(whole.starts_with(&fs::read(&path).unwrap()), "the same step is the same line");
        MetricsLog::open(&path, 0).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    }

    #[test]
    fn a_damaged_line_in_the_middle_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let line = serde_json::to_string(&metrics(1)).unwrap();
        fs::write(&path, format!("{line}\n{{\"step\": 2}}\n{line}\n")).unwrap();
        let error = MetricsLog::open(&path, 9).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl:2: missing field"), "{error}");
        assert!(fs::read_to_string(&path).unwrap().ends_with(&format!("{line}\n")), "nothing is cut");
    }
}
