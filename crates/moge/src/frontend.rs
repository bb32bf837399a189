//! A model ready to run: what the commands that load one share.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use indicatif::DecimalBytes;
use moge_engine::{Engine, EngineConfig, SamplingParams};
use moge_model::cost::NetworkCost;
use moge_model::synth::write_checkpoint;
use moge_model::{
    Architecture, BLOCK_SIZE, ChatTemplate, ChatTemplateError, Checkpoint, Cpu, Dtype, GenerationDefaults, Isa,
    KvCache, KvType, LoadMode, MAX_THREADS, Model, ModelConfig, PackedFormat, Precision, QuantScheme, TokenId,
    Tokenizer, TokenizerError, Workspace, available_threads, eos_token_ids,
};
use tempfile::TempDir;

use crate::cmd::synth::{check_free_space, find_preset};
use crate::interrupt::Interrupt;
use crate::memory::{MemoryPlan, available_bytes};
use crate::output::say_line;
use crate::progress;

/// Rows of a step: enough that each expert's weights are read for several tokens.
pub(crate) const MAX_BATCHED_TOKENS: usize = 512;

/// Sequences that run at the same time.
const MAX_RUNNING: usize = 64;

/// Which model, and how it runs.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    #[command(flatten)]
    source: ModelSource,
    /// Worker threads, at most 4096 [default: the processors this process may use]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_THREADS as u64))]
    pub(crate) threads: Option<usize>,
    /// Precision of activations; auto takes bf16 for bf16 checkpoints, f32 for others
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) dtype: DtypeArg,
    /// How the KV cache stores its numbers: int8 takes half of bf16; auto takes the precision of the activations
    #[arg(long, value_enum, default_value = "auto")]
    kv: KvArg,
    /// Quantise the weights in memory; `moge quantize` does it once and for all
    #[arg(long, value_enum, value_name = "SCHEME", conflicts_with_all = ["load", "allow_paging"])]
    pub(crate) quantize: Option<FormatArg>,
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
struct ModelSource {
    /// Directory of the checkpoint: config.json, safetensors, tokenizer
    #[arg(short, long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Instead of --model: a random Pangu Pro MoE, made for this run in a temporary folder, of a preset's sizes
    /// (`moge synth --help` lists them)
    #[arg(long, value_name = "PRESET")]
    synthetic: Option<String>,
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

/// How weights are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// Eight bits, a scale for each output.
    W8a8,
    /// Four bits, a scale for each output and 32 inputs; the output head in eight.
    W4a8,
}

impl FormatArg {
    /// The format.
    pub(crate) fn format(self) -> PackedFormat {
        match self {
            FormatArg::W8a8 => PackedFormat::W8A8,
            FormatArg::W4a8 => PackedFormat::W4A8,
        }
    }
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

    /// Read the small files of the checkpoint, made first if it is to be synthetic; `interrupt` removes it again.
    pub(crate) fn open(&self, interrupt: Option<&Interrupt>) -> Result<Frontend> {
        let mut frontend = self.open_as_it_is(interrupt)?;
        if let Some(scheme) = self.quantize {
            if !frontend.config.quant.is_none() {
                bail!("--quantize: {} is quantised already; it can only run as it is", frontend.dir.display());
            }
            frontend.config.quant = QuantScheme::uniform(scheme.format());
        }
        Ok(frontend)
    }

    fn open_as_it_is(&self, interrupt: Option<&Interrupt>) -> Result<Frontend> {
        let Some(preset) = &self.source.synthetic else {
            return Frontend::open(self.source.model.as_deref().unwrap_or(Path::new(".")));
        };
        let preset = find_preset(Some(Architecture::PanguProMoe), preset)?;
        let folder = tempfile::Builder::new().prefix("moge-").tempdir().context("temporary folder")?;
        if let Some(interrupt) = interrupt {
            interrupt.remove_on_exit(folder.path());
        }
        let dir = folder.path().join(preset.name);
        check_free_space(&dir, preset.config.weight_bytes()?)?;
        let bar = progress::bytes("making");
        write_checkpoint(&dir, &preset.config, &mut |done, total| progress::set(&bar, done, total))?;
        bar.finish_and_clear();
        Ok(Frontend { _folder: Some(folder), ..Frontend::open(&dir)? })
    }
}

/// What a server allows its requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ServingLimits {
    /// Tokens of a sequence; `None`: the model's context, or what the KV cache holds.
    pub(crate) max_model_len: Option<usize>,
    /// Rows of a step.
    pub(crate) max_batched_tokens: usize,
    /// Sequences that run at the same time.
    pub(crate) max_running: usize,
    /// Sequences that wait.
    pub(crate) max_waiting: usize,
    /// Size of the KV cache; `None`: most of what is left.
    pub(crate) kv_bytes: Option<u64>,
}

/// An engine, and what it computes on.
pub(crate) struct Loaded {
    pub(crate) engine: Engine,
    pub(crate) cpu: Cpu,
    pub(crate) load_time: Duration,
    /// The greatest length of a sequence.
    pub(crate) max_sequence_tokens: usize,
}

/// The small files of a checkpoint: enough to make prompts of text.
pub(crate) struct Frontend {
    /// The checkpoint's directory.
    pub(crate) dir: PathBuf,
    /// The network's description, as it will run.
    pub(crate) config: ModelConfig,
    /// The tokenizer, or why there is none.
    tokenizer: Result<Arc<Tokenizer>, TokenizerError>,
    /// What `generation_config.json` states.
    pub(crate) defaults: GenerationDefaults,
    /// Where a synthetic checkpoint lies; removed when this is dropped.
    _folder: Option<TempDir>,
}

impl Frontend {
    /// Read the small files in `dir`. A checkpoint without tokenizer is fine as long as nobody asks for it.
    pub(crate) fn open(dir: &Path) -> Result<Frontend> {
        let config = ModelConfig::load(dir)?;
        let defaults = GenerationDefaults::load(dir)?;
        let tokenizer = match Tokenizer::load(dir) {
            Err(error @ TokenizerError::Missing { .. }) => Err(error),
            other => Ok(Arc::new(other?)),
        };
        if let Ok(tokenizer) = &tokenizer {
            tokenizer.check_vocab(config.vocab_size)?;
        }
        Ok(Frontend { dir: dir.to_owned(), config, tokenizer, defaults, _folder: None })
    }

    /// The tokenizer.
    pub(crate) fn tokenizer(&self) -> Result<&Arc<Tokenizer>> {
        match &self.tokenizer {
            Ok(tokenizer) => Ok(tokenizer),
            Err(missing) => bail!("{missing}; without it a prompt can only be given as --tokens"),
        }
    }

    /// The chat template.
    pub(crate) fn chat_template(&self) -> Result<ChatTemplate, ChatTemplateError> {
        ChatTemplate::load(&self.dir, self.config.architecture)
    }

    /// What to call the model: the directory's name.
    pub(crate) fn name(&self) -> String {
        let dir = self.dir.canonicalize().unwrap_or_else(|_| self.dir.clone());
        dir.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
    }

    /// How the KV cache stores its numbers.
    pub(crate) fn kv_type(&self, args: &ModelArgs) -> KvType {
        match args.kv {
            KvArg::Auto => self.activation(args).into(),
            KvArg::F32 => KvType::F32,
            KvArg::Bf16 => KvType::Bf16,
            KvArg::Int8 => KvType::Int8,
        }
    }

    /// The precision that `args` ask for.
    pub(crate) fn activation(&self, args: &ModelArgs) -> Precision {
        match (args.dtype, self.config.dtype) {
            (DtypeArg::F32, _) | (DtypeArg::Auto, Dtype::F32 | Dtype::F16) => Precision::F32,
            (DtypeArg::Bf16, _) | (DtypeArg::Auto, Dtype::Bf16) => Precision::Bf16,
        }
    }

    /// Load the weights and make an engine that can hold `sequence_tokens`, the greatest length of each sequence.
    pub(crate) fn load(&self, args: &ModelArgs, sequence_tokens: &[usize]) -> Result<Loaded> {
        let start = Instant::now();
        let (activation, kv) = (self.activation(args), self.kv_type(args));
        let tokenizer = self.tokenizer.as_ref().ok().cloned();
        let max_running = sequence_tokens.len().clamp(1, MAX_RUNNING);
        let total_tokens: usize = sequence_tokens.iter().sum();
        let mut config = EngineConfig {
            activation,
            kv,
            num_blocks: sequence_tokens.iter().map(|tokens| tokens.div_ceil(BLOCK_SIZE)).sum::<usize>().max(1),
            max_sequence_tokens: usize::MAX,
            max_batched_tokens: MAX_BATCHED_TOKENS.min(total_tokens).max(max_running),
            max_running,
            max_waiting: sequence_tokens.len().max(1),
            eos_token_ids: eos_token_ids(&self.config.eos_token_ids, &self.defaults, tokenizer.as_deref()),
            max_draft_tokens: 0,
        };
        let longest = sequence_tokens.iter().max().map_or(1, |tokens| tokens.div_ceil(BLOCK_SIZE).max(1));
        self.fit_memory(args, &mut config, longest)?;
        let (model, cpu) = self.load_model(args)?;
        tracing::info!(
            "{} threads, {}, {activation:?} activations, {kv:?} KV cache",
            cpu.num_threads(),
            cpu.isa().name()
        );
        let engine = Engine::new(model, &cpu, tokenizer, &config);
        Ok(Loaded { engine, cpu, load_time: start.elapsed(), max_sequence_tokens: config.max_sequence_tokens })
    }

    /// Load the weights and make an engine that serves requests yet unknown.
    pub(crate) fn load_for_serving(&self, args: &ModelArgs, limits: &ServingLimits) -> Result<Loaded> {
        let start = Instant::now();
        let (activation, kv) = (self.activation(args), self.kv_type(args));
        let tokenizer = self.tokenizer.as_ref().ok().cloned();
        let context = self.config.max_position_embeddings;
        let max_model_len = limits.max_model_len.unwrap_or(context);
        if max_model_len > context {
            bail!("--max-model-len: {max_model_len} is not allowed; the model's context is {context} tokens");
        }
        let block_bytes = KvCache::block_bytes(&self.config, kv);
        let most_blocks = limits.max_running.saturating_mul(max_model_len.div_ceil(BLOCK_SIZE));
        let mut config = EngineConfig {
            activation,
            kv,
            num_blocks: most_blocks,
            max_sequence_tokens: max_model_len,
            max_batched_tokens: limits.max_batched_tokens,
            max_running: limits.max_running,
            max_waiting: limits.max_waiting,
            eos_token_ids: eos_token_ids(&self.config.eos_token_ids, &self.defaults, tokenizer.as_deref()),
            max_draft_tokens: 0,
        };
        if let Some(kv_bytes) = limits.kv_bytes {
            config.num_blocks = most_blocks.min((kv_bytes / block_bytes) as usize).max(1);
        }
        let workspace_bytes = Workspace::bytes(&self.config, config.step_limits(&self.config, args.num_threads()));
        let asked_bytes = limits.kv_bytes.map_or(block_bytes, |_| block_bytes.saturating_mul(config.num_blocks as u64));
        let left = self.check_memory(args, asked_bytes, workspace_bytes)?;
        if let (None, Some(left)) = (limits.kv_bytes, left) {
            config.num_blocks = most_blocks.min((left / 10 * 9 / block_bytes) as usize + 1);
        }
        let kv_tokens = config.num_blocks.saturating_mul(BLOCK_SIZE);
        if limits.max_model_len.is_some() && kv_tokens < max_model_len {
            bail!(
                "--max-model-len: {max_model_len} tokens do not fit into a KV cache of {kv_tokens} tokens ({}); --kv \
                 int8 halves what they need, --kv-memory sets its size",
                DecimalBytes(block_bytes * config.num_blocks as u64)
            );
        }
        config.max_sequence_tokens = max_model_len.min(kv_tokens);
        let (model, cpu) = self.load_model(args)?;
        say_line(format_args!(
            "KV cache: {} for {kv_tokens} tokens; sequences of up to {} tokens; {} threads",
            DecimalBytes(block_bytes * config.num_blocks as u64),
            config.max_sequence_tokens,
            cpu.num_threads()
        ));
        let engine = Engine::new(model, &cpu, tokenizer, &config);
        Ok(Loaded { engine, cpu, load_time: start.elapsed(), max_sequence_tokens: config.max_sequence_tokens })
    }

    /// Load the weights, and start the threads that compute.
    pub(crate) fn load_model(&self, args: &ModelArgs) -> Result<(Model, Cpu)> {
        let isa = Isa::select()?;
        let num_threads = args.num_threads();
        let cpu = Cpu::new(isa, num_threads);
        let bar = progress::bytes(if args.quantize.is_some() { "quantising" } else { "loading" });
        let report = |done, total| progress::set(&bar, done, total);
        let model = match (args.quantize, args.load) {
            (Some(_), _) => Model::load_quantizing(&self.dir, &cpu, self.config.quant.clone(), &report)?,
            (None, LoadArg::Mmap) => Model::load(&self.dir, LoadMode::Mmap, &report)?,
            (None, LoadArg::Read) => Model::load(&self.dir, LoadMode::Read, &report)?,
        };
        if args.quantize.is_none() && args.load == LoadArg::Mmap && !args.allow_paging {
            model.checkpoint().inspect(|checkpoint| checkpoint.prefault(num_threads, &report));
        }
        bar.finish_and_clear();
        if cpu.num_threads() < num_threads {
            tracing::warn!("the system allows {} of {num_threads} threads", cpu.num_threads());
        }
        Ok((model, cpu))
    }

    /// Cut the KV cache to what memory allows, but not below `least_blocks`; refuses what will not fit even so.
    fn fit_memory(&self, args: &ModelArgs, config: &mut EngineConfig, least_blocks: usize) -> Result<()> {
        let block_bytes = KvCache::block_bytes(&self.config, config.kv);
        let kv_bytes = |blocks: usize| block_bytes.saturating_mul(blocks as u64);
        let limits = config.step_limits(&self.config, args.num_threads());
        let workspace_bytes = Workspace::bytes(&self.config, limits);
        let Some(left) = self.check_memory(args, kv_bytes(least_blocks), workspace_bytes)? else { return Ok(()) };
        let affordable = least_blocks + (left / block_bytes) as usize;
        config.num_blocks = config.num_blocks.min(affordable).max(least_blocks);
        tracing::info!("{} of KV cache", DecimalBytes(kv_bytes(config.num_blocks)));
        Ok(())
    }

    /// Refuse a run that does not fit into memory. Returns the bytes that it leaves, if the system tells.
    pub(crate) fn check_memory(&self, args: &ModelArgs, kv_bytes: u64, workspace_bytes: u64) -> Result<Option<u64>> {
        let Some(available) = available_bytes() else { return Ok(None) };
        // The mapped originals of weights that are quantised in memory leave it when others need it.
        let weight_bytes = if args.quantize.is_some() {
            NetworkCost::of(&self.config).total.bytes
        } else {
            Checkpoint::file_bytes(&self.dir)?
        };
        let plan = MemoryPlan { weight_bytes, kv_bytes, workspace_bytes };
        let paging = args.allow_paging && args.load == LoadArg::Mmap;
        plan.check(available, paging).with_context(|| self.dir.display().to_string())?;
        tracing::info!("memory: {plan} of {} available", DecimalBytes(available));
        Ok(Some(plan.left_bytes(available, paging)))
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
