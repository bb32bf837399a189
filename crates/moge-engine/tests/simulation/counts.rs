//! How often things happened.

/// How often things happened.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) stop: usize,
    pub(crate) length: usize,
    /// Before it began, after a preemption, in prefill, in decode.
    pub(crate) cancelled: [usize; 4],
    pub(crate) failed: usize,
    pub(crate) queue_full: usize,
    pub(crate) never_fits: usize,
    pub(crate) chunked: usize,
    pub(crate) prompt_logprobs: usize,
    pub(crate) expert_ids: usize,
    pub(crate) preempted: usize,
    pub(crate) cached: usize,
    /// Draft tokens that had a row: those that were taken, and the others.
    pub(crate) accepted: usize,
    pub(crate) rejected: usize,
    /// Tokens computed, again ones among them.
    pub(crate) rows: usize,
}

impl Counts {
    pub(crate) fn add(&mut self, other: &Counts) {
        self.stop += other.stop;
        self.length += other.length;
        for (count, other) in self.cancelled.iter_mut().zip(other.cancelled) {
            *count += other;
        }
        self.failed += other.failed;
        self.queue_full += other.queue_full;
        self.never_fits += other.never_fits;
        self.chunked += other.chunked;
        self.prompt_logprobs += other.prompt_logprobs;
        self.preempted += other.preempted;
        self.cached += other.cached;
        self.expert_ids += other.expert_ids;
        self.accepted += other.accepted;
        self.rejected += other.rejected;
        self.rows += other.rows;
    }
}
