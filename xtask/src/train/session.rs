//! One run of a program that prints a line of JSON for each step.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Without a limit of its own, a program that says nothing any more would hold us for ever.
const LONGEST: Duration = Duration::from_secs(3600);

/// What a program printed of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Step {
    /// Cross-entropy before the update.
    pub(crate) loss: f64,
    pub(crate) seconds: f64,
    pub(crate) tokens: f64,
    pub(crate) flops: f64,
    /// What the machine can do at best, measured beside the step; by moge only.
    pub(crate) peak_flops_per_s: Option<f64>,
}

/// The steps of one process.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Session {
    pub(crate) steps: Vec<Step>,
    /// From the start of the process to its end.
    pub(crate) duration: Duration,
    /// The most memory that the process held, where the system tells.
    pub(crate) peak_bytes: Option<u64>,
}

impl Session {
    /// Run `command` to its end; `None`, and the program is stopped, if that takes longer than `limit`.
    pub(crate) fn run(command: &mut Command, limit: Option<Duration>) -> Result<Option<Session>> {
        let start = Instant::now();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let child =
            child.as_mut().map_err(|error| anyhow::anyhow!("cannot start {:?}: {error}", command.get_program()))?;
        let read = read_steps(child, start + limit.unwrap_or(LONGEST));
        if !matches!(read, Ok(Some(_))) {
            // It may have ended by itself meanwhile, which is as well.
            let _ = child.kill();
        }
        let status = child.wait().context("cannot wait for a program")?;
        let Some((steps, peak_bytes)) = read? else { return Ok(None) };
        ensure!(status.success(), "{:?} gave {status}; what it printed stands above", command.get_program());
        ensure!(steps.len() > 1, "{:?} printed {} steps", command.get_program(), steps.len());
        Ok(Some(Session { steps, duration: start.elapsed(), peak_bytes }))
    }

    /// Tokens per second, by the median of the steps after the first.
    pub(crate) fn tokens_per_s(&self) -> f64 {
        median(self.steps[1..].iter().map(|step| step.tokens / step.seconds))
    }

    /// Operations of a token.
    pub(crate) fn flops_per_token(&self) -> f64 {
        self.steps[0].flops / self.steps[0].tokens
    }

    /// What the machine could do meanwhile, if it was measured.
    pub(crate) fn peak_flops_per_s(&self) -> Option<f64> {
        let peaks: Vec<f64> = self.steps.iter().filter_map(|step| step.peak_flops_per_s).collect();
        (!peaks.is_empty()).then(|| median(peaks))
    }
}

/// Read to the end of what the program prints, or to `deadline`, which gives `None`.
fn read_steps(child: &mut Child, deadline: Instant) -> Result<Option<(Vec<Step>, Option<u64>)>> {
    let lines = BufReader::new(child.stdout.take().context("a program has no output")?).lines();
    let (sender, receiver) = channel();
    // Ends with the program, or when nobody listens any more.
    thread::spawn(move || lines.into_iter().try_for_each(|line| sender.send(line)));
    let (mut steps, mut peak_bytes) = (Vec::new(), None);
    loop {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                steps.push(parse_step(&line.context("cannot read what a program prints")?)?);
                peak_bytes = peak_bytes_of(child.id()).or(peak_bytes);
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(Some((steps, peak_bytes))),
            Err(RecvTimeoutError::Timeout) => return Ok(None),
        }
    }
}

fn parse_step(line: &str) -> Result<Step> {
    let value: Value = serde_json::from_str(line).with_context(|| format!("not a line of JSON: {line}"))?;
    let number = |field: &str| value[field].as_f64().with_context(|| format!("no number `{field}` in {line}"));
    let step = Step {
        loss: number("loss")?,
        seconds: number("seconds")?,
        tokens: number("tokens")?,
        flops: number("flops")?,
        peak_flops_per_s: value["peak_flops_per_s"].as_f64(),
    };
    if step.seconds <= 0.0 || step.tokens <= 0.0 {
        bail!("a step without tokens or without time: {line}");
    }
    Ok(step)
}

/// The most memory that a process has held so far, on Linux.
fn peak_bytes_of(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// The middle value; of an even number, the mean of the two in the middle.
///
/// # Panics
/// If there is no value.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    (low + high) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str, limit: Option<Duration>) -> Result<Option<Session>> {
        Session::run(Command::new("sh").args(["-c", script]), limit)
    }

    #[test]
    fn the_first_step_is_not_counted_and_the_others_by_their_median() {
        let step = |seconds| format!(r#"{{"step":1,"loss":2.5,"seconds":{seconds},"tokens":60,"flops":180}}"#);
        let script = [9, 2, 5, 3].map(|seconds| format!("echo '{}'", step(seconds))).join("; ");
        let session = run(&script, None).unwrap().unwrap();
        assert_eq!(session.tokens_per_s(), 20.0);
        assert_eq!((session.steps[0].loss, session.flops_per_token(), session.peak_flops_per_s()), (2.5, 3.0, None));
    }

    #[test]
    fn a_program_that_takes_too_long_is_stopped() {
        let start = Instant::now();
        assert_eq!(run("exec sleep 100", Some(Duration::from_millis(50))).unwrap(), None);
        assert!(start.elapsed() < Duration::from_secs(50));
    }

    #[test]
    fn a_program_that_fails_or_prints_something_else_is_an_error() {
        for (script, message) in [
            ("echo done", "not a line of JSON: done"),
            (r#"echo '{"loss": 1}'"#, r#"no number `seconds` in {"loss": 1}"#),
            ("exit 3", r#""sh" gave exit status: 3; what it printed stands above"#),
            ("true", r#""sh" printed 0 steps"#),
        ] {
            assert_eq!(run(script, None).unwrap_err().to_string(), message);
        }
    }
}
