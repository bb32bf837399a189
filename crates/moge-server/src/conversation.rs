//! The common part of chat and responses: messages to prompts, model output to reasoning, content and tool calls.

use std::sync::Arc;

use moge_engine::{FinishReason, Request, SamplingParams, SequenceOutput};
use moge_model::{ChatRequest, Prefix, Thinking, TokenId, thinking_delimiters};
use serde_json::{Map, Value};

use crate::answer::{chat_logprob, finish_reason};
use crate::app::Serving;
use crate::error::ApiError;
use crate::expert_ids::ExpertIds;
use crate::output::{Delta, OutputParser};
use crate::params::FormatFields;
use crate::structured::tools::{ToolChoice, tool_choice, tools};
use crate::structured::{ThinkingPhase, grammar};

/// The variable of templates that turns thinking on or off.
pub(crate) const ENABLE_THINKING: &str = "enable_thinking";

/// Input of a conversation's next turn.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conversation {
    /// As OpenAI's chat has them.
    pub(crate) messages: Vec<Value>,
    pub(crate) tools: ToolFields,
    pub(crate) format: FormatFields,
    /// Variables for the template.
    pub(crate) template_kwargs: Map<String, Value>,
    /// End with what begins the assistant's turn.
    pub(crate) add_generation_prompt: bool,
}

/// Tools that the model may call.
#[derive(Clone, Debug, Default)]
pub(crate) struct ToolFields {
    /// As OpenAI's chat has them.
    pub(crate) tools: Vec<Value>,
    pub(crate) tool_choice: Option<Value>,
    /// True if a required call may be followed by others.
    pub(crate) parallel_tool_calls: Option<bool>,
}

/// An assistant's turn while it is written.
pub(crate) struct Turn {
    serving: Arc<Serving>,
    parser: OutputParser,
    /// Of tokens whose text has not come out yet.
    logprobs: Vec<Value>,
    has_tool_call: bool,
    expert_ids: Option<ExpertIds>,
}

/// New parts of a turn from one engine output.
#[derive(Debug, Default)]
pub(crate) struct TurnDelta {
    pub(crate) deltas: Vec<Delta>,
    /// Tokens of the output that belong to the thinking, its marks among it.
    pub(crate) num_reasoning_tokens: usize,
    /// Log-probabilities of the tokens, if asked for.
    pub(crate) logprobs: Vec<Value>,
    /// `stop`, `length` or `tool_calls`.
    pub(crate) finish_reason: Option<&'static str>,
}

/// A prompt, and what to do with it.
pub(crate) struct Prepared {
    /// One for each answer.
    pub(crate) requests: Vec<Request>,
    /// Parallel to `requests`.
    pub(crate) turns: Vec<Turn>,
    pub(crate) num_prompt_tokens: usize,
}

impl Conversation {
    /// The prompt's tokens.
    ///
    /// # Errors
    /// If a message is not valid, or the template refuses them.
    pub(crate) fn prompt(&self, serving: &Serving) -> Result<Vec<TokenId>, ApiError> {
        let template = match &serving.model.chat_template {
            Ok(template) => template,
            Err(error) => return Err(ApiError::invalid("messages", error.to_string())),
        };
        let mut kwargs = self.template_kwargs.clone();
        kwargs.shift_remove(ENABLE_THINKING);
        let thinking = self.thinking()?;
        let messages = self.messages.iter().enumerate().map(|(index, message)| for_template(index, message));
        let messages: Vec<Value> = messages.collect::<Result<_, ApiError>>()?;
        let is_none = self.tools.tool_choice.as_ref().is_some_and(|choice| choice == "none");
        let tools = if is_none { &[][..] } else { &self.tools.tools };
        let add_generation_prompt = self.add_generation_prompt;
        let request = ChatRequest { messages: &messages, tools, add_generation_prompt, thinking, kwargs };
        let text = template.render(&request)?;
        Ok(serving.model.tokenizer.encode(&text, Prefix::Add)?)
    }

    /// The engine's requests for `n` answers.
    ///
    /// # Errors
    /// As [`Conversation::prompt`], and if tools or the form of the answer are not allowed.
    pub(crate) fn prepare(
        &self,
        serving: &Arc<Serving>,
        params: &SamplingParams,
        n: usize,
    ) -> Result<Prepared, ApiError> {
        let tools = tools(&self.tools.tools)?;
        let choice = tool_choice(self.tools.tool_choice.as_ref(), &tools)?;
        let prompt = self.prompt(serving)?;
        let model = &serving.model;
        let starts_in_thinking = starts_in_thinking(serving, &prompt);
        let thinking = match self.thinking()? {
            _ if starts_in_thinking => ThinkingPhase::Open,
            Thinking::Off => ThinkingPhase::Absent,
            Thinking::Default | Thinking::On => ThinkingPhase::MayOpen,
        };
        let parallel = self.tools.parallel_tool_calls.unwrap_or(true);
        let structured = self.format.structured();
        let lark = grammar(&structured, &tools, choice, parallel, &serving.markers, thinking)?;
        let field = match choice {
            ToolChoice::Required | ToolChoice::Named(_) => "tools",
            ToolChoice::None | ToolChoice::Auto => self.format.field().unwrap_or("tools"),
        };
        let grammar = model.compile(field, lark)?;
        let request = Request { prompt, sampling: params.clone(), grammar };
        // Before it is copied for every answer.
        let valid = request.validate(model.config.vocab_size, model.max_model_len);
        valid.map_err(|error| ApiError::from(error).renamed("prompt", "messages"))?;
        let num_prompt_tokens = request.prompt.len();
        let tools_allowed = choice != ToolChoice::None;
        let (requests, turns) = (0..n)
            .map(|answer| {
                let mut request = request.clone();
                request.sampling.seed = params.seed.wrapping_add(answer as u64);
                let turn = Turn {
                    serving: Arc::clone(serving),
                    parser: OutputParser::new(model.config.architecture, starts_in_thinking, tools_allowed),
                    logprobs: Vec::new(),
                    has_tool_call: false,
                    expert_ids: model.expert_ids(params),
                };
                (request, turn)
            })
            .unzip();
        Ok(Prepared { requests, turns, num_prompt_tokens })
    }

    /// The request's choice about thinking.
    fn thinking(&self) -> Result<Thinking, ApiError> {
        match self.template_kwargs.get(ENABLE_THINKING) {
            None | Some(Value::Null) => Ok(Thinking::Default),
            Some(Value::Bool(true)) => Ok(Thinking::On),
            Some(Value::Bool(false)) => Ok(Thinking::Off),
            Some(other) => {
                let message = format!("{other} is not allowed, must be true or false");
                Err(ApiError::invalid("chat_template_kwargs.enable_thinking", message))
            }
        }
    }
}

impl Turn {
    /// Take in a step's output.
    ///
    /// # Errors
    /// If the sequence came to no proper end.
    pub(crate) fn take(&mut self, output: &SequenceOutput) -> Result<TurnDelta, ApiError> {
        if let Some(expert_ids) = &mut self.expert_ids {
            expert_ids.push(&output.expert_ids);
        }
        let rows = output.sampled.iter().filter_map(|sampled| sampled.logprobs.as_ref());
        self.logprobs.extend(rows.map(|row| chat_logprob(&self.serving.model.tokenizer, row)));
        let mut deltas = Vec::new();
        let mut num_reasoning_tokens = 0;
        for text in output.token_texts() {
            let was_thinking = self.parser.is_thinking();
            deltas.extend(self.parser.push(text));
            num_reasoning_tokens += usize::from(was_thinking || self.parser.is_thinking());
        }
        deltas.extend(self.parser.push(output.last_text()));
        let mut reason = None;
        if let Some(finish) = output.finish_reason {
            deltas.extend(self.parser.finish());
            reason = Some(finish_reason(finish)?);
        }
        self.has_tool_call |= deltas.iter().any(|delta| matches!(delta, Delta::ToolCallStart { .. }));
        if self.has_tool_call && output.finish_reason == Some(FinishReason::Stop) {
            reason = Some("tool_calls");
        }
        let is_news = !deltas.is_empty() || reason.is_some();
        let logprobs = if is_news { std::mem::take(&mut self.logprobs) } else { Vec::new() };
        Ok(TurnDelta { deltas, num_reasoning_tokens, logprobs, finish_reason: reason })
    }

    /// Write the experts that were taken, if asked for, into the finished choice.
    pub(crate) fn write_expert_ids(&self, choice: &mut Map<String, Value>) {
        if let Some(expert_ids) = &self.expert_ids {
            expert_ids.write(choice);
        }
    }
}

/// True if the prompt leaves the model inside its thinking.
fn starts_in_thinking(serving: &Serving, prompt: &[TokenId]) -> bool {
    /// Tokens before the answer among which the template may open the thinking.
    const MAX_TOKENS: usize = 16;
    let tail = &prompt[prompt.len().saturating_sub(MAX_TOKENS)..];
    let text = serving.model.tokenizer.decode(tail);
    let (open, close) = thinking_delimiters(serving.model.config.architecture);
    text.rfind(open) > text.rfind(close)
}

/// A message as templates expect it: texts only, known roles, and arguments of tool calls as objects.
fn for_template(index: usize, message: &Value) -> Result<Value, ApiError> {
    let mut message = message.clone();
    if message["role"] == "developer" {
        message["role"] = "system".into();
    }
    if let Some(parts) = message.get("content").and_then(Value::as_array) {
        message["content"] = joined_texts(&format!("messages[{index}].content"), parts)?.into();
    }
    if let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut) {
        for call in calls {
            let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
            let parsed = arguments.as_str().and_then(|text| serde_json::from_str(text).ok());
            if let Some(object @ Value::Object(_)) = parsed {
                *arguments = object;
            }
        }
    }
    Ok(message)
}

/// The text of a message's parts; `path` is their place in the request.
///
/// # Errors
/// If a part is something else than text.
pub(crate) fn joined_texts(path: &str, parts: &[Value]) -> Result<String, ApiError> {
    let texts = parts.iter().enumerate().map(|(index, part)| match (&part["type"], &part["text"]) {
        (Value::String(kind), Value::String(text)) if kind.ends_with("text") => Ok(text.as_str()),
        (kind, _) => {
            let message = format!("{kind} is not supported; allowed: parts of text, with a `text`");
            Err(ApiError::invalid(format!("{path}[{index}].type"), message))
        }
    });
    texts.collect()
}
