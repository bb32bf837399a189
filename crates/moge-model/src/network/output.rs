//! The results of a step, apart from the scratch memory that it needs.

use crate::ExpertId;
use crate::network::config::ModelConfig;
use crate::network::cpu::StepLimits;
use crate::network::router::Route;

/// What a step returns. Reused from step to step.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// Logits of [`crate::Batch::logit_rows`], `[num_logit_rows, vocab_size]`.
    pub logits: Vec<f32>,
    /// Residual stream before the final norm of [`crate::Batch::hidden_rows`], `[num_hidden_rows, hidden_size]`.
    pub hidden_rows: Vec<f32>,
    /// Experts of [`crate::Batch::route_rows`], by falling probability inside each expert group:
    /// `[routed layer, num_route_rows, num_expert_groups, top_k_per_group]`.
    pub expert_ids: Vec<ExpertId>,
    /// How many rows each routed expert computed, `[routed layer, num_experts]`. If the last layer is routed, only rows whose
    /// logits or hidden states are wanted are computed there, unless a trace is recorded.
    pub rows_per_expert: Vec<usize>,
    /// What happened inside, if [`StepOutput::record_trace`] asked for it.
    pub trace: Option<Trace>,
}

/// Hidden states and expert choices of all rows of a step, for tests and analysis.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// Residual stream before each layer and after the last: `num_layers + 1` times `[num_rows, hidden_size]`.
    pub hidden: Vec<Vec<f32>>,
    /// Choices of each routed layer: `[num_rows, experts_per_token]`.
    pub routes: Vec<Vec<Route>>,
}

impl StepOutput {
    /// Room for the results of steps within `limits`; hidden rows come on top.
    pub fn new(config: &ModelConfig, limits: StepLimits) -> StepOutput {
        let (num_experts, per_token) = config.moe().map_or((0, 0), |moe| (moe.num_experts, moe.experts_per_token()));
        let num_layers = config.num_routed_layers();
        StepOutput {
            logits: Vec::with_capacity(limits.max_logit_rows * config.vocab_size),
            hidden_rows: Vec::new(),
            expert_ids: Vec::with_capacity(limits.max_rows * num_layers * per_token),
            rows_per_expert: Vec::with_capacity(num_layers * num_experts),
            trace: None,
        }
    }

    /// Record a [`Trace`] from the next step on. Costs memory and time.
    pub fn record_trace(&mut self) {
        self.trace = Some(Trace::default());
    }

    /// How many routed experts had rows, in each routed layer: those whose weights were read.
    pub fn experts_hit(&self, config: &ModelConfig) -> Vec<usize> {
        let num_experts = config.moe().map_or(1, |moe| moe.num_experts);
        let layers = self.rows_per_expert.chunks_exact(num_experts);
        layers.map(|rows| rows.iter().filter(|&&num_rows| num_rows > 0).count()).collect()
    }

    /// Forget the last step's.
    pub(crate) fn clear(&mut self) {
        self.logits.clear();
        self.hidden_rows.clear();
        self.expert_ids.clear();
        self.rows_per_expert.clear();
        if let Some(trace) = &mut self.trace {
            *trace = Trace::default();
        }
    }
}
