//! Tokens in the order of their scores.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use moge_model::TokenId;

/// A token and what it is compared by: a logit, or a number that grows with it. The greater candidate is the more
/// likely one; of equal scores that is the lower id, so that no order depends on how a sort works.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) token: TokenId,
    /// Never NaN.
    pub(crate) score: f64,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Candidate) -> Ordering {
        let by_score = self.score.partial_cmp(&other.score).unwrap_or(Ordering::Equal);
        by_score.then(other.token.cmp(&self.token))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Candidate) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Eq for Candidate {}

impl PartialEq for Candidate {
    fn eq(&self, other: &Candidate) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

/// A logit as the sampler reads it: NaN is impossible (`-inf`), `+inf` is the largest finite f32.
pub(crate) fn clean_logit(logit: f32) -> f64 {
    if logit.is_nan() { f64::NEG_INFINITY } else { f64::from(logit.min(f32::MAX)) }
}

/// The candidates of all tokens that are possible at all, in the order of their ids.
pub(crate) fn candidates(scores: impl Iterator<Item = f64>) -> impl Iterator<Item = Candidate> {
    let candidates = (0u32..).zip(scores).map(|(token, score)| Candidate { token: TokenId(token), score });
    candidates.filter(|candidate| candidate.score > f64::NEG_INFINITY)
}

/// The `k` most likely of `candidates`, the most likely first; all of them if there are fewer.
pub(crate) fn most_likely(mut candidates: impl Iterator<Item = Candidate>, k: usize) -> Vec<Candidate> {
    let mut heap: BinaryHeap<Reverse<Candidate>> = candidates.by_ref().take(k).map(Reverse).collect();
    for candidate in candidates {
        // One comparison for most tokens: few are among the best so far.
        if let Some(mut worst) = heap.peek_mut()
            && candidate > worst.0
        {
            *worst = Reverse(candidate);
        }
    }
    heap.into_sorted_vec().into_iter().map(|Reverse(candidate)| candidate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_likely_sorts_descending_with_ties_to_the_lower_id() {
        let scores = [1.0, f64::NEG_INFINITY, 3.0, -0.0, 3.0, 0.0, 1.0];
        for k in 0..9 {
            let tokens: Vec<u32> = most_likely(candidates(scores.into_iter()), k).iter().map(|c| c.token.0).collect();
            let all = [2, 4, 0, 6, 3, 5];
            assert_eq!(tokens, all[..k.min(6)]);
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_made_comparable() {
        assert_eq!(clean_logit(f32::NAN), f64::NEG_INFINITY);
        assert_eq!(clean_logit(f32::NEG_INFINITY), f64::NEG_INFINITY);
        assert_eq!(clean_logit(f32::INFINITY), f64::from(f32::MAX));
        assert_eq!(clean_logit(-1.5), -1.5);
    }
}
