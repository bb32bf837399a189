//! `moge train`: train a network as a run file says.

use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use clap::builder::RangedU64ValueParser;
use indicatif::ProgressBar;
use moge_model::{Cpu, Isa, MAX_THREADS, available_threads};
use moge_train::{DataError, DataProgress, Outcome, RunConfig, Session, SessionError, StepMetrics};

use crate::interrupt::Interrupt;
use crate::{memory, output, progress};

/// Train a network as a run file says
///
/// Stopped or killed, the same command goes on from the newest checkpoint, and ends with the same bits as if nothing had
/// happened. Ctrl-C finishes the step and writes a checkpoint; a second one ends at once. Writes checkpoints that every
/// other command takes, metrics.jsonl, and report.html, which opens offline.
#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    /// The run file: model, data, phases and output in TOML
    #[arg(value_name = "RUN.toml")]
    run: PathBuf,
    /// Worker threads, at most 4096 [default: the processors this process may use]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_THREADS as u64))]
    threads: Option<usize>,
    /// Devices that the report computes the imbalance of experts for; a divisor of their number [default: one for each
    /// expert group]
    #[arg(long, value_name = "N")]
    devices: Option<usize>,
    /// Make only the report again
    #[arg(long)]
    report_only: bool,
}

/// Train as `args` say.
pub(crate) fn run(args: &TrainArgs) -> Result<()> {
    let run = RunConfig::load(&args.run)?;
    let report = Session::report_path(&run);
    if args.report_only {
        Session::report(&run, args.devices).write(&report)?;
        return output::print_line(report.display());
    }
    if let Some(available_bytes) = memory::available_bytes() {
        memory::check_training(run.memory(), available_bytes)?;
    }
    let interrupt = Interrupt::install()?;
    let working = interrupt.working();
    let cpu = Cpu::new(Isa::select()?, args.threads.unwrap_or_else(available_threads));
    let mut session = open(&run, cpu, args.devices, &interrupt)?;
    warn(&session);
    let first_step = session.step();
    let bar = progress::items("training", session.num_steps() as usize);
    bar.set_position(first_step);
    // What an earlier run did says nothing about the rate of this one.
    bar.reset_eta();
    let mut last_loss = None;
    let result = session.run(&mut |metrics| {
        last_loss = Some(metrics.loss);
        show(&bar, metrics);
        if interrupt.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let outcome = result?;
    drop(working);
    let checkpoint = session.last_checkpoint().unwrap_or(&run.output.dir).display();
    let (step, num_steps) = (session.step(), session.num_steps());
    if outcome == Outcome::Stopped {
        output::say_line(format_args!(
            "{checkpoint}: stopped after {step} of {num_steps} steps; the same command, run again, goes on"
        ));
        interrupt.leave();
    }
    let end = match last_loss {
        Some(loss) => format!("{step} steps, loss {loss:.4}"),
        None => format!("{step} steps were done before, the run file asks for {num_steps}: nothing is left to do"),
    };
    output::print_line(format_args!("{checkpoint}: {end}\n{}", report.display()))
}

/// Open the run, with a bar for each source of data while it is prepared.
fn open(run: &RunConfig, cpu: Cpu, num_devices: Option<usize>, interrupt: &Interrupt) -> Result<Session> {
    let mut bar: Option<(String, ProgressBar)> = None;
    let opened = Session::open(run, cpu, num_devices, &mut |DataProgress { source, done_bytes, total_bytes }| {
        if bar.as_ref().is_none_or(|(name, _)| name != source) {
            bar = Some((source.to_owned(), progress::bytes("reading the data")));
        }
        if let Some((_, bar)) = &bar {
            progress::set(bar, done_bytes, total_bytes);
        }
        if interrupt.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    if let Some((_, bar)) = bar {
        bar.finish_and_clear();
    }
    match opened {
        Err(SessionError::Data(error @ DataError::Stopped { .. })) => {
            output::say_line(error);
            interrupt.leave();
        }
        opened => Ok(opened?),
    }
}

/// Say what the user may not expect.
fn warn(session: &Session) {
    for damage in session.damaged() {
        tracing::warn!("{}", output::plain(&damage.to_string()));
    }
    if let Some(dir) = session.last_checkpoint()
        && session.step() < session.num_steps()
    {
        tracing::warn!("{}: going on after step {}", dir.display(), session.step());
    }
    for change in session.changes() {
        tracing::warn!("changed since that checkpoint: {}", output::plain(change));
    }
    for source in session.data().sources().filter(|source| source.num_bad_lines > 0) {
        tracing::warn!(
            "data.{}: {} lines hold no document and were left out; on_bad_line = \"stop\" tells what is wrong with the first",
            source.name,
            source.num_bad_lines
        );
    }
}

fn show(bar: &ProgressBar, metrics: &StepMetrics) {
    let StepMetrics { step, phase, loss, learning_rate, grad_norm, tokens_per_s, .. } = metrics;
    let phase = output::plain(phase);
    bar.set_position(*step);
    bar.set_message(format!("{phase}: loss {loss:.4}, {tokens_per_s:.0} tokens/s"));
    tracing::info!(
        "{phase}: step {step}: loss {loss:.4}, learning rate {learning_rate:.3e}, gradient norm {grad_norm:.3}, \
         {tokens_per_s:.0} tokens/s"
    );
}
