//! `POST /v1/chat/completions`: the assistant's next turn.

use std::sync::Arc;

use axum::extract::State;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use moge_engine::{MAX_LOGPROBS, SequenceOutput};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::answer::{self, ResponseHead, StreamEncoder, Usage};
use crate::app::{AppState, Serving};
use crate::blocking::blocking;
use crate::body::Json;
use crate::conversation::{Conversation, Prepared, ToolFields, Turn, TurnDelta};
use crate::error::ApiError;
use crate::output::Delta;
use crate::params::{FormatFields, SamplingFields};

/// Prefix of answer ids.
const ID_PREFIX: &str = "chatcmpl-";

/// Object type of a part of a stream.
const CHUNK: &str = "chat.completion.chunk";

/// Fields that only chat has.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatFields {
    model: Option<String>,
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    chat_template_kwargs: Option<Map<String, Value>>,
    add_generation_prompt: Option<bool>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
}

/// Answer.
pub(crate) async fn chat_completions(
    State(state): State<AppState>,
    Json(fields, sampling, format): Json<ChatFields, SamplingFields, FormatFields>,
) -> Result<Response, ApiError> {
    let serving = Arc::clone(state.serving()?);
    serving.check_name(fields.model.as_deref())?;
    let is_streamed = sampling.is_streamed();
    let engine = serving.engine.clone();
    let (random_seed, max_answers) = (state.random(0), state.config.max_answers);
    let head = ResponseHead::new(state.new_id(ID_PREFIX), &serving.model.name, sampling.wants_usage());
    let wants_logprobs = fields.logprobs.unwrap_or(false);
    let prepare = move || prepare(&serving, fields, &sampling, format, random_seed, max_answers);
    let Prepared { requests, turns, num_prompt_tokens } = blocking(prepare).await??;
    let answers = engine.submit(requests, state.config.max_request_time).await;
    let mut answers = answers.map_err(|error| error.renamed("prompt", "messages"))?;
    let usage = Usage { prompt_tokens: num_prompt_tokens, ..Usage::default() };
    let mut writer = Writer { head, turns, usage, wants_logprobs };
    if is_streamed {
        let first = (0..writer.turns.len()).map(|index| writer.first(index)).collect();
        return Ok(answer::stream(answers, first, writer));
    }
    let mut whole: Vec<Whole> = writer.turns.iter().map(|_| Whole::default()).collect();
    while let Some((index, output)) = answers.next().await? {
        whole[index].append(writer.piece(index, &output)?);
    }
    let choices = whole.into_iter().enumerate().map(|(index, whole)| writer.choice(index, whole));
    let choices: Vec<Value> = choices.collect();
    Ok(axum::Json(writer.head.whole("chat.completion", &choices, writer.usage)).into_response())
}

fn prepare(
    serving: &Arc<Serving>,
    fields: ChatFields,
    sampling: &SamplingFields,
    format: FormatFields,
    random_seed: u64,
    max_answers: usize,
) -> Result<Prepared, ApiError> {
    let mut params = sampling.params(&serving.model.defaults, random_seed)?;
    params.max_tokens = sampling.max_tokens();
    if fields.top_logprobs.is_some() && fields.logprobs != Some(true) {
        return Err(ApiError::invalid("top_logprobs", "is allowed only with `logprobs: true`"));
    }
    // The engine has another name for it.
    if let Some(found) = fields.top_logprobs.filter(|&found| found > MAX_LOGPROBS) {
        let message = format!("{found} is not allowed, must be at most {MAX_LOGPROBS}");
        return Err(ApiError::invalid("top_logprobs", message));
    }
    params.logprobs = fields.logprobs.unwrap_or(false).then(|| fields.top_logprobs.unwrap_or(0));
    let n = sampling.num_answers(1, max_answers)?;
    let conversation = Conversation {
        messages: fields.messages,
        tools: ToolFields {
            tools: fields.tools.unwrap_or_default(),
            tool_choice: fields.tool_choice,
            parallel_tool_calls: fields.parallel_tool_calls,
        },
        format,
        template_kwargs: fields.chat_template_kwargs.unwrap_or_default(),
        add_generation_prompt: fields.add_generation_prompt.unwrap_or(true),
    };
    conversation.prepare(serving, &params, n)
}

/// An answer as it is when nothing streams.
#[derive(Default)]
struct Whole {
    reasoning: Option<String>,
    content: Option<String>,
    /// Names and arguments.
    tool_calls: Vec<(String, String)>,
    logprobs: Vec<Value>,
    finish_reason: Option<&'static str>,
}

impl Whole {
    fn append(&mut self, piece: TurnDelta) {
        for delta in piece.deltas {
            match delta {
                Delta::Reasoning(text) => self.reasoning.get_or_insert_default().push_str(&text),
                Delta::Content(text) => self.content.get_or_insert_default().push_str(&text),
                Delta::ToolCallStart { name, .. } => self.tool_calls.push((name, String::new())),
                Delta::ToolCallArguments { index, text } => self.tool_calls[index].1.push_str(&text),
            }
        }
        self.logprobs.extend(piece.logprobs);
        self.finish_reason = piece.finish_reason.or(self.finish_reason);
    }
}

struct Writer {
    head: ResponseHead,
    turns: Vec<Turn>,
    usage: Usage,
    wants_logprobs: bool,
}

impl Writer {
    fn piece(&mut self, index: usize, output: &SequenceOutput) -> Result<TurnDelta, ApiError> {
        self.usage.add(output, index == 0);
        let piece = self.turns[index].take(output)?;
        self.usage.reasoning_tokens += piece.num_reasoning_tokens;
        Ok(piece)
    }

    /// The id of a tool call.
    fn call_id(&self, choice: usize, call: usize) -> String {
        format!("call_{}_{choice}_{call}", self.head.id.trim_start_matches(ID_PREFIX))
    }

    /// A choice of an answer that does not stream.
    fn choice(&self, index: usize, whole: Whole) -> Value {
        let calls = whole.tool_calls.into_iter().enumerate().map(|(call, (name, arguments))| {
            let function = json!({ "name": name, "arguments": arguments });
            json!({ "id": self.call_id(index, call), "type": "function", "function": function })
        });
        let calls: Vec<Value> = calls.collect();
        let content = if calls.is_empty() { Some(whole.content.unwrap_or_default()) } else { whole.content };
        let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
        if let Some(reasoning) = whole.reasoning {
            message["reasoning_content"] = reasoning.into();
        }
        if !calls.is_empty() {
            message["tool_calls"] = calls.into();
        }
        let mut choice = Map::new();
        choice.insert("index".to_owned(), index.into());
        choice.insert("message".to_owned(), message);
        choice.insert("logprobs".to_owned(), self.logprobs(&whole.logprobs, true));
        choice.insert("finish_reason".to_owned(), whole.finish_reason.into());
        self.turns[index].write_expert_ids(&mut choice);
        Value::Object(choice)
    }

    fn logprobs(&self, content: &[Value], is_last: bool) -> Value {
        if self.wants_logprobs && (is_last || !content.is_empty()) {
            Value::Object(Map::from_iter([("content".to_owned(), content.into())]))
        } else {
            Value::Null
        }
    }

    /// The first event of a streamed choice.
    fn first(&self, index: usize) -> Event {
        self.chunk(index, &json!({ "role": "assistant", "content": "" }), &[], None)
    }

    fn chunk(&self, index: usize, delta: &Value, logprobs: &[Value], finish_reason: Option<&str>) -> Event {
        let mut choice = Map::new();
        choice.insert("index".to_owned(), index.into());
        choice.insert("delta".to_owned(), delta.clone());
        choice.insert("logprobs".to_owned(), self.logprobs(logprobs, false));
        choice.insert("finish_reason".to_owned(), finish_reason.into());
        if finish_reason.is_some() {
            self.turns[index].write_expert_ids(&mut choice);
        }
        self.head.chunk(CHUNK, Value::Object(choice))
    }

    fn delta(&self, choice: usize, delta: Delta) -> Value {
        match delta {
            Delta::Reasoning(text) => json!({ "reasoning_content": text }),
            Delta::Content(text) => json!({ "content": text }),
            Delta::ToolCallStart { index, name } => {
                let function = json!({ "name": name, "arguments": "" });
                let id = self.call_id(choice, index);
                json!({ "tool_calls": [{ "index": index, "id": id, "type": "function", "function": function }] })
            }
            Delta::ToolCallArguments { index, text } => {
                json!({ "tool_calls": [{ "index": index, "function": { "arguments": text } }] })
            }
        }
    }
}

impl StreamEncoder for Writer {
    fn take(&mut self, index: usize, output: &SequenceOutput) -> Result<Vec<Event>, ApiError> {
        let TurnDelta { deltas, mut logprobs, finish_reason, .. } = self.piece(index, output)?;
        let mut events = Vec::new();
        for delta in deltas {
            let delta = self.delta(index, delta);
            events.push(self.chunk(index, &delta, &std::mem::take(&mut logprobs), None));
        }
        if finish_reason.is_some() {
            events.push(self.chunk(index, &json!({}), &logprobs, finish_reason));
        }
        Ok(events)
    }

    fn end(&mut self) -> Vec<Event> {
        self.head.end(CHUNK, self.usage)
    }

    fn fail(&mut self, error: &ApiError) -> Vec<Event> {
        answer::failed(error)
    }
}
