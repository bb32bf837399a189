//! Conversion of a response request's fields to those of chat.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::conversation::joined_texts;
use crate::error::ApiError;

/// The input to answer.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "must be a string or a list of items")]
pub(super) enum Input {
    Text(String),
    Items(Vec<Value>),
}

/// Messages of `instructions` and `input`. The calls of one turn and the text before them become one message, as
/// templates expect them.
///
/// # Errors
/// If an item is of a kind that is not known, or lacks what its kind has.
pub(super) fn chat_messages(instructions: Option<String>, input: Input) -> Result<Vec<Value>, ApiError> {
    let instructions = instructions.map(|text| json!({ "role": "system", "content": text }));
    let mut messages: Vec<Value> = instructions.into_iter().collect();
    let items = match input {
        Input::Text(text) => vec![json!({ "role": "user", "content": text })],
        Input::Items(items) => items,
    };
    for (index, item) in items.iter().enumerate() {
        let path = format!("input[{index}]");
        match item["type"].as_str() {
            None if !item["type"].is_null() => return Err(unknown_item(&path, &item["type"])),
            None | Some("message") => messages.push(message(&path, item)?),
            Some("function_call") => push_call(&mut messages, call(&path, item)?),
            Some("function_call_output") => {
                let call_id = string(&path, item, "call_id")?;
                let content = text(&path, item, "output")?;
                messages.push(json!({ "role": "tool", "tool_call_id": call_id, "content": content }));
            }
            // Templates drop the thinking of earlier turns.
            Some("reasoning") => {}
            Some(_) => return Err(unknown_item(&path, &item["type"])),
        }
    }
    Ok(messages)
}

fn unknown_item(path: &str, kind: &Value) -> ApiError {
    let allowed = "\"message\", \"function_call\", \"function_call_output\", \"reasoning\"";
    ApiError::invalid(format!("{path}.type"), format!("{kind} is not supported; allowed: {allowed}"))
}

fn message(path: &str, item: &Value) -> Result<Value, ApiError> {
    if !item.is_object() {
        return Err(ApiError::invalid(path, "an item must be an object"));
    }
    let role = string(path, item, "role")?;
    if !["user", "assistant", "system", "developer"].contains(&role) {
        let message = format!("{role:?} is not allowed, must be \"user\", \"assistant\", \"system\" or \"developer\"");
        return Err(ApiError::invalid(format!("{path}.role"), message));
    }
    Ok(json!({ "role": role, "content": text(path, item, "content")? }))
}

fn call(path: &str, item: &Value) -> Result<Value, ApiError> {
    let function = json!({ "name": string(path, item, "name")?, "arguments": string(path, item, "arguments")? });
    Ok(json!({ "id": string(path, item, "call_id")?, "type": "function", "function": function }))
}

/// Add a call to the assistant's message, if that is the last one.
fn push_call(messages: &mut Vec<Value>, call: Value) {
    match messages.last_mut() {
        Some(last) if last["role"] == "assistant" => match &mut last["tool_calls"] {
            Value::Array(calls) => calls.push(call),
            none => *none = json!([call]),
        },
        _ => messages.push(json!({ "role": "assistant", "content": "", "tool_calls": [call] })),
    }
}

fn string<'a>(path: &str, item: &'a Value, field: &str) -> Result<&'a str, ApiError> {
    let wrong = || ApiError::invalid(format!("{path}.{field}"), format!("{} must be a string", item[field]));
    item[field].as_str().ok_or_else(wrong)
}

/// A field that is a text or a list of parts with texts.
fn text(path: &str, item: &Value, field: &str) -> Result<String, ApiError> {
    let path = format!("{path}.{field}");
    match &item[field] {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => joined_texts(&path, parts),
        other => Err(ApiError::invalid(path, format!("{other} must be a string or a list of parts"))),
    }
}

/// Tools, which say here directly what they say in `function` there.
///
/// # Errors
/// If one is not a function.
pub(super) fn chat_tools(tools: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    let tools = tools.into_iter().enumerate().map(|(index, mut tool)| match &mut tool {
        Value::Object(function) if function.get("type").is_some_and(|kind| kind == "function") => {
            function.shift_remove("type");
            Ok(json!({ "type": "function", "function": tool }))
        }
        _ => {
            let message = format!("{} is not supported; allowed: \"function\"", tool["type"]);
            Err(ApiError::invalid(format!("tools[{index}].type"), message))
        }
    });
    tools.collect()
}

/// The choice, with the name of a function where chat has it.
///
/// # Errors
/// If it is an object that names no function.
pub(super) fn chat_tool_choice(choice: Value) -> Result<Value, ApiError> {
    match &choice {
        Value::Object(fields) if choice["type"] == "function" => {
            Ok(json!({ "type": "function", "function": { "name": fields.get("name") } }))
        }
        Value::Object(_) => {
            let message = format!("{} is not supported; allowed: \"function\"", choice["type"]);
            Err(ApiError::invalid("tool_choice.type", message))
        }
        _ => Ok(choice),
    }
}

/// The format, with its schema where chat has it.
///
/// # Errors
/// If it is not valid.
pub(super) fn chat_format(format: Value) -> Result<Value, ApiError> {
    match format["type"].as_str() {
        Some("json_schema") => Ok(json!({ "type": "json_schema", "json_schema": { "schema": format["schema"] } })),
        Some("text" | "json_object") => Ok(format),
        _ if format.is_null() => Ok(format),
        _ => {
            let allowed = "\"text\", \"json_object\" or \"json_schema\"";
            let message = format!("{} is not allowed; allowed: {allowed}", format["type"]);
            Err(ApiError::invalid("text.format.type", message))
        }
    }
}

/// An error that names a field as chat or completions call it, with its name here.
pub(super) fn in_own_names(error: ApiError) -> ApiError {
    let (param, message) = match error {
        ApiError::Invalid { param, message } => (param, message),
        ApiError::PromptTooLong { num_tokens, max_model_len, .. } => {
            return ApiError::PromptTooLong { param: "input", num_tokens, max_model_len };
        }
        _ => return error,
    };
    let param = match param.as_str() {
        _ if param == "prompt" || param.starts_with("messages") => "input".to_owned(),
        "max_tokens" => "max_output_tokens".to_owned(),
        "response_format" => "text.format".to_owned(),
        _ => param.replace("response_format.json_schema", "text.format").replace(".function", ""),
    };
    ApiError::Invalid { param, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(instructions: Option<&str>, items: Value) -> Result<Vec<Value>, ApiError> {
        chat_messages(instructions.map(str::to_owned), serde_json::from_value(items).unwrap())
    }

    #[test]
    fn the_calls_of_a_turn_join_the_text_before_them() {
        let call = |id: &str| json!({ "type": "function_call", "call_id": id, "name": "f", "arguments": "{}" });
        let chat_call =
            |id: &str| json!({ "id": id, "type": "function", "function": { "name": "f", "arguments": "{}" } });
        let output = json!({ "type": "function_call_output", "call_id": "b", "output": [{ "type": "input_text", "text": "7" }] });
        let items = json!([
            { "type": "reasoning", "summary": [] },
            { "role": "assistant", "content": [{ "type": "output_text", "text": "I " }, { "type": "output_text", "text": "ask" }] },
            call("a"), { "type": "reasoning", "summary": [] }, call("b"), output, call("c"),
        ]);
        let expected = json!([
            { "role": "system", "content": "Be brief." },
            { "role": "assistant", "content": "I ask", "tool_calls": [chat_call("a"), chat_call("b")] },
            { "role": "tool", "tool_call_id": "b", "content": "7" },
            { "role": "assistant", "content": "", "tool_calls": [chat_call("c")] },
        ]);
        assert_eq!(Value::from(messages(Some("Be brief."), items).unwrap()), expected);
        assert_eq!(messages(None, "x".into()).unwrap(), [json!({ "role": "user", "content": "x" })]);
    }

    #[test]
    fn an_item_that_is_none_is_refused_with_its_place() {
        let message =
            |item: Value| messages(None, json!([{ "role": "user", "content": "" }, item])).unwrap_err().to_string();
        assert_eq!(message(json!(7)), "input[1]: an item must be an object");
        assert_eq!(message(json!({ "role": "user" })), "input[1].content: null must be a string or a list of parts");
        assert_eq!(message(json!({ "type": "function_call" })), "input[1].name: null must be a string");
        let kinds = "\"message\", \"function_call\", \"function_call_output\", \"reasoning\"";
        assert_eq!(
            message(json!({ "type": "computer_call" })),
            format!("input[1].type: \"computer_call\" is not supported; allowed: {kinds}")
        );
    }

    #[test]
    fn errors_name_fields_as_they_are_called_here() {
        for (there, here) in [
            ("prompt", "input"),
            ("messages[3].content", "input"),
            ("max_tokens", "max_output_tokens"),
            ("response_format", "text.format"),
            ("response_format.json_schema.schema", "text.format.schema"),
            ("tools[2].function.name", "tools[2].name"),
            ("tool_choice.function.name", "tool_choice.name"),
            ("guided_regex", "guided_regex"),
        ] {
            let error = in_own_names(ApiError::invalid(there, "wrong"));
            assert_eq!(error.to_string(), format!("{here}: wrong"));
        }
    }
}
