//! Options that several commands share: which model, how it runs, how to sample.

use clap::builder::{PossibleValue, PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use clap::{Args, ValueEnum};
use moge_engine::SamplingParams;
use moge_model::{GenerationDefaults, MAX_THREADS, PackedFormat, TokenId, available_threads};
use std::path::PathBuf;

/// Which model, and how it runs.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    #[command(flatten)]
    pub(crate) source: ModelSource,
    /// Worker threads, at most 4096 [default: the processors this process may use]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_THREADS as u64))]
    pub(crate) threads: Option<usize>,
    /// Precision of activations; auto takes bf16 for bf16 checkpoints, f32 for others
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) dtype: DtypeArg,
    /// How the KV cache stores its numbers: int8 takes half of bf16; auto takes the precision of the activations
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) kv: KvArg,
    /// Quantise the weights in memory; `moge quantize` does it once and for all
    #[arg(long, value_parser = format_parser(), value_name = "SCHEME", conflicts_with_all = ["load", "allow_paging"])]
    pub(crate) quantize: Option<PackedFormat>,
    /// Map the weights, or read them whole (faster on network disks)
    #[arg(long, value_enum, default_value = "mmap")]
    pub(crate) load: LoadArg,
    /// Run even if the weights do not fit into memory: they are read from disk again and again
    #[arg(long)]
    pub(crate) allow_paging: bool,
}

/// Where the checkpoint comes from.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct ModelSource {
    /// Directory of the checkpoint: config.json, safetensors, tokenizer
    #[arg(short, long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Instead of --model: a random Pangu Pro MoE, made for this run in a temporary folder, of a preset's sizes
    /// (`moge synth --help` lists them)
    #[arg(long, value_name = "PRESET")]
    pub(crate) synthetic: Option<String>,
}

/// Precision of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    /// As the checkpoint says.
    Auto,
    /// Activations in f32; weights are widened as they are read.
    F32,
    /// Activations rounded to bf16, sums in f32.
    Bf16,
}

/// The names of the quantised formats.
pub(crate) fn format_parser() -> impl TypedValueParser<Value = PackedFormat> {
    let values = PackedFormat::ALL.map(|format| PossibleValue::new(format.name()).help(format.about()));
    PossibleValuesParser::new(values).map(|name| PackedFormat::from_name(&name).expect("one of the names"))
}

/// How the KV cache stores its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvArg {
    /// As the activations are.
    Auto,
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// int8 with a scale for each token and head.
    Int8,
}

/// How the weights come into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoadArg {
    /// Map the files.
    Mmap,
    /// Read the files.
    Read,
}

/// How to sample. What is not given comes from the checkpoint's `generation_config.json`, else greedy.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling (defaults: the checkpoint's generation_config.json, else greedy)")]
pub(crate) struct SamplingArgs {
    /// Divides the logits; 0 takes the most likely token
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Keep the K most likely tokens; 0 keeps all
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Keep the fewest most likely tokens whose probabilities add up to P
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Keep tokens at least P times as likely as the most likely one
    #[arg(long, value_name = "P")]
    min_p: Option<f64>,
    /// Divides the logits of tokens that have occurred; 1 is off
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f64>,
    /// Subtracted from the logits of tokens in the output, from -2 to 2
    #[arg(long, value_name = "X", allow_hyphen_values = true)]
    presence_penalty: Option<f64>,
    /// Subtracted for each time that a token is in the output, from -2 to 2
    #[arg(long, value_name = "X", allow_hyphen_values = true)]
    frequency_penalty: Option<f64>,
    /// Added to a token's logit, from -100 to 100; may be given several times
    #[arg(long, value_name = "ID=VALUE", value_parser = parse_logit_bias)]
    logit_bias: Vec<(TokenId, f64)>,
    /// The same seed gives the same tokens, whatever else runs and on how many threads [default: 0; chat takes a new
    /// one for every answer]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Stop before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Stop at these token ids too
    #[arg(long, value_name = "ID,ID", value_delimiter = ',', value_parser = parse_token_id)]
    stop_token_ids: Vec<TokenId>,
    /// Do not stop before N tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    min_tokens: usize,
    /// Go on after an end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,
}

/// A token id as the command line has it, perhaps with spaces around it.
pub(crate) fn parse_token_id(text: &str) -> Result<TokenId, String> {
    let id = text.trim().parse().map_err(|_| format!("a token id is a whole number from 0 to {}", u32::MAX));
    id.map(TokenId)
}

fn parse_logit_bias(text: &str) -> Result<(TokenId, f64), String> {
    let parse = || {
        let (id, bias) = text.split_once('=')?;
        Some((TokenId(id.trim().parse().ok()?), bias.trim().parse().ok()?))
    };
    parse().ok_or_else(|| format!("{text:?} is not ID=VALUE, as in 17=-2.5"))
}

impl SamplingArgs {
    /// True if the user wants the same draw again.
    pub(crate) fn seed_is_given(&self) -> bool {
        self.seed.is_some()
    }

    /// Sampling parameters; `defaults` fill what the command line leaves open.
    pub(crate) fn params(&self, defaults: &GenerationDefaults) -> SamplingParams {
        let defaults = SamplingParams::from(defaults);
        SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            logit_bias: self.logit_bias.iter().copied().collect(),
            seed: self.seed.unwrap_or(0),
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token_ids.clone(),
            min_tokens: self.min_tokens,
            ignore_eos: self.ignore_eos,
            ..SamplingParams::default()
        }
    }
}

impl ModelArgs {
    /// Threads to compute with.
    pub(crate) fn num_threads(&self) -> usize {
        self.threads.unwrap_or_else(available_threads)
    }

    /// The same for a baseline: weights as they lie, KV cache as precise as activations.
    pub(crate) fn for_baseline(&self) -> ModelArgs {
        ModelArgs { quantize: None, kv: KvArg::Auto, ..self.clone() }
    }

    /// True if the checkpoint is to be made first.
    pub(crate) fn is_synthetic(&self) -> bool {
        self.source.synthetic.is_some()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    #[test]
    fn a_silent_command_line_means_what_the_file_says_as_in_a_request() {
        let Line { sampling } = Line::parse_from(["moge"]);
        for do_sample in [None, Some(false), Some(true)] {
            for temperature in [None, Some(0.6)] {
                let defaults = GenerationDefaults { do_sample, temperature, top_k: Some(50), ..Default::default() };
                assert_eq!(sampling.params(&defaults), SamplingParams::from(&defaults));
            }
        }
    }
}
