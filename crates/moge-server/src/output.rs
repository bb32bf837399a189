//! Incremental parser of the model's output: reasoning, answer and tool calls.
//!
//! The text shows the model's special tokens as they stand, so everything is found in text:
//!
//! | network | thinking | tool calls |
//! |---|---|---|
//! | Pangu | `[unused16]..[unused17]` | `[unused11][{"name": .., "arguments": {..}}, ..][unused12]` |
//! | Qwen3 | `<think>..</think>` | `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, repeated |
//! | GLM-4 | `<think>..</think>` | a turn of its own: the name, a line break, the object; `<\|assistant\|>` before the next |
//!
//! Only what stands at the beginning is thinking; later markers of thinking are text, as in vLLM's parsers, which
//! call everything after the first end marker content. Unlike there, text before a late marker is not dropped.
//! Whitespace around the thinking and between tool calls is layout and belongs to nothing.
//!
//! Every character is looked at once, and none is looked at again when a supposed tool call turns out to be none: the
//! time is linear in the text whatever it holds.

mod call;
mod delta;

use moge_model::{Architecture, ToolFormat, thinking_delimiters};

use call::{CallParser, Progress};
pub(crate) use call::{MAX_NAME_LEN, is_name_char};
pub(crate) use delta::Delta;
use delta::Deltas;

/// Parser of one answer. It holds back text that may be the beginning of a marker, and a tool call whose name is not
/// known yet.
pub(crate) struct OutputParser {
    thinking: (&'static str, &'static str),
    architecture: Architecture,
    /// `None` if tool calls are ordinary text.
    tool_format: Option<ToolFormat>,
    place: Place,
    /// Whitespace that may be layout.
    blank: String,
    /// Possible beginning of a marker, at least one character shorter than it.
    candidate: String,
    deltas: Deltas,
}

/// Position of the next character in the answer.
enum Place {
    /// After nothing but whitespace.
    Start,
    /// `begun`: there has been more than whitespace.
    Thinking {
        begun: bool,
    },
    AfterThinking,
    Content,
    Call(CallParser),
    /// `may_close`: the marker that ends the call has not been seen.
    AfterCall {
        may_close: bool,
    },
}

#[derive(Clone, Copy)]
enum Marker {
    ThinkingOpen,
    ThinkingClose,
    ToolOpen,
    ToolClose,
}

impl OutputParser {
    /// For an answer of this network. `starts_in_thinking`: the prompt has opened the thinking. `tools_allowed`: the
    /// request has tools and lets the model call them; otherwise the markers of tool calls are text like any other.
    pub(crate) fn new(architecture: Architecture, starts_in_thinking: bool, tools_allowed: bool) -> OutputParser {
        OutputParser {
            thinking: thinking_delimiters(architecture),
            architecture,
            tool_format: tools_allowed.then(|| architecture.tool_format()),
            place: if starts_in_thinking { Place::Thinking { begun: false } } else { Place::Start },
            blank: String::new(),
            candidate: String::new(),
            deltas: Deltas::default(),
        }
    }

    /// True if what comes next is thinking, as far as it is certain.
    pub(crate) fn is_thinking(&self) -> bool {
        matches!(self.place, Place::Thinking { .. })
    }

    /// Parse further text; returns what is now certain. The concatenated deltas do not depend on how the text is cut.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Delta> {
        for c in text.chars() {
            self.step(c);
        }
        std::mem::take(&mut self.deltas.list)
    }

    /// End the text; returns what was held back. A tool call without a name and the beginning of its arguments is content.
    pub(crate) fn finish(&mut self) -> Vec<Delta> {
        if let Place::Call(call) = &mut self.place {
            let held = call.take_held();
            // After a first call of a list, whitespace is layout.
            if call.has_announced() && held.trim().is_empty() {
                return std::mem::take(&mut self.deltas.list);
            }
            self.write(&held);
        } else if !self.candidate.is_empty() {
            let candidate = std::mem::take(&mut self.candidate);
            self.write(&candidate);
        } else if matches!(self.place, Place::Start) {
            self.write("");
        }
        std::mem::take(&mut self.deltas.list)
    }

    fn step(&mut self, c: char) {
        if let Place::Call(call) = &mut self.place {
            match call.step(c, &mut self.deltas) {
                Progress::More => return,
                Progress::Done => {
                    let may_close = self.tool_format.and_then(ToolFormat::close).is_some();
                    self.place = Place::AfterCall { may_close };
                    return;
                }
                Progress::Failed => {
                    let held = call.take_held();
                    self.write(&held);
                }
            }
        }
        self.step_text(c);
    }

    /// A character outside tool calls.
    fn step_text(&mut self, c: char) {
        if self.candidate.is_empty() {
            if c.is_ascii_whitespace() && !matches!(self.place, Place::Content) {
                return self.hold_whitespace(c);
            }
            if self.begins_unmarked_call(c) {
                return self.open_call(c.encode_utf8(&mut [0; 4]));
            }
            // All markers of a network begin alike.
            if !self.thinking.0.starts_with(c) {
                return self.write(c.encode_utf8(&mut [0; 4]));
            }
        }
        self.candidate.push(c);
        let candidates = self.markers().into_iter().flatten().filter(|(_, text)| text.starts_with(&self.candidate));
        match candidates.min_by_key(|(_, text)| text.len()) {
            Some((marker, text)) if text.len() == self.candidate.len() => {
                self.candidate.clear();
                self.enter(marker, text);
            }
            Some(_) => {}
            None => {
                self.candidate.pop();
                if self.candidate.is_empty() {
                    return self.write(c.encode_utf8(&mut [0; 4]));
                }
                let candidate = std::mem::take(&mut self.candidate);
                self.write(&candidate);
                // The first character of a marker stands nowhere else in one, so only this one can begin another.
                self.step_text(c);
            }
        }
    }

    /// The markers that mean something here.
    fn markers(&self) -> [Option<(Marker, &'static str)>; 2] {
        let (thinking_open, thinking_close) = self.thinking;
        let tool_open = self.tool_format.map(|format| (Marker::ToolOpen, format.open()));
        let tool_close = self.tool_format.and_then(ToolFormat::close).map(|text| (Marker::ToolClose, text));
        match self.place {
            Place::Start => [Some((Marker::ThinkingOpen, thinking_open)), tool_open],
            // A model may open the thinking although the prompt has done so.
            Place::Thinking { begun: false } => {
                [Some((Marker::ThinkingOpen, thinking_open)), Some((Marker::ThinkingClose, thinking_close))]
            }
            Place::Thinking { begun: true } => [Some((Marker::ThinkingClose, thinking_close)), None],
            Place::AfterCall { may_close: true } => [tool_open, tool_close],
            Place::AfterThinking | Place::Content | Place::Call(_) | Place::AfterCall { may_close: false } => {
                [tool_open, None]
            }
        }
    }

    fn enter(&mut self, marker: Marker, text: &str) {
        match marker {
            Marker::ThinkingOpen => self.place = Place::Thinking { begun: false },
            Marker::ThinkingClose => self.place = Place::AfterThinking,
            Marker::ToolOpen => return self.open_call(text),
            Marker::ToolClose => self.place = Place::AfterCall { may_close: false },
        }
        self.blank.clear();
    }

    /// GLM-4 calls a tool where a turn begins, without a marker.
    fn begins_unmarked_call(&self, c: char) -> bool {
        let at_start = matches!(self.place, Place::Start | Place::AfterThinking | Place::AfterCall { .. });
        self.tool_format == Some(ToolFormat::Glm4) && at_start && is_name_char(c)
    }

    /// A possible call begins with this text.
    fn open_call(&mut self, text: &str) {
        let Some(format) = self.tool_format else { return };
        let mut held = std::mem::take(&mut self.blank);
        held.push_str(text);
        let name_start = if text == format.open() { held.len() } else { held.len() - text.len() };
        self.place = Place::Call(CallParser::new(format, held, name_start));
    }

    fn hold_whitespace(&mut self, c: char) {
        let is_layout = match self.place {
            // GLM-4 begins a turn's text on the line after the speaker's name.
            Place::Start => self.architecture.begins_on_new_line() && c == '\n' && self.blank.is_empty(),
            Place::AfterThinking | Place::Thinking { begun: false } => true,
            Place::Thinking { begun: true } | Place::Content | Place::Call(_) | Place::AfterCall { .. } => false,
        };
        if !is_layout {
            self.blank.push(c);
        }
    }

    /// Write text that is not a marker, after the whitespace that was held back.
    fn write(&mut self, text: &str) {
        let blank = std::mem::take(&mut self.blank);
        if matches!(self.place, Place::Thinking { .. }) {
            self.deltas.reasoning(&blank);
            self.deltas.reasoning(text);
            self.place = Place::Thinking { begun: true };
            return;
        }
        self.deltas.content(&blank);
        self.deltas.content(text);
        self.place = Place::Content;
    }
}

#[cfg(test)]
mod tests;
