//! Sampling parameters, named as in OpenAI's API and vLLM's extensions of it.

use std::collections::BTreeMap;
use std::fmt::Display;

use moge_model::{GenerationDefaults, TokenId};

use crate::error::AdmitError;

/// Most alternatives per log-probability: enough for every known use, and a bound on the memory of one request.
pub const MAX_LOGPROBS: usize = 128;

/// Most entries of each list that every new token is compared with: stop strings, stop tokens, biases.
pub const MAX_LIST_LEN: usize = 1024;

/// Longest stop string in bytes. Text is held back while it may be the beginning of one.
pub const MAX_STOP_BYTES: usize = 1024;

/// Sampling parameters. The default is greedy, without penalties, up to the end of the context.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Stop after this many tokens, at least 1, or at the end of the context if that comes first. `None`: when the
    /// context or the KV cache is full. Nothing is reserved for them; where the KV cache gets short, the youngest
    /// sequences wait.
    pub max_tokens: Option<usize>,
    /// Sample no stop token and look for no stop string before this many tokens.
    pub min_tokens: usize,
    /// Divides the logits; 0 takes the most likely token, the lower id of equals.
    pub temperature: f64,
    /// Keep this many most likely tokens; `None` or 0 keeps all.
    pub top_k: Option<usize>,
    /// Keep the fewest most likely tokens whose probabilities add up to this; 1 keeps all. In `(0, 1]`.
    pub top_p: f64,
    /// Keep the tokens at least this probable relative to the most likely one; 0 keeps all. In `[0, 1]`.
    pub min_p: f64,
    /// Positive logits of tokens in prompt or output are divided by this, others multiplied; 1 is off. Above 0.
    pub repetition_penalty: f64,
    /// Subtracted from the logits of tokens in the output; 0 is off. In `[-2, 2]`.
    pub presence_penalty: f64,
    /// Subtracted for each time that a token is in the output; 0 is off. In `[-2, 2]`.
    pub frequency_penalty: f64,
    /// Added to the logits of these tokens, at most [`MAX_LIST_LEN`]. Each in `[-100, 100]`.
    pub logit_bias: BTreeMap<TokenId, f64>,
    /// The only source of randomness: different samples need different seeds.
    pub seed: u64,
    /// Stop when the text contains one of these; the text ends before it. At most [`MAX_LIST_LEN`], each of at most
    /// [`MAX_STOP_BYTES`].
    pub stop: Vec<String>,
    /// Stop at these tokens, in addition to the model's end-of-sequence tokens; the text ends before them. At most
    /// [`MAX_LIST_LEN`].
    pub stop_token_ids: Vec<TokenId>,
    /// Treat the model's end-of-sequence tokens as any other token.
    pub ignore_eos: bool,
    /// Report each sampled token's log-probability and this many most likely alternatives.
    pub logprobs: Option<usize>,
    /// The same for the tokens of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// Report which experts computed each token: [`crate::SequenceOutput::expert_ids`]. The prompt is not looked up in
    /// the prefix cache then. Refused where the model has no routed experts.
    pub return_expert_ids: bool,
}

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
            max_tokens: None,
            min_tokens: 0,
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
            return_expert_ids: false,
        }
    }
}

impl From<&GenerationDefaults> for SamplingParams {
    /// The parameters of a checkpoint's `generation_config.json`, the defaults of every front end. As in `transformers`,
    /// decoding is greedy unless the file has `do_sample: true`, whatever its temperature.
    fn from(defaults: &GenerationDefaults) -> SamplingParams {
        let temperature = if defaults.is_greedy() { 0.0 } else { defaults.temperature.unwrap_or(1.0) };
        SamplingParams {
            temperature,
            top_k: defaults.top_k,
            top_p: defaults.top_p.unwrap_or(1.0),
            min_p: defaults.min_p.unwrap_or(0.0),
            repetition_penalty: defaults.repetition_penalty.unwrap_or(1.0),
            ..SamplingParams::default()
        }
    }
}

impl SamplingParams {
    /// True if the token after `num_output_tokens` may end the sequence otherwise than by `max_tokens`.
    pub(crate) fn may_stop_after(&self, num_output_tokens: usize) -> bool {
        num_output_tokens >= self.min_tokens
    }

    /// Check every field against its range.
    ///
    /// # Errors
    /// [`AdmitError::InvalidParameter`] for the first field that is out of its range.
    pub fn validate(&self, vocab_size: usize) -> Result<(), AdmitError> {
        let max_tokens = self.max_tokens.unwrap_or(usize::MAX);
        check("max_tokens", max_tokens, max_tokens >= 1, "at least 1")?;
        check("min_tokens", self.min_tokens, self.min_tokens <= max_tokens, "at most max_tokens")?;
        let temperature_is_allowed = self.temperature.is_finite() && self.temperature >= 0.0;
        check("temperature", self.temperature, temperature_is_allowed, "finite and at least 0")?;
        check("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1")?;
        let penalty = self.repetition_penalty;
        check("repetition_penalty", penalty, penalty.is_finite() && penalty > 0.0, "finite and above 0")?;
        let penalties = -2.0..=2.0;
        check("presence_penalty", self.presence_penalty, penalties.contains(&self.presence_penalty), "from -2 to 2")?;
        check(
            "frequency_penalty",
            self.frequency_penalty,
            penalties.contains(&self.frequency_penalty),
            "from -2 to 2",
        )?;
        let lists = [
            ("logit_bias", self.logit_bias.len()),
            ("stop_token_ids", self.stop_token_ids.len()),
            ("stop", self.stop.len()),
        ];
        for (field, len) in lists {
            let allowed = format_args!("at most {MAX_LIST_LEN} entries");
            check(field, format_args!("a list of {len}"), len <= MAX_LIST_LEN, allowed)?;
        }
        for (&token, &bias) in &self.logit_bias {
            check_token("logit_bias", token, vocab_size)?;
            check("logit_bias", bias, (-100.0..=100.0).contains(&bias), "from -100 to 100")?;
        }
        for &token in &self.stop_token_ids {
            check_token("stop_token_ids", token, vocab_size)?;
        }
        for stop in &self.stop {
            check("stop", "an empty string", !stop.is_empty(), "not empty")?;
            let (len, allowed) = (stop.len(), format_args!("at most {MAX_STOP_BYTES} bytes long"));
            check("stop", format_args!("a string of {len} bytes"), len <= MAX_STOP_BYTES, allowed)?;
        }
        for (field, num_alternatives) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            let num_alternatives = num_alternatives.unwrap_or(0);
            check(field, num_alternatives, num_alternatives <= MAX_LOGPROBS, format_args!("at most {MAX_LOGPROBS}"))?;
        }
        Ok(())
    }
}

fn check(field: &'static str, value: impl Display, is_allowed: bool, allowed: impl Display) -> Result<(), AdmitError> {
    if is_allowed {
        return Ok(());
    }
    Err(AdmitError::InvalidParameter { field, value: value.to_string(), allowed: allowed.to_string() })
}

fn check_token(field: &'static str, token: TokenId, vocab_size: usize) -> Result<(), AdmitError> {
    let allowed = format_args!("below the vocabulary size {vocab_size}");
    check(field, format_args!("token {}", token.0), (token.0 as usize) < vocab_size, allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The name of the field that `change` makes invalid for a vocabulary of 10.
    fn refused_field(change: impl FnOnce(&mut SamplingParams)) -> &'static str {
        let mut params = SamplingParams::default();
        change(&mut params);
        match params.validate(10) {
            Err(AdmitError::InvalidParameter { field, .. }) => field,
            other => panic!("{other:?} for {params:?}"),
        }
    }

    #[test]
    fn each_field_is_held_to_its_range_and_named() {
        assert_eq!(refused_field(|p| p.max_tokens = Some(0)), "max_tokens");
        assert_eq!(refused_field(|p| (p.max_tokens, p.min_tokens) = (Some(3), 4)), "min_tokens");
        for bad in [-0.1, f64::INFINITY, f64::NAN] {
            assert_eq!(refused_field(|p| p.temperature = bad), "temperature");
        }
        for bad in [0.0, -0.5, 1.01, f64::NAN] {
            assert_eq!(refused_field(|p| p.top_p = bad), "top_p");
        }
        for bad in [-0.1, 1.1, f64::NAN] {
            assert_eq!(refused_field(|p| p.min_p = bad), "min_p");
        }
        for bad in [0.0, -1.0, f64::INFINITY, f64::NAN] {
            assert_eq!(refused_field(|p| p.repetition_penalty = bad), "repetition_penalty");
        }
        for bad in [-2.1, 2.1, f64::NAN] {
            assert_eq!(refused_field(|p| p.presence_penalty = bad), "presence_penalty");
            assert_eq!(refused_field(|p| p.frequency_penalty = bad), "frequency_penalty");
        }
        for (token, bias) in [(10, 0.0), (3, 100.5), (3, f64::NAN)] {
            assert_eq!(refused_field(|p| _ = p.logit_bias.insert(TokenId(token), bias)), "logit_bias");
        }
        assert_eq!(refused_field(|p| p.stop_token_ids = vec![TokenId(9), TokenId(10)]), "stop_token_ids");
        assert_eq!(refused_field(|p| p.stop = vec!["a".into(), String::new()]), "stop");
        assert_eq!(refused_field(|p| p.stop = vec!["a".repeat(MAX_STOP_BYTES + 1)]), "stop");
        assert_eq!(refused_field(|p| p.stop = vec!["a".into(); MAX_LIST_LEN + 1]), "stop");
        assert_eq!(refused_field(|p| p.stop_token_ids = vec![TokenId(9); MAX_LIST_LEN + 1]), "stop_token_ids");
        assert_eq!(refused_field(|p| p.logprobs = Some(129)), "logprobs");
        assert_eq!(refused_field(|p| p.prompt_logprobs = Some(129)), "prompt_logprobs");
    }

    #[test]
    fn a_file_is_greedy_unless_it_says_do_sample() {
        for (do_sample, temperature, expected) in [
            (None, None, 0.0),
            (None, Some(0.6), 0.0),
            (Some(false), Some(0.6), 0.0),
            (Some(true), Some(0.6), 0.6),
            (Some(true), None, 1.0),
        ] {
            let defaults = GenerationDefaults { do_sample, temperature, ..GenerationDefaults::default() };
            let params = SamplingParams::from(&defaults);
            assert_eq!(params, SamplingParams { temperature: expected, ..SamplingParams::default() });
        }
    }

    #[test]
    fn the_ends_of_the_ranges_are_allowed() {
        assert_eq!(SamplingParams::default().validate(10), Ok(()));
        let params = SamplingParams {
            max_tokens: Some(4),
            min_tokens: 4,
            top_k: Some(0),
            min_p: 1.0,
            presence_penalty: -2.0,
            frequency_penalty: 2.0,
            logit_bias: [(TokenId(9), -100.0), (TokenId(0), 100.0)].into(),
            stop_token_ids: vec![TokenId(9); MAX_LIST_LEN],
            stop: vec!["a".repeat(MAX_STOP_BYTES); MAX_LIST_LEN],
            logprobs: Some(128),
            prompt_logprobs: Some(0),
            ..SamplingParams::default()
        };
        assert_eq!(params.validate(10), Ok(()));
    }

    #[test]
    fn a_refusal_says_field_value_and_range() {
        let params = SamplingParams { top_p: 1.5, ..SamplingParams::default() };
        let message = params.validate(10).unwrap_err().to_string();
        assert_eq!(message, "top_p: 1.5 is not allowed, must be above 0 and at most 1");
    }
}
