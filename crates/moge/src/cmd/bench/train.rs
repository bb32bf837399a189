//! `moge bench train`: the speed of training steps, for a program that compares it.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use indicatif::DecimalBytes;
use moge_kernels::{IGNORED_TARGET, f32_flops_per_s};
use moge_model::{Cpu, Isa, ModelConfig, Precision, available_threads};
use moge_train::{
    Layout, LossConfig, MAX_ROWS, Optimizer, OptimizerConfig, TokenBatch, TokenFile, TrainMemory, TrainNetwork,
    TrainState, Workspace, load_weights,
};
use serde_json::json;

use super::in_range;
use crate::memory;
use crate::output::{print_line, say_line};

/// Most of each number that is asked for.
const MAX: u64 = 1 << 24;

/// Measure training steps on a checkpoint and a token file
///
/// Each sequence is the beginning of a document of the file, in order; its last token has no target. A step is forward,
/// backward, clipping to norm 1 and AdamW (0.9, 0.95, decay 0.1), with the auxiliary loss times 0.001. Prints a JSON line
/// for each step, with the losses before its update; the peak of f32 multiply-adds is measured after it.
#[derive(Debug, Args)]
pub(crate) struct TrainBenchArgs {
    /// The checkpoint's directory
    model: PathBuf,
    /// Token file, see docs/training.md
    batches: PathBuf,
    /// Sequences of a step
    #[arg(long, value_name = "N", default_value = "8", value_parser = in_range(1, MAX))]
    num_sequences: usize,
    /// Tokens of a sequence
    #[arg(long, value_name = "N", default_value = "256", value_parser = in_range(1, MAX))]
    sequence_length: usize,
    /// Steps
    #[arg(long, value_name = "N", default_value = "5", value_parser = in_range(1, MAX))]
    num_steps: usize,
    /// What matrix products round their operands to
    #[arg(long, value_enum, default_value = "f32")]
    dtype: ComputeType,
    /// Keep only the inputs of layers, and compute the rest again
    #[arg(long)]
    recompute: bool,
    /// Worker threads [default: the processors this process may use]
    #[arg(long, value_name = "N", value_parser = in_range(1, moge_model::MAX_THREADS as u64))]
    threads: Option<usize>,
    /// Learning rate of every step
    #[arg(long, value_name = "RATE", default_value = "3e-4")]
    learning_rate: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ComputeType {
    F32,
    Bf16,
}

/// Run `moge bench train`.
pub(super) fn run(args: &TrainBenchArgs) -> Result<()> {
    let config = ModelConfig::load(&args.model)?;
    let tokens = TokenFile::open(&args.batches, config.vocab_size)?;
    let num_wanted = args.num_sequences as u64 * args.num_steps as u64;
    if tokens.num_documents() < num_wanted {
        let found = tokens.num_documents();
        bail!("{}: has {found} documents; {num_wanted} sequences are asked for", args.batches.display());
    }
    let num_rows = args.num_sequences * args.sequence_length;
    if num_rows > MAX_ROWS {
        bail!("--num-sequences times --sequence-length is {num_rows}; allowed: at most {MAX_ROWS}");
    }
    let plan = TrainMemory::new(&config, num_rows, args.recompute);
    if let Some(available_bytes) = memory::available_bytes() {
        memory::check_training(plan, available_bytes)?;
    }
    say_line(format_args!(
        "counted: {} (parameters, gradients, moments {} + activations {} + scratch {})",
        DecimalBytes(plan.total_bytes()),
        DecimalBytes(plan.state_bytes),
        DecimalBytes(plan.activation_bytes),
        DecimalBytes(plan.scratch_bytes),
    ));
    let mut state = TrainState::new(load_weights(&args.model, &config, &Layout::new(&config))?);
    let cpu = Cpu::new(Isa::select()?, args.threads.unwrap_or_else(available_threads));
    let activation = match args.dtype {
        ComputeType::F32 => Precision::F32,
        ComputeType::Bf16 => Precision::Bf16,
    };
    let work = Workspace::new(&cpu, &config, activation, num_rows, args.recompute);
    let loss = LossConfig { aux: 0.001, z: 0.0 };
    // As the peer does, of which all parameters decay.
    let (weight_decay, decay_norms_and_biases) = (0.1, true);
    let optimizer =
        OptimizerConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay, decay_norms_and_biases, clip: 1.0 };
    let mut optimizer = Optimizer::new(TrainNetwork::new(&config), work, loss, optimizer);
    let flops = optimizer.network().ops_per_token() * num_rows as u64;
    for step in 0..args.num_steps {
        let batch = read_batch(&tokens, args, step)?;
        let start = Instant::now();
        let losses = optimizer.step(&cpu, &mut state, &[batch], args.learning_rate);
        let seconds = start.elapsed().as_secs_f64();
        print_line(json!({
            "step": step + 1,
            "loss": losses.loss,
            "aux_loss": losses.aux_loss,
            "grad_norm": losses.grad_norm,
            "seconds": seconds,
            "tokens": num_rows,
            "flops": flops,
            "peak_flops_per_s": f32_flops_per_s(&cpu),
        }))?;
    }
    Ok(())
}

/// The sequences of a step.
fn read_batch(file: &TokenFile, args: &TrainBenchArgs, step: usize) -> Result<TokenBatch> {
    let mut batch = TokenBatch { offsets: vec![0], ..TokenBatch::default() };
    for index in step * args.num_sequences..(step + 1) * args.num_sequences {
        let places = file.document(index as u64)?;
        let length = args.sequence_length as u64;
        if places.end - places.start < length {
            let found = places.end - places.start;
            bail!("{}: document {index} has {found} tokens; --sequence-length is {length}", args.batches.display());
        }
        let first = batch.tokens.len();
        file.read(places.start..places.start + length, &mut batch.tokens)?;
        batch.targets.extend_from_slice(&batch.tokens[first + 1..]);
        batch.targets.push(IGNORED_TARGET);
        batch.offsets.push(batch.tokens.len());
    }
    Ok(batch)
}
