//! Errors of the fields that restrict an answer.

use serde_json::Value;
use thiserror::Error;

/// A part of a request that cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum StructuredError {
    /// Two fields restrict the same answer.
    #[error("{first}, {second}: at most one of the two is allowed")]
    Conflict {
        /// One field.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// A field has a value that it may not have.
    #[error("{field}: {value} is not allowed; allowed: {allowed}")]
    Field {
        /// The field's path in the request, as `tools[2].function.name`.
        field: String,
        /// The value as JSON, shortened.
        value: String,
        /// The allowed values.
        allowed: String,
    },
}

impl StructuredError {
    /// The field at fault, as errors name it in `param`.
    pub(crate) fn field(&self) -> &str {
        match self {
            StructuredError::Conflict { second, .. } => second,
            StructuredError::Field { field, .. } => field,
        }
    }

    /// `value` is `Null` if the field is missing.
    pub(super) fn wrong(field: impl Into<String>, value: &Value, allowed: impl Into<String>) -> StructuredError {
        const MAX_CHARS: usize = 100;
        let mut text = value.to_string();
        if let Some((end, _)) = text.char_indices().nth(MAX_CHARS) {
            text.truncate(end);
            text.push_str("...");
        }
        StructuredError::Field { field: field.into(), value: text, allowed: allowed.into() }
    }
}
