//! The router's choice: the best experts of every expert group.

use moge_kernels::{Isa, softmax};

use crate::{ExpertId, MoeConfig};

/// One expert chosen for one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Route {
    /// The expert.
    pub expert: ExpertId,
    /// Factor of its output.
    pub weight: f32,
}

/// Choose the best `top_k_per_group` experts of every expert group for one token.
///
/// Shapes: `logits` `[num_experts]`, `router_scale` `[num_experts]` if the network has it; `routes`
/// `[experts_per_token]`, expert group after expert group, inside each by falling probability.
/// `weight = softmax(logits)[expert] * router_scale[expert]`: the softmax is over all experts, and the choice is by its
/// unscaled values (arXiv 2505.21411 §2.2; `router_scale` as the released weights use it). A router that renormalises
/// divides the weights by their sum; the others leave them. A tie goes to the lower expert id. NaN loses to any number.
/// `logits` is left holding the softmax.
///
/// # Panics
/// If a length differs from `config`.
pub fn route_token(
    isa: Isa,
    config: &MoeConfig,
    logits: &mut [f32],
    router_scale: Option<&[f32]>,
    routes: &mut [Route],
) {
    softmax(isa, logits);
    choose_experts(config, logits, router_scale, routes);
}

/// As [`route_token`], of probabilities: the softmax of the logits.
///
/// # Panics
/// If a length differs from `config`.
pub fn choose_experts(config: &MoeConfig, probs: &[f32], router_scale: Option<&[f32]>, routes: &mut [Route]) {
    assert_eq!(probs.len(), config.num_experts);
    assert!(router_scale.is_none_or(|scale| scale.len() == config.num_experts));
    assert_eq!(routes.len(), config.experts_per_token());
    let group_size = config.experts_per_group();
    for (group, chosen) in routes.chunks_exact_mut(config.top_k_per_group()).enumerate() {
        let candidates = group * group_size..(group + 1) * group_size;
        for place in 0..chosen.len() {
            let (taken, rest) = chosen.split_at_mut(place);
            let free = candidates.clone().filter(|&e| taken.iter().all(|route| route.expert.0 as usize != e));
            let is_better = |a: usize, b: usize| probs[a] > probs[b] || (probs[b].is_nan() && !probs[a].is_nan());
            let best = free.reduce(|best, e| if is_better(e, best) { e } else { best });
            let best = best.expect("top_k_per_group is at most the size of an expert group");
            rest[0] = Route { expert: ExpertId(best as u32), weight: 0.0 };
        }
    }
    weigh_routes(config, probs, router_scale, routes);
}

/// Give the chosen experts of one token their weights, as [`route_token`] says; `probs` is its softmax.
pub fn weigh_routes(config: &MoeConfig, probs: &[f32], router_scale: Option<&[f32]>, routes: &mut [Route]) {
    for route in &mut *routes {
        let expert = route.expert.0 as usize;
        route.weight = probs[expert] * router_scale.map_or(1.0, |scale| scale[expert]);
    }
    if config.router.renormalizes() {
        let sum: f32 = routes.iter().map(|route| route.weight).sum();
        routes.iter_mut().for_each(|route| route.weight /= sum);
    }
}

/// The rows of a step sorted by expert, so that each expert's weights are read once. Reused from step to step.
#[derive(Debug, Default)]
pub struct Dispatch {
    /// Dispatched rows of expert `e` are `offsets[e]..offsets[e + 1]`; `[num_experts + 1]`.
    pub offsets: Vec<usize>,
    /// Source row of each dispatched row, `[num_rows * experts_per_token]`.
    pub source_rows: Vec<u32>,
    /// Dispatched row of each choice, `[num_rows, experts_per_token]`.
    pub slots: Vec<u32>,
    /// Weight of each choice, `[num_rows, experts_per_token]`.
    pub weights: Vec<f32>,
    /// Weight of each dispatched row, `[num_rows * experts_per_token]`.
    pub row_weights: Vec<f32>,
}

impl Dispatch {
    /// Room for `num_choices` choices among `num_experts` experts.
    pub fn with_capacity(num_choices: usize, num_experts: usize) -> Dispatch {
        Dispatch {
            offsets: Vec::with_capacity(num_experts + 1),
            source_rows: Vec::with_capacity(num_choices),
            slots: Vec::with_capacity(num_choices),
            weights: Vec::with_capacity(num_choices),
            row_weights: Vec::with_capacity(num_choices),
        }
    }

    /// Sort `routes` `[num_rows, experts_per_token]` by expert; rows of one expert stay in order.
    pub fn sort(&mut self, config: &MoeConfig, routes: &[Route]) {
        self.offsets.clear();
        self.offsets.resize(config.num_experts + 1, 0);
        for route in routes {
            self.offsets[route.expert.0 as usize + 1] += 1;
        }
        for expert in 0..config.num_experts {
            self.offsets[expert + 1] += self.offsets[expert];
        }
        self.source_rows.resize(routes.len(), 0);
        self.row_weights.resize(routes.len(), 0.0);
        self.slots.clear();
        self.weights.clear();
        // `offsets[e]` counts up while expert e is filled; afterwards each holds the start of the next: shift back.
        for (choice, route) in routes.iter().enumerate() {
            let next = &mut self.offsets[route.expert.0 as usize];
            self.source_rows[*next] = (choice / config.experts_per_token()) as u32;
            self.row_weights[*next] = route.weight;
            self.slots.push(*next as u32);
            self.weights.push(route.weight);
            *next += 1;
        }
        self.offsets.rotate_right(1);
        self.offsets[0] = 0;
    }

    /// How many rows each expert has, `[num_experts]`.
    pub fn rows_per_expert(&self) -> impl Iterator<Item = usize> {
        self.offsets.windows(2).map(|offsets| offsets[1] - offsets[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Router;

    const CONFIG: MoeConfig = MoeConfig {
        num_experts: 10,
        router: Router::GroupedSoftmax { num_expert_groups: 2, top_k_per_group: 3 },
        router_scale: true,
        expert_intermediate_size: 1,
        shared_intermediate_size: None,
    };

    fn routes_of(logits: [f32; 10], scale: [f32; 10]) -> Vec<Route> {
        let mut routes = [Route { expert: ExpertId(99), weight: 0.0 }; 6];
        route_token(Isa::best(), &CONFIG, &mut logits.clone(), Some(&scale), &mut routes);
        routes.to_vec()
    }

    fn experts(routes: &[Route]) -> Vec<u32> {
        routes.iter().map(|route| route.expert.0).collect()
    }

    #[test]
    fn each_expert_group_gives_its_best_by_unscaled_probability() {
        let logits = [0.1, 0.5, 0.3, -1.0, 0.4, 3.0, 9.0, 1.0, 2.0, 0.0];
        let mut scale = [1.0; 10];
        scale[3] = 1e6; // would win if the scale came before the choice
        let routes = routes_of(logits, scale);
        assert_eq!(experts(&routes), [1, 4, 2, 6, 5, 8]);
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        for route in routes {
            let p = f64::from(logits[route.expert.0 as usize]).exp() / sum;
            assert!((f64::from(route.weight) - p).abs() < 1e-7);
        }
    }

    #[test]
    fn a_router_that_renormalises_divides_by_the_sum_of_the_chosen() {
        let logits = [0.1, 0.5, 0.3, -1.0, 0.4, 3.0, 9.0, 1.0, 2.0, 0.0];
        let sum: f64 = [9.0f64, 3.0, 2.0].map(f64::exp).iter().sum();
        for (renormalize, of_all) in [(true, 1.0), (false, sum / logits.map(f64::exp).iter().sum::<f64>())] {
            let config = MoeConfig { router: Router::TopKSoftmax { top_k: 3, renormalize }, ..CONFIG };
            let mut routes = [Route { expert: ExpertId(99), weight: 0.0 }; 3];
            route_token(Isa::best(), &config, &mut logits.map(|x| x as f32), None, &mut routes);
            assert_eq!(experts(&routes), [6, 5, 8]);
            for (route, logit) in routes.iter().zip([9.0f64, 3.0, 2.0]) {
                assert!((f64::from(route.weight) - logit.exp() / sum * of_all).abs() < 1e-6, "{route:?}");
            }
        }
    }

    #[test]
    fn ties_and_nans_go_to_the_lower_expert() {
        assert_eq!(experts(&routes_of([1.0; 10], [1.0; 10])), [0, 1, 2, 5, 6, 7]);
        assert_eq!(experts(&routes_of([f32::NAN; 10], [1.0; 10])), [0, 1, 2, 5, 6, 7]);
        let mut some = [f32::NEG_INFINITY; 10];
        some[4] = 0.0;
        assert_eq!(experts(&routes_of(some, [1.0; 10])), [4, 0, 1, 5, 6, 7]);
    }

    #[test]
    fn dispatch_sorts_rows_by_expert_and_finds_them_again() {
        let route = |expert, weight| Route { expert: ExpertId(expert), weight };
        let router = Router::TopKSoftmax { top_k: 2, renormalize: false };
        let config = MoeConfig { num_experts: 4, router, ..CONFIG };
        let routes = [route(3, 0.1), route(1, 0.2), route(1, 0.3), route(0, 0.4), route(3, 0.5), route(1, 0.6)];
        let mut dispatch = Dispatch::with_capacity(6, 4);
        let capacities = |d: &Dispatch| (d.offsets.capacity(), d.source_rows.capacity(), d.slots.capacity());
        let reserved = capacities(&dispatch);
        for _ in 0..2 {
            dispatch.sort(&config, &routes);
            assert_eq!(dispatch.offsets, [0, 1, 4, 4, 6]);
            assert!(dispatch.rows_per_expert().eq([1, 3, 0, 2]));
            assert_eq!(dispatch.source_rows, [1, 0, 1, 2, 0, 2]);
            assert_eq!(dispatch.slots, [4, 1, 2, 0, 5, 3]);
            assert_eq!(dispatch.weights, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]);
            assert_eq!(dispatch.row_weights, [0.4, 0.2, 0.3, 0.6, 0.1, 0.5]);
            assert_eq!(capacities(&dispatch), reserved, "a step allocates nothing");
        }
    }
}
