//! `check` and `test`: what must hold before a commit.
//!
//! A task is a list of steps and a step is one cargo command, printed before it runs, so that it can be repeated by
//! hand. The first step that fails ends the task.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::outcome::{Outcome, Tally};
use crate::{cargo, clients};

/// One cargo command.
struct Step {
    name: &'static str,
    /// Arguments of cargo, separated by spaces. The first word is the subcommand.
    args: &'static str,
    /// A variable of its environment, and the value.
    env: Option<(&'static str, &'static str)>,
    kind: Kind,
}

enum Kind {
    Plain,
    /// Runs tests: they are counted, and having found none is a failure.
    Tests,
    /// The same, skipped where AVX2 is the best that the CPU has, or more than it has.
    TestsBelowBestIsa,
    /// Needs a program that does not come with Rust: skipped, visibly, where it is not installed.
    Optional,
    /// Done here and not by cargo; the command line only repeats it.
    Own(fn() -> Result<Outcome>),
}

const CHECK: &[Step] = &[
    Step { name: "fmt", args: "fmt --all --check", env: None, kind: Kind::Plain },
    Step { name: "clippy", args: "clippy --workspace --all-targets -- -D warnings", env: None, kind: Kind::Plain },
    Step {
        name: "doc",
        args: "doc --no-deps --workspace",
        env: Some(("RUSTDOCFLAGS", "-D warnings")),
        kind: Kind::Plain,
    },
    Step { name: "tidy", args: "test --workspace --test tidy", env: None, kind: Kind::Tests },
    // Without `advisories`: they come from a database on the network that changes from day to day.
    Step { name: "deny", args: "deny check bans licenses sources", env: None, kind: Kind::Optional },
];

const TEST: &[Step] = &[
    Step { name: "test", args: "test --workspace --no-fail-fast", env: None, kind: Kind::Tests },
    // The kernels' own tests try every ISA the CPU has; the crates above them take the best one unless told. The whole
    // workspace again, because a part of it would resolve other features and compile every dependency a second time.
    Step {
        name: "scalar",
        args: "test --workspace --no-fail-fast",
        env: Some(("MOGE_ISA", "scalar")),
        kind: Kind::Tests,
    },
    // What most CPUs have, where this one has more.
    Step {
        name: "avx2",
        args: "test --workspace --no-fail-fast",
        env: Some(("MOGE_ISA", "avx2")),
        kind: Kind::TestsBelowBestIsa,
    },
    // A target directory of its own, because other RUSTFLAGS would throw away what the usual one holds.
    Step {
        name: "loom",
        args: "test --package moge-kernels --release --lib --target-dir target/loom loom",
        env: Some(("RUSTFLAGS", "--cfg loom")),
        kind: Kind::Tests,
    },
    Step { name: "build", args: "build", env: None, kind: Kind::Plain },
    Step { name: "clients", args: "xtask test clients", env: None, kind: Kind::Own(clients::run) },
];

/// Run the steps of `check` that `names` names; all if it is empty.
pub(crate) fn check(names: &[String]) -> Result<()> {
    run_all(&select(CHECK.iter(), names)?)
}

/// Run the steps of `check` and of `test` that `names` names; all if it is empty.
pub(crate) fn test(names: &[String]) -> Result<()> {
    run_all(&select(CHECK.iter().chain(TEST), names)?)
}

/// List the steps of both tasks.
pub(crate) fn print_steps() {
    println!("Steps of `check`:");
    CHECK.iter().for_each(|step| println!("  {:8} {}", step.name, step.command_line()));
    println!("Steps that `test` adds:");
    TEST.iter().for_each(|step| println!("  {:8} {}", step.name, step.command_line()));
}

/// The steps of these names in their usual order; all of them if there are no names.
fn select<'a>(steps: impl Iterator<Item = &'a Step> + Clone, names: &[String]) -> Result<Vec<&'a Step>> {
    for name in names {
        if !steps.clone().any(|step| step.name == name) {
            let known: Vec<&str> = steps.map(|step| step.name).collect();
            bail!("no step is called `{name}`; there are {}", known.join(", "));
        }
    }
    Ok(steps.filter(|step| names.is_empty() || names.iter().any(|name| name == step.name)).collect())
}

fn run_all(steps: &[&Step]) -> Result<()> {
    let mut report: Vec<(&str, Outcome, Duration)> = Vec::new();
    for step in steps {
        println!("\n==> {}: {}", step.name, step.command_line());
        let start = Instant::now();
        let result = step.run();
        let time = start.elapsed();
        let outcome = result.with_context(|| {
            format!("step `{}` failed after {:.1} s: {}", step.name, time.as_secs_f64(), step.command_line())
        })?;
        println!("<== {}: {outcome}, {:.1} s", step.name, time.as_secs_f64());
        report.push((step.name, outcome, time));
    }

    println!();
    for (name, outcome, time) in &report {
        println!("{name:8} {:6.1} s  {outcome}", time.as_secs_f64());
    }
    // Only `test`: `tidy` and `scalar` repeat its tests, and each test shall count once.
    if let Some((_, Outcome::Tested(tally), _)) = report.iter().find(|(name, ..)| *name == "test") {
        println!("\nAll test binaries of the workspace together:\ntest result: ok. {tally}");
    }
    Ok(())
}

impl Step {
    /// What to type in the repository's root for the same effect.
    fn command_line(&self) -> String {
        match self.env {
            Some((name, value)) if value.contains(' ') => format!("{name}=\"{value}\" cargo {}", self.args),
            Some((name, value)) => format!("{name}={value} cargo {}", self.args),
            None => format!("cargo {}", self.args),
        }
    }

    fn run(&self) -> Result<Outcome> {
        let mut command = cargo();
        command.args(self.args.split(' ')).envs(self.env);
        match self.kind {
            Kind::Own(run) => return run(),
            Kind::TestsBelowBestIsa if !has_more_than_avx2() => {
                return Ok(Outcome::Skipped { missing: "a CPU with more than AVX2".to_owned() });
            }
            Kind::Tests | Kind::TestsBelowBestIsa => return Ok(Outcome::Tested(Tally::of_tests(&mut command)?)),
            Kind::Optional if !self.is_installed()? => {
                let missing = format!("cargo-{}", self.subcommand());
                let missing = format!("{missing} is not installed (cargo install --locked {missing})");
                return Ok(Outcome::Skipped { missing });
            }
            Kind::Optional | Kind::Plain => {}
        }
        let status = command.status().context("cannot start cargo")?;
        if !status.success() {
            bail!("{status}");
        }
        Ok(Outcome::Passed)
    }

    fn subcommand(&self) -> &str {
        self.args.split(' ').next().unwrap_or_default()
    }

    fn is_installed(&self) -> Result<bool> {
        let output = cargo().args([self.subcommand(), "--version"]).output().context("cannot start cargo")?;
        Ok(output.status.success())
    }
}

/// True if the CPU has one of the instruction sets that `MOGE_ISA` places above AVX2.
fn has_more_than_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f") || is_x86_feature_detected!("avxvnni");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

#[cfg(test)]
mod tests {
    use super::{CHECK, TEST, select};

    #[test]
    fn every_step_has_a_name_of_its_own_and_can_be_chosen_by_it() {
        for step in CHECK.iter().chain(TEST) {
            let chosen = select(CHECK.iter().chain(TEST), &[step.name.to_string()]).unwrap();
            assert_eq!(chosen.len(), 1, "{}", step.name);
            assert_eq!(chosen[0].args, step.args);
        }
    }

    #[test]
    fn an_unknown_step_is_refused_with_the_list_of_steps() {
        let error = select(CHECK.iter(), &["clipy".to_string()]).err().unwrap().to_string();
        assert_eq!(error, "no step is called `clipy`; there are fmt, clippy, doc, tidy, deny");
    }
}
