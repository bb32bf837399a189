//! The MLP half of a layer: one dense MLP, or routed experts and a shared one.

use moge_kernels::{
    Begin, ExpertOutputs, ExpertsDown, GroupedRows, add, combine, gemm, grouped_gemm, grouped_swiglu,
    packed_experts_down, packed_swiglu, rms_norm, softmax,
};

use super::CpuStep;
use super::input::Input;
use super::workspace::Workspace;
use crate::network::config::{ModelConfig, MoeConfig};
use crate::network::profile::Operator;
use crate::network::router::choose_experts;
use crate::network::weight::{InputKind, Weight};
use crate::network::weights::{Experts, Layer, LayerMlp, Swiglu};

/// Rows that a thread routes at a time: some microseconds of work.
const ROUTED_ROWS: usize = 16;

impl CpuStep<'_> {
    /// `normed = norm(hidden)`: what the MLP of `layer` and its router read.
    pub(crate) fn norm_for_mlp(&mut self, layer: &Layer) {
        let norm = self.norm(&layer.mlp_norm);
        let dense = match &layer.mlp {
            LayerMlp::Dense(mlp) => Some(mlp),
            LayerMlp::Experts(experts) => experts.shared.as_ref(),
        };
        let Workspace { hidden, normed, quantized, profile, .. } = &mut *self.work;
        match dense {
            Some(dense) => {
                Input::normed(self.cpu, normed, quantized, hidden, norm, &dense.gate_up[0]);
            }
            None => rms_norm(self.cpu, normed, hidden, norm),
        }
        profile.mark(Operator::Norm);
    }

    /// `projected = mlp(normed)`.
    pub(crate) fn dense_mlp(&mut self, mlp: &Swiglu) {
        self.swiglu(mlp);
        self.work.profile.mark(Operator::DenseMlp);
    }

    /// Choose the experts of the rows of `normed`, and record what is wanted of the choices.
    pub(crate) fn route(&mut self, experts: &Experts) {
        let (cpu, isa) = (self.cpu, self.cpu.isa());
        let moe = moe(self.config);
        let (num_experts, per_token) = (moe.num_experts, moe.experts_per_token());
        let Workspace { normed, router_logits, routes, route_rows, .. } = &mut *self.work;
        gemm(cpu, router_logits, normed, experts.router.matrix(), None);
        cpu.for_each_slice(router_logits, ROUTED_ROWS * num_experts, |_, logits| {
            logits.chunks_exact_mut(num_experts).for_each(|logits| softmax(isa, logits));
        });
        let probs = &router_logits[..];
        cpu.for_each_slice(routes, ROUTED_ROWS * per_token, |chunk, routes| {
            let probs = probs[chunk * ROUTED_ROWS * num_experts..].chunks_exact(num_experts);
            for (routes, probs) in routes.chunks_exact_mut(per_token).zip(probs) {
                choose_experts(moe, probs, experts.router_scale.as_deref(), routes);
            }
        });
        for &row in &*route_rows {
            let routes = &routes[row as usize * per_token..][..per_token];
            self.output.expert_ids.extend(routes.iter().map(|route| route.expert));
        }
        if let Some(trace) = &mut self.output.trace {
            trace.routes.push(routes.clone());
        }
    }

    /// Sort the rows by expert.
    pub(crate) fn dispatch(&mut self) {
        let moe = moe(self.config);
        let Workspace { dispatch, routes, profile, .. } = &mut *self.work;
        dispatch.sort(moe, routes);
        self.output.rows_per_expert.extend(dispatch.rows_per_expert());
        profile.mark(Operator::Router);
    }

    /// `projected = shared(normed)`, if there is a shared expert.
    pub(crate) fn shared_expert(&mut self, experts: &Experts) {
        if let Some(shared) = &experts.shared {
            self.swiglu(shared);
            self.work.profile.mark(Operator::SharedExpert);
        }
    }

    /// The sum of weight * expert(normed) over each row's experts, and of the shared expert's output in `projected`: added
    /// to `hidden`, or left in `projected` if the sum begins with zero.
    pub(crate) fn routed_experts(&mut self, experts: &Experts, begin: Begin) {
        match experts.routed[0].down.input_kind() {
            InputKind::Int8 => self.packed_experts(experts, begin),
            InputKind::Float => self.plain_experts(experts, begin),
        }
        if begin == Begin::Zero {
            // The sum is where the experts' input was.
            let Workspace { normed, projected, .. } = &mut *self.work;
            std::mem::swap(normed, projected);
        }
        self.work.profile.mark(Operator::Combine);
    }

    fn plain_experts(&mut self, experts: &Experts, begin: Begin) {
        let cpu = self.cpu;
        let Workspace { hidden, normed, inner, expert_out, projected, dispatch, activation, profile, .. } =
            &mut *self.work;
        let rows = GroupedRows { offsets: &dispatch.offsets, source_rows: Some(&dispatch.source_rows) };
        let inner = &mut inner[..dispatch.source_rows.len() * experts.routed[0].down.cols()];
        let gate_up = |e: usize| experts.routed[e].gate_up.each_ref().map(Weight::matrix);
        grouped_swiglu(cpu, inner, normed, rows, &gate_up, *activation);
        profile.mark(Operator::RoutedGateUp);
        let rows = GroupedRows { source_rows: None, ..rows };
        grouped_gemm(cpu, expert_out, inner, rows, &|e| experts.routed[e].down.matrix());
        profile.mark(Operator::RoutedDown);
        let outputs = ExpertOutputs { rows: expert_out, slots: &dispatch.slots, weights: &dispatch.weights };
        let out = if begin == Begin::Zero { normed } else { hidden };
        combine(cpu, out, begin, outputs, experts.shared.is_some().then_some(&projected[..]));
    }

    fn packed_experts(&mut self, experts: &Experts, begin: Begin) {
        let (cpu, hidden_size) = (self.cpu, self.config.hidden_size);
        let Workspace { hidden, normed, inner, dispatched, projected, dispatch, profile, .. } = &mut *self.work;
        let rows = GroupedRows { offsets: &dispatch.offsets, source_rows: Some(&dispatch.source_rows) };
        let inter = experts.routed[0].down.cols();
        let inner = &mut inner[..dispatch.source_rows.len() * inter];
        dispatched.quantize(cpu, normed, hidden_size, rows);
        packed_swiglu(cpu, inner, dispatched, &|e| experts.routed[e].gate_up.each_ref().map(Weight::packed));
        profile.mark(Operator::RoutedGateUp);
        dispatched.quantize(cpu, inner, inter, GroupedRows { source_rows: None, ..rows });
        let down = ExpertsDown {
            inner: dispatched,
            down: &|e| experts.routed[e].down.packed(),
            source_rows: &dispatch.source_rows,
            row_weights: &dispatch.row_weights,
        };
        let out = if begin == Begin::Zero { normed } else { hidden };
        packed_experts_down(cpu, out, begin, hidden_size, down);
        profile.mark(Operator::RoutedDown);
        if experts.shared.is_some() {
            add(cpu, out, projected);
        }
    }

    /// `projected = down(silu(gate(normed)) * up(normed))` of every row. If gate and up read int8, `quantized` holds the
    /// rows of `normed`.
    fn swiglu(&mut self, mlp: &Swiglu) {
        let cpu = self.cpu;
        let Workspace { normed, inner, projected, quantized, activation, num_rows, .. } = &mut *self.work;
        let inner = &mut inner[..*num_rows * mlp.down.cols()];
        match mlp.gate_up[0].input_kind() {
            InputKind::Int8 => {
                packed_swiglu(cpu, inner, quantized, &|_| mlp.gate_up.each_ref().map(Weight::packed));
            }
            InputKind::Float => {
                let rows = GroupedRows { offsets: &[0, *num_rows], source_rows: None };
                let gate_up = |_| mlp.gate_up.each_ref().map(Weight::matrix);
                grouped_swiglu(cpu, inner, normed, rows, &gate_up, *activation);
            }
        }
        Input::new(cpu, inner, quantized, &mlp.down).product(cpu, projected, &mlp.down);
    }
}

/// The shape of the layers with experts; only those ask.
fn moe(config: &ModelConfig) -> &MoeConfig {
    config.moe().expect("a layer has experts")
}
