//! Pieces of a grammar, so written that no text from a request ends one early.

use serde_json::{Value, json};

use super::error::StructuredError;

/// The most whitespace between two tokens of JSON. Without a bound a model that is held to JSON it did not expect may
/// write whitespace for ever.
const JSON_WHITESPACE: &str = r"[ \t\r\n]{1,64}";

/// A literal of exactly this text.
pub(super) fn string(text: &str) -> String {
    // The dialect's strings are JSON's, but may not have the delete character.
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// A value that follows a JSON schema, which must be an object.
pub(super) fn json_schema(schema: &Value) -> String {
    let mut schema = schema.clone();
    if let Value::Object(fields) = &mut schema {
        fields.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": JSON_WHITESPACE}));
    }
    format!("%json {schema}")
}

/// A text that a regular expression matches as a whole. Anchors at its ends say nothing more, and are taken off.
pub(super) fn regex(pattern: &str) -> Result<String, StructuredError> {
    let mut body = String::new();
    let mut chars = pattern.strip_prefix('^').unwrap_or(pattern).chars();
    while let Some(c) = chars.next() {
        match (c, chars.as_str()) {
            ('$', "") => {}
            // It would escape the delimiter that ends the expression.
            ('\\', "") => {
                let allowed = "a regular expression; this one ends inside an escape";
                return Err(StructuredError::wrong("guided_regex", &pattern.into(), allowed));
            }
            ('\\', _) => match chars.next() {
                // After a backslash the dialect takes no line break as it is.
                Some('\n') => body.push_str("\\n"),
                escaped => body.extend([c].into_iter().chain(escaped)),
            },
            ('/', _) => body.push_str("\\/"),
            _ => body.push(c),
        }
    }
    // Without a body the delimiters would begin a comment.
    Ok(if body.is_empty() { "\"\"".to_owned() } else { format!("/{body}/") })
}
