//! `moge quantize`: a checkpoint to one in the packed layout.

use std::fs::{self, OpenOptions};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::{fmt, io};

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use indicatif::DecimalBytes;
use moge_model::{
    Cpu, Isa, LayerFormats, MAX_THREADS, PackedFormat, QuantScheme, WriteError, available_threads, format_from_name,
    format_name, format_names,
};
use moge_quant::{Job, QuantizeError, RoundingErrors};

use crate::args::format_parser;
use crate::cmd::synth::check_free_space;
use crate::interrupt::Interrupt;
use crate::{output, progress};

/// Quantise a checkpoint once and for all: smaller, faster, and mapped as it lies at every start
///
/// Reads checkpoints in f32, f16 and bf16, and the official int8 ones (quant_model_weight*.safetensors). Norms, routers,
/// embedding and biases stay as they are. Needs little memory, whatever the size. Stopped or killed, it goes on when the
/// same command is run again.
#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    /// Directory of the checkpoint
    #[arg(short, long, value_name = "DIR")]
    model: PathBuf,
    /// Directory to write: new, empty, or what an earlier run left unfinished
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Format of all weights but the head: w8a8 has eight bits per weight, w4a8 four and a half
    #[arg(long, value_parser = format_parser())]
    scheme: PackedFormat,
    /// Another format for the shared expert
    #[arg(long, value_name = "FORMAT", value_parser = RoleFormat::parser())]
    shared_expert: Option<RoleFormat>,
    /// Another format for the projections of attention
    #[arg(long, value_name = "FORMAT", value_parser = RoleFormat::parser())]
    attention: Option<RoleFormat>,
    /// Format of the output head
    #[arg(long, value_name = "FORMAT", default_value = "w8a8", value_parser = RoleFormat::parser())]
    lm_head: RoleFormat,
    /// Another format for all weights of one layer, counted from 0; may be given for several
    #[arg(long, value_name = "LAYER=FORMAT", value_parser = LayerFormat::parse)]
    layer: Vec<LayerFormat>,
    /// Worker threads, at most 4096 [default: the processors this process may use]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_THREADS as u64))]
    threads: Option<usize>,
    /// Write what rounding did to every tensor to this file, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// How weights of one role are quantised; `None`: they stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RoleFormat(Option<PackedFormat>);

/// A layer with a format of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LayerFormat {
    layer: usize,
    format: RoleFormat,
}

impl LayerFormat {
    fn parse(text: &str) -> Result<LayerFormat, String> {
        let allowed = || format!("not LAYER=FORMAT, as in 0=w8a8; formats are {}", format_names());
        let (layer, format) = text.split_once('=').ok_or_else(allowed)?;
        let layer = layer.parse().map_err(|_| allowed())?;
        Ok(LayerFormat { layer, format: RoleFormat(format_from_name(format).ok_or_else(allowed)?) })
    }
}

impl RoleFormat {
    fn parser() -> impl TypedValueParser<Value = RoleFormat> {
        let about = |format: Option<PackedFormat>| format.map_or("As they are", PackedFormat::about);
        let value = |format| PossibleValue::new(format_name(format)).help(about(format));
        let values = PackedFormat::ALL.into_iter().map(Some).chain([None]).map(value);
        PossibleValuesParser::new(values).map(|name| RoleFormat(format_from_name(&name).expect("one of the names")))
    }
}

/// Quantise as `args` say, and print what that did to the weights.
pub(crate) fn run(args: &QuantizeArgs) -> Result<()> {
    let job = Job::open(&args.model, &args.out, &args.scheme())?;
    if args.shared_expert.is_some() && job.config().moe().and_then(|moe| moe.shared_intermediate_size).is_none() {
        bail!("--shared-expert: this network has none");
    }
    let num_layers = job.config().num_layers();
    if let Some(LayerFormat { layer, .. }) = args.layer.iter().find(|exception| exception.layer >= num_layers) {
        bail!("--layer {layer}: this network has layers 0 to {}", num_layers - 1);
    }
    let (output_bytes, missing_bytes) = (job.output_bytes(), job.missing_bytes());
    check_free_space(&args.out, missing_bytes)?;
    if let Some(file) = &args.report {
        // The report may be wanted beside what it is about.
        fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
        check_writable(file).with_context(|| file.display().to_string())?;
    }
    if missing_bytes < output_bytes {
        let done = DecimalBytes(output_bytes - missing_bytes);
        tracing::warn!("{}: going on after {done} of {}", args.out.display(), DecimalBytes(output_bytes));
    }
    let interrupt = Interrupt::install()?;
    let working = interrupt.answering();
    let cpu = Cpu::new(Isa::select()?, args.threads.unwrap_or_else(available_threads));
    let bar = progress::bytes("quantising");
    let mut is_first = true;
    let result = job.run(&cpu, &mut |done, total| {
        progress::set(&bar, done, total);
        if std::mem::take(&mut is_first) {
            // What an earlier run did says nothing about the rate of this one.
            bar.reset_eta();
        }
        if interrupt.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    drop(working);
    bar.finish_and_clear();
    let damage = match result {
        Ok(damage) => damage,
        Err(error @ QuantizeError::Stopped { .. }) => {
            output::say_line(error);
            interrupt.leave();
        }
        Err(error @ QuantizeError::Write(WriteError::DiskFull { .. })) => {
            bail!("{error}; with more space the same command, run again, will go on");
        }
        Err(error) => return Err(error.into()),
    };
    if let Some(file) = &args.report {
        let json = serde_json::to_string_pretty(&damage)?;
        fs::write(file, json + "\n").with_context(|| file.display().to_string())?;
    }
    output::print(Summary { args, output_bytes, damage: &damage })
}

/// Refuse a file that cannot be written when the work is done. What it holds stays until then.
fn check_writable(file: &Path) -> io::Result<()> {
    let is_new = fs::symlink_metadata(file).is_err();
    OpenOptions::new().write(true).create(true).truncate(false).open(file)?;
    if is_new { fs::remove_file(file) } else { Ok(()) }
}

impl QuantizeArgs {
    fn scheme(&self) -> QuantScheme {
        let uniform = QuantScheme::uniform(self.scheme);
        let layers = LayerFormats {
            mlp: uniform.layers.mlp,
            shared_expert: self.shared_expert.map_or(uniform.layers.shared_expert, |format| format.0),
            attention: self.attention.map_or(uniform.layers.attention, |format| format.0),
        };
        let formats = |format: RoleFormat| format.0.map_or_else(LayerFormats::default, LayerFormats::uniform);
        let exceptions = self.layer.iter().map(|exception| (exception.layer, formats(exception.format))).collect();
        QuantScheme { layers, exceptions, lm_head: self.lm_head.0 }
    }
}

/// What is printed at the end.
struct Summary<'a> {
    args: &'a QuantizeArgs,
    output_bytes: u64,
    damage: &'a RoundingErrors,
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.args.out.display(), DecimalBytes(self.output_bytes))?;
        writeln!(f, "role           format  tensors  relative error  largest difference  worst tensor")?;
        for role in &self.damage.roles {
            let (name, format, tensors) = (role.role, role.format, role.num_tensors);
            let (error, largest) = (100.0 * role.relative_error, role.max_error);
            write!(f, "{name:<14} {format:<7} {tensors:>7} {error:>13.3} % {largest:>19.6}  ")?;
            writeln!(f, "{} ({:.3} %)", output::plain(&role.worst_tensor), 100.0 * role.worst_relative_error)?;
        }
        Ok(())
    }
}
