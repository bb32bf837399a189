//! The loop: schedule, forward, sample, postprocess.

use std::sync::Arc;

use moge_model::{
    BLOCK_SIZE, Cpu, ExpertId, KvCache, KvType, Model, ModelConfig, Precision, StepLimits, StepOutput, TokenId,
    Tokenizer, Workspace,
};

use crate::error::AdmitError;
use crate::masks::Masks;
use crate::output::{SequenceOutput, SequenceResult};
use crate::request::{Request, SeqId};
use crate::sample::sample;
use crate::sampler::Samplers;
use crate::scheduler::{Scheduler, SchedulerConfig};
use crate::stats::{EngineStats, ExpertLoad};
use crate::step::Step;

/// Sizes and limits of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Precision of activations.
    pub activation: Precision,
    /// Element type of the KV cache.
    pub kv: KvType,
    /// Blocks of the KV cache, of [`moge_model::BLOCK_SIZE`] tokens each.
    pub num_blocks: usize,
    /// Longest sequence, prompt and output together; the model's context if that is shorter.
    pub max_sequence_tokens: usize,
    /// Rows of a step, at least 1. A longer prompt is computed in several steps.
    pub max_batched_tokens: usize,
    /// Sequences that run at the same time, at least 1.
    pub max_running: usize,
    /// Requests that may wait to run.
    pub max_waiting: usize,
    /// Tokens that end a sequence: the union of what config, generation config and tokenizer name.
    pub eos_token_ids: Vec<TokenId>,
    /// Most draft tokens of a sequence that one step verifies ([`Engine::set_draft`]); 0 without a drafter.
    pub max_draft_tokens: usize,
}

impl EngineConfig {
    /// The largest step that the engine will take.
    pub fn step_limits(&self, model: &ModelConfig, num_threads: usize) -> StepLimits {
        StepLimits {
            max_rows: self.max_batched_tokens,
            max_logit_rows: self.scheduler(model).max_logit_rows(),
            max_context: self.scheduler(model).max_sequence_tokens.min(self.num_blocks * BLOCK_SIZE),
            num_threads,
        }
    }

    /// Limits of the scheduler with this model.
    fn scheduler(&self, model: &ModelConfig) -> SchedulerConfig {
        SchedulerConfig {
            vocab_size: model.vocab_size,
            max_sequence_tokens: self.max_sequence_tokens.min(model.max_position_embeddings),
            num_blocks: self.num_blocks,
            max_batched_tokens: self.max_batched_tokens,
            max_running: self.max_running,
            max_waiting: self.max_waiting,
            eos_token_ids: self.eos_token_ids.clone(),
            max_draft_tokens: self.max_draft_tokens,
        }
    }
}

/// A model, its KV cache, and the requests it processes.
pub struct Engine {
    model: Model,
    /// Threads that the workspace has room for.
    num_threads: usize,
    kv_cache: KvCache,
    workspace: Workspace,
    output: StepOutput,
    scheduler: Scheduler,
    samplers: Samplers,
    expert_load: Option<ExpertLoad>,
    masks: Masks,
}

impl Engine {
    /// Allocate KV cache and workspace for `model` and for steps on `cpu`. Without a tokenizer all text is empty and stop
    /// strings are refused.
    ///
    /// # Panics
    /// As [`Scheduler::new`].
    pub fn new(model: Model, cpu: &Cpu, tokenizer: Option<Arc<Tokenizer>>, config: &EngineConfig) -> Engine {
        let limits = config.step_limits(model.config(), cpu.num_threads());
        Engine {
            kv_cache: KvCache::new(model.config(), config.kv, config.num_blocks),
            workspace: Workspace::new(model.config(), config.activation, limits),
            output: StepOutput::new(model.config(), limits),
            scheduler: Scheduler::new(config.scheduler(model.config()), tokenizer),
            samplers: Samplers::default(),
            expert_load: ExpertLoad::new(model.config()),
            masks: Masks::default(),
            num_threads: limits.num_threads,
            model,
        }
    }

    /// Queue a request; [`Engine::step`] works on it.
    ///
    /// # Errors
    /// [`AdmitError`] if it is invalid, could never run, or the queue is full.
    pub fn add_request(&mut self, request: Request) -> Result<SeqId, AdmitError> {
        // An expert id within its group is reported as a byte; no known model has larger expert groups.
        let has_expert_ids = self.expert_load.as_ref().is_some_and(|load| load.experts_per_group <= 256);
        if request.sampling.return_expert_ids && !has_expert_ids {
            let allowed = "false, as the model has no expert groups of at most 256 routed experts".to_owned();
            return Err(AdmitError::InvalidParameter { field: "return_expert_ids", value: "true".to_owned(), allowed });
        }
        self.scheduler.add_request(request)
    }

    /// Compute one batch on `cpu` and return one output for each sequence in it; empty if there is no work. Between two
    /// steps a trainer or another engine may use the same threads.
    ///
    /// # Panics
    /// If `cpu` has more threads than the one the engine was made for.
    pub fn step(&mut self, cpu: &Cpu) -> Vec<SequenceOutput> {
        assert!(cpu.num_threads() <= self.num_threads, "more threads than the engine was made for");
        let Some(step) = self.scheduler.schedule() else { return Vec::new() };
        self.masks.start(self.scheduler.take_grammars(&step));
        self.model.forward(cpu, &step.batch, &mut self.kv_cache, &mut self.workspace, &mut self.output);
        let masks = self.scheduler.return_grammars(self.masks.finish());
        let rows = self.scheduler.logit_rows(&step, masks);
        let vocab_size = self.model.config().vocab_size;
        let mut results = sample(cpu, &self.samplers, &rows, &self.output.logits, vocab_size);
        if let Some(load) = &mut self.expert_load {
            load.add(&self.output.rows_per_expert);
            add_expert_ids(&mut results, &step, &self.output.expert_ids, load);
        }
        self.scheduler.postprocess(&step, results)
    }

    /// As [`Scheduler::set_draft`].
    pub fn set_draft(&mut self, id: SeqId, draft: Vec<TokenId>) {
        self.scheduler.set_draft(id, draft);
    }

    /// Replace the weights of a model made by [`Model::from_params`], and forget what the old ones computed for prompts to
    /// come. Sequences that run go on with keys and values of the old ones.
    ///
    /// # Panics
    /// As [`Model::update_params`].
    pub fn update_params(&mut self, cpu: &Cpu, params: &[f32]) {
        self.model.update_params(cpu, params);
        self.clear_prefix_cache();
    }

    /// As [`Scheduler::clear_prefix_cache`].
    pub fn clear_prefix_cache(&mut self) {
        self.scheduler.clear_prefix_cache();
    }

    /// End a sequence now and free its blocks. Returns its last output, `None` if it has ended before.
    pub fn cancel(&mut self, id: SeqId) -> Option<SequenceOutput> {
        self.scheduler.cancel(id)
    }

    /// True while a request waits or runs.
    pub fn has_unfinished(&self) -> bool {
        self.scheduler.has_unfinished()
    }

    /// KV blocks that no sequence holds.
    pub fn num_free_blocks(&self) -> usize {
        self.scheduler.num_free_blocks()
    }

    /// Current state, and totals since the start.
    pub fn stats(&self) -> EngineStats {
        self.scheduler.stats()
    }

    /// Tokens routed to each expert; `None` if the model has no routed experts.
    pub fn expert_load(&self) -> Option<&ExpertLoad> {
        self.expert_load.as_ref()
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }
}

/// Give each sequence the experts of its route rows. `expert_ids`
/// `[routed layer, num_route_rows, experts_per_token]` are those of `step`.
fn add_expert_ids(results: &mut [SequenceResult], step: &Step, expert_ids: &[ExpertId], load: &ExpertLoad) {
    if step.batch.route_rows.is_empty() {
        return;
    }
    let num_layers = load.counts.len() / (load.num_expert_groups * load.experts_per_group);
    let layer_len = expert_ids.len() / num_layers;
    let experts_per_token = layer_len / step.batch.route_rows.len();
    let mut start = 0;
    for (result, scheduled) in results.iter_mut().zip(&step.sequences) {
        for _ in 0..scheduled.num_route_rows {
            for layer in expert_ids.chunks_exact(layer_len) {
                let experts = layer[start..start + experts_per_token].iter();
                result.expert_ids.extend(experts.map(|expert| (expert.0 as usize % load.experts_per_group) as u8));
            }
            start += experts_per_token;
        }
    }
}
