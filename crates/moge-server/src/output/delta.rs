//! Parts of an answer, and their accumulation.

/// A further part of an answer. All parts of one kind, concatenated, are that kind's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Delta {
    /// Text of the model's thinking.
    Reasoning(String),
    /// Text of the answer.
    Content(String),
    /// A tool call begins.
    ToolCallStart {
        /// Index of the call, from 0.
        index: usize,
        /// The function that is called.
        name: String,
    },
    /// Text of a call's arguments: an object with its brackets in order, as the model wrote it, perhaps cut off.
    ToolCallArguments {
        /// Index of the call, from 0; it has begun.
        index: usize,
        /// The text.
        text: String,
    },
}

/// Deltas to hand out, neighbours of one kind as one.
#[derive(Default)]
pub(super) struct Deltas {
    pub(super) list: Vec<Delta>,
    num_calls: usize,
}

impl Deltas {
    pub(super) fn reasoning(&mut self, text: &str) {
        match self.list.last_mut() {
            _ if text.is_empty() => {}
            Some(Delta::Reasoning(last)) => last.push_str(text),
            _ => self.list.push(Delta::Reasoning(text.to_owned())),
        }
    }

    pub(super) fn content(&mut self, text: &str) {
        match self.list.last_mut() {
            _ if text.is_empty() => {}
            Some(Delta::Content(last)) => last.push_str(text),
            _ => self.list.push(Delta::Content(text.to_owned())),
        }
    }

    pub(super) fn call(&mut self, name: String) {
        self.list.push(Delta::ToolCallStart { index: self.num_calls, name });
        self.num_calls += 1;
    }

    /// Arguments of the last call.
    pub(super) fn arguments(&mut self, text: &str) {
        match self.list.last_mut() {
            Some(Delta::ToolCallArguments { text: last, .. }) => last.push_str(text),
            _ => self.list.push(Delta::ToolCallArguments { index: self.num_calls - 1, text: text.to_owned() }),
        }
    }
}
