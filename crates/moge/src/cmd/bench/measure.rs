//! Runs of a case, each between two measurements of its ceiling.

use std::time::Instant;

use moge_model::cost::{NetworkCost, kv_token_bytes};
use moge_model::{Batch, Cpu, KvCache, Model, StepOutput, Workspace};

use super::case::{Case, Precisions, RandomTokens};
use super::report::{CaseReport, Repetition};
use super::roofline::{Ceiling, Ceilings};
use crate::progress;

/// A loaded model and what its cases are measured with.
pub(crate) struct Bench<'a> {
    model: &'a Model,
    cpu: &'a Cpu,
    precisions: Precisions,
    cost: NetworkCost,
    pub(crate) ceilings: Ceilings<'a>,
}

/// How often and how closely to look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) repetitions: usize,
    pub(crate) profile: bool,
}

/// What the steps of a case change.
struct Memory {
    tokens: RandomTokens,
    kv_cache: KvCache,
    work: Workspace,
    output: StepOutput,
}

impl<'a> Bench<'a> {
    /// What is needed to measure cases of `model`.
    pub(crate) fn new(model: &'a Model, cpu: &'a Cpu, precisions: Precisions) -> Bench<'a> {
        Bench { model, cpu, precisions, cost: model.cost(), ceilings: Ceilings::new(cpu, model.config()) }
    }

    /// Run a case again and again.
    pub(crate) fn measure(&self, case: Case, effort: Effort) -> CaseReport {
        let bar = progress::items(case.to_string(), effort.repetitions);
        bar.tick();
        let config = self.model.config();
        let mut memory = Memory {
            tokens: RandomTokens::new(config.vocab_size),
            kv_cache: case.kv_cache(self.cpu, config, self.precisions),
            work: case.workspace(self.cpu, config, self.precisions),
            output: StepOutput::default(),
        };
        // The first step is slower than others: it touches memory that nobody has touched.
        self.step(&case.step(0, &mut memory.tokens), &mut memory);
        if effort.profile {
            memory.work.record_profile();
        }
        let ceiling = self.ceiling(case);
        let mut before = self.ceilings.measure(ceiling);
        let mut repetitions = Vec::with_capacity(effort.repetitions);
        for _ in 0..effort.repetitions {
            let repetition = self.repeat(case, &mut memory);
            let after = self.ceilings.measure(ceiling);
            repetitions.push(Repetition { ceiling: (before + after) / 2.0, ..repetition });
            before = after;
            bar.inc(1);
        }
        bar.finish_and_clear();
        CaseReport::new(case, ceiling, &repetitions, memory.work.profile())
    }

    /// What bounds a case: products with weights that many rows share, or reading the weights for few.
    fn ceiling(&self, case: Case) -> Ceiling {
        match case {
            Case::Prefill { .. } if self.model.config().quant.layers.mlp.is_some() => Ceiling::Int8,
            // Whatever floats are stored, they are multiplied in f32.
            Case::Prefill { .. } => Ceiling::Bf16,
            Case::Decode { .. } => Ceiling::Memory,
        }
    }

    /// All steps of a case, once; the ceiling is left open.
    fn repeat(&self, case: Case, memory: &mut Memory) -> Repetition {
        let config = self.model.config();
        let kv_token_bytes = kv_token_bytes(config, self.precisions.kv);
        let mut repetition = Repetition::default();
        for index in 0..case.num_steps() {
            let batch = case.step(index, &mut memory.tokens);
            repetition.seconds += self.step(&batch, memory);
            let experts_hit = memory.output.experts_hit(self.model.config());
            let work = match self.ceiling(case) {
                Ceiling::Memory => self.cost.step_bytes(kv_token_bytes, &batch, &experts_hit),
                Ceiling::Int8 | Ceiling::Bf16 => self.cost.step_ops(config, &batch),
            };
            repetition.work += work as f64;
            repetition.experts_hit += experts_hit.iter().sum::<usize>();
            repetition.routed_layers += experts_hit.len();
        }
        repetition
    }

    /// Compute a step; returns the seconds it took.
    fn step(&self, batch: &Batch, memory: &mut Memory) -> f64 {
        let start = Instant::now();
        self.model.forward(self.cpu, batch, &mut memory.kv_cache, &mut memory.work, &mut memory.output);
        start.elapsed().as_secs_f64()
    }
}
