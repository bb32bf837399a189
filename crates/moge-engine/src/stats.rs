//! Statistics of an engine.

use moge_model::ModelConfig;

/// Current state of an engine, and totals since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences with blocks of the KV cache.
    pub num_running: usize,
    /// Sequences without blocks: not started yet, or preempted.
    pub num_waiting: usize,
    /// Blocks of the KV cache.
    pub num_blocks: usize,
    /// Blocks that no sequence holds; some may still be in the prefix cache.
    pub num_free_blocks: usize,
    /// Total: preemptions, where a sequence gave its blocks to older ones.
    pub num_preemptions: u64,
    /// Total: prompt tokens of the sequences that began to run and may use the prefix cache.
    pub num_prompt_tokens_looked_up: u64,
    /// Total: those of them that were in the prefix cache.
    pub num_prompt_tokens_cached: u64,
}

/// Tokens routed to each expert since the start, including rejected draft tokens. The last layer counts only tokens whose
/// logits were wanted: it computes no experts for the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertLoad {
    /// Tokens, `[routed layer, num_expert_groups, experts_per_group]`.
    pub counts: Vec<u64>,
    /// Expert groups of a layer.
    pub num_expert_groups: usize,
    /// Experts of an expert group.
    pub experts_per_group: usize,
}

impl ExpertLoad {
    /// All counts 0; `None` if the model has no routed experts.
    pub(crate) fn new(config: &ModelConfig) -> Option<ExpertLoad> {
        let moe = config.moe()?;
        Some(ExpertLoad {
            counts: vec![0; config.num_routed_layers() * moe.num_experts],
            num_expert_groups: moe.num_expert_groups(),
            experts_per_group: moe.experts_per_group(),
        })
    }

    /// Count a step: `rows_per_expert` `[routed layer, num_experts]`.
    pub(crate) fn add(&mut self, rows_per_expert: &[usize]) {
        for (count, &num_rows) in self.counts.iter_mut().zip(rows_per_expert) {
            *count += num_rows as u64;
        }
    }
}
