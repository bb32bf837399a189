//! Sampling fields of requests, and their conversion to the engine's parameters.

use std::collections::BTreeMap;

use moge_engine::SamplingParams;
use moge_model::{GenerationDefaults, TokenId};
use serde::Deserialize;
use serde_json::Value;

use crate::error::ApiError;
use crate::structured::StructuredFields;

/// Fields that chat, completions and responses share; names as OpenAI and vLLM have them.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SamplingFields {
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    max_output_tokens: Option<usize>,
    min_tokens: Option<usize>,
    temperature: Option<f64>,
    top_k: Option<i64>,
    top_p: Option<f64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    logit_bias: Option<BTreeMap<String, f64>>,
    seed: Option<i64>,
    stop: Option<OneOrMany<String>>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<bool>,
    n: Option<usize>,
    best_of: Option<usize>,
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    pub(crate) return_expert_ids: Option<bool>,
}

/// Fields that restrict the form of an answer.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct FormatFields {
    pub(crate) response_format: Option<Value>,
    guided_json: Option<Value>,
    guided_regex: Option<String>,
    guided_grammar: Option<String>,
    guided_choice: Option<Vec<String>>,
}

impl FormatFields {
    /// The field that says what the answer must look like, if one does.
    pub(crate) fn field(&self) -> Option<&'static str> {
        let is_free = |format: &Value| format.is_null() || format["type"] == "text";
        let fields = [
            ("response_format", self.response_format.as_ref().is_some_and(|format| !is_free(format))),
            ("guided_json", self.guided_json.as_ref().is_some_and(|schema| !schema.is_null())),
            ("guided_regex", self.guided_regex.is_some()),
            ("guided_grammar", self.guided_grammar.is_some()),
            ("guided_choice", self.guided_choice.is_some()),
        ];
        fields.into_iter().find_map(|(field, is_given)| is_given.then_some(field))
    }

    /// The same, to make a grammar of.
    pub(crate) fn structured(&self) -> StructuredFields<'_> {
        StructuredFields {
            response_format: self.response_format.as_ref(),
            guided_json: self.guided_json.as_ref(),
            guided_regex: self.guided_regex.as_deref(),
            guided_grammar: self.guided_grammar.as_deref(),
            guided_choice: self.guided_choice.as_deref(),
        }
    }
}

/// One value, or a list of them.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany<T> {
    /// One.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub(crate) fn into_vec(self) -> Vec<T> {
        match self {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

/// Options of a stream.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct StreamOptions {
    include_usage: Option<bool>,
}

impl SamplingFields {
    /// Sampling parameters; `defaults` fill what the request leaves open, and `random_seed` a seed that it does not give.
    /// `max_tokens` and log-probabilities are each endpoint's own.
    ///
    /// # Errors
    /// If a value cannot be one; ranges are the engine's to check.
    pub(crate) fn params(&self, defaults: &GenerationDefaults, random_seed: u64) -> Result<SamplingParams, ApiError> {
        let defaults = SamplingParams::from(defaults);
        let stop_token_ids = self.stop_token_ids.as_deref().unwrap_or_default();
        let top_k = match self.top_k {
            None => defaults.top_k,
            // vLLM's way to say all.
            Some(-1) => None,
            Some(k) => Some(usize::try_from(k).map_err(|_| {
                ApiError::invalid("top_k", format!("{k} is not allowed, must be at least 0, or -1 for all"))
            })?),
        };
        Ok(SamplingParams {
            max_tokens: None,
            min_tokens: self.min_tokens.unwrap_or(0),
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k,
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            logit_bias: self.logit_bias()?,
            seed: self.seed.map_or(random_seed, i64::cast_unsigned),
            stop: self.stop.clone().map_or_else(Vec::new, OneOrMany::into_vec),
            stop_token_ids: stop_token_ids.iter().copied().map(TokenId).collect(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            logprobs: None,
            prompt_logprobs: None,
            return_expert_ids: self.return_expert_ids.unwrap_or(false),
        })
    }

    /// The most tokens of an answer, by the name of any endpoint; later names win.
    pub(crate) fn max_tokens(&self) -> Option<usize> {
        self.max_output_tokens.or(self.max_completion_tokens).or(self.max_tokens)
    }

    /// ResponseStream to each of `num_prompts` prompts, with at most `max_answers` in all.
    ///
    /// # Errors
    /// If that is 0 or too many, or `best_of` asks for more.
    pub(crate) fn num_answers(&self, num_prompts: usize, max_answers: usize) -> Result<usize, ApiError> {
        let n = self.n.unwrap_or(1);
        if num_prompts > max_answers {
            let message = format!("{num_prompts} of them are not allowed, must be at most {max_answers}");
            return Err(ApiError::invalid("prompt", message));
        }
        if n == 0 || n.saturating_mul(num_prompts) > max_answers {
            let allowed = format!("from 1 to {}", max_answers / num_prompts.max(1));
            let message = format!("{n} for {num_prompts} prompts is not allowed, must be {allowed}");
            return Err(ApiError::invalid("n", message));
        }
        if self.best_of.is_some_and(|best_of| best_of != n) {
            return Err(ApiError::invalid("best_of", "is not supported; allowed: the value of n"));
        }
        Ok(n)
    }

    /// True if the answer is to come in parts.
    pub(crate) fn is_streamed(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// True if the last part is to say how many tokens there were.
    pub(crate) fn wants_usage(&self) -> bool {
        self.stream_options.and_then(|options| options.include_usage).unwrap_or(false)
    }

    fn logit_bias(&self) -> Result<BTreeMap<TokenId, f64>, ApiError> {
        let entries = self.logit_bias.iter().flatten();
        let parsed = entries.map(|(id, &bias)| {
            let id = id.parse().map_err(|_| {
                ApiError::invalid("logit_bias", format!("{id:?} is not allowed, keys must be token ids"))
            })?;
            Ok((TokenId(id), bias))
        });
        parsed.collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn params(fields: serde_json::Value) -> Result<SamplingParams, ApiError> {
        let fields: SamplingFields = serde_json::from_value(fields).unwrap();
        let defaults = GenerationDefaults {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_k: Some(50),
            ..GenerationDefaults::default()
        };
        fields.params(&defaults, 17)
    }

    #[test]
    fn a_silent_request_means_what_the_file_says_as_on_the_command_line() {
        for do_sample in [None, Some(false), Some(true)] {
            for temperature in [None, Some(0.6)] {
                let defaults = GenerationDefaults { do_sample, temperature, top_k: Some(50), ..Default::default() };
                let params = SamplingFields::default().params(&defaults, 0).unwrap();
                assert_eq!(params, SamplingParams::from(&defaults));
            }
        }
    }

    #[test]
    fn the_checkpoint_fills_what_a_request_leaves_open() {
        let open = params(json!({})).unwrap();
        assert_eq!((open.temperature, open.top_k, open.top_p, open.seed), (0.6, Some(50), 1.0, 17));
        let given = params(json!({
            "temperature": 0.0, "top_k": -1, "top_p": 0.9, "seed": -3, "stop": "END", "logit_bias": {"7": -1.5},
            "stop_token_ids": [3, 5], "min_tokens": 2, "ignore_eos": true
        }));
        let given = given.unwrap();
        assert_eq!((given.temperature, given.top_k, given.top_p, given.seed), (0.0, None, 0.9, u64::MAX - 2));
        assert_eq!((given.stop, given.logit_bias), (vec!["END".to_owned()], [(TokenId(7), -1.5)].into()));
        assert_eq!((given.stop_token_ids, given.min_tokens), (vec![TokenId(3), TokenId(5)], 2));
        assert!(given.ignore_eos);
    }

    #[test]
    fn values_that_cannot_be_are_refused_by_name() {
        let message = |fields| params(fields).unwrap_err().to_string();
        assert_eq!(message(json!({"top_k": -2})), "top_k: -2 is not allowed, must be at least 0, or -1 for all");
        assert_eq!(
            message(json!({"logit_bias": {"x": 1}})),
            "logit_bias: \"x\" is not allowed, keys must be token ids"
        );
    }

    #[test]
    fn the_number_of_answers_is_bounded_over_all_prompts() {
        let fields = |n| SamplingFields { n, ..SamplingFields::default() };
        assert_eq!(fields(None).num_answers(5, 8).unwrap(), 1);
        assert_eq!(fields(Some(4)).num_answers(2, 8).unwrap(), 4);
        let message = fields(Some(3)).num_answers(3, 8).unwrap_err().to_string();
        assert_eq!(message, "n: 3 for 3 prompts is not allowed, must be from 1 to 2");
        assert!(fields(Some(0)).num_answers(1, 8).is_err());
        let message = fields(None).num_answers(9, 8).unwrap_err().to_string();
        assert_eq!(message, "prompt: 9 of them are not allowed, must be at most 8");
    }

    #[test]
    fn the_field_that_forms_the_answer_is_known() {
        let field = |fields| serde_json::from_value::<FormatFields>(fields).unwrap().field();
        assert_eq!(field(json!({"response_format": {"type": "text"}, "guided_regex": "a+"})), Some("guided_regex"));
        assert_eq!(field(json!({"response_format": {"type": "json_object"}})), Some("response_format"));
        assert_eq!(field(json!({"guided_json": null})), None);
    }
}
