//! Messages of a chat, and their prompt.

use std::path::Path;

use anyhow::{Context, Result, bail};
use moge_model::{ChatRequest, ChatTemplate, Thinking};
use serde_json::{Value, json};

use crate::input::{read_text_file, without_byte_order_mark};

/// A chat so far.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    messages: Vec<Value>,
    tools: Vec<Value>,
    /// Thinking before the answer.
    pub(crate) thinking: Thinking,
}

impl Conversation {
    /// Read a JSON list of messages, or an object with `messages` and perhaps `tools`.
    pub(crate) fn from_file(file: &Path) -> Result<Conversation> {
        let name = file.display();
        let text = read_text_file(file)?;
        let value: Value =
            serde_json::from_str(without_byte_order_mark(&text)).with_context(|| format!("{name}: not JSON"))?;
        let (messages, tools) = match value {
            Value::Object(mut fields) => (fields.remove("messages"), fields.remove("tools")),
            list => (Some(list), None),
        };
        let Some(Value::Array(messages)) = messages else {
            bail!("{name}: neither a list of messages nor an object with \"messages\"");
        };
        let tools = match tools {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(tools)) => tools,
            Some(_) => bail!("{name}: tools: not a list"),
        };
        Ok(Conversation { messages, tools, thinking: Thinking::Default })
    }

    /// Say something in a role.
    pub(crate) fn push(&mut self, role: &str, content: &str) {
        self.messages.push(json!({ "role": role, "content": content }));
    }

    /// Replace the system message; an empty text removes it.
    pub(crate) fn set_system(&mut self, content: &str) {
        if self.messages.first().is_some_and(|first| first["role"] == "system") {
            self.messages.remove(0);
        }
        if !content.is_empty() {
            self.messages.insert(0, json!({ "role": "system", "content": content }));
        }
    }

    /// Forget everything but the system message.
    pub(crate) fn reset(&mut self) {
        self.messages.retain(|message| message["role"] == "system");
    }

    /// Take the last message back.
    pub(crate) fn pop(&mut self) {
        self.messages.pop();
    }

    /// The text that the model is to continue with its answer.
    pub(crate) fn prompt(&self, template: &ChatTemplate) -> Result<String> {
        let request = ChatRequest {
            messages: &self.messages,
            tools: &self.tools,
            add_generation_prompt: true,
            thinking: self.thinking,
            ..ChatRequest::default()
        };
        Ok(template.render(&request)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_keeps_the_system_message_and_an_empty_one_removes_it() {
        let mut conversation = Conversation::default();
        conversation.push("user", "a");
        conversation.set_system("x");
        conversation.set_system("y");
        conversation.push("assistant", "b");
        assert_eq!(conversation.messages.len(), 3);
        conversation.reset();
        assert_eq!(conversation.messages, [json!({ "role": "system", "content": "y" })]);
        conversation.set_system("");
        assert!(conversation.messages.is_empty());
    }
}
