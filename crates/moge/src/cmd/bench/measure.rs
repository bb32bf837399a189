//! Runs of a case, each between two measurements of its ceiling.

use std::time::Instant;

use moge_model::{ActivationType, BLOCK_SIZE, Batch, Cpu, KvCache, Model, WeightBytes, Workspace};

use super::case::{Case, RandomTokens};
use super::ceilings::{Ceiling, Ceilings};
use super::report::{CaseReport, OperatorTime, Repetition};
use super::work::{step_bytes, step_ops};
use crate::progress;

/// A loaded model and what its cases are measured with.
pub(crate) struct Bench<'a> {
    model: &'a Model,
    cpu: &'a Cpu,
    activation: ActivationType,
    weights: WeightBytes,
    pub(crate) ceilings: Ceilings<'a>,
}

/// How often and how closely to look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) repetitions: usize,
    pub(crate) profile: bool,
}

/// What all repetitions of a case add up to.
#[derive(Default)]
struct Totals {
    num_steps: usize,
    experts_hit: usize,
    num_routed_layers: usize,
}

impl<'a> Bench<'a> {
    /// `activation` is that of the KV cache, too.
    pub(crate) fn new(model: &'a Model, cpu: &'a Cpu, activation: ActivationType) -> Bench<'a> {
        Bench { model, cpu, activation, weights: model.weight_bytes(), ceilings: Ceilings::new(cpu) }
    }

    /// Run a case again and again.
    pub(crate) fn measure(&self, case: Case, effort: Effort) -> CaseReport {
        let config = self.model.config();
        let bar = progress::items(case.to_string(), effort.repetitions);
        bar.tick();
        let mut kv_cache = case.kv_cache(self.cpu, config, self.activation);
        let mut work = case.workspace(self.cpu, config, self.activation);
        let mut tokens = RandomTokens::new(config.vocab_size);
        // The first step is slower than others: it touches memory that nobody has touched.
        self.model.forward(self.cpu, &case.steps(&mut tokens)[0], &mut kv_cache, &mut work);
        if effort.profile {
            work.record_profile();
        }
        let mut totals = Totals::default();
        let mut repetitions = Vec::new();
        let mut before = self.ceilings.measure(case.ceiling());
        for _ in 0..effort.repetitions {
            let steps = case.steps(&mut tokens);
            let (seconds, work) = self.repeat(case.ceiling(), &steps, &mut kv_cache, &mut work, &mut totals);
            let after = self.ceilings.measure(case.ceiling());
            repetitions.push(Repetition { seconds, work: work as f64, ceiling: (before + after) / 2.0 });
            before = after;
            bar.inc(1);
        }
        bar.finish_and_clear();
        let experts_hit = totals.experts_hit as f64 / totals.num_routed_layers as f64;
        let experts_hit = (totals.num_routed_layers > 0).then_some(experts_hit);
        let profile = work.profile().map(|profile| OperatorTime::list(profile, totals.num_steps));
        CaseReport::new(case, &repetitions, experts_hit, profile)
    }

    /// Compute `steps`; returns the seconds they took, and the operations or bytes of `ceiling`.
    fn repeat(
        &self,
        ceiling: Ceiling,
        steps: &[Batch],
        kv_cache: &mut KvCache,
        work: &mut Workspace,
        totals: &mut Totals,
    ) -> (f64, u64) {
        let config = self.model.config();
        let kv_token_bytes = KvCache::block_bytes(config, self.activation) / BLOCK_SIZE as u64;
        let mut done = 0;
        let start = Instant::now();
        for step in steps {
            self.model.forward(self.cpu, step, kv_cache, work);
            let experts_hit = work.experts_hit();
            done += match ceiling {
                Ceiling::Memory => step_bytes(&self.weights, kv_token_bytes, step, experts_hit),
                Ceiling::Int8 | Ceiling::Bf16 => step_ops(config, step),
            };
            totals.num_steps += 1;
            totals.num_routed_layers += experts_hit.len();
            totals.experts_hit += experts_hit.iter().sum::<usize>();
        }
        (start.elapsed().as_secs_f64(), done)
    }
}
