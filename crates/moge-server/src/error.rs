//! Errors of requests, and the only table of their HTTP statuses.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use moge_engine::{AdmitError, GrammarError};
use moge_model::{ChatTemplateError, TokenizerError};
use serde_json::{Value, json};
use thiserror::Error;

use crate::structured::StructuredError;

/// When a client may try again after the queue was full.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Error of a request. Clients get it as OpenAI's error object.
#[derive(Debug, Error)]
pub(crate) enum ApiError {
    /// A value is not allowed.
    #[error("{param}: {message}")]
    Invalid {
        /// The field's path in the body.
        param: String,
        /// The value found and the allowed values.
        message: String,
    },
    /// The body is not valid JSON.
    #[error("the body is not JSON: {0}")]
    NotJson(serde_json::Error),
    /// The body is JSON of another shape than the endpoint takes.
    #[error("{param}: {message}")]
    WrongShape {
        /// The field's path in the body.
        param: String,
        /// The value found and the allowed values.
        message: String,
    },
    /// The prompt leaves no room for an answer.
    #[error("{param}: {num_tokens} tokens, but the model's maximum context length is {max_model_len}, answer included")]
    PromptTooLong {
        /// The field that the prompt came in.
        param: &'static str,
        /// Tokens of the prompt.
        num_tokens: usize,
        /// Tokens that prompt and answer may have together.
        max_model_len: usize,
    },
    /// A missing or wrong API key.
    #[error("the header `Authorization: Bearer KEY` is missing, or its key is not one that this server knows")]
    Unauthorized,
    /// The model is unknown.
    #[error("model: {0:?} is not served here; GET /v1/models lists what is")]
    UnknownModel(String),
    /// The path is unknown.
    #[error("there is nothing at {0}")]
    NotFound(String),
    /// The path wants another method.
    #[error("this path does not take {0}")]
    MethodNotAllowed(String),
    /// The requested form of the answer allows no further token.
    #[error("the answer cannot go on in the form that was asked for: no token of the model fits")]
    DeadEnd,
    /// The body did not arrive in time.
    #[error("the body did not arrive within {0:?}")]
    BodyTooSlow(Duration),
    /// The body is longer than allowed.
    #[error("the body is longer than {0} bytes")]
    BodyTooLarge(usize),
    /// The body is not declared to be JSON.
    #[error("the header `Content-Type: application/json` is missing")]
    NotDeclaredJson,
    /// Too many requests wait.
    #[error("too many requests: {0}")]
    Busy(String),
    /// The request took longer than allowed.
    #[error("the request took longer than {} s", .0.as_secs())]
    Deadline(Duration),
    /// The server does not answer now.
    #[error("{0}")]
    Unavailable(&'static str),
    /// The model or the server failed.
    #[error("{0}")]
    Internal(String),
}

impl ApiError {
    /// A value that is not allowed in the field `param`.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError::Invalid { param: param.into(), message: message.into() }
    }

    /// The same error, where the endpoint calls the field `there` by the name `here`.
    pub(crate) fn renamed(self, there: &str, here: &'static str) -> ApiError {
        match self {
            ApiError::Invalid { param, message } if param == there => ApiError::invalid(here, message),
            ApiError::PromptTooLong { param, num_tokens, max_model_len } if param == there => {
                ApiError::PromptTooLong { param: here, num_tokens, max_model_len }
            }
            other => other,
        }
    }

    /// The status of the answer.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            ApiError::Invalid { .. } | ApiError::NotJson(_) | ApiError::PromptTooLong { .. } | ApiError::DeadEnd => {
                StatusCode::BAD_REQUEST
            }
            ApiError::Unauthorized => StatusCode::UNAUTHORIZED,
            ApiError::UnknownModel(_) | ApiError::NotFound(_) => StatusCode::NOT_FOUND,
            ApiError::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            ApiError::BodyTooSlow(_) => StatusCode::REQUEST_TIMEOUT,
            ApiError::BodyTooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            ApiError::NotDeclaredJson => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ApiError::WrongShape { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            ApiError::Busy(_) => StatusCode::TOO_MANY_REQUESTS,
            ApiError::Deadline(_) => StatusCode::GATEWAY_TIMEOUT,
            ApiError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            ApiError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// OpenAI's `type` and `code`.
    fn kind(&self) -> (&'static str, Option<&'static str>) {
        match self {
            ApiError::Unauthorized => ("authentication_error", Some("invalid_api_key")),
            ApiError::UnknownModel(_) => ("invalid_request_error", Some("model_not_found")),
            ApiError::PromptTooLong { .. } => ("invalid_request_error", Some("context_length_exceeded")),
            ApiError::Busy(_) => ("rate_limit_error", Some("rate_limit_exceeded")),
            ApiError::Deadline(_) => ("timeout_error", Some("timeout")),
            ApiError::Unavailable(_) => ("server_error", Some("unavailable")),
            ApiError::Internal(_) => ("server_error", None),
            _ => ("invalid_request_error", None),
        }
    }

    /// `{"error": {"message", "type", "param", "code"}}`.
    pub(crate) fn body(&self) -> Value {
        let param = match self {
            ApiError::Invalid { param, .. } | ApiError::WrongShape { param, .. } => Some(param.as_str()),
            ApiError::PromptTooLong { param, .. } => Some(*param),
            ApiError::UnknownModel(_) => Some("model"),
            _ => None,
        };
        let (kind, code) = self.kind();
        json!({ "error": { "message": shortened(self.to_string()), "type": kind, "param": param, "code": code } })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status();
        // Unavailability and overload are not failures of the server, and may be frequent.
        if status.is_server_error() && !matches!(self, ApiError::Unavailable(_)) {
            // Quoted, as it may hold what a client wrote.
            tracing::warn!("{status}: {:?}", shortened(self.to_string()));
        }
        let mut response = (status, axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        if matches!(self, ApiError::Busy(_) | ApiError::Unavailable(_)) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER.as_secs()));
        }
        if matches!(self, ApiError::Unauthorized) {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<AdmitError> for ApiError {
    fn from(error: AdmitError) -> ApiError {
        let message = error.to_string();
        match error {
            AdmitError::QueueFull { .. } => ApiError::Busy(message),
            AdmitError::PromptTooLong { num_tokens, max_tokens } => {
                ApiError::PromptTooLong { param: "prompt", num_tokens, max_model_len: max_tokens + 1 }
            }
            AdmitError::EmptyPrompt | AdmitError::TokenOutOfVocabulary { .. } => {
                ApiError::invalid("prompt", strip_field(&message))
            }
            AdmitError::NeverFits { .. } => ApiError::invalid("max_tokens", strip_field(&message)),
            AdmitError::InvalidParameter { field, .. } => ApiError::invalid(field, strip_field(&message)),
        }
    }
}

/// The engine's messages begin with the field, as ours do.
fn strip_field(message: &str) -> String {
    message.split_once(": ").map_or(message, |(_, rest)| rest).to_owned()
}

impl From<ChatTemplateError> for ApiError {
    fn from(error: ChatTemplateError) -> ApiError {
        match error {
            ChatTemplateError::Message { index, problem } => ApiError::invalid(format!("messages[{index}]"), problem),
            ChatTemplateError::Raised { .. }
            | ChatTemplateError::Render { .. }
            | ChatTemplateError::TooMuchWork { .. }
            | ChatTemplateError::TooSlow { .. } => ApiError::invalid("messages", error.to_string()),
            other => ApiError::Internal(other.to_string()),
        }
    }
}

impl From<StructuredError> for ApiError {
    fn from(error: StructuredError) -> ApiError {
        ApiError::invalid(error.field(), strip_field(&error.to_string()))
    }
}

impl ApiError {
    /// Why the grammar that `field` asks for cannot be followed.
    pub(crate) fn grammar(field: &'static str, error: &GrammarError) -> ApiError {
        let message = error.to_string();
        match error {
            GrammarError::Busy => ApiError::Busy(message),
            GrammarError::Thread { .. } | GrammarError::Vocabulary { .. } => ApiError::Internal(message),
            GrammarError::TooLong { .. } | GrammarError::Invalid { .. } | GrammarError::TooSlow => {
                ApiError::invalid(field, message)
            }
        }
    }
}

/// A message that quotes what a client sent, without most of it if that was long.
fn shortened(mut message: String) -> String {
    const MAX_CHARS: usize = 1000;
    if let Some((end, _)) = message.char_indices().nth(MAX_CHARS) {
        message.truncate(end);
        message.push_str("...");
    }
    message
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> ApiError {
        ApiError::invalid("prompt", error.to_string())
    }
}
