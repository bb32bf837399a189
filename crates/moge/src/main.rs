//! The `moge` binary.

mod cmd;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Run, inspect and make Mixture-of-Grouped-Experts language models.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Inspect(cmd::inspect::InspectArgs),
    Synth(Box<cmd::synth::SynthArgs>),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Inspect(args) => cmd::inspect::run(&args),
        Command::Synth(args) => cmd::synth::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
