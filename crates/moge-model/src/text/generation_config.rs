//! `generation_config.json`: the sampling parameters that the model's authors recommend.

use std::path::Path;

use serde_json::{Map, Value};
use thiserror::Error;

use crate::TokenId;
use crate::checkpoint::files;

/// The fields of `generation_config.json`; all absent without such a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Sample instead of taking the most probable token; absent means false.
    pub do_sample: Option<bool>,
    /// Divides the logits; at least 0.
    pub temperature: Option<f64>,
    /// Number of most probable tokens to keep.
    pub top_k: Option<usize>,
    /// Probability of the tokens that are kept; in (0, 1].
    pub top_p: Option<f64>,
    /// Least probability kept, as a share of the greatest; in [0, 1].
    pub min_p: Option<f64>,
    /// Divides or multiplies the logits of tokens that have occurred; above 0.
    pub repetition_penalty: Option<f64>,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<TokenId>,
}

/// Why a `generation_config.json` is refused.
#[derive(Debug, Error)]
pub enum GenerationDefaultsError {
    /// The file cannot be read.
    #[error("{file}: {source}")]
    Read {
        /// The file's path.
        file: String,
        /// The I/O error.
        source: std::io::Error,
    },
    /// The file is not a JSON object.
    #[error("{file}: not a JSON object: {source}")]
    NotJson {
        /// The file's path.
        file: String,
        /// The parser's error.
        source: serde_json::Error,
    },
    /// A field has a value that is not allowed.
    #[error("{file}: {field}: {value} is not allowed; allowed: {allowed}")]
    Field {
        /// The file's path.
        file: String,
        /// The field's name.
        field: &'static str,
        /// The value found.
        value: String,
        /// The values allowed.
        allowed: &'static str,
    },
}

impl GenerationDefaults {
    /// Read `generation_config.json` in `dir`.
    ///
    /// # Errors
    /// If the file is there but is not a JSON object, or a field has a value that is not allowed.
    pub fn load(dir: &Path) -> Result<Self, GenerationDefaultsError> {
        let path = dir.join("generation_config.json");
        let file = path.display().to_string();
        let bytes = match files::read_file_if_there(&path) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(Self::default()),
            Err(source) => return Err(GenerationDefaultsError::Read { file, source }),
        };
        Self::from_json(&bytes, &file)
    }

    fn from_json(bytes: &[u8], file: &str) -> Result<Self, GenerationDefaultsError> {
        let object = serde_json::from_slice(bytes)
            .map_err(|source| GenerationDefaultsError::NotJson { file: file.to_owned(), source })?;
        let fields = Fields { file, object };
        Ok(Self {
            do_sample: fields.get("do_sample", "true or false", Value::as_bool)?,
            temperature: fields.number("temperature", "a number from 0 on", |x| x >= 0.0)?,
            top_k: fields.get("top_k", "a whole number from 0 on", |v| usize::try_from(v.as_u64()?).ok())?,
            top_p: fields.number("top_p", "a number in (0, 1]", |x| x > 0.0 && x <= 1.0)?,
            min_p: fields.number("min_p", "a number in [0, 1]", |x| (0.0..=1.0).contains(&x))?,
            repetition_penalty: fields.number("repetition_penalty", "a number above 0", |x| x > 0.0)?,
            eos_token_ids: fields.get("eos_token_id", "a token id or a list of them", token_ids)?.unwrap_or_default(),
        })
    }

    /// True if the most probable token is to be taken each time; `temperature`, `top_k`, `top_p` and `min_p` then have
    /// no effect.
    pub fn is_greedy(&self) -> bool {
        self.do_sample != Some(true)
    }
}

/// The file's object and its name for messages.
struct Fields<'a> {
    file: &'a str,
    object: Map<String, Value>,
}

impl Fields<'_> {
    /// A field that is absent or null is not stated; one that `parse` refuses is an error.
    fn get<T>(
        &self,
        field: &'static str,
        allowed: &'static str,
        parse: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, GenerationDefaultsError> {
        match self.object.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => parse(value).map(Some).ok_or_else(|| GenerationDefaultsError::Field {
                file: self.file.to_owned(),
                field,
                value: value.to_string(),
                allowed,
            }),
        }
    }

    fn number(
        &self,
        field: &'static str,
        allowed: &'static str,
        is_allowed: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, GenerationDefaultsError> {
        self.get(field, allowed, |value| value.as_f64().filter(|&number| is_allowed(number)))
    }
}

fn token_ids(value: &Value) -> Option<Vec<TokenId>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).map(TokenId);
    match value {
        Value::Array(values) => values.iter().map(id).collect(),
        value => Some(vec![id(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<GenerationDefaults, GenerationDefaultsError> {
        GenerationDefaults::from_json(json.as_bytes(), "generation_config.json")
    }

    #[test]
    fn a_missing_file_and_a_file_without_do_sample_mean_greedy() {
        let dir = tempfile::tempdir().unwrap();
        assert!(GenerationDefaults::load(dir.path()).unwrap().is_greedy());
        assert!(parse(r#"{"temperature": 0.6}"#).unwrap().is_greedy());
        assert!(!parse(r#"{"do_sample": true}"#).unwrap().is_greedy());
    }

    #[test]
    fn all_fields_are_read_and_null_counts_as_absent() {
        let json = r#"{"do_sample": true, "temperature": 0.6, "top_k": 50, "top_p": 0.95, "min_p": null,
            "repetition_penalty": 1.05, "eos_token_id": [7, 9], "transformers_version": "4.51.0"}"#;
        let expected = GenerationDefaults {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_k: Some(50),
            top_p: Some(0.95),
            min_p: None,
            repetition_penalty: Some(1.05),
            eos_token_ids: vec![TokenId(7), TokenId(9)],
        };
        assert_eq!(parse(json).unwrap(), expected);
        assert_eq!(parse(r#"{"eos_token_id": 3}"#).unwrap().eos_token_ids, [TokenId(3)]);
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        for (json, message) in [
            (r#"{"temperature": -1}"#, "temperature: -1 is not allowed; allowed: a number from 0 on"),
            (r#"{"top_p": 0}"#, "top_p: 0 is not allowed; allowed: a number in (0, 1]"),
            (r#"{"top_k": -1}"#, "top_k: -1 is not allowed; allowed: a whole number from 0 on"),
            (r#"{"min_p": "x"}"#, "min_p: \"x\" is not allowed; allowed: a number in [0, 1]"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty: 0 is not allowed; allowed: a number above 0"),
            (r#"{"eos_token_id": [1, 4294967296]}"#, "eos_token_id: [1,4294967296] is not allowed"),
            ("[]", "not a JSON object"),
        ] {
            let error = parse(json).unwrap_err().to_string();
            assert!(error.starts_with("generation_config.json: ") && error.contains(message), "{error}");
        }
    }
}
