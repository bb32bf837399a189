//! Running both engines in turn.
//!
//! The speed of a shared machine drifts, so what is compared runs directly one after the other: in every repetition
//! each configuration of llama.cpp, then ours. What is measured goes at once into a journal, so that a run that was
//! interrupted goes on where it stopped.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Name of our engine in the journal.
pub(crate) const OURS: &str = "moge";
/// A configuration of llama.cpp that was slower than this share of the best one in the first repetition is not run
/// again: timings vary by 10 to 15 %.
const WORTH_REPEATING: f64 = 0.8;

/// Tokens per second of every repetition, by case and engine. Our engine is [`OURS`], others are configurations of
/// llama.cpp.
pub(crate) type Rates = BTreeMap<(String, String), Vec<f64>>;

/// The measurements of the run that is going on.
pub(crate) struct Journal {
    path: PathBuf,
    pub(crate) rates: Rates,
}

impl Journal {
    /// Go on with the journal at `path` if it is of the same run, which `run` describes; else begin a new one.
    pub(crate) fn open(path: &Path, run: &Value) -> Result<Journal> {
        let text = fs::read_to_string(path).unwrap_or_default();
        let mut rates = Rates::new();
        let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        if lines.next().as_ref() == Some(run) {
            if !text.ends_with('\n') {
                // The last line was cut off: the next one must not be joined to it.
                fs::write(path, format!("{text}\n")).with_context(|| format!("cannot write {}", path.display()))?;
            }
            for line in lines {
                // A line that was cut off by an interruption is measured again.
                let (Some(case), Some(engine)) = (line["case"].as_str(), line["engine"].as_str()) else { continue };
                let Some(rate) = line["tokens_per_s"].as_f64() else { continue };
                rates.entry((case.to_string(), engine.to_string())).or_default().push(rate);
            }
        } else {
            fs::write(path, format!("{run}\n")).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(Journal { path: path.to_path_buf(), rates })
    }

    /// The rate of this case, engine and repetition, which is measured if it is not known yet.
    pub(crate) fn rate(
        &mut self,
        case: &str,
        engine: &str,
        repetition: usize,
        measure: impl FnOnce() -> Result<f64>,
    ) -> Result<f64> {
        let known = self.rates.entry((case.to_string(), engine.to_string())).or_default();
        if let Some(&rate) = known.get(repetition) {
            return Ok(rate);
        }
        let rate = measure().with_context(|| format!("cannot measure {case} with {engine}"))?;
        eprintln!("  {case:40} {engine:22} {rate:9.2} tokens/s");
        known.push(rate);
        let line = json!({ "case": case, "engine": engine, "tokens_per_s": rate });
        let file = OpenOptions::new().append(true).open(&self.path);
        file.and_then(|mut file| writeln!(file, "{line}"))
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        Ok(rate)
    }

    /// The run is over: the next one measures everything again.
    pub(crate) fn close(self) -> Result<()> {
        fs::remove_file(&self.path).with_context(|| format!("cannot remove {}", self.path.display()))
    }
}

/// Which of these first rates are worth repeating.
pub(crate) fn worth_repeating(rates: &[f64]) -> Vec<bool> {
    let best = rates.iter().copied().fold(0.0, f64::max);
    rates.iter().map(|&rate| rate >= WORTH_REPEATING * best).collect()
}

#[cfg(test)]
mod tests {
    use super::{Journal, worth_repeating};
    use anyhow::bail;
    use serde_json::json;

    #[test]
    fn an_interrupted_run_goes_on_and_another_run_begins_anew() {
        let path = std::env::temp_dir().join(format!("peers-journal-test-{}.jsonl", std::process::id()));
        let run = json!({ "threads": 3 });
        let mut journal = Journal::open(&path, &run).unwrap();
        assert_eq!(journal.rate("prefill", "Q4_0", 0, || Ok(7.5)).unwrap(), 7.5);
        journal.rate("prefill", "Q4_0", 1, || bail!("interrupted")).unwrap_err();

        let mut journal = Journal::open(&path, &run).unwrap();
        assert_eq!(journal.rate("prefill", "Q4_0", 0, || bail!("known already")).unwrap(), 7.5);
        assert_eq!(journal.rate("prefill", "Q4_0", 1, || Ok(8.5)).unwrap(), 8.5);
        assert_eq!(journal.rates[&("prefill".to_string(), "Q4_0".to_string())], [7.5, 8.5]);
        journal.close().unwrap();

        Journal::open(&path, &run).unwrap().rate("prefill", "Q4_0", 0, || Ok(1.0)).unwrap();
        let other = Journal::open(&path, &json!({ "threads": 4 })).unwrap();
        assert!(other.rates.is_empty());
        other.close().unwrap();
    }

    #[test]
    fn only_what_is_near_the_best_is_repeated() {
        assert_eq!(worth_repeating(&[79.0, 100.0, 81.0]), [false, true, true]);
    }
}
