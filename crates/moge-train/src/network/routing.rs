//! The router, forward and backward, and its losses.

use moge_kernels::Accumulate;
use moge_model::{ExpertId, MoeConfig, Route, route_token, weigh_routes};

use super::spans::{Gradients, Linear};
use super::workspace::Routed;
use super::{ExpertParams, Pass, PassScratch};

/// What the routers of all layers add to the loss of a batch: sums over the routed layers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RoutingLosses {
    /// `sum over experts i of f_i p_i` (arXiv 2505.21411 §2), with `f_i = num_experts / (experts_per_token * num_rows) *
    /// rows that chose i` and `p_i` the mean of the softmax over all experts; over all expert groups together.
    pub aux: f64,
    /// Mean of the squared logarithm of the sum of exponentials of a row's logits.
    pub z: f64,
}

impl Pass<'_> {
    /// Route the rows of `x`, `[num_rows, hidden_size]`.
    pub(super) fn route(&self, experts: &ExpertParams, x: &[f32], routed: &mut Routed, tools: &mut PassScratch<'_>) {
        let Routed { probs, log_sums, routes, dispatch, .. } = routed;
        Linear { cpu: self.cpu, products: tools.gemm_f32, span: experts.router }.forward(self.params, probs, x, None);
        let moe = &experts.moe;
        let scale = experts.router_scale.clone().map(|range| &self.params[range]);
        let per_token = moe.experts_per_token();
        let first_choice = experts.routed_index * routes.len();
        let forced = self.forced.map(|ids| &ids[first_choice..first_choice + routes.len()]);
        let rows = probs.chunks_exact_mut(moe.num_experts).zip(log_sums).zip(routes.chunks_exact_mut(per_token));
        for (row, ((probs, log_sum), routes)) in rows.enumerate() {
            let (largest, logit) = argmax(probs);
            route_token(self.cpu.isa(), moe, probs, scale, routes);
            // softmax(l)[i] = exp(l[i] - log_sum) for every i, the most exact for the largest.
            *log_sum = logit - probs[largest].ln();
            if let Some(forced) = forced {
                take_forced(&forced[row * per_token..(row + 1) * per_token], routes);
                weigh_routes(moe, probs, scale, routes);
            }
        }
        dispatch.sort(moe, routes);
    }

    /// The losses of one layer's router.
    pub(super) fn routing_losses(&self, moe: &MoeConfig, routed: &Routed) -> RoutingLosses {
        let num_rows = routed.log_sums.len() as f64;
        let mut means = vec![0.0; moe.num_experts];
        for probs in routed.probs.chunks_exact(moe.num_experts) {
            means.iter_mut().zip(probs).for_each(|(sum, &p)| *sum += f64::from(p) / num_rows);
        }
        let aux = means.iter().zip(load_factors(moe, routed)).map(|(p, f)| p * f).sum();
        let z = routed.log_sums.iter().map(|&sum| f64::from(sum).powi(2)).sum::<f64>() / num_rows;
        RoutingLosses { aux, z }
    }

    /// Gradients of the router's weights from those of the routes' weights and of its losses, and of what it read: `dx`.
    pub(super) fn route_backward(
        &self,
        experts: &ExpertParams,
        (dx, x): (&mut [f32], &[f32]),
        routed: &Routed,
        tools: &mut PassScratch<'_>,
        grads: &mut Gradients<'_>,
    ) {
        let moe = &experts.moe;
        let scale = experts.router_scale.clone().map(|range| &self.params[range]);
        let dispatch = &routed.dispatch;
        let num_rows = routed.log_sums.len() as f32;
        let aux = load_factors(moe, routed).map(|f| self.scales.aux * f as f32 / num_rows).collect::<Vec<f32>>();
        let mut d_scale = vec![0.0f64; moe.num_experts];
        let d_logits = &mut tools.scratch.d_logits;
        let per_token = moe.experts_per_token();
        let rows = d_logits.chunks_exact_mut(moe.num_experts).zip(routed.probs.chunks_exact(moe.num_experts));
        for (row, (d_logits, probs)) in rows.enumerate() {
            // First the gradients of the probabilities.
            d_logits.copy_from_slice(&aux);
            let choices = row * per_token..(row + 1) * per_token;
            let routes = &routed.routes[choices.clone()];
            let d_weight = |slot: u32| tools.scratch.d_weights[slot as usize];
            let slots = &dispatch.slots[choices];
            let factor = |e: usize| scale.map_or(1.0, |scale| scale[e]);
            // Weights that were divided by their sum: d of each before that is (d - sum of d * weight) / sum.
            let (mut sum, mut mean) = (1.0, 0.0);
            if moe.router.renormalizes() {
                sum = routes.iter().map(|route| route.expert.0 as usize).map(|e| probs[e] * factor(e)).sum();
                mean = routes.iter().zip(slots).map(|(route, &slot)| d_weight(slot) * route.weight).sum();
            }
            for (route, &slot) in routes.iter().zip(slots) {
                let (e, d_weight) = (route.expert.0 as usize, (d_weight(slot) - mean) / sum);
                d_logits[e] += d_weight * factor(e);
                d_scale[e] += f64::from(d_weight * probs[e]);
            }
            let dot: f32 = d_logits.iter().zip(probs).map(|(d, p)| d * p).sum();
            let z = self.scales.z * 2.0 * routed.log_sums[row] / num_rows;
            d_logits.iter_mut().zip(probs).for_each(|(d, p)| *d = p * (*d - dot + z));
        }
        if let Some(range) = experts.router_scale.clone() {
            for (out, sum) in grads.numbers[range].iter_mut().zip(d_scale) {
                *out = if grads.store == Accumulate::Set { sum as f32 } else { *out + sum as f32 };
            }
        }
        let (products, d_logits) = (&mut *tools.gemm_f32, &*d_logits);
        Linear { cpu: self.cpu, products, span: experts.router }.backward_weight(grads, d_logits, x);
        let linear = Linear { cpu: self.cpu, products, span: experts.router };
        linear.backward_input(self.params, dx, d_logits, Accumulate::Set);
    }
}

/// `f_i` of each expert, see [`RoutingLosses::aux`].
fn load_factors<'a>(moe: &'a MoeConfig, routed: &'a Routed) -> impl Iterator<Item = f64> + 'a {
    let dispatch = &routed.dispatch;
    let factor = moe.num_experts as f64 / routed.routes.len() as f64;
    dispatch.rows_per_expert().map(move |num_rows| factor * num_rows as f64)
}

/// Index and value of the largest number.
fn argmax(numbers: &[f32]) -> (usize, f32) {
    let mut best = (0, numbers[0]);
    for (i, &x) in numbers.iter().enumerate() {
        if x > best.1 {
            best = (i, x);
        }
    }
    best
}

/// Routes to `experts` in place of the best ones.
fn take_forced(experts: &[ExpertId], routes: &mut [Route]) {
    for (route, &expert) in routes.iter_mut().zip(experts) {
        route.expert = expert;
    }
}
