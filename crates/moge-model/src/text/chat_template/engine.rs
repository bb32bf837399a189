//! Jinja configured as `transformers` does, for templates that are not trusted.
//!
//! Fuel bounds the work of a template. Functions of the engine that consume fuel too late, or use the stack without a
//! limit, are replaced here.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, StringInput, Value as JinjaValue, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, Output, State};
use serde_json::Value;
use thiserror::Error;

use super::error::ChatTemplateError;
use super::limits::{BYTES_PER_FUEL, MAX_DEPTH};
use super::{namespace, rewrite, strftime, tojson};

/// Maximum length of a template, in bytes; known ones have less than 20 000.
const MAX_TEMPLATE_BYTES: usize = 128 << 10;

/// Stack for templates: the engine recurses over expressions, at most once per byte of a template, and takes less than
/// 512 bytes each time. Memory that is not touched is not used.
const STACK_BYTES: usize = 256 << 20;

/// Time for one template; a usual one takes milliseconds.
pub(super) const MAX_TIME: Duration = Duration::from_secs(10);

/// Maximum depth of calls of macros and includes; each level takes a few KB of stack.
const MAX_RECURSION: usize = 100;

/// Jinja as `transformers` configures it, with these templates.
pub(super) fn environment(
    file: &str,
    sources: Vec<(String, String)>,
) -> Result<Environment<'static>, ChatTemplateError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| syntax_error(file, &error))?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_unknown_method_callback(call_method);
    environment.set_formatter(print);
    environment.add_filter("string", to_text);
    environment.add_filter("join", join);
    environment.remove_filter("pprint");
    environment.add_filter("tojson", tojson::tojson);
    environment.add_function("namespace", namespace::namespace);
    environment.add_function(namespace::ASSIGN, namespace::assign);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime::strftime_now);
    for (name, source) in sources {
        if source.len() > MAX_TEMPLATE_BYTES {
            let problem = format!("{} bytes; allowed: at most {MAX_TEMPLATE_BYTES}", source.len());
            return Err(ChatTemplateError::Field { file: file.to_owned(), problem });
        }
        // Jinja2 reads every kind of line end as one character.
        let source = rewrite::rewrite_tags(&source.replace("\r\n", "\n").replace('\r', "\n"));
        environment.add_template_owned(name, source).map_err(|error| syntax_error(file, &error))?;
    }
    Ok(environment)
}

fn syntax_error(file: &str, error: &minijinja::Error) -> ChatTemplateError {
    ChatTemplateError::Syntax { file: file.to_owned(), line: error.line().unwrap_or(0), problem: describe(error) }
}

/// The argument of `raise_exception`.
#[derive(Debug, Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

fn raise_exception(message: &JinjaValue) -> Result<String, minijinja::Error> {
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception");
    Err(error.with_source(Raised(message.to_string())))
}

/// Python's methods of strings and dictionaries.
fn call_method(
    state: &mut State,
    value: &JinjaValue,
    method: &str,
    args: &[JinjaValue],
) -> Result<JinjaValue, minijinja::Error> {
    // These two build their result before they consume fuel for it.
    match (method, value.as_str(), args.first()) {
        ("join", Some(_), Some(items)) => charge_for_text(state, items, 0)?,
        ("format", Some(format), _) => {
            for width in format.split(|c: char| !c.is_ascii_digit()).filter(|width| !width.is_empty()) {
                state.consume_fuel(width.parse().unwrap_or(u64::MAX) / BYTES_PER_FUEL as u64)?;
            }
        }
        _ => {}
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// Print a value.
fn print(out: &mut Output, state: &mut State, value: &JinjaValue) -> Result<(), minijinja::Error> {
    charge_for_text(state, value, 0)?;
    minijinja::escape_formatter(out, state, value)
}

/// `value | string`.
fn to_text(state: &State, value: &JinjaValue) -> Result<String, minijinja::Error> {
    charge_for_text(state, value, 0)?;
    Ok(value.to_string())
}

/// `value | join(joiner, attribute)`.
fn join(
    state: &mut State,
    value: &JinjaValue,
    joiner: Option<StringInput<'_>>,
    attribute: Option<&str>,
    kwargs: Kwargs,
) -> Result<JinjaValue, minijinja::Error> {
    charge_for_text(state, value, 0)?;
    minijinja::filters::join(state, value, joiner, attribute, kwargs)
}

/// Consume fuel for the text of a list or mapping before it is built: one that holds another many times is small in
/// memory and huge as text, and the engine itself consumes fuel only afterwards.
fn charge_for_text(state: &State, value: &JinjaValue, depth: usize) -> Result<(), minijinja::Error> {
    if depth > MAX_DEPTH {
        let problem = format!("a value is nested deeper than {MAX_DEPTH}");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, problem));
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            for item in value.try_iter()?.checked() {
                charge_for_text(state, &item?, depth + 1)?;
            }
        }
        ValueKind::Map => {
            for key in value.try_iter()?.checked() {
                charge_for_text(state, &value.get_item(&key?)?, depth + 1)?;
            }
        }
        // The engine charges for a string that is printed by itself.
        _ if depth == 0 => return Ok(()),
        _ => {}
    }
    state.consume_fuel(1 + (value.as_str().map_or(0, str::len) / BYTES_PER_FUEL) as u64)
}

/// Run a template that is not trusted, on a stack large enough for the deepest expression of the longest template, and
/// for a limited time. A template that exceeds it keeps its thread until fuel or its length end it.
pub(super) fn run_bounded<T: Send + 'static>(
    file: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ChatTemplateError> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK_BYTES);
    let work = move || {
        // The receiver is gone if the result comes too late.
        let _ = sender.send(work());
    };
    let file = file.to_owned();
    if let Err(source) = thread.spawn(work) {
        return Err(ChatTemplateError::Thread { file, source });
    }
    receiver.recv_timeout(MAX_TIME).map_err(|error| match error {
        RecvTimeoutError::Timeout => ChatTemplateError::TooSlow { file, seconds: MAX_TIME.as_secs() },
        RecvTimeoutError::Disconnected => ChatTemplateError::Panicked { file },
    })
}

/// The same value for the template engine; the order of keys is kept.
pub(super) fn jinja_value(value: &Value) -> JinjaValue {
    match value {
        Value::Null => JinjaValue::from(()),
        Value::Bool(flag) => JinjaValue::from(*flag),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(number), _, _) => JinjaValue::from(number),
            (None, Some(number), _) => JinjaValue::from(number),
            (None, None, number) => JinjaValue::from(number),
        },
        Value::String(text) => JinjaValue::from(text.as_str()),
        Value::Array(items) => items.iter().map(jinja_value).collect(),
        Value::Object(entries) => {
            JinjaValue::from_pairs(entries.iter().map(|(key, value)| (key.as_str(), jinja_value(value))))
        }
    }
}

/// An error of the template engine without its line, which is reported separately.
pub(super) fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}
