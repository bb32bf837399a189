//! The fields of a `config.json`, with readers whose errors name file, field, value and what is allowed.

use serde_json::{Map, Value};

use crate::network::config::ConfigError;

/// No size in a config may exceed this; keeps every product of three sizes inside 64 bits.
pub(crate) const MAX_SIZE: u64 = 1 << 21;

/// The fields as they lie in the file.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub(crate) file: &'a str,
    pub(crate) fields: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The field's value; a null counts as absent.
    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// A whole number in `1..=MAX_SIZE` that must be there.
    pub(crate) fn size(&self, field: &str) -> Result<usize, ConfigError> {
        self.optional_size(field)?.ok_or_else(|| self.bad(field, "missing".to_owned()))
    }

    /// A whole number in `1..=MAX_SIZE`.
    pub(crate) fn optional_size(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64() {
            Some(size @ 1..=MAX_SIZE) => Ok(Some(size as usize)),
            _ => Err(self.bad(field, format!("{} is not a whole number in 1..={MAX_SIZE}", shortened(value)))),
        }
    }

    /// A number above 0, also as an f32.
    pub(crate) fn positive(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x > 0.0 && (x as f32).is_finite() && x as f32 > 0.0 => Ok(Some(x)),
            _ => Err(self.bad(field, format!("{} is not a number above 0", shortened(value)))),
        }
    }

    /// True or false.
    pub(crate) fn flag(&self, field: &str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let flag = value.as_bool();
        flag.map(Some).ok_or_else(|| self.bad(field, format!("{} is not true or false", shortened(value))))
    }

    /// The error that `field` is wrong.
    pub(crate) fn bad(&self, field: &str, problem: String) -> ConfigError {
        ConfigError::Field { file: self.file.to_owned(), field: field.to_owned(), problem }
    }
}

/// What kind of JSON value it is, for an error.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The value as JSON, shortened where it is long, for an error.
pub(crate) fn shortened(value: &Value) -> String {
    const MAX_CHARS: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
