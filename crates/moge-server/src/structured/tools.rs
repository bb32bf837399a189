//! Tools that a request offers, which of them are to be called, and the grammar of their calls.

use std::collections::HashMap;

use moge_model::ToolFormat;
use serde_json::{Value, json};

use super::error::StructuredError;
use super::lark::{json_schema, string};
use super::markers::{GrammarMarkers, Marker};
use crate::output::{MAX_NAME_LEN, is_name_char};

/// A function that the model may call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool<'a> {
    /// Its name, in characters that every model's form of a call can hold.
    pub(crate) name: &'a str,
    /// The JSON schema of its arguments; without one it takes none.
    parameters: Option<&'a Value>,
}

/// Choice of tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// No call; what looks like one is text.
    None,
    /// As the model sees fit.
    Auto,
    /// At least one call.
    Required,
    /// One call of the tool at this index.
    Named(usize),
}

/// Check the field `tools`.
///
/// # Errors
/// [`StructuredError::Field`] with the path of what is wrong.
pub(crate) fn tools(tools: &[Value]) -> Result<Vec<Tool<'_>>, StructuredError> {
    let mut index_of: HashMap<&str, usize> = HashMap::new();
    let mut checked = Vec::new();
    for (index, tool) in tools.iter().enumerate() {
        if tool["type"] != "function" {
            return Err(StructuredError::wrong(format!("tools[{index}].type"), &tool["type"], "\"function\""));
        }
        let tool = check(index, &tool["function"])?;
        if let Some(first) = index_of.insert(tool.name, index) {
            let allowed = format!("a name that no other tool has; tools[{first}] has it");
            return Err(StructuredError::wrong(format!("tools[{index}].function.name"), &tool.name.into(), allowed));
        }
        checked.push(tool);
    }
    Ok(checked)
}

fn check(index: usize, function: &Value) -> Result<Tool<'_>, StructuredError> {
    let path = format!("tools[{index}].function");
    if !function.is_object() {
        return Err(StructuredError::wrong(path, function, "an object"));
    }
    let name = function["name"].as_str().unwrap_or_default();
    if name.is_empty() || name.len() > MAX_NAME_LEN || !name.chars().all(is_name_char) {
        let allowed = format!("1 to {MAX_NAME_LEN} letters, digits, underscores, hyphens or dots");
        return Err(StructuredError::wrong(format!("{path}.name"), &function["name"], allowed));
    }
    let parameters = match &function["parameters"] {
        Value::Null => None,
        schema @ Value::Object(fields) => match fields.get("type") {
            None => Some(schema),
            Some(kind) if kind == "object" => Some(schema),
            Some(other) => return Err(StructuredError::wrong(format!("{path}.parameters.type"), other, "\"object\"")),
        },
        other => return Err(StructuredError::wrong(format!("{path}.parameters"), other, "a JSON schema, an object")),
    };
    Ok(Tool { name, parameters })
}

/// Check the field `tool_choice`; without it the model calls tools as it sees fit, if there are any.
///
/// # Errors
/// [`StructuredError::Field`] if it is not one of OpenAI's values, names an unknown tool, or requires calls without
/// tools.
pub(crate) fn tool_choice(choice: Option<&Value>, tools: &[Tool<'_>]) -> Result<ToolChoice, StructuredError> {
    let Some(value) = choice.filter(|choice| !choice.is_null()) else {
        return Ok(if tools.is_empty() { ToolChoice::None } else { ToolChoice::Auto });
    };
    let choice = match (value.as_str(), value["type"].as_str()) {
        (Some("none"), _) => return Ok(ToolChoice::None),
        (Some("auto"), _) => ToolChoice::Auto,
        (Some("required"), _) => ToolChoice::Required,
        (None, Some("function")) => {
            let name = &value["function"]["name"];
            let index = tools.iter().position(|tool| name == tool.name);
            index.map(ToolChoice::Named).ok_or_else(|| {
                StructuredError::wrong("tool_choice.function.name", name, "the name of one of `tools`")
            })?
        }
        _ => {
            let allowed = "\"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": ..}}";
            return Err(StructuredError::wrong("tool_choice", value, allowed));
        }
    };
    if tools.is_empty() {
        return Err(StructuredError::wrong("tool_choice", value, "\"none\", as there are no `tools`"));
    }
    Ok(choice)
}

/// The rule `calls` and those that it needs: calls in the model's form.
pub(super) fn calls(
    tools: &[Tool<'_>],
    choice: ToolChoice,
    parallel_tool_calls: bool,
    markers: &GrammarMarkers,
) -> String {
    let (tools, is_repeatable) = match choice {
        ToolChoice::Named(index) => (&tools[index..=index], false),
        ToolChoice::None | ToolChoice::Auto | ToolChoice::Required => (tools, parallel_tool_calls),
    };
    let open = markers.tool_open.lark();
    let close = markers.tool_close.as_ref().map(Marker::lark).unwrap_or_default();
    let repeat = |separator: &str, call: &str| {
        if is_repeatable { format!("{call} ({separator} {call})*") } else { call.to_owned() }
    };
    let mut rules = match markers.tool_format {
        ToolFormat::PanguList => format!("calls: {open} \"[\" {} \"]\" {close}\n", repeat("\", \"", "call")),
        ToolFormat::Hermes => {
            format!("calls: {}\nmarked_call: {open} \"\\n\" call \"\\n\" {close}\n", repeat("\"\\n\"", "marked_call"))
        }
        ToolFormat::Glm4 => format!("calls: {}\n", repeat(&open, "call")),
    };
    let names: Vec<String> = (0..tools.len()).map(|index| format!("call_{index}")).collect();
    rules += &format!("call: {}\n", names.join(" | "));
    for (tool, rule) in tools.iter().zip(&names) {
        // A schema stays by itself: its references count from its own root.
        let arguments = json_schema(&arguments_schema(tool));
        rules += &match markers.tool_format {
            ToolFormat::PanguList | ToolFormat::Hermes => {
                let head = format!("{{\"name\": {}, \"arguments\": ", Value::from(tool.name));
                format!("{rule}: {} {arguments} \"}}\"\n", string(&head))
            }
            ToolFormat::Glm4 => format!("{rule}: {} {arguments}\n", string(&format!("{}\n", tool.name))),
        };
    }
    rules
}

fn arguments_schema(tool: &Tool<'_>) -> Value {
    match tool.parameters {
        None => json!({"type": "object", "additionalProperties": false}),
        Some(parameters) => {
            let mut schema = parameters.clone();
            if let Value::Object(fields) = &mut schema {
                fields.entry("type").or_insert_with(|| "object".into());
            }
            schema
        }
    }
}
