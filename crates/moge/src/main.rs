//! The `moge` binary.

// Printing goes through `output`, which bears a closed pipe.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod args;
mod cmd;
mod conversation;
mod input;
mod interrupt;
mod memory;
mod model_files;
mod output;
mod progress;
mod thinking;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use tracing::level_filters::LevelFilter;

use cmd::serve::LogFormat;

/// Run, inspect and make Mixture-of-Grouped-Experts language models.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Say more on standard error: -v what is being done, -vv details
    #[arg(short, long, global = true, display_order = 100, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Say nothing on standard error but errors
    #[arg(short, long, global = true, display_order = 100, conflicts_with = "verbose")]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Generate(Box<cmd::generate::GenerateArgs>),
    Chat(Box<cmd::chat::ChatArgs>),
    Tokenize(cmd::tokenize::TokenizeArgs),
    Inspect(cmd::inspect::InspectArgs),
    Serve(Box<cmd::serve::ServeArgs>),
    Bench(Box<cmd::bench::BenchArgs>),
    Synth(Box<cmd::synth::SynthArgs>),
    Quantize(cmd::quantize::QuantizeArgs),
    Perplexity(Box<cmd::perplexity::PerplexityArgs>),
    Train(cmd::train::TrainArgs),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // A server's log has a line for each request.
    let usual = if matches!(cli.command, Command::Serve(_)) { LevelFilter::INFO } else { LevelFilter::WARN };
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => usual,
        (false, 1) => LevelFilter::INFO,
        (false, _) => LevelFilter::DEBUG,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_target(false)
        .log_internal_errors(false);
    match &cli.command {
        Command::Serve(args) if args.log_format == LogFormat::Json => log.json().flatten_event(true).init(),
        _ => log.without_time().with_ansi(std::io::stderr().is_terminal()).init(),
    }
    let result = match cli.command {
        Command::Generate(args) => cmd::generate::run(&args),
        Command::Chat(args) => cmd::chat::run(&args),
        Command::Tokenize(args) => cmd::tokenize::run(&args),
        Command::Inspect(args) => cmd::inspect::run(&args),
        Command::Serve(args) => cmd::serve::run(&args),
        Command::Bench(args) => cmd::bench::run(&args),
        Command::Synth(args) => cmd::synth::run(&args),
        Command::Quantize(args) => cmd::quantize::run(&args),
        Command::Perplexity(args) => cmd::perplexity::run(&args),
        Command::Train(args) => cmd::train::run(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "moge", &mut script);
            output::print(String::from_utf8_lossy(&script))
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_reader_gone(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::say_line(format_args!("error: {}", output::one_line(&error)));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
