//! A checkpoint's files, and how they become a model that runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::DecimalBytes;
use moge_engine::{Engine, EngineConfig};
use moge_model::cost::NetworkCost;
use moge_model::synth::write_checkpoint;
use moge_model::{
    Architecture, BLOCK_SIZE, ChatTemplate, ChatTemplateError, Checkpoint, Cpu, Dtype, GenerationDefaults, Isa,
    KvCache, KvType, LoadMode, Model, ModelConfig, Precision, QuantScheme, StoredTensor, Tokenizer, TokenizerError,
    Workspace, eos_token_ids,
};
use tempfile::TempDir;

use crate::args::{DtypeArg, KvArg, LoadArg, ModelArgs};
use crate::cmd::synth::{check_free_space, find_preset};
use crate::interrupt::Interrupt;
use crate::memory::{MemoryPlan, available_bytes};
use crate::output::say_line;
use crate::progress;

/// Rows of a step: enough that each expert's weights are read for several tokens.
pub(crate) const MAX_BATCHED_TOKENS: usize = 512;

/// Sequences that run at the same time.
const MAX_RUNNING: usize = 64;

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
pub(crate) struct ModelFiles {
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

impl ModelFiles {
    /// Read the small files of the checkpoint, made first if it is to be synthetic; `interrupt` removes it again.
    pub(crate) fn of(args: &ModelArgs, interrupt: Option<&Interrupt>) -> Result<ModelFiles> {
        let mut files = ModelFiles::as_they_are(args, interrupt)?;
        if let Some(scheme) = args.quantize {
            if !files.config.quant.is_none() {
                bail!("--quantize: {} is quantised already; it can only run as it is", files.dir.display());
            }
            files.config.quant = QuantScheme::uniform(scheme);
        }
        Ok(files)
    }

    fn as_they_are(args: &ModelArgs, interrupt: Option<&Interrupt>) -> Result<ModelFiles> {
        let Some(preset) = &args.source.synthetic else {
            return ModelFiles::open(args.source.model.as_deref().unwrap_or(Path::new(".")));
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
        Ok(ModelFiles { _folder: Some(folder), ..ModelFiles::open(&dir)? })
    }

    /// Read the small files in `dir`. A checkpoint without tokenizer is fine as long as nobody asks for it.
    pub(crate) fn open(dir: &Path) -> Result<ModelFiles> {
        let config = ModelConfig::load(dir)?;
        let defaults = GenerationDefaults::load(dir)?;
        let tokenizer = match Tokenizer::load(dir) {
            Err(error @ TokenizerError::Missing { .. }) => Err(error),
            other => Ok(Arc::new(other?)),
        };
        if let Ok(tokenizer) = &tokenizer {
            tokenizer.check_vocab(config.vocab_size)?;
        }
        Ok(ModelFiles { dir: dir.to_owned(), config, tokenizer, defaults, _folder: None })
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
        let copied_bytes = if args.quantize.is_some() { 0 } else { copied_bytes(&self.dir)? };
        let plan = MemoryPlan { weight_bytes, copied_bytes, kv_bytes, workspace_bytes };
        let paging = args.allow_paging && args.load == LoadArg::Mmap;
        plan.check(available, paging).with_context(|| self.dir.display().to_string())?;
        tracing::info!("memory: {plan} of {} available", DecimalBytes(available));
        Ok(Some(plan.left_bytes(available, paging)))
    }
}

/// Bytes of the tensors that loading copies, as they are not aligned for their type where the files have them.
fn copied_bytes(dir: &Path) -> Result<u64> {
    let checkpoint = Checkpoint::open(dir, LoadMode::Mmap, &|_, _| ())?;
    let is_copied = |tensor: &StoredTensor| {
        // The size of an element is the alignment that its type needs.
        let num_elements: usize = tensor.shape().iter().product();
        let align = tensor.bytes().len().checked_div(num_elements).unwrap_or(1);
        !tensor.bytes().as_ptr().addr().is_multiple_of(align)
    };
    let copied = checkpoint.tensors().filter(|(_, tensor)| is_copied(tensor));
    Ok(copied.map(|(_, tensor)| tensor.bytes().len() as u64).sum())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn tensors_behind_a_header_of_odd_length_are_counted_twice_before_anything_is_loaded() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/qwen3");
        assert_eq!(copied_bytes(&golden).unwrap(), 0);
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = fs::read(golden.join("model.safetensors")).unwrap();
        let (head, data) = bytes.split_at_mut(8);
        let header_bytes = u64::from_le_bytes((&*head).try_into().unwrap());
        let data_bytes = data.len() as u64 - header_bytes;
        let num_spaces = 1 + header_bytes % 2;
        head.copy_from_slice(&(header_bytes + num_spaces).to_le_bytes());
        let end = 8 + header_bytes as usize;
        bytes.splice(end..end, std::iter::repeat_n(b' ', num_spaces as usize));
        fs::write(folder.path().join("model.safetensors"), &bytes).unwrap();
        let copied_bytes = copied_bytes(folder.path()).unwrap();
        assert_eq!(copied_bytes, data_bytes);
        let plan = MemoryPlan { weight_bytes: bytes.len() as u64, copied_bytes, kv_bytes: 0, workspace_bytes: 0 };
        let error = plan.check(data_bytes * 3 / 2, false).unwrap_err().to_string();
        assert!(error.contains("copies of unaligned weights"), "{error}");
        plan.check(data_bytes - 1, true).unwrap_err();
        plan.check(data_bytes, true).unwrap();
    }
}
