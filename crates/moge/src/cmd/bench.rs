//! `moge bench`: how fast a model runs here, beside what the machine can do at best.

mod case;
mod measure;
mod random;
mod report;
mod roofline;
mod serve;
mod train;

use std::fmt::Debug;
use std::time::Instant;

use anyhow::Result;
use clap::builder::RangedU64ValueParser;
use clap::{Args, Subcommand, ValueEnum};
use moge_kernels::MemoryRead;
use moge_model::{Cpu, KvType, LayerFormats, Model, ModelConfig, QuantScheme, StepOutput, Workspace, format_name};

use self::case::{Case, Precisions, RandomTokens};
use self::measure::{Bench, Effort};
use self::report::{Report, StartReport};
use self::serve::ServeBenchArgs;
use self::train::TrainBenchArgs;
use crate::args::ModelArgs;
use crate::interrupt::Interrupt;
use crate::model_files::ModelFiles;
use crate::output::print_line;

/// Most sequences of a case.
const MAX_SEQUENCES: u64 = 4096;
/// Most tokens of a sequence; models allow fewer.
const MAX_TOKENS: u64 = 1 << 21;
/// Prompt of `--start`.
const START_TOKENS: usize = 16;

/// Measure a model's speed beside the machine's own limits
///
/// Tokens are random. Prefill is compared with the peak of multiply-adds, and counts the products that are computed; decode
/// with the speed of reading memory, and counts the weights and the KV cache that are read. The limits are measured before
/// and after each repetition, on as many threads: "share" is the median of the ratios of each repetition to its own
/// limits. Without any case, prefill of 512 tokens and decode of batches of 1, 8 and 32 are measured.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: Option<BenchCommand>,
    /// Prefill: tokens of a prompt, several for several cases [default: 512]
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = in_range(1, MAX_TOKENS))]
    prefill: Vec<usize>,
    /// Prefill: prompts that come at the same time [default: 1]
    #[arg(long, value_name = "N", value_parser = in_range(1, MAX_SEQUENCES))]
    prompts: Option<usize>,
    /// Decode: steps of a repetition [default: 64]
    #[arg(long, value_name = "N", value_parser = in_range(1, MAX_TOKENS))]
    decode: Option<usize>,
    /// Decode: sequences of a batch, several for several cases [default: 1,8,32]
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = in_range(1, MAX_SEQUENCES))]
    batch: Vec<usize>,
    /// Decode: tokens that each sequence has in its KV cache when it begins, filled with random numbers; several for
    /// several cases [default: 128]
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = in_range(0, MAX_TOKENS))]
    context: Vec<usize>,
    /// Time from opening the files to the first token of a 16-token prompt, the files being in the page cache or not
    #[arg(long)]
    start: bool,
    /// How often each case is measured
    #[arg(long, value_name = "N", default_value = "5", value_parser = in_range(1, 1000))]
    repetitions: usize,
    /// Show where the time of a step goes
    #[arg(long)]
    profile: bool,
    /// What to print
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    Serve(Box<ServeBenchArgs>),
    Train(Box<TrainBenchArgs>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A table.
    Table,
    /// One JSON object at the end.
    Json,
}

fn in_range(least: u64, most: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(least..=most)
}

/// Run `moge bench`.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    match &args.command {
        Some(BenchCommand::Serve(serve)) => serve::run(serve),
        Some(BenchCommand::Train(train)) => train::run(train),
        None => run_model(args),
    }
}

/// Measure a model, without a server.
fn run_model(args: &BenchArgs) -> Result<()> {
    // Without files to remove, Ctrl-C may end the program as it ends any other.
    let interrupt = args.model.is_synthetic().then(Interrupt::install).transpose()?;
    let mut opened = Instant::now();
    let files = ModelFiles::of(&args.model, interrupt.as_ref())?;
    if args.model.is_synthetic() {
        // Making a checkpoint is no part of starting one.
        opened = Instant::now();
    }
    let cases = args.cases();
    let precisions = Precisions { activation: files.activation(&args.model), kv: files.kv_type(&args.model) };
    check(args, &files, &cases, precisions.kv)?;
    let (model, cpu) = files.load_model(&args.model)?;
    let start = args.start.then(|| time_start(&model, &cpu, precisions, opened));
    let bench = Bench::new(&model, &cpu, precisions);
    let is_table = args.format == Format::Table;
    let mut report = Report {
        model: files.dir.display().to_string(),
        weights: weights_label(model.config()),
        activations: label(precisions.activation),
        kv: label(precisions.kv),
        isa: cpu.isa().name(),
        threads: cpu.num_threads(),
        ceilings: bench.ceilings.report(),
        start,
        cases: Vec::new(),
    };
    if is_table {
        print_line(&report)?;
    }
    let effort = Effort { repetitions: args.repetitions, profile: args.profile };
    for case in cases {
        let measured = bench.measure(case, effort);
        if is_table {
            print_line(&measured)?;
        }
        report.cases.push(measured);
    }
    if is_table { Ok(()) } else { print_line(serde_json::to_string(&report)?) }
}

/// A type's name as users write it.
fn label(name: impl Debug) -> String {
    format!("{name:?}").to_lowercase()
}

/// How the weights are stored: a type, or a format for each part of the network.
fn weights_label(config: &ModelConfig) -> String {
    let QuantScheme { layers: LayerFormats { mlp, shared_expert, attention }, exceptions, lm_head } = &config.quant;
    match *mlp {
        _ if config.quant.is_none() => label(config.dtype),
        Some(format) if config.quant == QuantScheme::uniform(format) => format_name(*mlp).to_owned(),
        _ => format!(
            "mlp {}, shared expert {}, attention {}, lm_head {}{}",
            format_name(*mlp),
            format_name(*shared_expert),
            format_name(*attention),
            format_name(*lm_head),
            if exceptions.is_empty() { "" } else { ", some layers otherwise" }
        ),
    }
}

/// Compute the first token of a prompt. `opened` is when the first file was.
fn time_start(model: &Model, cpu: &Cpu, precisions: Precisions, opened: Instant) -> StartReport {
    let loaded = Instant::now();
    let config = model.config();
    let case = Case::Prefill { tokens: START_TOKENS.min(config.max_position_embeddings), prompts: 1 };
    let mut kv_cache = case.kv_cache(cpu, config, precisions);
    let mut work = case.workspace(cpu, config, precisions);
    let step = case.step(0, &mut RandomTokens::new(config.vocab_size));
    model.forward(cpu, &step, &mut kv_cache, &mut work, &mut StepOutput::default());
    StartReport::new(case.tokens(), loaded - opened, loaded.elapsed())
}

/// Refuse before the weights are loaded what is too long or too large.
fn check(args: &BenchArgs, files: &ModelFiles, cases: &[Case], kv: KvType) -> Result<()> {
    let config = &files.config;
    cases.iter().try_for_each(|case| case.check(config))?;
    let num_threads = args.model.num_threads();
    // Cases run one after another.
    let kv_bytes = cases.iter().map(|case| case.kv_bytes(config, kv)).max().unwrap_or(0);
    let workspace_bytes =
        cases.iter().map(|case| Workspace::bytes(config, case.limits(num_threads))).max().unwrap_or(0);
    files.check_memory(&args.model, kv_bytes, workspace_bytes.saturating_add(MemoryRead::bytes(num_threads)))?;
    Ok(())
}

impl BenchArgs {
    fn cases(&self) -> Vec<Case> {
        let or_default = |given: &[usize], default: &[usize]| {
            if given.is_empty() { default.to_vec() } else { given.to_vec() }
        };
        let wants_prefill = !self.prefill.is_empty() || self.prompts.is_some();
        let wants_decode = self.decode.is_some() || !self.batch.is_empty() || !self.context.is_empty();
        let wants_all = !wants_prefill && !wants_decode && !self.start;
        let mut cases = Vec::new();
        if wants_prefill || wants_all {
            let prompts = self.prompts.unwrap_or(1);
            let lengths = or_default(&self.prefill, &[512]);
            cases.extend(lengths.into_iter().map(|tokens| Case::Prefill { tokens, prompts }));
        }
        if wants_decode || wants_all {
            let steps = self.decode.unwrap_or(64);
            for context in or_default(&self.context, &[128]) {
                let batches = or_default(&self.batch, &[1, 8, 32]);
                cases.extend(batches.into_iter().map(|batch| Case::Decode { steps, batch, context }));
            }
        }
        cases
    }
}
