//! Engine outputs to responses, whole or streamed.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use moge_engine::{FinishReason, RowLogprobs, SequenceOutput};
use moge_model::Tokenizer;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::clock::unix_seconds;
use crate::engine_thread::ResponseStream;
use crate::error::ApiError;

/// Interval between comments that keep an idle stream open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Tokens of a request, as OpenAI counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Of each prompt once, however many answers it has.
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    /// Those of them that are thinking.
    pub(crate) reasoning_tokens: usize,
    /// Prompt tokens that were in the KV cache already.
    pub(crate) cached_tokens: usize,
}

impl Usage {
    /// Count the result of a step for an answer; `is_first_answer` of its prompt.
    pub(crate) fn add(&mut self, output: &SequenceOutput, is_first_answer: bool) {
        self.completion_tokens += output.sampled.len();
        // Every output of a sequence repeats it; the last one is counted.
        if is_first_answer && output.finish_reason.is_some() {
            self.cached_tokens += output.num_cached_tokens;
        }
    }

    /// OpenAI's `usage` of chat and completions.
    pub(crate) fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": { "cached_tokens": self.cached_tokens },
            "completion_tokens_details": { "reasoning_tokens": self.reasoning_tokens },
        })
    }

    /// OpenAI's `usage` of responses.
    pub(crate) fn to_responses_json(self) -> Value {
        json!({
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": { "cached_tokens": self.cached_tokens },
            "output_tokens": self.completion_tokens,
            "output_tokens_details": { "reasoning_tokens": self.reasoning_tokens },
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }
}

/// OpenAI's `finish_reason` of an answer.
///
/// # Errors
/// If the answer did not come to an end that it has a name for.
pub(crate) fn finish_reason(reason: FinishReason) -> Result<&'static str, ApiError> {
    match reason {
        FinishReason::Stop => Ok("stop"),
        FinishReason::Length => Ok("length"),
        FinishReason::Cancelled => Err(ApiError::Unavailable("the request was cancelled")),
        FinishReason::GrammarFailed => Err(ApiError::DeadEnd),
        FinishReason::NoFiniteLogit => Err(ApiError::Internal("the model's logits are not numbers".to_owned())),
    }
}

/// Log-probabilities of tokens as completions have them: parallel lists.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f64>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    /// Add a token that begins at character `offset` of the text; returns where the next one begins.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, row: &RowLogprobs, offset: usize) -> usize {
        let top = row.top.iter().map(|top| (tokenizer.token_text(top.token), finite(top.logprob).into()));
        let end = self.push_text(tokenizer.token_text(row.token), offset);
        self.token_logprobs.push(Some(finite(row.logprob)));
        self.top_logprobs.push(Some(top.collect()));
        end
    }

    /// Add a token that has no log-probability: the first one of a text.
    pub(crate) fn push_first(&mut self, text: String) -> usize {
        self.token_logprobs.push(None);
        self.top_logprobs.push(None);
        self.push_text(text, 0)
    }

    fn push_text(&mut self, text: String, offset: usize) -> usize {
        let end = offset + text.chars().count();
        self.tokens.push(text);
        self.text_offset.push(offset);
        end
    }

    /// Add what follows.
    pub(crate) fn append(&mut self, next: CompletionLogprobs) {
        self.tokens.extend(next.tokens);
        self.token_logprobs.extend(next.token_logprobs);
        self.top_logprobs.extend(next.top_logprobs);
        self.text_offset.extend(next.text_offset);
    }

    /// True if empty.
    pub(crate) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// The log-probability of a token as chat has it: an object.
pub(crate) fn chat_logprob(tokenizer: &Tokenizer, row: &RowLogprobs) -> Value {
    let entry = |token, logprob| {
        json!({
            "token": tokenizer.token_text(token),
            "logprob": finite(logprob),
            "bytes": tokenizer.token_bytes(token),
        })
    };
    let mut object = entry(row.token, row.logprob);
    object["top_logprobs"] = row.top.iter().map(|top| entry(top.token, top.logprob)).collect();
    object
}

/// JSON has no infinity; -9999 is OpenAI's value for an impossible token.
fn finite(logprob: f64) -> f64 {
    logprob.max(-9999.0)
}

/// Turns a request's outputs into the parts of a stream.
pub(crate) trait StreamEncoder: Send + 'static {
    /// Events for what sequence `index` has new.
    fn take(&mut self, index: usize, output: &SequenceOutput) -> Result<Vec<Event>, ApiError>;
    /// Events after the last output.
    fn end(&mut self) -> Vec<Event>;
    /// Events in place of all that would follow.
    fn fail(&mut self, error: &ApiError) -> Vec<Event>;
}

/// Common fields of all parts of an answer of chat or completions.
pub(crate) struct ResponseHead {
    pub(crate) id: String,
    model: String,
    created: u64,
    /// The last part of a stream is to say how many tokens there were.
    wants_usage: bool,
}

impl ResponseHead {
    /// Of an answer that begins now.
    pub(crate) fn new(id: String, model: &str, wants_usage: bool) -> ResponseHead {
        ResponseHead { id, model: model.to_owned(), created: unix_seconds(), wants_usage }
    }

    /// The whole answer.
    pub(crate) fn whole(&self, object: &str, choices: &[Value], usage: Usage) -> Value {
        let mut body = self.body(object, choices);
        body["usage"] = usage.to_json();
        body
    }

    /// A part of a stream.
    pub(crate) fn chunk(&self, object: &str, choice: Value) -> Event {
        let mut body = self.body(object, &[choice]);
        if self.wants_usage {
            body["usage"] = Value::Null;
        }
        data(&body)
    }

    /// Last events of a stream.
    pub(crate) fn end(&self, object: &str, usage: Usage) -> Vec<Event> {
        let usage = self.wants_usage.then(|| data(&self.whole(object, &[], usage)));
        usage.into_iter().chain([done()]).collect()
    }

    fn body(&self, object: &str, choices: &[Value]) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }
}

/// Last events of a stream of chat or completions that fails.
pub(crate) fn failed(error: &ApiError) -> Vec<Event> {
    vec![data(&error.body()), done()]
}

fn done() -> Event {
    Event::default().data("[DONE]")
}

fn data(value: &Value) -> Event {
    Event::default().data(value.to_string())
}

/// Answer with server-sent events. When the client goes away, `answers` are dropped and so cancelled.
pub(crate) fn stream(answers: ResponseStream, first: Vec<Event>, chunks: impl StreamEncoder) -> Response {
    let steps = stream::unfold(Some((answers, chunks)), async |state| {
        let (mut answers, mut chunks) = state?;
        let events = match answers.next().await {
            Ok(Some((index, output))) => match chunks.take(index, &output) {
                Ok(events) => return Some((events, Some((answers, chunks)))),
                Err(error) => chunks.fail(&error),
            },
            Ok(None) => chunks.end(),
            Err(error) => chunks.fail(&error),
        };
        Some((events, None))
    });
    let events = stream::iter([first]).chain(steps).flat_map(stream::iter).map(Ok::<Event, Infallible>);
    let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    // Proxies must forward events without buffering.
    response.headers_mut().insert("x-accel-buffering", axum::http::HeaderValue::from_static("no"));
    response
}
