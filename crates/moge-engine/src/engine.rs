//! The loop: schedule, forward, sample, postprocess.

use std::collections::BTreeMap;
use std::sync::Arc;

use moge_model::{
    BLOCK_SIZE, Cpu, ExpertId, KvCache, KvType, Model, ModelConfig, Precision, StepLimits, StepOutput, TokenId,
    Tokenizer, Workspace,
};

use crate::logprobs::row_logprobs;
use crate::masks::{MaskResult, Masks};
use crate::sampler::{NoFiniteLogit, Sampler};
use crate::{
    AdmitError, EngineStats, ExpertLoad, FinishReason, Request, Sampled, Scheduler, SchedulerConfig, SeqId,
    SequenceOutput, SequenceResult, Step,
};

/// How much an engine takes on at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Precision of activations.
    pub activation: Precision,
    /// How the KV cache stores its numbers.
    pub kv: KvType,
    /// Blocks of the KV cache, of [`moge_model::BLOCK_SIZE`] tokens each.
    pub num_blocks: usize,
    /// Longest sequence, prompt and output together; the model's context if that is shorter.
    pub max_sequence_tokens: usize,
    /// Rows of a step, at least 1. A longer prompt is computed in several steps.
    pub max_batched_tokens: usize,
    /// Sequences that run at the same time, at least 1.
    pub max_running: usize,
    /// Requests that wait to run.
    pub max_waiting: usize,
    /// Tokens that end a sequence: the union of what config, generation config and tokenizer name.
    pub eos_token_ids: Vec<TokenId>,
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

    /// What the scheduler allows with a model like this.
    fn scheduler(&self, model: &ModelConfig) -> SchedulerConfig {
        SchedulerConfig {
            vocab_size: model.vocab_size,
            max_sequence_tokens: self.max_sequence_tokens.min(model.max_position_embeddings),
            num_blocks: self.num_blocks,
            max_batched_tokens: self.max_batched_tokens,
            max_running: self.max_running,
            max_waiting: self.max_waiting,
            eos_token_ids: self.eos_token_ids.clone(),
        }
    }
}

/// A model, its KV cache, and the requests it works on.
pub struct Engine {
    model: Model,
    cpu: Cpu,
    kv_cache: KvCache,
    workspace: Workspace,
    output: StepOutput,
    scheduler: Scheduler,
    sampler: Sampler,
    expert_load: Option<ExpertLoad>,
    masks: Masks,
}

impl Engine {
    /// Allocate KV cache and workspace for `model`. Without a tokenizer all text is empty and stop strings are refused.
    ///
    /// # Panics
    /// As [`Scheduler::new`].
    pub fn new(model: Model, cpu: Cpu, tokenizer: Option<Arc<Tokenizer>>, config: &EngineConfig) -> Engine {
        let limits = config.step_limits(model.config(), cpu.num_threads());
        Engine {
            kv_cache: KvCache::new(model.config(), config.kv, config.num_blocks),
            workspace: Workspace::new(model.config(), config.activation, limits),
            output: StepOutput::new(model.config(), limits),
            scheduler: Scheduler::new(config.scheduler(model.config()), tokenizer),
            sampler: Sampler::default(),
            expert_load: ExpertLoad::new(model.config()),
            masks: Masks::default(),
            model,
            cpu,
        }
    }

    /// Queue a request; [`Engine::step`] works on it.
    ///
    /// # Errors
    /// [`AdmitError`] if it is invalid, could never run, or the queue is full.
    pub fn add_request(&mut self, request: Request) -> Result<SeqId, AdmitError> {
        // An expert id is a byte, and an expert group has no more experts than that in any model we know.
        let has_expert_ids = self.expert_load.as_ref().is_some_and(|load| load.experts_per_group <= 256);
        if request.sampling.return_expert_ids && !has_expert_ids {
            let allowed = "false, as the model has no expert groups of at most 256 routed experts".to_owned();
            return Err(AdmitError::InvalidParameter { field: "return_expert_ids", value: "true".to_owned(), allowed });
        }
        self.scheduler.add_request(request)
    }

    /// Compute one batch and tell what is new, one entry for each sequence that had a part in it. Empty if there is
    /// nothing to do.
    pub fn step(&mut self) -> Vec<SequenceOutput> {
        let Some(step) = self.scheduler.schedule() else { return Vec::new() };
        self.masks.start(&mut self.scheduler, &step);
        self.model.forward(&self.cpu, &step.batch, &mut self.kv_cache, &mut self.workspace, &mut self.output);
        let masks = self.masks.finish(&mut self.scheduler);
        let mut results = sample(&mut self.sampler, &self.scheduler, &step, &self.output.logits, masks);
        if let Some(load) = &mut self.expert_load {
            load.add(&self.output.rows_per_expert);
            add_expert_ids(&mut results, &step, &self.output.expert_ids, load);
        }
        self.scheduler.postprocess(&step, results)
    }

    /// End a sequence now and free its blocks. Returns its last output, `None` if it has ended before.
    pub fn cancel(&mut self, id: SeqId) -> Option<SequenceOutput> {
        self.scheduler.cancel(id)
    }

    /// True while a request waits or runs.
    pub fn has_unfinished(&self) -> bool {
        self.scheduler.has_unfinished()
    }

    /// Blocks of the KV cache that no sequence holds.
    pub fn num_free_blocks(&self) -> usize {
        self.scheduler.num_free_blocks()
    }

    /// What the engine holds now, and totals since its start.
    pub fn stats(&self) -> EngineStats {
        self.scheduler.stats()
    }

    /// How many tokens went to each routed expert; `None` if the model has none.
    pub fn expert_load(&self) -> Option<&ExpertLoad> {
        self.expert_load.as_ref()
    }

    /// The model it runs.
    pub fn model(&self) -> &Model {
        &self.model
    }
}

/// Turn the logits of `step`, `[num_logit_rows, vocab_size]`, into log-probabilities of prompt tokens and new tokens.
/// `masks` has one for each sequence with a grammar that samples.
///
/// # Panics
/// If `logits` has another length.
pub(crate) fn sample(
    sampler: &mut Sampler,
    scheduler: &Scheduler,
    step: &Step,
    logits: &[f32],
    mut masks: BTreeMap<SeqId, MaskResult>,
) -> Vec<SequenceResult> {
    assert_eq!(logits.len(), step.batch.logit_rows.len() * scheduler.vocab_size());
    let mut logits = logits.chunks_exact(scheduler.vocab_size());
    let scheduled = step.sequences.iter().zip(&step.batch.sequences);
    scheduled
        .map(|(scheduled, rows)| {
            let sequence = scheduler.running(scheduled.id);
            // The logits of a prompt token's row belong to the token after it.
            let following = sequence.tokens[rows.first_position + 1..].iter();
            let num_prompt_rows = scheduled.num_logit_rows - usize::from(scheduled.samples);
            let num_alternatives = sequence.sampling.prompt_logprobs.unwrap_or(0);
            let prompt_logprobs = logits
                .by_ref()
                .take(num_prompt_rows)
                .zip(following)
                .map(|(row, &token)| row_logprobs(row, token, num_alternatives))
                .collect();
            let sampled = scheduled.samples.then(|| logits.next()).flatten().map(|row| {
                let allowed = masks.remove(&scheduled.id).map(|mask| sequence.allowed_tokens(mask)).transpose()?;
                let token = sampler
                    .sample(row, &sequence.sampling, &sequence.history(allowed.as_deref()))
                    .map_err(|NoFiniteLogit| FinishReason::NoFiniteLogit)?;
                let logprobs = sequence.sampling.logprobs.map(|n| row_logprobs(row, token, n));
                Ok(Sampled { token, logprobs })
            });
            SequenceResult { prompt_logprobs, sampled, expert_ids: Vec::new() }
        })
        .collect()
}

/// Give each sequence the experts of its rows that are wanted. `expert_ids`
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

#[cfg(test)]
mod tests;
