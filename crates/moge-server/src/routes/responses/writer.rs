//! A response while it is written: its items, and the events that tell of them.

use axum::response::sse::Event;
use moge_engine::SequenceOutput;
use serde_json::{Map, Value, json};

use crate::answer::{StreamEncoder, Usage};
use crate::conversation::Turn;
use crate::error::ApiError;
use crate::output::Delta;

/// Collects the response; what it tells on the way is the stream of it.
pub(super) struct Writer {
    /// Common part of the ids.
    id: String,
    /// As OpenAI has it, but for its `output`.
    response: Map<String, Value>,
    /// One.
    turns: Vec<Turn>,
    usage: Usage,
    /// All but the last are complete.
    items: Vec<Item>,
    /// Events that have been told so far.
    num_events: usize,
    /// Events that are to be sent.
    events: Vec<Event>,
}

struct Item {
    content: Content,
    status: &'static str,
}

enum Content {
    Reasoning(String),
    Message(String),
    FunctionCall { name: String, arguments: String },
}

const IN_PROGRESS: &str = "in_progress";
const COMPLETED: &str = "completed";
const INCOMPLETE: &str = "incomplete";
const FAILED: &str = "failed";

impl Content {
    /// The part of the item that holds its text; a call has none.
    fn part(&self) -> Option<Value> {
        match self {
            Content::Reasoning(text) => Some(json!({ "type": "reasoning_text", "text": text })),
            Content::Message(text) => {
                Some(json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] }))
            }
            Content::FunctionCall { .. } => None,
        }
    }
}

impl Writer {
    /// To fill `response`; `id` without its prefix.
    pub(super) fn new(
        id: String,
        mut response: Map<String, Value>,
        turns: Vec<Turn>,
        num_prompt_tokens: usize,
    ) -> Writer {
        response.insert("id".to_owned(), format!("resp_{id}").into());
        let usage = Usage { prompt_tokens: num_prompt_tokens, ..Usage::default() };
        Writer { id, response, turns, usage, items: Vec::new(), num_events: 0, events: Vec::new() }
    }

    /// The events before the first output.
    pub(super) fn begin(&mut self) -> Vec<Event> {
        self.tell("response.created", json!({ "response": self.response() }));
        self.tell_of_response();
        std::mem::take(&mut self.events)
    }

    /// The response as it stands.
    pub(super) fn response(&self) -> Value {
        let mut response = self.response.clone();
        response.insert("output".to_owned(), (0..self.items.len()).map(|index| self.item(index)).collect());
        Value::Object(response)
    }

    /// Tell the response's status.
    fn tell_of_response(&mut self) {
        let status = self.response["status"].as_str().unwrap_or(FAILED);
        self.tell(&format!("response.{status}"), json!({ "response": self.response() }));
    }

    fn tell(&mut self, kind: &str, fields: Value) {
        let mut data = json!({ "type": kind, "sequence_number": self.num_events });
        extend(&mut data, fields);
        self.num_events += 1;
        self.events.push(Event::default().event(kind).data(data.to_string()));
    }

    /// Tell something of the last item or, if that has one, of the part that holds its text.
    fn tell_of_item(&mut self, kind: &str, fields: Value) {
        let index = self.items.len() - 1;
        let mut all = json!({ "item_id": self.item_id(index), "output_index": index });
        if !matches!(self.items[index].content, Content::FunctionCall { .. }) {
            all["content_index"] = 0.into();
        }
        extend(&mut all, fields);
        self.tell(kind, all);
    }

    fn item_id(&self, index: usize) -> String {
        let prefix = match self.items[index].content {
            Content::Reasoning(_) => "rs",
            Content::Message(_) => "msg",
            Content::FunctionCall { .. } => "fc",
        };
        format!("{prefix}_{}_{index}", self.id)
    }

    fn item(&self, index: usize) -> Value {
        let id = self.item_id(index);
        let Item { content, status } = &self.items[index];
        // An item begins without its part.
        let parts: Vec<Value> = content.part().into_iter().filter(|_| *status != IN_PROGRESS).collect();
        match content {
            Content::Reasoning(_) => {
                json!({ "id": id, "type": "reasoning", "summary": [], "content": parts, "status": status })
            }
            Content::Message(_) => {
                json!({ "id": id, "type": "message", "role": "assistant", "content": parts, "status": status })
            }
            Content::FunctionCall { name, arguments } => json!({
                "id": id,
                "type": "function_call",
                "call_id": format!("call_{}_{index}", self.id),
                "name": name,
                "arguments": arguments,
                "status": status,
            }),
        }
    }

    fn add(&mut self, delta: Delta) {
        match delta {
            Delta::Reasoning(text) => {
                if !matches!(self.open(), Some(Content::Reasoning(_))) {
                    self.begin_item(Content::Reasoning(String::new()));
                }
                self.add_text(&text);
            }
            Delta::Content(text) => {
                if !matches!(self.open(), Some(Content::Message(_))) {
                    self.begin_item(Content::Message(String::new()));
                }
                self.add_text(&text);
            }
            Delta::ToolCallStart { name, .. } => {
                self.begin_item(Content::FunctionCall { name, arguments: String::new() });
            }
            Delta::ToolCallArguments { text, .. } => self.add_text(&text),
        }
    }

    /// Contents so far of the item being written.
    fn open(&self) -> Option<&Content> {
        self.items.last().filter(|item| item.status == IN_PROGRESS).map(|item| &item.content)
    }

    fn begin_item(&mut self, content: Content) {
        self.end_item(COMPLETED);
        let part = content.part();
        self.items.push(Item { content, status: IN_PROGRESS });
        let index = self.items.len() - 1;
        self.tell("response.output_item.added", json!({ "output_index": index, "item": self.item(index) }));
        if let Some(part) = part {
            self.tell_of_item("response.content_part.added", json!({ "part": part }));
        }
    }

    fn add_text(&mut self, more: &str) {
        let Some(Item { content, .. }) = self.items.last_mut() else { return };
        let (kind, text, fields) = match content {
            Content::Reasoning(text) => ("response.reasoning_text.delta", text, json!({ "delta": more })),
            Content::Message(text) => ("response.output_text.delta", text, json!({ "delta": more, "logprobs": [] })),
            Content::FunctionCall { arguments, .. } => {
                ("response.function_call_arguments.delta", arguments, json!({ "delta": more }))
            }
        };
        text.push_str(more);
        self.tell_of_item(kind, fields);
    }

    /// The item that is being written, if any, has come to its end.
    fn end_item(&mut self, status: &'static str) {
        let Some(content) = self.open() else { return };
        let part = content.part();
        let (kind, fields) = match content {
            Content::Reasoning(text) => ("response.reasoning_text.done", json!({ "text": text })),
            Content::Message(text) => ("response.output_text.done", json!({ "text": text, "logprobs": [] })),
            Content::FunctionCall { name, arguments } => {
                ("response.function_call_arguments.done", json!({ "name": name, "arguments": arguments }))
            }
        };
        self.tell_of_item(kind, fields);
        if let Some(part) = part {
            self.tell_of_item("response.content_part.done", json!({ "part": part }));
        }
        let index = self.items.len() - 1;
        self.items[index].status = status;
        self.tell("response.output_item.done", json!({ "output_index": index, "item": self.item(index) }));
    }

    /// The response has come to its end, which the last event is to say.
    fn end_response(&mut self, status: &'static str) {
        let is_incomplete = status == INCOMPLETE;
        self.end_item(if is_incomplete || status == FAILED { INCOMPLETE } else { COMPLETED });
        self.response.insert("status".to_owned(), status.into());
        if is_incomplete {
            self.response.insert("incomplete_details".to_owned(), json!({ "reason": "max_output_tokens" }));
        }
    }
}

/// Add the fields of one object to those of another.
fn extend(object: &mut Value, more: Value) {
    if let (Value::Object(object), Value::Object(more)) = (object, more) {
        object.extend(more);
    }
}

impl StreamEncoder for Writer {
    fn take(&mut self, index: usize, output: &SequenceOutput) -> Result<Vec<Event>, ApiError> {
        self.usage.add(output, true);
        let piece = self.turns[index].take(output)?;
        self.usage.reasoning_tokens += piece.num_reasoning_tokens;
        for delta in piece.deltas {
            self.add(delta);
        }
        if let Some(reason) = piece.finish_reason {
            self.turns[index].write_expert_ids(&mut self.response);
            self.response.insert("usage".to_owned(), self.usage.to_responses_json());
            self.end_response(if reason == "length" { INCOMPLETE } else { COMPLETED });
        }
        Ok(std::mem::take(&mut self.events))
    }

    fn end(&mut self) -> Vec<Event> {
        self.tell_of_response();
        std::mem::take(&mut self.events)
    }

    fn fail(&mut self, error: &ApiError) -> Vec<Event> {
        self.end_response(FAILED);
        let message = error.to_string();
        let code = "server_error";
        self.response.insert("error".to_owned(), json!({ "code": code, "message": message }));
        self.tell("error", json!({ "code": code, "message": message, "param": null }));
        self.tell_of_response();
        std::mem::take(&mut self.events)
    }
}
