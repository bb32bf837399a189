//! Scratch memory of a step.

use moge_kernels::{AttentionLimits, AttentionScratch, Precision, QuantizedRows, rope_angles};

use crate::BLOCK_SIZE;
use crate::checkpoint::quant_scheme::WeightRole;
use crate::ids::ExpertId;
use crate::network::batch::Batch;
use crate::network::config::{LayerConfig, ModelConfig};
use crate::network::profile::Profile;
use crate::network::router::{Dispatch, Route};

/// Scratch memory of a step. Allocated once: a step only changes lengths, within the capacity reserved here.
#[derive(Debug)]
pub struct Workspace {
    pub(crate) activation: Precision,
    pub(crate) num_rows: usize,
    limits: StepLimits,
    widths: Widths,
    pub(crate) tokens: Vec<u32>,
    positions: Vec<u32>,
    /// Cosines and sines of the rows' RoPE angles, `[num_rows, rotary_dim / 2]`.
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    /// Residual stream, `[num_rows, hidden_size]`.
    pub(crate) hidden: Vec<f32>,
    /// Normed residual stream: what the projections read, `[num_rows, hidden_size]`.
    pub(crate) normed: Vec<f32>,
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
    /// Attention's output before the output projection, `[num_rows, num_q_heads * head_dim]`.
    pub(crate) attention: Vec<f32>,
    pub(crate) attention_scratch: AttentionScratch,
    /// Output of a projection back to the residual stream, `[num_rows, hidden_size]`.
    pub(crate) projected: Vec<f32>,
    pub(crate) router_logits: Vec<f32>,
    pub(crate) routes: Vec<Route>,
    pub(crate) dispatch: Dispatch,
    /// Inner activations of an MLP: of the shared expert, then of the routed ones; the front part that each needs.
    pub(crate) inner: Vec<f32>,
    /// What packed weights other than routed experts read: one input after another.
    pub(crate) quantized: QuantizedRows,
    /// What packed routed experts read: their rows of `normed`, then of `inner`.
    pub(crate) dispatched: QuantizedRows,
    /// Output of routed experts that are not packed, `[num_rows * experts_per_token, hidden_size]`.
    pub(crate) expert_out: Vec<f32>,
    /// The rows of the batch that the buffers hold, ascending: all until after the last attention.
    pub(crate) rows: Vec<u32>,
    /// Rows of the batch whose experts are still to be recorded in the layers to come.
    pub(crate) route_rows: Vec<u32>,
    pub(crate) profile: Profile,
}

#[derive(Clone, Copy, Debug)]
struct Widths {
    hidden: usize,
    q: usize,
    kv: usize,
    experts: usize,
    experts_per_token: usize,
    /// Output of a row's routed experts before they are combined; packed ones are combined at once.
    expert_out: usize,
    /// Inner activations of the widest MLP.
    inner: usize,
    /// Inputs of the widest packed weight other than routed experts; 0 if none is packed.
    quantized: usize,
    /// Inputs of the widest product of packed routed experts; 0 if they are not packed.
    dispatched: usize,
}

/// The largest step that a workspace serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Rows.
    pub max_rows: usize,
    /// Rows that want logits.
    pub max_logit_rows: usize,
    /// Tokens of a sequence.
    pub max_context: usize,
    /// Threads of the [`moge_kernels::Cpu`].
    pub num_threads: usize,
}

impl StepLimits {
    fn attention(self, config: &ModelConfig) -> AttentionLimits {
        AttentionLimits {
            num_threads: self.num_threads,
            max_rows: self.max_rows,
            max_context: self.max_context,
            num_q_heads: config.num_q_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
        }
    }
}

impl Widths {
    fn new(config: &ModelConfig) -> Widths {
        let moe = config.moe();
        let (experts, experts_per_token) = moe.map_or((0, 0), |moe| (moe.num_experts, moe.experts_per_token()));
        let routed_inner = moe.map_or(0, |moe| moe.experts_per_token() * moe.expert_intermediate_size);
        let dense_inner = config.layers.iter().map(LayerConfig::dense_width).max().unwrap_or(0);
        let inner = routed_inner.max(dense_inner);
        let quantized =
            if config.quant.is_none() { 0 } else { config.hidden_size.max(config.q_size()).max(dense_inner) };
        let routed_layers = || (0..config.num_layers()).filter(|&layer| config.layers[layer].is_routed());
        let is_packed = |layer: usize| config.quant.format(WeightRole::RoutedExpert, Some(layer)).is_some();
        let dispatched = match moe {
            Some(moe) if routed_layers().any(is_packed) => config.hidden_size.max(moe.expert_intermediate_size),
            _ => 0,
        };
        let has_plain_experts = routed_layers().any(|layer| !is_packed(layer));
        Widths {
            quantized,
            dispatched,
            hidden: config.hidden_size,
            q: config.q_size(),
            kv: config.kv_size(),
            experts,
            experts_per_token,
            expert_out: if has_plain_experts { experts_per_token * config.hidden_size } else { 0 },
            inner,
        }
    }

    /// Numbers of a row in all buffers together.
    fn row(self) -> usize {
        3 * self.hidden + 2 * (self.q + self.kv) + self.experts + self.inner + self.expert_out
    }
}

impl Workspace {
    /// Scratch for steps within `limits`.
    pub fn new(config: &ModelConfig, activation: Precision, limits: StepLimits) -> Workspace {
        let widths = Widths::new(config);
        let rows = |width: usize| Vec::with_capacity(limits.max_rows * width);
        Workspace {
            activation,
            num_rows: 0,
            limits,
            widths,
            tokens: Vec::with_capacity(limits.max_rows),
            positions: Vec::with_capacity(limits.max_rows),
            cos: rows(config.rope.rotary_dim / 2),
            sin: rows(config.rope.rotary_dim / 2),
            hidden: rows(widths.hidden),
            normed: rows(widths.hidden),
            q: rows(widths.q),
            k: rows(widths.kv),
            v: rows(widths.kv),
            attention: rows(widths.q),
            attention_scratch: AttentionScratch::new(limits.attention(config)),
            projected: rows(widths.hidden),
            router_logits: rows(widths.experts),
            routes: Vec::with_capacity(limits.max_rows * widths.experts_per_token),
            dispatch: Dispatch::with_capacity(limits.max_rows * widths.experts_per_token, widths.experts),
            inner: rows(widths.inner),
            quantized: QuantizedRows::with_capacity(limits.max_rows, widths.quantized, 1),
            dispatched: QuantizedRows::with_capacity(
                limits.max_rows * widths.experts_per_token,
                widths.dispatched,
                widths.experts,
            ),
            expert_out: rows(widths.expert_out),
            rows: Vec::with_capacity(limits.max_rows),
            route_rows: Vec::with_capacity(limits.max_rows),
            profile: Profile::default(),
        }
    }

    /// Bytes that [`Workspace::new`] would reserve, and those of the logits of a step; small lists are left out.
    pub fn bytes(config: &ModelConfig, limits: StepLimits) -> u64 {
        let widths = Widths::new(config);
        let numbers = limits.max_rows * widths.row() + limits.max_logit_rows * config.vocab_size;
        let quantized = QuantizedRows::capacity_bytes(limits.max_rows, widths.quantized)
            + QuantizedRows::capacity_bytes(limits.max_rows * widths.experts_per_token, widths.dispatched);
        4 * numbers as u64 + (quantized + limits.attention(config).scratch_bytes()) as u64
    }

    /// Record where the time goes from the next step on, beginning at zero.
    pub fn record_profile(&mut self) {
        self.profile = Profile::recording();
    }

    /// Where the time went since [`Workspace::record_profile`], if that was asked for.
    pub fn profile(&self) -> Option<&Profile> {
        self.profile.is_recording().then_some(&self.profile)
    }

    pub(crate) fn begin(&mut self, batch: &Batch, inverse_frequencies: &[f32]) {
        self.profile.begin_step();
        self.route_rows.clear();
        self.route_rows.extend(&batch.route_rows);
        let (num_rows, widths) = (batch.num_rows(), self.widths);
        let limits = self.limits;
        assert!(num_rows <= limits.max_rows, "{num_rows} rows in a workspace of {}", limits.max_rows);
        assert!(batch.logit_rows.len() <= limits.max_logit_rows, "more logits wanted than the workspace holds");
        assert_eq!(batch.sequences.iter().map(|s| s.num_rows).sum::<usize>(), num_rows, "rows of the sequences");
        self.rows.clear();
        self.rows.extend(0..num_rows as u32);
        self.tokens.clear();
        self.tokens.extend(batch.tokens.iter().map(|token| token.0));
        self.positions.clear();
        for sequence in &batch.sequences {
            let end = sequence.first_position + sequence.num_rows;
            assert!(end <= sequence.block_table.len() * BLOCK_SIZE, "block table too short");
            self.positions.extend((sequence.first_position..end).map(|position| position as u32));
        }
        for buffer in [&mut self.cos, &mut self.sin] {
            buffer.resize(num_rows * inverse_frequencies.len(), 0.0);
        }
        rope_angles(&mut self.cos, &mut self.sin, &self.positions, inverse_frequencies);
        for buffer in [&mut self.q, &mut self.attention] {
            buffer.resize(num_rows * widths.q, 0.0);
        }
        for buffer in [&mut self.k, &mut self.v] {
            buffer.resize(num_rows * widths.kv, 0.0);
        }
        self.set_rows(num_rows);
    }

    /// Give every buffer but those of attention the length of `num_rows` rows.
    fn set_rows(&mut self, num_rows: usize) {
        let widths = self.widths;
        self.num_rows = num_rows;
        for buffer in [&mut self.hidden, &mut self.normed, &mut self.projected] {
            buffer.resize(num_rows * widths.hidden, 0.0);
        }
        self.inner.resize(num_rows * widths.inner, 0.0);
        self.router_logits.resize(num_rows * widths.experts, 0.0);
        self.routes.resize(num_rows * widths.experts_per_token, Route { expert: ExpertId(0), weight: 0.0 });
        self.expert_out.resize(num_rows * widths.expert_out, 0.0);
    }

    /// Go on with the rows that `is_wanted` names only: they move to the front.
    pub(crate) fn keep_rows(&mut self, is_wanted: impl Fn(u32) -> bool) {
        let width = self.widths.hidden;
        let mut num_kept = 0;
        for place in 0..self.rows.len() {
            if is_wanted(self.rows[place]) {
                self.rows[num_kept] = self.rows[place];
                self.hidden.copy_within(place * width..(place + 1) * width, num_kept * width);
                num_kept += 1;
            }
        }
        self.rows.truncate(num_kept);
        self.set_rows(num_kept);
    }
}
