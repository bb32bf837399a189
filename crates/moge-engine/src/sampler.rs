//! One row of logits to one token.
//!
//! The order, which changes results: logit_bias, repetition penalty, presence and frequency penalties, bans of what
//! the grammar does not allow and of stop tokens while `min_tokens` are not reached; temperature; top_k; top_p; min_p;
//! draw. Each filter sees the probabilities that the one before it left, renormalized. All of it in f64, in orders that depend on logits and ids only.

use std::collections::BinaryHeap;
use std::sync::{Mutex, PoisonError};

use moge_model::TokenId;

use crate::candidate::{Candidate, candidates, clean_logit, most_likely};
use crate::sampling_params::SamplingParams;

/// Every logit of the row was NaN or `-inf`, so no token can be sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoFiniteLogit;

/// State of a sequence that sampling depends on, besides its parameters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct History<'a> {
    pub(crate) prompt: &'a [TokenId],
    pub(crate) output: &'a [TokenId],
    /// A bit for each token that may be sampled; `None` allows all.
    pub(crate) allowed: Option<&'a [u32]>,
    /// Tokens that may not be sampled now.
    pub(crate) banned: &'a [TokenId],
}

/// Scratch memory for sampling; no state carries over from one row to the next.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    /// Logits after bias and penalties, `[vocab_size]`.
    scores: Vec<f64>,
    /// Occurrences of each token, `[vocab_size]`; zero between calls.
    counts: Vec<u32>,
}

/// Samplers for concurrent threads; grows to the largest number used at the same time.
#[derive(Debug, Default)]
pub(crate) struct Samplers(Mutex<Vec<Sampler>>);

impl Samplers {
    /// Call `work` with exclusive use of a sampler.
    pub(crate) fn with(&self, work: impl FnOnce(&mut Sampler)) {
        let free = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sampler = free().pop().unwrap_or_default();
        work(&mut sampler);
        free().push(sampler);
    }
}

impl Sampler {
    /// Choose the token that follows `history`. A function of the arguments alone: randomness comes from
    /// `params.seed` and the position of the new token.
    ///
    /// # Panics
    /// If a token of `params` or `history` has no logit.
    pub(crate) fn sample(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        history: &History,
    ) -> Result<TokenId, NoFiniteLogit> {
        self.scores.clear();
        self.scores.extend(logits.iter().copied().map(clean_logit));
        self.counts.resize(logits.len(), 0);
        self.adjust(params, history);
        // In the order of the ids, so that the lower one of equals stays.
        let greater = |best: Candidate, next: Candidate| if next.score > best.score { next } else { best };
        let best = candidates(self.scores.iter().copied()).reduce(greater).ok_or(NoFiniteLogit)?;
        if params.temperature == 0.0 {
            return Ok(best.token);
        }
        let kept = self.keep(params, best);
        let position = history.prompt.len() + history.output.len();
        Ok(draw(&kept, uniform(params.seed, position as u64)).unwrap_or(best.token))
    }

    /// The tokens that may be drawn, with probabilities up to a common factor that makes it 1 for `best`.
    fn keep(&self, params: &SamplingParams, best: Candidate) -> Vec<Candidate> {
        let possible = candidates(self.scores.iter().copied());
        let mut kept: Vec<Candidate> = match params.top_k {
            Some(k) if k > 0 => most_likely(possible, k),
            _ => possible.collect(),
        };
        for candidate in &mut kept {
            candidate.score = ((candidate.score - best.score) / params.temperature).exp();
        }
        if params.top_p < 1.0 {
            kept = keep_top_p(kept, params.top_p);
        }
        kept.retain(|candidate| candidate.score >= params.min_p);
        kept
    }

    /// Apply bias, penalties and bans to `scores`.
    fn adjust(&mut self, params: &SamplingParams, history: &History) {
        for (token, bias) in &params.logit_bias {
            self.scores[token.0 as usize] += bias;
        }
        if params.repetition_penalty != 1.0 {
            let penalty = params.repetition_penalty;
            self.for_each_distinct(history.prompt.iter().chain(history.output), |score, _| {
                // The least penalties could reach +inf, from which no difference can be taken.
                *score = if *score > 0.0 { (*score / penalty).min(f64::MAX) } else { *score * penalty };
            });
        }
        if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
            self.for_each_distinct(history.output.iter(), |score, count| {
                *score -= params.presence_penalty + f64::from(count) * params.frequency_penalty;
            });
        }
        if let Some(allowed) = history.allowed {
            for (scores, word) in self.scores.chunks_mut(32).zip(allowed) {
                for (bit, score) in scores.iter_mut().enumerate() {
                    if word >> bit & 1 == 0 {
                        *score = f64::NEG_INFINITY;
                    }
                }
            }
        }
        for token in history.banned {
            self.scores[token.0 as usize] = f64::NEG_INFINITY;
        }
    }

    /// Call `change` once with the score of every token in `tokens` and how often it occurs there.
    fn for_each_distinct<'a>(
        &mut self,
        tokens: impl Iterator<Item = &'a TokenId> + Clone,
        change: impl Fn(&mut f64, u32),
    ) {
        for token in tokens.clone() {
            self.counts[token.0 as usize] += 1;
        }
        for token in tokens {
            let count = std::mem::take(&mut self.counts[token.0 as usize]);
            if count > 0 {
                change(&mut self.scores[token.0 as usize], count);
            }
        }
    }
}

/// The fewest most likely candidates whose share of the sum is at least `top_p`; one at least.
fn keep_top_p(candidates: Vec<Candidate>, top_p: f64) -> Vec<Candidate> {
    let wanted = top_p * sum(&candidates);
    // A heap, because most of a large vocabulary need never be sorted.
    let mut heap = BinaryHeap::from(candidates);
    let mut kept = Vec::new();
    let mut cumulative = 0.0;
    while let Some(candidate) = heap.pop() {
        cumulative += candidate.score;
        kept.push(candidate);
        if cumulative >= wanted {
            break;
        }
    }
    kept
}

/// The candidate at the share `u` of the sum, `None` if rounding leads past the last one.
fn draw(candidates: &[Candidate], u: f64) -> Option<TokenId> {
    let target = u * sum(candidates);
    let mut cumulative = 0.0;
    let drawn = candidates.iter().find(|candidate| {
        cumulative += candidate.score;
        cumulative > target
    });
    drawn.map(|candidate| candidate.token)
}

fn sum(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.score).sum()
}

/// A number in `[0, 1)`, uniform over positions and over seeds: random number `position` of the SplitMix64 stream
/// (Steele, Lea and Flood 2014) that starts at the scrambled seed. No state is carried from one call to the next.
fn uniform(seed: u64, position: u64) -> f64 {
    // Scrambled, because the streams of neighboring seeds must not be shifted copies of one another.
    let bits = split_mix_64(split_mix_64(seed, 0), position);
    (bits >> 11) as f64 / (1u64 << 53) as f64 // 53 bits are what an f64 holds exactly
}

/// Output number `index` of SplitMix64 started with the state `start`.
fn split_mix_64(start: u64, index: u64) -> u64 {
    const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15; // 2^64 divided by the golden ratio, made odd
    let mut z = start.wrapping_add(index.wrapping_add(1).wrapping_mul(GAMMA));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests;
