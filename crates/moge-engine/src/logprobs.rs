//! Log-probabilities, always of the unmodified logits (as vLLM reports them).

use moge_model::TokenId;
use serde::Serialize;

use crate::candidate::{Candidate, candidates, clean_logit, most_likely};

/// A token and its natural log-probability.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenId,
    /// At most 0; `-inf` for an impossible token.
    pub logprob: f64,
}

/// Log-probabilities at one position of a sequence.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RowLogprobs {
    /// The token at the position.
    pub token: TokenId,
    /// Its natural log-probability, at most 0; `-inf` for an impossible token.
    pub logprob: f64,
    /// The most likely tokens at the position, most likely first; ties by ascending id.
    pub top: Vec<TokenLogprob>,
}

/// Log-softmax of `logits` `[vocab_size]` in f64, summed in the order of the ids, at `token` and at the
/// `num_alternatives` most likely tokens. A NaN logit is an impossible token.
pub(crate) fn row_logprobs(logits: &[f32], token: TokenId, num_alternatives: usize) -> RowLogprobs {
    let max = logits.iter().copied().map(clean_logit).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|&logit| (clean_logit(logit) - max).exp()).sum();
    let log_normalizer = max + sum.ln();
    // With no possible token the normalizer is undefined; then every token is impossible.
    let logprob = |logit: f64| if logit == f64::NEG_INFINITY { logit } else { logit - log_normalizer };
    let top = most_likely(candidates(logits.iter().copied().map(clean_logit)), num_alternatives);
    RowLogprobs {
        token,
        logprob: logprob(clean_logit(logits[token.0 as usize])),
        top: top
            .into_iter()
            .map(|Candidate { token, score }| TokenLogprob { token, logprob: logprob(score) })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_the_log_softmax_of_the_raw_logits() {
        let logits = [0.0, 2.0_f32.ln(), f32::NAN, 5.0_f32.ln(), f32::NEG_INFINITY];
        let row = row_logprobs(&logits, TokenId(1), 7);
        assert!((row.logprob - 0.25_f64.ln()).abs() < 1e-7);
        let top: Vec<u32> = row.top.iter().map(|top| top.token.0).collect();
        assert_eq!(top, [3, 1, 0], "impossible tokens are no alternatives");
        assert!((row.top[0].logprob - 0.625_f64.ln()).abs() < 1e-7);
        assert_eq!(row_logprobs(&logits, TokenId(2), 0).logprob, f64::NEG_INFINITY);
    }

    #[test]
    fn huge_and_impossible_rows_give_no_nan() {
        let row = row_logprobs(&[f32::INFINITY, f32::MIN, 3.0], TokenId(0), 2);
        assert_eq!((row.logprob, row.top[0].logprob), (0.0, 0.0));
        let row = row_logprobs(&[f32::NAN, f32::NEG_INFINITY], TokenId(1), 3);
        assert_eq!((row.logprob, row.top.len()), (f64::NEG_INFINITY, 0));
    }

    #[test]
    fn alternatives_with_equal_logits_come_lower_id_first() {
        let row = row_logprobs(&[1.0, 2.0, 1.0, 2.0, 2.0], TokenId(0), 2);
        let top: Vec<u32> = row.top.iter().map(|top| top.token.0).collect();
        assert_eq!(top, [1, 3]);
    }
}
