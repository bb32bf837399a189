//! How a step ended, and the tests that it ran.

use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// How a step ended that did not fail.
pub(crate) enum Outcome {
    Passed,
    Tested(Tally),
    Skipped { missing: String },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Passed => f.write_str("ok"),
            Outcome::Tested(tally) => write!(f, "ok, {tally}"),
            Outcome::Skipped { missing } => write!(f, "SKIPPED: {missing}"),
        }
    }
}

/// What `test result:` lines count, and the words after the counts.
const COUNTED: [&str; 5] = ["passed", "failed", "ignored", "measured", "filtered out"];

/// Counts in the order of [`COUNTED`].
#[derive(Default)]
pub(crate) struct Tally([u64; 5]);

impl Tally {
    /// Run `command` and count the tests that it says it has run.
    ///
    /// # Errors
    /// If it fails, or ran no test.
    pub(crate) fn of_tests(command: &mut Command) -> Result<Tally> {
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {program}"))?;
        let mut tally = Tally::default();
        if let Some(stdout) = child.stdout.take() {
            for line in BufReader::new(stdout).split(b'\n') {
                let line = line.context("cannot read what the tests print")?;
                tally.read_line(&String::from_utf8_lossy(&line));
                io::stdout().write_all(&[&line[..], b"\n"].concat()).context("cannot pass on what the tests print")?;
            }
        }
        let status = child.wait().with_context(|| format!("cannot wait for {program}"))?;
        if !status.success() {
            bail!("{status}");
        }
        if tally.passed() == 0 {
            bail!("it ran no test");
        }
        Ok(tally)
    }

    /// Count one test binary, if `line` is its `test result: ok. 5 passed; 0 failed; ..`.
    fn read_line(&mut self, line: &str) {
        let Some((_, counts)) = line.split_once("test result: ") else { return };
        let numbers = counts.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse::<u64>().ok());
        self.0.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
    }

    fn passed(&self) -> u64 {
        self.0[0]
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<String> = self.0.iter().zip(COUNTED).map(|(count, what)| format!("{count} {what}")).collect();
        f.write_str(&counts.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn the_summaries_of_all_test_binaries_are_added_up() {
        let mut tally = Tally::default();
        tally.read_line(
            "test result: ok. 7 passed; 0 failed; 2 ignored; 0 measured; 11 filtered out; finished in 0.31s",
        );
        tally.read_line("test weights::a_line_between ... ok");
        tally.read_line(
            "test result: FAILED. 5 passed; 1 failed; 0 ignored; 0 measured; 3 filtered out; finished in 4.00s",
        );
        assert_eq!(tally.to_string(), "12 passed; 1 failed; 2 ignored; 0 measured; 14 filtered out");
    }
}
