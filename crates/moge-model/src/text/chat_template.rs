//! Chat messages to a prompt, by the checkpoint's own Jinja template.
//!
//! Templates are written for Jinja2 as `transformers` configures it, and are not trusted: fuel bounds the steps that one
//! may take and the bytes that it may produce.

mod engine;
pub(crate) mod error;
mod limits;
mod namespace;
mod rewrite;
mod strftime;
mod tojson;

use std::path::Path;

use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};

use crate::text::tokenizer::files::{TokenizerFiles, read_optional};
use crate::{Architecture, TokenId, Tokenizer};
use engine::{Raised, describe, jinja_value, run_bounded};
use error::ChatTemplateError;

/// Suffix of a user's text that asks Pangu for an answer without thinking.
const NO_THINK: &str = " /no_think";

/// Fuel of a render, independent of its input: about a million steps, or 64 MB of text.
const FUEL: u64 = 1_000_000;

/// Fuel that each byte of input adds: a short message of 40 bytes allows 320 steps.
const FUEL_PER_INPUT_BYTE: u64 = 8;

/// The name of the template that is used unless another is asked for.
const DEFAULT: &str = "default";

/// The name of the template that is used if there are tools, where a checkpoint has a separate one.
const TOOL_USE: &str = "tool_use";

/// Controls whether the model thinks before it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Thinking {
    /// The template's default.
    #[default]
    Default,
    /// Ask for it (`enable_thinking` is true).
    On,
    /// Ask for none (`enable_thinking` is false; Pangu's last user text ends in ` /no_think`).
    Off,
}

/// The input of a template.
#[derive(Clone, Debug, Default)]
pub struct ChatRequest<'a> {
    /// Objects with `role`, `content` (a string or a list of parts), perhaps `tool_calls`, `reasoning_content`, ...
    pub messages: &'a [Value],
    /// Descriptions of the functions that the model may call.
    pub tools: &'a [Value],
    /// End with the start of the assistant's next turn.
    pub add_generation_prompt: bool,
    /// Controls whether the model thinks before it answers.
    pub thinking: Thinking,
    /// Further variables for the template.
    pub kwargs: Map<String, Value>,
}

/// A checkpoint's chat template, ready to render.
pub struct ChatTemplate {
    /// The path that messages name.
    file: String,
    architecture: Architecture,
    environment: Environment<'static>,
    /// `bos_token` and the like, which templates may write.
    special_tokens: Map<String, Value>,
}

impl ChatTemplate {
    /// Read `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`, or else take the one that is
    /// built in for Pangu.
    ///
    /// # Errors
    /// If there is none, or it is not a valid template.
    pub fn load(dir: &Path, architecture: Architecture) -> Result<Self, ChatTemplateError> {
        let files = TokenizerFiles::load(dir)?;
        let path = dir.join("chat_template.jinja");
        let (file, sources) = if let Some(bytes) = read_optional(&path)? {
            let file = path.display().to_string();
            let source = String::from_utf8(bytes)
                .map_err(|_| ChatTemplateError::Field { file: file.clone(), problem: "not UTF-8".into() })?;
            (file, vec![(DEFAULT.to_owned(), source)])
        } else if let Some(template) = &files.chat_template {
            (files.file.clone(), named_sources(&files.file, template)?)
        } else if let Some(template) = architecture.spec().text.chat_template {
            ("built-in chat template".to_owned(), vec![(DEFAULT.to_owned(), template.to_owned())])
        } else {
            return Err(ChatTemplateError::Missing { dir: dir.display().to_string(), architecture });
        };
        let environment = run_bounded(&file, {
            let file = file.clone();
            move || engine::environment(&file, sources)
        })??;
        Ok(Self { file, architecture, environment, special_tokens: special_tokens(&files) })
    }

    /// The prompt for these messages.
    ///
    /// Tokenise it with [`crate::Prefix::Add`]: whether the template has written the tokenizer's prefix is decided by
    /// ids.
    ///
    /// # Errors
    /// If a message is not an object with a role, or the template raises, fails or does not terminate.
    pub fn render(&self, request: &ChatRequest<'_>) -> Result<String, ChatTemplateError> {
        check_messages(request.messages)?;
        let mut messages = request.messages.to_vec();
        if self.architecture.spec().text.reads_no_think && request.thinking == Thinking::Off {
            append_no_think(&mut messages);
        }
        let context = self.context(request, messages);
        // The size of the input bounds the work that it justifies.
        let fuel = FUEL + FUEL_PER_INPUT_BYTE * context.to_string().len() as u64;
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let wants_tool_use = !request.tools.is_empty() && environment.get_template(TOOL_USE).is_ok();
        let name = if wants_tool_use { TOOL_USE } else { DEFAULT };
        let render = move || environment.get_template(name)?.render(jinja_value(&context));
        run_bounded(&self.file, render)?.map_err(|error| self.render_error(&error, fuel))
    }

    fn context(&self, request: &ChatRequest<'_>, messages: Vec<Value>) -> Value {
        let mut context = self.special_tokens.clone();
        context.extend(request.kwargs.clone());
        let tools = if request.tools.is_empty() { Value::Null } else { request.tools.to_vec().into() };
        context.insert("messages".into(), messages.into());
        context.insert("tools".into(), tools);
        context.entry("documents").or_insert(Value::Null);
        context.insert("add_generation_prompt".into(), request.add_generation_prompt.into());
        if request.thinking != Thinking::Default {
            context.insert("enable_thinking".into(), (request.thinking == Thinking::On).into());
        }
        Value::Object(context)
    }

    fn render_error(&self, error: &minijinja::Error, fuel: u64) -> ChatTemplateError {
        let file = self.file.clone();
        // An error inside a macro is wrapped in the errors of its callers.
        let causes = std::iter::successors(Some(error), |error| std::error::Error::source(*error)?.downcast_ref());
        let error = causes.last().unwrap_or(error);
        let raised = std::error::Error::source(error).and_then(|source| source.downcast_ref::<Raised>());
        match (raised, error.kind()) {
            (Some(Raised(message)), _) => ChatTemplateError::Raised { file, message: message.clone() },
            (None, ErrorKind::OutOfFuel) => ChatTemplateError::TooMuchWork { file, fuel },
            (None, _) => ChatTemplateError::Render { file, line: error.line().unwrap_or(0), problem: describe(error) },
        }
    }
}

/// Texts around the model's thinking: `[unused16]` and `[unused17]` for Pangu, `<think>` and `</think>` for the others.
pub fn thinking_delimiters(architecture: Architecture) -> (&'static str, &'static str) {
    architecture.spec().text.thinking
}

/// The same as token ids, if the tokenizer has a single token for each.
pub fn thinking_tokens(tokenizer: &Tokenizer, architecture: Architecture) -> Option<(TokenId, TokenId)> {
    let (open, close) = thinking_delimiters(architecture);
    Some((tokenizer.id_of(open)?, tokenizer.id_of(close)?))
}

/// `chat_template` is one template, or a list of `{"name": .., "template": ..}`.
fn named_sources(file: &str, template: &Value) -> Result<Vec<(String, String)>, ChatTemplateError> {
    let field = |problem: String| ChatTemplateError::Field { file: file.to_owned(), problem };
    let entries = match template {
        Value::String(source) => return Ok(vec![(DEFAULT.to_owned(), source.clone())]),
        Value::Array(entries) => entries,
        _ => return Err(field("must be a string, or a list of objects with `name` and `template`".into())),
    };
    let mut sources = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        match (entry.get("name").and_then(Value::as_str), entry.get("template").and_then(Value::as_str)) {
            (Some(name), Some(source)) => sources.push((name.to_owned(), source.to_owned())),
            _ => return Err(field(format!("[{index}] must be an object with the strings `name` and `template`"))),
        }
    }
    if !sources.iter().any(|(name, _)| name == DEFAULT) {
        let names: Vec<&str> = sources.iter().map(|(name, _)| name.as_str()).collect();
        return Err(field(format!("no template is named \"default\"; found: {names:?}")));
    }
    Ok(sources)
}

/// The special tokens under the names that templates use.
fn special_tokens(files: &TokenizerFiles) -> Map<String, Value> {
    let mut tokens: Map<String, Value> =
        files.named.iter().map(|(field, text)| ((*field).to_owned(), text.clone().into())).collect();
    if !files.additional.is_empty() {
        tokens.insert("additional_special_tokens".into(), files.additional.clone().into());
    }
    tokens
}

fn check_messages(messages: &[Value]) -> Result<(), ChatTemplateError> {
    for (index, message) in messages.iter().enumerate() {
        let problem = match (message.as_object(), message.get("role"), message.get("content")) {
            (None, ..) => "must be an object",
            (_, None, _) => "`role` is missing",
            (_, Some(Value::String(_)), Some(Value::Bool(_) | Value::Number(_))) => {
                "`content` must be a string, a list of parts, or null"
            }
            (_, Some(Value::String(_)), _) => continue,
            (_, Some(_), _) => "`role` must be a string",
        };
        return Err(ChatTemplateError::Message { index, problem });
    }
    Ok(())
}

/// Append ` /no_think` to the last user message, unless it ends so already.
fn append_no_think(messages: &mut [Value]) {
    let Some(message) = messages.iter_mut().rev().find(|message| message["role"] == "user") else { return };
    let text = match &mut message["content"] {
        Value::Array(parts) => parts.iter_mut().rev().find_map(|part| part.get_mut("text")),
        content => Some(content),
    };
    if let Some(Value::String(text)) = text
        && !text.ends_with(NO_THINK)
    {
        text.push_str(NO_THINK);
    }
}

#[cfg(test)]
mod tests;
