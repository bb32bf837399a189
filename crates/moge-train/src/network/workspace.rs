//! What a pass keeps for backward, and its scratch memory.

use moge_kernels::{Cpu, Precision, SegmentAttentionScratch, TrainGemm, rms_norm_scratch_len};
use moge_model::{Dispatch, ExpertId, LayerConfig, ModelConfig, NormPlacement, Route, TensorSpec, expected_tensors};

/// Most rows of a pass: with them what the largest network keeps can still be counted in 64 bits.
pub const MAX_ROWS: usize = 1 << 20;

/// Logits that are computed at a time, if that gives enough rows: 16 MiB.
const MAX_LOGITS: usize = 1 << 22;
/// Rows whose logits are computed at a time, at least: the head's weights are packed once for them.
const MIN_LOGIT_ROWS: usize = 128;

/// What a layer's backward needs of its forward, besides its input. Widths are those of the config; what a network does
/// not have is empty.
#[derive(Debug, Default)]
pub(super) struct Activations {
    /// What the projections read, `[num_rows, hidden_size]`.
    pub(super) normed: Vec<f32>,
    /// Queries, keys and values as attention reads them.
    pub(super) qkv: [Vec<f32>; 3],
    /// Queries and keys before their norms, where there are such.
    pub(super) raw_qk: [Vec<f32>; 2],
    /// Attention's output, `[num_rows, num_q_heads * head_dim]`.
    pub(super) attention: Vec<f32>,
    /// `[num_rows, num_q_heads]`.
    pub(super) log_sums: Vec<f32>,
    /// What the norm after attention reads, where there is one, `[num_rows, hidden_size]`.
    pub(super) projected: Vec<f32>,
    /// Residual stream between attention and MLP, `[num_rows, hidden_size]`.
    pub(super) middle: Vec<f32>,
    /// What the MLP reads, `[num_rows, hidden_size]`.
    pub(super) mlp_normed: Vec<f32>,
    /// Gates and ups of the dense MLP or of the shared expert, `[num_rows, 2 * inner width]`; gradients after backward.
    pub(super) gate_up: Vec<f32>,
    /// What the norm after the MLP reads, where there is one, `[num_rows, hidden_size]`.
    pub(super) mlp_projected: Vec<f32>,
    /// Of the router and the routed experts.
    pub(super) routed: Routed,
}

/// What the routed half of a layer keeps.
#[derive(Debug, Default)]
pub(super) struct Routed {
    /// Softmax over all experts, `[num_rows, num_experts]`.
    pub(super) probs: Vec<f32>,
    /// Logarithm of the sum of exponentials of each row's logits, `[num_rows]`.
    pub(super) log_sums: Vec<f32>,
    /// The choices, `[num_rows, experts_per_token]`.
    pub(super) routes: Vec<Route>,
    /// The same sorted by expert.
    pub(super) dispatch: Dispatch,
    /// Gates and ups of dispatched rows, `[num_dispatched, 2 * inner width]`; gradients after backward.
    pub(super) gate_up: Vec<f32>,
}

/// Memory that is written and read within a layer.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Inner rows of an MLP, then their gradients.
    pub(super) inner: Vec<f32>,
    /// Outputs of routed experts, or gradients of their inputs, `[num_dispatched, hidden_size]`.
    pub(super) expert_rows: Vec<f32>,
    /// `[num_rows, hidden_size]` each.
    pub(super) hidden: [Vec<f32>; 3],
    /// Gradients of queries, keys and values.
    pub(super) d_qkv: [Vec<f32>; 3],
    /// Gradient of attention's output, then of raw queries and keys.
    pub(super) d_attention: Vec<f32>,
    /// Gradients of the routes' weights, `[num_dispatched]`.
    pub(super) d_weights: Vec<f32>,
    /// Gradients of router logits, `[num_rows, num_experts]`.
    pub(super) d_logits: Vec<f32>,
    /// `[num_dispatched]`.
    pub(super) ones: Vec<f32>,
    /// Logits of some rows.
    pub(super) logits: Vec<f32>,
    /// `[num_rows]`.
    pub(super) losses: Vec<f32>,
    /// Of the kernels that sum over rows.
    pub(super) partials: Vec<f32>,
}

/// Memory of forward and backward, for one network and at most as many rows as it was made for.
#[derive(Debug)]
pub struct Workspace {
    pub(super) products: TrainGemm,
    /// For the router, which is f32 always.
    pub(super) gemm_f32: TrainGemm,
    pub(super) attention: SegmentAttentionScratch,
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
    /// Residual stream before each layer and after the last, `[num_layers + 1]` times `[num_rows, hidden_size]`.
    pub(super) stream: Vec<Vec<f32>>,
    /// Of each layer, or of the one at hand where backward computes them again.
    pub(super) kept: Vec<Activations>,
    pub(super) scratch: Scratch,
}

impl Workspace {
    /// Memory for batches of at most `max_rows`. With `recompute` only the inputs of layers are kept for backward.
    pub fn new(cpu: &Cpu, config: &ModelConfig, activation: Precision, max_rows: usize, recompute: bool) -> Workspace {
        let num_kept = if recompute { 1 } else { config.num_layers() };
        let q_per_kv = config.num_q_heads / config.num_kv_heads;
        let mut work = Workspace {
            products: TrainGemm::new(cpu, activation),
            gemm_f32: TrainGemm::new(cpu, Precision::F32),
            attention: SegmentAttentionScratch::new(cpu.num_threads(), max_rows, q_per_kv, config.head_dim),
            cos: Vec::new(),
            sin: Vec::new(),
            stream: vec![Vec::new(); config.num_layers() + 1],
            kept: (0..num_kept).map(|_| Activations::default()).collect(),
            scratch: Scratch::default(),
        };
        work.resize(config, max_rows);
        work
    }

    /// Set the lengths for a batch of `num_rows`.
    pub(super) fn resize(&mut self, config: &ModelConfig, num_rows: usize) {
        let hidden = num_rows * config.hidden_size;
        let half = config.rope.rotary_dim / 2;
        self.cos.resize(num_rows * half, 0.0);
        self.sin.resize(num_rows * half, 0.0);
        self.stream.iter_mut().for_each(|stream| stream.resize(hidden, 0.0));
        for kept in &mut self.kept {
            kept.for_each_len(config, num_rows, &mut |numbers, len| numbers.resize(len, 0.0));
            kept.routed.resize(config, num_rows);
        }
        self.scratch.for_each_len(config, num_rows, &mut |numbers, len| numbers.resize(len, 0.0));
        self.scratch.ones.fill(1.0);
    }
}

/// What a training holds in memory, counted on paper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainMemory {
    /// Parameters, their gradients and AdamW's two moments.
    pub state_bytes: u64,
    /// What is kept of forward for backward.
    pub activation_bytes: u64,
    /// Memory that is written and read within a layer.
    pub scratch_bytes: u64,
}

impl TrainMemory {
    /// Of batches of at most `max_rows`.
    ///
    /// # Panics
    /// If `max_rows` exceeds [`MAX_ROWS`].
    pub fn new(config: &ModelConfig, max_rows: usize, recompute: bool) -> TrainMemory {
        assert!(max_rows <= MAX_ROWS, "{max_rows} rows are more than {MAX_ROWS}");
        let params: u64 = expected_tensors(config).iter().map(TensorSpec::num_elements).fold(0, u64::saturating_add);
        let (mut kept, mut scratch) = (0u64, 0u64);
        Activations::default().for_each_len(config, max_rows, &mut |_, len| kept += len as u64);
        Scratch::default().for_each_len(config, max_rows, &mut |_, len| scratch += len as u64);
        let num_kept = if recompute { 1 } else { config.num_layers() as u64 };
        let stream = (config.num_layers() as u64 + 1) * (max_rows * config.hidden_size) as u64;
        TrainMemory {
            state_bytes: params.saturating_mul(16),
            activation_bytes: 4 * (num_kept * kept + stream),
            scratch_bytes: 4 * scratch,
        }
    }

    /// All of it.
    pub fn total_bytes(self) -> u64 {
        self.state_bytes.saturating_add(self.activation_bytes).saturating_add(self.scratch_bytes)
    }
}

/// Rows whose logits are computed at a time.
pub(super) fn logit_rows(config: &ModelConfig, num_rows: usize) -> usize {
    (MAX_LOGITS / config.vocab_size).max(MIN_LOGIT_ROWS).min(num_rows)
}

/// Inner width of the MLP that every row goes through.
pub(super) fn dense_width(config: &ModelConfig) -> usize {
    config.layers.iter().map(LayerConfig::dense_width).max().unwrap_or(0)
}

impl Activations {
    /// Call `body` with each list of numbers and the length that it has for `num_rows`.
    fn for_each_len(&mut self, config: &ModelConfig, num_rows: usize, body: &mut dyn FnMut(&mut Vec<f32>, usize)) {
        let [hidden, q, kv] = [config.hidden_size, config.q_size(), config.kv_size()].map(|width| num_rows * width);
        let [queries, keys, values] = &mut self.qkv;
        for (numbers, len) in [(queries, q), (keys, kv), (values, kv), (&mut self.attention, q)] {
            body(numbers, len);
        }
        for numbers in [&mut self.normed, &mut self.middle, &mut self.mlp_normed] {
            body(numbers, hidden);
        }
        body(&mut self.log_sums, num_rows * config.num_q_heads);
        body(&mut self.gate_up, 2 * num_rows * dense_width(config));
        if config.qk_norm {
            let [raw_q, raw_k] = &mut self.raw_qk;
            body(raw_q, q);
            body(raw_k, kv);
        }
        if config.layers.iter().any(|layer| layer.norms == NormPlacement::Sandwich) {
            body(&mut self.projected, hidden);
            body(&mut self.mlp_projected, hidden);
        }
        if let Some(moe) = config.moe() {
            body(&mut self.routed.probs, num_rows * moe.num_experts);
            body(&mut self.routed.log_sums, num_rows);
            body(&mut self.routed.gate_up, 2 * num_rows * moe.experts_per_token() * moe.expert_intermediate_size);
        }
    }
}

impl Routed {
    /// Make room for the choices of `num_rows`.
    fn resize(&mut self, config: &ModelConfig, num_rows: usize) {
        if let Some(moe) = config.moe() {
            self.routes.resize(num_rows * moe.experts_per_token(), Route { expert: ExpertId(0), weight: 0.0 });
        }
    }
}

impl Scratch {
    /// As [`Activations::for_each_len`].
    fn for_each_len(&mut self, config: &ModelConfig, num_rows: usize, body: &mut dyn FnMut(&mut Vec<f32>, usize)) {
        let [hidden, q, kv] = [config.hidden_size, config.q_size(), config.kv_size()].map(|width| num_rows * width);
        self.hidden.iter_mut().for_each(|numbers| body(numbers, hidden));
        let [dq, dk, dv] = &mut self.d_qkv;
        for (numbers, len) in [(dq, q), (dk, kv), (dv, kv), (&mut self.d_attention, q), (&mut self.losses, num_rows)] {
            body(numbers, len);
        }
        body(&mut self.logits, logit_rows(config, num_rows) * config.vocab_size);
        let heads = num_rows * config.num_q_heads;
        let norms = [rms_norm_scratch_len(num_rows, config.hidden_size), rms_norm_scratch_len(heads, config.head_dim)];
        body(&mut self.partials, norms[0].max(norms[1]));
        let mut inner_len = num_rows * dense_width(config);
        if let Some(moe) = config.moe() {
            let num_dispatched = num_rows * moe.experts_per_token();
            inner_len = inner_len.max(num_dispatched * moe.expert_intermediate_size);
            body(&mut self.expert_rows, num_dispatched * config.hidden_size);
            body(&mut self.d_weights, num_dispatched);
            body(&mut self.ones, num_dispatched);
            body(&mut self.d_logits, num_rows * moe.num_experts);
        }
        body(&mut self.inner, inner_len);
    }
}
