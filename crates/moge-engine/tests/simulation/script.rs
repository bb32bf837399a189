//! Numbers that stand for what a model computes, and random ones.

use moge_engine::{FinishReason, RowLogprobs};
use moge_model::TokenId;

pub(crate) const EOS: TokenId = TokenId(0);
pub(crate) const VOCAB_SIZE: usize = 23;

/// What the model says after `tokens`: now and then it fails.
pub(crate) fn scripted(tokens: &[TokenId]) -> Result<TokenId, FinishReason> {
    let mut rng = Rng(text_hashes(tokens).last().copied().unwrap_or_default());
    if rng.one_in(500) { Err(FinishReason::NoFiniteLogit) } else { Ok(rng.token()) }
}

/// For each token a hash of it and all before it.
pub(crate) fn text_hashes(tokens: &[TokenId]) -> Vec<u64> {
    let mut hash = Rng(0);
    let next = |token: &TokenId| {
        hash.0 ^= u64::from(token.0);
        hash.0 = hash.next();
        hash.0
    };
    tokens.iter().map(next).collect()
}

/// What stands for the experts of the tokens at `positions`.
pub(crate) fn places(positions: std::ops::Range<usize>) -> Vec<u8> {
    positions.map(|position| position as u8).collect()
}

pub(crate) fn logprobs_of(token: TokenId) -> RowLogprobs {
    RowLogprobs { token, logprob: -1.0 - f64::from(token.0), top: Vec::new() }
}

/// SplitMix64.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// At least `low`, below `high`.
    pub(crate) fn range(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low) as u64) as usize
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.range(0, n) == 0
    }

    pub(crate) fn token(&mut self) -> TokenId {
        TokenId(self.range(0, VOCAB_SIZE) as u32)
    }
}
