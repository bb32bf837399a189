//! `POST /v1/responses`: the assistant's next turn as a list of items. Nothing is stored.

mod input;
mod writer;

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use moge_engine::SamplingParams;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::answer::{self, StreamEncoder};
use crate::app::{AppState, Serving};
use crate::blocking::blocking;
use crate::body::Json;
use crate::clock::unix_seconds;
use crate::conversation::{Conversation, ENABLE_THINKING, Prepared, ToolFields};
use crate::error::ApiError;
use crate::params::{FormatFields, SamplingFields};
use input::{Input, chat_format, chat_messages, chat_tool_choice, chat_tools, in_own_names};
use writer::Writer;

/// Value of `include` that would need log-probabilities.
const INCLUDE_LOGPROBS: &str = "message.output_text.logprobs";

/// Thinking effort; `none` turns thinking off, all other values leave the model's default.
const EFFORTS: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];

/// Fields that only responses have.
#[derive(Debug, Deserialize)]
pub(crate) struct ResponsesFields {
    model: Option<String>,
    input: Input,
    instructions: Option<String>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    text: Option<TextFields>,
    reasoning: Option<ReasoningFields>,
    /// A stored prompt.
    prompt: Option<Value>,
    include: Option<Vec<String>>,
    top_logprobs: Option<usize>,
    metadata: Option<Map<String, Value>>,
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// Form of the answer.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct TextFields {
    format: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct ReasoningFields {
    effort: Option<String>,
}

/// Answer.
pub(crate) async fn responses(
    State(state): State<AppState>,
    Json(fields, sampling, format): Json<ResponsesFields, SamplingFields, FormatFields>,
) -> Result<Response, ApiError> {
    let serving = Arc::clone(state.serving()?);
    serving.check_name(fields.model.as_deref())?;
    let is_streamed = sampling.is_streamed();
    let engine = serving.engine.clone();
    let (random_seed, id) = (state.random(0), state.new_id(""));
    let (Prepared { requests, turns, num_prompt_tokens }, response) = blocking(move || {
        let mut params = sampling.params(&serving.model.defaults, random_seed)?;
        params.max_tokens = sampling.max_tokens();
        sampling.num_answers(1, 1)?;
        let response = response_object(&serving, &fields, &params);
        let prepared = conversation(fields, format)?.prepare(&serving, &params, 1).map_err(in_own_names)?;
        Ok::<_, ApiError>((prepared, response))
    })
    .await??;
    let answers = engine.submit(requests, state.config.max_request_time).await;
    let mut answers = answers.map_err(in_own_names)?;
    let mut writer = Writer::new(id, response, turns, num_prompt_tokens);
    if is_streamed {
        let first = writer.begin();
        return Ok(answer::stream(answers, first, writer));
    }
    // The same as with a stream, so that both have the same result.
    while let Some((index, output)) = answers.next().await? {
        writer.take(index, &output)?;
    }
    writer.end();
    Ok(axum::Json(writer.response()).into_response())
}

/// The request as chat would have it.
///
/// # Errors
/// If it holds what cannot be honoured.
fn conversation(fields: ResponsesFields, mut format: FormatFields) -> Result<Conversation, ApiError> {
    refuse_what_is_not_honoured(&fields)?;
    if format.response_format.is_some() {
        return Err(ApiError::invalid("response_format", "its place here is `text.format`"));
    }
    format.response_format = fields.text.and_then(|text| text.format).map(chat_format).transpose()?;
    let mut template_kwargs = fields.chat_template_kwargs.unwrap_or_default();
    if fields.reasoning.and_then(|reasoning| reasoning.effort).is_some_and(|effort| effort == "none") {
        template_kwargs.entry(ENABLE_THINKING).or_insert(false.into());
    }
    Ok(Conversation {
        messages: chat_messages(fields.instructions, fields.input)?,
        tools: ToolFields {
            tools: chat_tools(fields.tools.unwrap_or_default())?,
            tool_choice: fields.tool_choice.map(chat_tool_choice).transpose()?,
            parallel_tool_calls: fields.parallel_tool_calls,
        },
        format,
        template_kwargs,
        add_generation_prompt: true,
    })
}

fn refuse_what_is_not_honoured(fields: &ResponsesFields) -> Result<(), ApiError> {
    let refuse = |param: &str, found: &dyn std::fmt::Display, allowed: &str| {
        Err(ApiError::invalid(param, format!("{found} is not supported; allowed: {allowed}")))
    };
    if let Some(prompt) = fields.prompt.as_ref().filter(|prompt| !prompt.is_null()) {
        return refuse("prompt", prompt, "null, as nothing is stored; send `instructions` and `input`");
    }
    if let Some(top) = fields.top_logprobs.filter(|&top| top > 0) {
        return refuse("top_logprobs", &top, "0; /v1/chat/completions has log-probabilities");
    }
    if fields.include.iter().flatten().any(|name| name == INCLUDE_LOGPROBS) {
        return refuse("include", &INCLUDE_LOGPROBS, "others; /v1/chat/completions has log-probabilities");
    }
    let effort = fields.reasoning.as_ref().and_then(|reasoning| reasoning.effort.as_ref());
    match effort.filter(|effort| !EFFORTS.contains(&effort.as_str())) {
        Some(effort) => refuse("reasoning.effort", effort, &EFFORTS.join(", ")),
        None => Ok(()),
    }
}

/// The response before it has begun: what was asked for, and what came of it where that was open.
fn response_object(serving: &Serving, fields: &ResponsesFields, params: &SamplingParams) -> Map<String, Value> {
    let format = fields.text.as_ref().and_then(|text| text.format.clone());
    let effort = fields.reasoning.as_ref().and_then(|reasoning| reasoning.effort.as_ref());
    let response = json!({
        "id": null,
        "object": "response",
        "created_at": unix_seconds(),
        "status": "in_progress",
        "background": false,
        "error": null,
        "incomplete_details": null,
        "instructions": fields.instructions,
        "max_output_tokens": params.max_tokens,
        "model": serving.model.name,
        "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls.unwrap_or(true),
        "previous_response_id": null,
        "reasoning": { "effort": effort, "summary": null },
        "store": false,
        "temperature": params.temperature,
        "text": { "format": format.unwrap_or_else(|| json!({ "type": "text" })) },
        "tool_choice": fields.tool_choice.clone().unwrap_or_else(|| "auto".into()),
        "tools": fields.tools.clone().unwrap_or_default(),
        "top_logprobs": 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": null,
        "metadata": fields.metadata.clone().unwrap_or_default(),
    });
    match response {
        Value::Object(response) => response,
        _ => Map::new(),
    }
}
