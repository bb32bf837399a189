//! Restrictions of an answer, as one grammar in llguidance's dialect of Lark.
//!
//! A request restricts its answer by `response_format` or one of vLLM's `guided_*` fields, and its tool calls by
//! `tool_choice`. Only the answer is restricted: thinking before it is free. Tool calls are
//! written in the model's own form (see [`crate::output`]), with arguments that follow the tool's `parameters`.

mod error;
mod lark;
pub(crate) mod markers;
pub(crate) mod tools;

use moge_model::TokenId;
use serde_json::{Value, json};

pub(crate) use error::StructuredError;
use lark::{json_schema, regex, string};
use markers::{GrammarMarkers, Marker};
use tools::{Tool, ToolChoice};

/// The parts of a request that restrict what the model writes, as they came.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StructuredFields<'a> {
    /// `{"type": "text" | "json_object" | "json_schema", ..}`.
    pub(crate) response_format: Option<&'a Value>,
    /// A JSON schema, or the text of one.
    pub(crate) guided_json: Option<&'a Value>,
    /// A regular expression that the whole answer must match.
    pub(crate) guided_regex: Option<&'a str>,
    /// A Lark grammar with the rule `start`.
    pub(crate) guided_grammar: Option<&'a str>,
    /// The only answers that are allowed.
    pub(crate) guided_choice: Option<&'a [String]>,
}

/// Thinking before the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ThinkingPhase {
    /// It answers at once.
    Absent,
    /// It may open its thinking.
    MayOpen,
    /// The prompt has opened it.
    Open,
}

/// The grammar of what the model is to write, `None` if that is free.
///
/// With `required` tools or a named one there are calls and no answer, so that what restricts the answer has no effect.
/// Otherwise, if the answer is restricted and tools may be called, it may be a call as well. `parallel_tool_calls` lets
/// `required` be followed by more than one call.
///
/// # Errors
/// [`StructuredError`] if a field has a wrong value, or two fields restrict the answer.
pub(crate) fn grammar(
    fields: &StructuredFields<'_>,
    tools: &[Tool<'_>],
    choice: ToolChoice,
    parallel_tool_calls: bool,
    markers: &GrammarMarkers,
    thinking: ThinkingPhase,
) -> Result<Option<String>, StructuredError> {
    let answer = answer(fields)?;
    let calls = || tools::calls(tools, choice, parallel_tool_calls, markers);
    let body = match (choice, answer) {
        (ToolChoice::Required | ToolChoice::Named(_), _) => format!("body: calls\n{}", calls()),
        (_, None) => return Ok(None),
        (ToolChoice::None, Some(answer)) => format!("body: {answer}\n"),
        (ToolChoice::Auto, Some(answer)) => format!("body: calls | answer\nanswer: {answer}\n{}", calls()),
    };
    Ok(Some(lead_in(markers, thinking) + &body))
}

/// The right side of a rule for the answer, `None` if it is free.
fn answer(fields: &StructuredFields<'_>) -> Result<Option<String>, StructuredError> {
    let format = fields.response_format.filter(|format| !format.is_null());
    let schema = fields.guided_json.filter(|schema| !schema.is_null());
    let answers = [
        ("response_format", format.map(response_format).transpose()?.flatten()),
        ("guided_json", schema.map(guided_json).transpose()?),
        ("guided_regex", fields.guided_regex.map(regex).transpose()?),
        // The grammar may end in a comment.
        ("guided_grammar", fields.guided_grammar.map(|text| format!("%lark {{\n{text}\n}}"))),
        ("guided_choice", fields.guided_choice.map(guided_choice).transpose()?),
    ];
    let mut given = answers.into_iter().filter_map(|(field, answer)| Some((field, answer?)));
    match (given.next(), given.next()) {
        (Some((first, _)), Some((second, _))) => Err(StructuredError::Conflict { first, second }),
        (first, _) => Ok(first.map(|(_, answer)| answer)),
    }
}

fn response_format(format: &Value) -> Result<Option<String>, StructuredError> {
    match format["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(json_schema(&json!({"type": "object"})))),
        Some("json_schema") => match &format["json_schema"]["schema"] {
            schema @ Value::Object(_) => Ok(Some(json_schema(schema))),
            other => {
                Err(StructuredError::wrong("response_format.json_schema.schema", other, "a JSON schema, an object"))
            }
        },
        _ => {
            let allowed = "\"text\", \"json_object\" or \"json_schema\"";
            Err(StructuredError::wrong("response_format.type", &format["type"], allowed))
        }
    }
}

fn guided_json(schema: &Value) -> Result<String, StructuredError> {
    let parsed = schema.as_str().map(serde_json::from_str);
    match parsed.as_ref().map_or(Some(schema), |parsed| parsed.as_ref().ok()) {
        Some(object @ Value::Object(_)) => Ok(json_schema(object)),
        _ => Err(StructuredError::wrong("guided_json", schema, "a JSON schema, an object, or the text of one")),
    }
}

fn guided_choice(choices: &[String]) -> Result<String, StructuredError> {
    if choices.is_empty() {
        return Err(StructuredError::wrong("guided_choice", &json!([]), "at least one text"));
    }
    let choices: Vec<String> = choices.iter().map(|choice| string(choice)).collect();
    Ok(choices.join(" | "))
}

/// `start`, which is the thinking if there is any, then `body`.
fn lead_in(markers: &GrammarMarkers, thinking: ThinkingPhase) -> String {
    // GLM-4 begins a turn's text on the line after the speaker's name.
    let on_new_line = markers.architecture.begins_on_new_line();
    let start = match thinking {
        ThinkingPhase::Absent if on_new_line => "start: \"\\n\"? body\n",
        ThinkingPhase::Absent => "start: body\n",
        ThinkingPhase::MayOpen if on_new_line => "start: (opened_thinking | \"\\n\")? body\n",
        ThinkingPhase::MayOpen => "start: opened_thinking? body\n",
        ThinkingPhase::Open => "start: thinking body\n",
    };
    let mut rules = start.to_owned();
    if thinking == ThinkingPhase::MayOpen {
        rules += &format!("opened_thinking: {} thinking\n", markers.thinking_open.lark());
    }
    if thinking != ThinkingPhase::Absent {
        // The whitespace that the model was trained to write between thinking and answer.
        let gap = "(\"\\n\" | \"\\n\\n\")?";
        rules += &match &markers.thinking_close {
            Marker::Token(TokenId(id)) => format!("thinking: <[^{id}]>* <[{id}]> {gap}\n"),
            Marker::Text(text) => {
                format!("thinking: thinking_text {gap}\nthinking_text[suffix={}]: /(?s:.*)/\n", string(text))
            }
        };
    }
    rules
}

#[cfg(test)]
mod tests;
