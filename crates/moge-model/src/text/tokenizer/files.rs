//! The small JSON files beside a tokenizer: names of special tokens, flags, ids.

use std::path::Path;

use serde_json::{Map, Value};

use super::error::{TokenizerError, field_error};
use crate::TokenId;
use crate::checkpoint::files;

/// Fields that name one special token each, as the files spell them.
const NAMED_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];

/// The fields of `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.
#[derive(Default)]
pub(crate) struct TokenizerFiles {
    /// Path of `tokenizer_config.json`, for messages.
    pub(crate) file: String,
    /// Field and text, in the order of [`NAMED_TOKENS`]; only fields that are present.
    pub(crate) named: Vec<(&'static str, String)>,
    /// All tokens that text is split at, with the id if a file states one.
    pub(crate) added: Vec<AddedToken>,
    /// `additional_special_tokens`, in the file's order.
    pub(crate) additional: Vec<String>,
    /// True if a prompt begins with the BOS token; `None` if not stated.
    pub(crate) add_bos_token: Option<bool>,
    /// True if a prompt ends with the EOS token.
    pub(crate) add_eos_token: bool,
    /// `chat_template`, not interpreted.
    pub(crate) chat_template: Option<Value>,
}

/// A token that the text is split at before the tokenizer's model encodes it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct AddedToken {
    pub(crate) text: String,
    pub(crate) id: Option<TokenId>,
    /// White space before the token belongs to it.
    pub(crate) lstrip: bool,
    /// White space after the token belongs to it.
    pub(crate) rstrip: bool,
}

impl TokenizerFiles {
    /// Read the files that exist.
    pub(crate) fn load(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer_config.json");
        let config = read_object(&path)?.unwrap_or_default();
        let mut files = Self { file: path.display().to_string(), ..Self::default() };
        files.add_bos_token = files.flag(&config, "add_bos_token")?;
        files.add_eos_token = files.flag(&config, "add_eos_token")?.unwrap_or(false);
        files.chat_template = config.get("chat_template").filter(|value| !value.is_null()).cloned();
        files.read_added_tokens_decoder(&config)?;
        files.read_added_tokens(&dir.join("added_tokens.json"))?;
        files.read_names(&path, &config)?;
        let map_path = dir.join("special_tokens_map.json");
        if let Some(map) = read_object(&map_path)? {
            files.read_names(&map_path, &map)?;
        }
        Ok(files)
    }

    /// The text of a named token such as `bos_token`.
    pub(crate) fn named(&self, field: &str) -> Option<&str> {
        self.named.iter().find(|(name, _)| *name == field).map(|(_, text)| text.as_str())
    }

    fn flag(&self, config: &Map<String, Value>, name: &str) -> Result<Option<bool>, TokenizerError> {
        match config.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(field_error(&self.file, name, format!("{other} is neither true nor false"))),
        }
    }

    /// `added_tokens_decoder`: `{"<id>": {"content": .., "lstrip": .., ..}}`.
    fn read_added_tokens_decoder(&mut self, config: &Map<String, Value>) -> Result<(), TokenizerError> {
        let name = "added_tokens_decoder";
        let entries = match config.get(name) {
            None | Some(Value::Null) => return Ok(()),
            Some(Value::Object(entries)) => entries,
            Some(_) => return Err(field_error(&self.file, name, "must be an object of ids".into())),
        };
        for (key, value) in entries {
            let field = format!("{name}.{key}");
            let id = key.parse().map_err(|_| field_error(&self.file, &field, "the key is not a token id".into()))?;
            let token = added_token(&self.file, &field, value)?;
            self.add(AddedToken { id: Some(TokenId(id)), ..token });
        }
        Ok(())
    }

    /// `added_tokens.json`: `{"<text>": id}`.
    fn read_added_tokens(&mut self, path: &Path) -> Result<(), TokenizerError> {
        for (text, value) in read_object(path)?.unwrap_or_default() {
            let id = value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| field_error(&path.display().to_string(), &text, format!("{value} is not a token id")))?;
            self.add(AddedToken { text, id: Some(TokenId(id)), ..AddedToken::default() });
        }
        Ok(())
    }

    /// The named special tokens and `additional_special_tokens`.
    fn read_names(&mut self, path: &Path, object: &Map<String, Value>) -> Result<(), TokenizerError> {
        let file = path.display().to_string();
        for name in NAMED_TOKENS {
            let Some(value) = object.get(name).filter(|value| !value.is_null()) else { continue };
            let token = added_token(&file, name, value)?;
            if self.named(name).is_none() {
                self.named.push((name, token.text.clone()));
            }
            self.add(token);
        }
        let name = "additional_special_tokens";
        let values = match object.get(name) {
            None | Some(Value::Null) => return Ok(()),
            Some(Value::Array(values)) => values,
            Some(_) => return Err(field_error(&file, name, "must be a list of tokens".into())),
        };
        for (index, value) in values.iter().enumerate() {
            let token = added_token(&file, &format!("{name}[{index}]"), value)?;
            if !self.additional.contains(&token.text) {
                self.additional.push(token.text.clone());
            }
            self.add(token);
        }
        Ok(())
    }

    /// Add a token unless it is known; the first file that describes it decides.
    fn add(&mut self, token: AddedToken) {
        if !self.added.iter().any(|known| known.text == token.text) {
            self.added.push(token);
        }
    }
}

/// A token is written as a string or as an object with `content` and flags.
fn added_token(file: &str, field: &str, value: &Value) -> Result<AddedToken, TokenizerError> {
    let flag = |name: &str| value.get(name).and_then(Value::as_bool).unwrap_or(false);
    let text = match value {
        Value::String(text) => text,
        Value::Object(object) => match object.get("content") {
            Some(Value::String(text)) => text,
            _ => return Err(field_error(file, field, "`content` must be a string".into())),
        },
        other => return Err(field_error(file, field, format!("{other} is neither a string nor an object"))),
    };
    if text.is_empty() {
        return Err(field_error(file, field, "a token must not be empty".into()));
    }
    if flag("single_word") {
        return Err(field_error(file, field, "`single_word`: true is not supported".into()));
    }
    Ok(AddedToken { text: text.clone(), id: None, lstrip: flag("lstrip"), rstrip: flag("rstrip") })
}

/// Read a JSON object; `None` if there is no such file.
fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, TokenizerError> {
    let Some(bytes) = read_optional(path)? else { return Ok(None) };
    let object = serde_json::from_slice(&bytes).map_err(|error| TokenizerError::Invalid {
        file: path.display().to_string(),
        problem: format!("not a JSON object: {error}"),
    })?;
    Ok(Some(object))
}

/// Read a file; `None` if it does not exist.
pub(crate) fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    files::read_file_if_there(path).map_err(|source| TokenizerError::Read { file: path.display().to_string(), source })
}
