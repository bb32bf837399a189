//! A request's body: read within bounds, parsed, and asked for what it holds beyond what we know.

use std::collections::BTreeSet;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::header;
use futures_util::StreamExt;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::app::AppState;
use crate::blocking::blocking;
use crate::error::ApiError;

/// Longest time for a body to arrive.
const MAX_BODY_TIME: Duration = Duration::from_secs(30);

/// Longer bodies are parsed on a blocking thread.
const MAX_QUICK_BYTES: usize = 64 << 10;

/// Fields that OpenAI's API has and that change nothing here.
const WITHOUT_EFFECT: [&str; 12] = [
    "user",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "verbosity",
    "max_tool_calls",
    "stream_options.include_obfuscation",
    "text.verbosity",
    "reasoning.summary",
    "reasoning.generate_summary",
];

/// A field, whether a value asks for what happens anyway, and such values in words.
type NotHonoured = (&'static str, fn(&Value) -> bool, &'static str);

/// Fields that we know and cannot honour, unless they ask for what happens anyway.
const NOT_HONOURED: &[NotHonoured] = &[
    ("audio", Value::is_null, "null, as models here write text only"),
    ("modalities", |value| *value == serde_json::json!(["text"]), "[\"text\"]"),
    ("functions", Value::is_null, "null; `tools` is its successor"),
    ("function_call", Value::is_null, "null; `tool_choice` is its successor"),
    ("prediction", Value::is_null, "null"),
    ("web_search_options", Value::is_null, "null"),
    ("suffix", |value| matches!(value, Value::Null) || value == "", "null"),
    ("store", |value| *value == Value::Bool(false), "false, as nothing is stored"),
    ("previous_response_id", Value::is_null, "null, as nothing is stored; send the whole conversation as `input`"),
    ("conversation", Value::is_null, "null, as nothing is stored"),
    ("context_management", Value::is_null, "null"),
    ("truncation", |value| value == "disabled", "\"disabled\""),
    ("background", |value| *value == Value::Bool(false), "false"),
    ("skip_special_tokens", |value| *value == Value::Bool(false), "false: special tokens stand in the text"),
    ("use_beam_search", |value| *value == Value::Bool(false), "false"),
    ("truncate_prompt_tokens", Value::is_null, "null"),
    ("structured_outputs", Value::is_null, "null; `response_format` and the `guided_` fields do the same"),
    ("prompt_logprobs", Value::is_null, "null; completions have `echo` with `logprobs`"),
    ("allowed_token_ids", Value::is_null, "null; `guided_choice` and `guided_regex` restrict an answer"),
    ("bad_words", |value| value.as_array().is_some_and(Vec::is_empty), "an empty list"),
    ("include_stop_str_in_output", |value| *value == Value::Bool(false), "false"),
    ("continue_final_message", |value| *value == Value::Bool(false), "false"),
    ("chat_template", Value::is_null, "null: the template is the model's own"),
    ("documents", Value::is_null, "null"),
];

/// A body of JSON as the types that the endpoint takes; each has some of its fields.
#[derive(Debug)]
pub(crate) struct Json<A, B = Nothing, C = Nothing>(pub(crate) A, pub(crate) B, pub(crate) C);

/// No field.
#[derive(Debug, Deserialize)]
pub(crate) struct Nothing {}

impl<A, B, C> FromRequest<AppState> for Json<A, B, C>
where
    A: DeserializeOwned + Send + 'static,
    B: DeserializeOwned + Send + 'static,
    C: DeserializeOwned + Send + 'static,
{
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        // A page of another origin can send any other type without asking.
        let is_json = content_type.is_some_and(|value| {
            value.split(';').next().is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"))
        });
        if !is_json {
            return Err(ApiError::NotDeclaredJson);
        }
        let read = read_all(request.into_body(), state.config.max_body_bytes);
        let bytes =
            tokio::time::timeout(MAX_BODY_TIME, read).await.map_err(|_| ApiError::BodyTooSlow(MAX_BODY_TIME))??;
        if bytes.len() <= MAX_QUICK_BYTES {
            return parse(&bytes);
        }
        blocking(move || parse(&bytes)).await?
    }
}

async fn read_all(body: Body, max_bytes: usize) -> Result<Vec<u8>, ApiError> {
    let mut stream = body.into_data_stream();
    let mut all = Vec::new();
    while let Some(chunk) = stream.next().await {
        let chunk: Bytes = chunk.map_err(|error| ApiError::invalid("body", error.to_string()))?;
        if all.len() + chunk.len() > max_bytes {
            return Err(ApiError::BodyTooLarge(max_bytes));
        }
        all.extend_from_slice(&chunk);
    }
    Ok(all)
}

/// Parse `bytes`. Unknown fields are named in the log; known fields that are not supported are refused.
pub(crate) fn parse<A, B, C>(bytes: &[u8]) -> Result<Json<A, B, C>, ApiError>
where
    A: DeserializeOwned,
    B: DeserializeOwned,
    C: DeserializeOwned,
{
    let mut value: Value = serde_json::from_slice(bytes).map_err(ApiError::NotJson)?;
    if let Value::Object(fields) = &mut value {
        for &(field, is_allowed, allowed) in NOT_HONOURED {
            if let Some(value) = fields.shift_remove(field)
                && !is_allowed(&value)
                && !value.is_null()
            {
                return Err(ApiError::invalid(
                    field,
                    format!("{} is not supported; allowed: {allowed}", brief(&value)),
                ));
            }
        }
    }
    let (a, unknown_to_a) = parse_part(&value)?;
    let (b, unknown_to_b) = parse_part(&value)?;
    let (c, unknown_to_c) = parse_part(&value)?;
    let mut unknown = &(&unknown_to_a & &unknown_to_b) & &unknown_to_c;
    unknown.retain(|path| !WITHOUT_EFFECT.contains(&path.as_str()));
    if !unknown.is_empty() {
        tracing::warn!("fields that are not known here: {}", names(&unknown));
    }
    Ok(Json(a, b, c))
}

/// The fields of one type, and the paths of all others.
fn parse_part<T: DeserializeOwned>(value: &Value) -> Result<(T, BTreeSet<String>), ApiError> {
    let mut unknown = BTreeSet::new();
    // A field that need not be there is a step of its own, written as a question mark.
    let mut note = |path: serde_ignored::Path<'_>| _ = unknown.insert(path.to_string().replace(".?", ""));
    let deserializer = serde_ignored::Deserializer::new(value, &mut note);
    let part = serde_path_to_error::deserialize(deserializer).map_err(|error| {
        let path = error.path().to_string();
        let param = if path == "." { "body".to_owned() } else { path };
        ApiError::WrongShape { param, message: error.into_inner().to_string() }
    })?;
    Ok((part, unknown))
}

/// Names for a line of the log: quoted, as a client has chosen them, and not more than a few.
fn names(fields: &BTreeSet<String>) -> String {
    const MAX_NAMES: usize = 16;
    let shown = fields.iter().take(MAX_NAMES).map(|name| brief(&Value::from(name.as_str())));
    let rest = fields.len().saturating_sub(MAX_NAMES);
    let rest = (rest > 0).then(|| format!("and {rest} more"));
    shown.chain(rest).collect::<Vec<_>>().join(", ")
}

/// A value as a message shows it: not more of it than one line.
fn brief(value: &Value) -> String {
    const MAX_CHARS: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    struct Outer {
        inner: Inner,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    struct Inner {
        number: u8,
    }

    fn message(bytes: &[u8]) -> String {
        parse::<Outer, Nothing, Nothing>(bytes).unwrap_err().to_string()
    }

    #[test]
    fn what_is_wrong_is_named_with_its_path() {
        assert_eq!(message(br#"{"inner": {"number": "x"}}"#), "inner.number: invalid type: string \"x\", expected u8");
        assert_eq!(message(br#"{"inner": {}}"#), "inner: missing field `number`");
        assert!(message(b"{").starts_with("the body is not JSON: EOF"));
        assert!(message(b"\xff").starts_with("the body is not JSON"));
        assert!(message("[".repeat(100_000).as_bytes()).contains("recursion limit"));
    }

    #[test]
    fn names_of_unknown_fields_cannot_forge_or_flood_the_log() {
        let fields = (0..19).map(|index| format!("{index:02}\n{}", "x".repeat(1000))).collect();
        let names = names(&fields);
        assert!(names.starts_with("\"00\\nxxx") && names.ends_with(", and 3 more"), "{names}");
        assert!(!names.contains('\n') && names.len() < 2000, "{names}");
    }

    #[test]
    fn fields_that_cannot_be_honoured_are_refused_unless_they_ask_for_nothing() {
        let body = |field: &str| format!(r#"{{"inner": {{"number": 7, "odd": 1}}, {field}}}"#);
        assert_eq!(
            parse::<Outer, Nothing, Nothing>(body(r#""user": "me", "store": null"#).as_bytes()).unwrap().0.inner.number,
            7
        );
        let refusal = message(body(r#""store": true"#).as_bytes());
        assert_eq!(refusal, "store: true is not supported; allowed: false, as nothing is stored");
    }
}
