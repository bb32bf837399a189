//! What a model makes of a text, and how far that is from what another one makes of it.

use moge_kernels::{Cpu, KvType, Precision};
use moge_model::{
    BLOCK_SIZE, Batch, BlockId, KvCache, Model, ModelConfig, SequenceRows, StepLimits, StepOutput, TokenId, Workspace,
};
use serde::Serialize;

/// Rows of a step. Each has logits over the whole vocabulary.
const MAX_ROWS: usize = 64;

/// A model and the memory of its steps.
#[derive(Debug)]
pub struct EvalModel {
    model: Model,
    kv_cache: KvCache,
    work: Workspace,
    output: StepOutput,
}

/// What a model makes of a text, perhaps beside a baseline.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Tokens that were predicted.
    pub num_tokens: usize,
    /// The exponential of the mean negative log-probability of those tokens.
    pub perplexity: f64,
    /// How far from the baseline that is.
    pub baseline: Option<Comparison>,
}

/// A model beside a baseline, over the same tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Perplexity of the baseline.
    pub perplexity: f64,
    /// Kullback-Leibler divergence of the model from the baseline, in nats: the mean over the tokens.
    pub kl_mean: f64,
    /// The largest.
    pub kl_max: f64,
    /// Root mean square of the difference in logits, over that of the baseline's logits; both less their mean over the
    /// vocabulary, which no probability depends on.
    pub logit_error: f64,
    /// Share of the tokens for which both find the same token the most likely.
    pub same_top_share: f64,
    /// Share of the baseline's choices of experts that the model does not make, over all tokens and layers; none if either
    /// has no routed experts, or another number of them.
    pub changed_expert_share: Option<f64>,
}

impl EvalModel {
    /// `model`, to read up to `context` tokens at a time.
    pub fn new(model: Model, cpu: &Cpu, activation: Precision, kv: KvType, context: usize) -> EvalModel {
        let kv_cache = KvCache::new(model.config(), kv, context.div_ceil(BLOCK_SIZE));
        let work = Workspace::new(model.config(), activation, limits(context, cpu.num_threads()));
        EvalModel { model, kv_cache, work, output: StepOutput::default() }
    }

    /// Bytes that [`EvalModel::new`] needs beside the weights: of the KV cache, and of a step.
    pub fn bytes(config: &ModelConfig, kv: KvType, context: usize, num_threads: usize) -> (u64, u64) {
        let kv_bytes = KvCache::block_bytes(config, kv).saturating_mul(context.div_ceil(BLOCK_SIZE) as u64);
        (kv_bytes, Workspace::bytes(config, limits(context, num_threads)))
    }

    fn step(&mut self, cpu: &Cpu, batch: &Batch) {
        self.model.forward(cpu, batch, &mut self.kv_cache, &mut self.work, &mut self.output);
    }

    /// Logits of row `row` among those that were wanted.
    fn logits(&self, row: usize) -> &[f32] {
        let vocab_size = self.model.config().vocab_size;
        &self.output.logits[row * vocab_size..(row + 1) * vocab_size]
    }

    /// Experts of a layer, and of them those that a token takes.
    fn expert_counts(&self) -> Option<(usize, usize)> {
        self.model.config().moe().map(|moe| (moe.num_experts, moe.experts_per_token()))
    }
}

fn limits(context: usize, num_threads: usize) -> StepLimits {
    let max_rows = MAX_ROWS.min(context);
    StepLimits { max_rows, max_logit_rows: max_rows, max_context: context, num_threads }
}

impl Evaluation {
    /// Let `side`, and `baseline` beside it, read each of `windows` from its start, and see what they expect of every token
    /// after the first `num_given`, at least 1, of a window. `progress` gets the tokens read so far.
    ///
    /// # Panics
    /// If a window is longer than either side's context, names a token outside the vocabulary, or the vocabularies differ.
    pub fn run(
        cpu: &Cpu,
        side: &mut EvalModel,
        mut baseline: Option<&mut EvalModel>,
        windows: &[&[TokenId]],
        num_given: usize,
        progress: &mut dyn FnMut(usize),
    ) -> Evaluation {
        let mut sums = Sums::default();
        let mut num_read = 0;
        for window in windows {
            for start in (0..window.len()).step_by(MAX_ROWS) {
                let (mut batch, targets) = step_of(window, start, num_given.max(1));
                if baseline.is_some() {
                    batch.route_rows = (0..batch.num_rows() as u32).collect();
                }
                side.step(cpu, &batch);
                if let Some(baseline) = &mut baseline {
                    baseline.step(cpu, &batch);
                    sums.add_routes(side, baseline);
                }
                for (row, target) in targets.iter().enumerate() {
                    sums.add_row(side.logits(row), baseline.as_ref().map(|baseline| baseline.logits(row)), *target);
                }
                num_read += batch.num_rows();
                progress(num_read);
            }
        }
        sums.evaluation(baseline.is_some())
    }
}

/// The step for the tokens of `window` from `start` on, and the tokens that its wanted rows are to predict.
fn step_of(window: &[TokenId], start: usize, num_given: usize) -> (Batch, Vec<TokenId>) {
    let end = window.len().min(start + MAX_ROWS);
    let num_blocks = end.div_ceil(BLOCK_SIZE) as u32;
    let is_wanted = |position: &usize| position + 1 >= num_given && position + 1 < window.len();
    let wanted: Vec<usize> = (start..end).filter(is_wanted).collect();
    let sequence = SequenceRows {
        num_rows: end - start,
        first_position: start,
        block_table: (0..num_blocks).map(BlockId).collect(),
    };
    let batch = Batch {
        tokens: window[start..end].to_vec(),
        sequences: vec![sequence],
        logit_rows: wanted.iter().map(|position| (position - start) as u32).collect(),
        ..Batch::default()
    };
    (batch, wanted.iter().map(|position| window[position + 1]).collect())
}

/// Sums over the predicted tokens.
#[derive(Debug, Default)]
struct Sums {
    num_tokens: usize,
    negative_log: f64,
    baseline_negative_log: f64,
    kl: f64,
    kl_max: f64,
    logit_differences: f64,
    baseline_logits: f64,
    num_same_top: usize,
    num_choices: usize,
    num_changed: usize,
}

impl Sums {
    fn add_row(&mut self, logits: &[f32], baseline: Option<&[f32]>, target: TokenId) {
        let target = target.0 as usize;
        let normalizer = log_normalizer(logits);
        self.num_tokens += 1;
        self.negative_log += normalizer - f64::from(logits[target]);
        let Some(baseline) = baseline else { return };
        let baseline_normalizer = log_normalizer(baseline);
        self.baseline_negative_log += baseline_normalizer - f64::from(baseline[target]);
        let terms = baseline.iter().zip(logits).map(|(&b, &a)| {
            let log_b = f64::from(b) - baseline_normalizer;
            log_b.exp() * (log_b - (f64::from(a) - normalizer))
        });
        let kl: f64 = terms.sum();
        self.kl += kl;
        self.kl_max = self.kl_max.max(kl);
        let (mean, baseline_mean) = (mean(logits), mean(baseline));
        for (&a, &b) in logits.iter().zip(baseline) {
            let b = f64::from(b) - baseline_mean;
            self.logit_differences += (f64::from(a) - mean - b).powi(2);
            self.baseline_logits += b.powi(2);
        }
        self.num_same_top += usize::from(most_likely(logits) == most_likely(baseline));
    }

    fn add_routes(&mut self, side: &EvalModel, baseline: &EvalModel) {
        let Some((_, per_token)) = side.expert_counts().filter(|counts| baseline.expert_counts() == Some(*counts))
        else {
            return;
        };
        let choices = [side, baseline].map(|side| side.output.expert_ids.chunks_exact(per_token));
        let [found, expected] = choices;
        for (found, expected) in found.zip(expected) {
            self.num_changed += expected.iter().filter(|expert| !found.contains(expert)).count();
            self.num_choices += per_token;
        }
    }

    fn evaluation(&self, has_baseline: bool) -> Evaluation {
        let num_tokens = self.num_tokens as f64;
        let comparison = || Comparison {
            perplexity: (self.baseline_negative_log / num_tokens).exp(),
            kl_mean: self.kl / num_tokens,
            kl_max: self.kl_max,
            logit_error: (self.logit_differences / self.baseline_logits).sqrt(),
            same_top_share: self.num_same_top as f64 / num_tokens,
            changed_expert_share: (self.num_choices > 0).then(|| self.num_changed as f64 / self.num_choices as f64),
        };
        Evaluation {
            num_tokens: self.num_tokens,
            perplexity: (self.negative_log / num_tokens).exp(),
            baseline: has_baseline.then(comparison),
        }
    }
}

/// The logarithm of the sum of the exponentials.
fn log_normalizer(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum::<f64>().ln()
}

fn mean(logits: &[f32]) -> f64 {
    logits.iter().copied().map(f64::from).sum::<f64>() / logits.len() as f64
}

/// The token with the largest logit, of equals the lowest.
fn most_likely(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, token| if logits[token] > logits[best] { token } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_over_tokens_are_those_of_the_formulas() {
        // Probabilities 1/2, 1/4, 1/4 of the model; 1/4, 1/2, 1/4 of the baseline. Logits are right up to a constant.
        let logs = |probs: [f32; 3], constant: f32| probs.map(|p| p.ln() + constant);
        let (model, baseline) = (logs([0.5, 0.25, 0.25], 3.0), logs([0.25, 0.5, 0.25], -1.0));
        let mut sums = Sums::default();
        sums.add_row(&model, Some(&baseline), TokenId(0));
        sums.add_row(&model, Some(&model), TokenId(2));
        let found = sums.evaluation(true);
        assert!((found.perplexity - 8f64.sqrt()).abs() < 1e-6, "{found:?}");
        let comparison = found.baseline.unwrap();
        assert!((comparison.perplexity - 4.0).abs() < 1e-6, "{comparison:?}");
        let kl = 0.25 * 2f64.ln();
        assert!((comparison.kl_max - kl).abs() < 1e-6 && (comparison.kl_mean - kl / 2.0).abs() < 1e-6);
        assert_eq!((comparison.same_top_share, comparison.changed_expert_share), (0.5, None));
        // In units of ln 2, less their means: the model 2/3, -1/3, -1/3; the baseline -1/3, 2/3, -1/3; then itself.
        assert!((comparison.logit_error - (2.0f64 / (6.0 / 9.0 + 6.0 / 9.0)).sqrt()).abs() < 1e-6);
    }

    #[test]
    fn every_token_after_the_given_ones_is_predicted_once() {
        let window: Vec<TokenId> = (0..150).map(TokenId).collect();
        for num_given in [1, 2, 70] {
            let mut predicted = Vec::new();
            for start in (0..window.len()).step_by(MAX_ROWS) {
                let (batch, targets) = step_of(&window, start, num_given);
                assert_eq!(batch.logit_rows.len(), targets.len());
                for (row, target) in batch.logit_rows.iter().zip(&targets) {
                    assert_eq!(batch.tokens[*row as usize].0 + 1, target.0);
                }
                predicted.extend(targets);
            }
            assert_eq!(predicted, window[num_given..]);
        }
    }
}
