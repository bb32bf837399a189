//! Where the time of steps goes.

use std::time::{Duration, Instant};

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// Token embedding, with what a step prepares.
    Embed,
    /// Norms of the residual stream, additions to it, and rounding of what projections read.
    Norm,
    /// Query, key and value projections.
    Qkv,
    /// Norms of q and k heads, RoPE, and writing keys and values to the cache.
    RopeAndKvWrite,
    /// Attention over the cache.
    Attention,
    /// Output projection of the attention.
    OutputProjection,
    /// MLP of a dense layer.
    DenseMlp,
    /// The router, the choice of experts, and sorting the rows by expert.
    Router,
    /// The shared expert.
    SharedExpert,
    /// Gate and up projections of the routed experts.
    RoutedGateUp,
    /// Down projections of the routed experts.
    RoutedDown,
    /// Weighted sum of the experts' outputs.
    Combine,
    /// Logits, with the last norm.
    Head,
}

impl Operator {
    /// Every operator, in the order of a step.
    pub const ALL: [Operator; 13] = [
        Operator::Embed,
        Operator::Norm,
        Operator::Qkv,
        Operator::RopeAndKvWrite,
        Operator::Attention,
        Operator::OutputProjection,
        Operator::DenseMlp,
        Operator::Router,
        Operator::SharedExpert,
        Operator::RoutedGateUp,
        Operator::RoutedDown,
        Operator::Combine,
        Operator::Head,
    ];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Operator::Embed => "embed",
            Operator::Norm => "norm",
            Operator::Qkv => "qkv",
            Operator::RopeAndKvWrite => "rope_and_kv_write",
            Operator::Attention => "attention",
            Operator::OutputProjection => "output_projection",
            Operator::DenseMlp => "dense_mlp",
            Operator::Router => "router",
            Operator::SharedExpert => "shared_expert",
            Operator::RoutedGateUp => "routed_gate_up",
            Operator::RoutedDown => "routed_down",
            Operator::Combine => "combine",
            Operator::Head => "head",
        }
    }
}

/// Time of each operator, summed over layers and steps, from the step on that follows
/// [`Workspace::record_profile`](crate::Workspace::record_profile).
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// When the last operator ended; nothing while times are not recorded.
    last_mark: Option<Instant>,
    times: [Duration; Operator::ALL.len()],
}

impl Profile {
    /// Time of `operator` so far.
    pub fn time(&self, operator: Operator) -> Duration {
        self.times[operator as usize]
    }

    /// Time of all operators so far.
    pub fn total(&self) -> Duration {
        self.times.iter().sum()
    }

    pub(crate) fn is_recording(&self) -> bool {
        self.last_mark.is_some()
    }

    /// A profile that records from now on.
    pub(crate) fn recording() -> Profile {
        Profile { last_mark: Some(Instant::now()), ..Profile::default() }
    }

    /// A step begins: what came before it counts for no operator.
    pub(crate) fn begin_step(&mut self) {
        self.begin_step_at(Instant::now());
    }

    fn begin_step_at(&mut self, now: Instant) {
        self.last_mark = self.last_mark.map(|_| now);
    }

    /// `operator` has ended: the time since the last one is its own.
    pub(crate) fn mark(&mut self, operator: Operator) {
        self.mark_at(operator, Instant::now());
    }

    fn mark_at(&mut self, operator: Operator, now: Instant) {
        if let Some(last) = self.last_mark {
            self.times[operator as usize] += now - last;
            self.last_mark = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_operator_has_its_own_place_and_name() {
        for (index, operator) in Operator::ALL.into_iter().enumerate() {
            assert_eq!(operator as usize, index);
            assert!(Operator::ALL[..index].iter().all(|other| other.name() != operator.name()));
        }
    }

    #[test]
    fn time_goes_to_the_operator_that_ends_it_and_time_between_steps_to_none() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut profile = Profile { last_mark: Some(start), ..Profile::default() };
        profile.begin_step_at(at(30));
        profile.mark_at(Operator::Qkv, at(31));
        profile.mark_at(Operator::Head, at(33));
        profile.begin_step_at(at(40));
        profile.mark_at(Operator::Qkv, at(44));
        assert_eq!(profile.time(Operator::Qkv), Duration::from_millis(5));
        assert_eq!(profile.time(Operator::Head), Duration::from_millis(2));
        assert_eq!(profile.total(), Duration::from_millis(7));
    }

    #[test]
    fn nothing_is_recorded_before_it_is_asked_for() {
        let mut profile = Profile::default();
        profile.begin_step();
        profile.mark(Operator::Embed);
        assert!(!profile.is_recording());
        assert_eq!(profile.total(), Duration::ZERO);
    }
}
