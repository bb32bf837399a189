//! `POST /v1/completions`: texts or tokens to continue.

use std::sync::Arc;

use axum::extract::State;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use moge_engine::{Request, SequenceOutput};
use moge_model::{Prefix, TokenId};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::answer::{self, CompletionLogprobs, ResponseHead, StreamEncoder, Usage, finish_reason};
use crate::app::{AppState, Serving};
use crate::blocking::blocking;
use crate::body::Json;
use crate::error::ApiError;
use crate::expert_ids::ExpertIds;
use crate::params::{FormatFields, SamplingFields};
use crate::structured::tools::ToolChoice;
use crate::structured::{ThinkingPhase, grammar};

/// Object type of an answer and of each part of a stream.
const OBJECT: &str = "text_completion";

/// Tokens of an answer unless the request says how many, as OpenAI has it.
const DEFAULT_MAX_TOKENS: usize = 16;

/// Most log-probabilities of prompt tokens over all answers to a request: each takes some 100 bytes until it is sent.
const MAX_PROMPT_LOGPROBS: usize = 1 << 22;

/// Fields that only completions have.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct CompletionFields {
    model: Option<String>,
    prompt: Prompts,
    echo: Option<bool>,
    logprobs: Option<usize>,
    add_special_tokens: Option<bool>,
}

/// The prompts to continue.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "must be a string, a list of strings, a list of token ids, or a list of such lists")]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

impl Prompts {
    fn len(&self) -> usize {
        match self {
            Prompts::Text(_) | Prompts::Tokens(_) => 1,
            Prompts::Texts(texts) => texts.len(),
            Prompts::TokenLists(lists) => lists.len(),
        }
    }
}

/// Continue.
pub(crate) async fn completions(
    State(state): State<AppState>,
    Json(fields, sampling, format): Json<CompletionFields, SamplingFields, FormatFields>,
) -> Result<Response, ApiError> {
    let serving = Arc::clone(state.serving()?);
    serving.check_name(fields.model.as_deref())?;
    let head = ResponseHead::new(state.new_id("cmpl-"), &serving.model.name, sampling.wants_usage());
    let is_streamed = sampling.is_streamed();
    let engine = serving.engine.clone();
    let (random_seed, max_answers) = (state.random(0), state.config.max_answers);
    let (requests, choices) =
        blocking(move || prepare(&serving, &fields, &sampling, &format, random_seed, max_answers)).await??;
    let mut answers = engine.submit(requests, state.config.max_request_time).await?;
    let mut writer = Writer { head, choices, usage: Usage::default() };
    writer.usage.prompt_tokens = writer.choices.iter().filter(|c| c.is_first).map(|c| c.prompt.len()).sum();
    if is_streamed {
        return Ok(answer::stream(answers, Vec::new(), writer));
    }
    let mut whole: Vec<TextDelta> = writer.choices.iter().map(|_| TextDelta::default()).collect();
    while let Some((index, output)) = answers.next().await? {
        whole[index].append(writer.piece(index, &output)?);
    }
    let choices = whole.into_iter().enumerate().map(|(index, piece)| writer.choice(index, piece, true));
    let choices: Vec<Value> = choices.collect();
    Ok(axum::Json(writer.head.whole(OBJECT, &choices, writer.usage)).into_response())
}

/// One answer while it is written.
struct Choice {
    serving: Arc<Serving>,
    prompt: Vec<TokenId>,
    /// Tokens at its beginning that the tokenizer added: they are not in its text.
    num_added: usize,
    /// Of the answers to its prompt.
    is_first: bool,
    /// The prompt's text, until it has been written, if it is to be.
    echo: Option<String>,
    wants_logprobs: bool,
    /// Only the prompt is wanted.
    no_tokens: bool,
    /// Characters of the text that the tokens so far stand for.
    offset: usize,
    expert_ids: Option<ExpertIds>,
}

/// A part of an answer, or all of it.
#[derive(Default)]
struct TextDelta {
    text: String,
    logprobs: CompletionLogprobs,
    finish_reason: Option<&'static str>,
}

impl TextDelta {
    fn append(&mut self, next: TextDelta) {
        self.text += &next.text;
        self.logprobs.append(next.logprobs);
        self.finish_reason = next.finish_reason.or(self.finish_reason);
    }
}

/// Tokenise the prompts, and say what the engine is to do.
fn prepare(
    serving: &Arc<Serving>,
    fields: &CompletionFields,
    sampling: &SamplingFields,
    format: &FormatFields,
    random_seed: u64,
    max_answers: usize,
) -> Result<(Vec<Request>, Vec<Choice>), ApiError> {
    let n = sampling.num_answers(fields.prompt.len(), max_answers)?;
    let prompts = prompts(serving, fields)?;
    let mut params = sampling.params(&serving.model.defaults, random_seed)?;
    let echo = fields.echo.unwrap_or(false);
    let max_tokens = sampling.max_tokens().unwrap_or(DEFAULT_MAX_TOKENS);
    let no_tokens = echo && max_tokens == 0;
    params.max_tokens = Some(if no_tokens { 1 } else { max_tokens });
    params.logprobs = fields.logprobs;
    params.prompt_logprobs = fields.logprobs.filter(|_| echo);
    let num_echoed = n * prompts.iter().map(|(_, prompt)| prompt.len()).sum::<usize>();
    let num_logprobs = params.prompt_logprobs.map_or(0, |top| num_echoed.saturating_mul(top.saturating_add(1)));
    if num_logprobs > MAX_PROMPT_LOGPROBS {
        let allowed = "fewer, or fewer or shorter prompts";
        let message =
            format!("{num_logprobs} of prompts at once, at most {MAX_PROMPT_LOGPROBS} are allowed: {allowed}");
        return Err(ApiError::invalid("logprobs", message));
    }
    let lark = grammar(&format.structured(), &[], ToolChoice::None, false, &serving.markers, ThinkingPhase::Absent)?;
    let grammar = serving.model.compile(format.field().unwrap_or("response_format"), lark)?;
    let num_added = if fields.add_special_tokens.unwrap_or(true) { serving.model.tokenizer.prefix().len() } else { 0 };
    let (mut requests, mut choices) = (Vec::new(), Vec::new());
    for (text, prompt) in prompts {
        let request = Request { prompt, sampling: params.clone(), grammar: grammar.clone() };
        // Before it is copied for every answer.
        request.validate(serving.model.config.vocab_size, serving.model.max_model_len)?;
        for answer in 0..n {
            let mut request = request.clone();
            request.sampling.seed = params.seed.wrapping_add(answer as u64);
            let echo = echo.then(|| text.clone().unwrap_or_else(|| serving.model.tokenizer.decode(&request.prompt)));
            choices.push(Choice {
                serving: Arc::clone(serving),
                prompt: request.prompt.clone(),
                num_added: if text.is_some() { num_added } else { 0 },
                is_first: answer == 0,
                echo,
                wants_logprobs: fields.logprobs.is_some(),
                no_tokens,
                offset: 0,
                expert_ids: serving.model.expert_ids(&params),
            });
            requests.push(request);
        }
    }
    Ok((requests, choices))
}

/// A prompt's text, if it came as text, and its tokens.
type Prompt = (Option<String>, Vec<TokenId>);

fn prompts(serving: &Serving, fields: &CompletionFields) -> Result<Vec<Prompt>, ApiError> {
    let tokens = |list: &[u32]| (None, list.iter().copied().map(TokenId).collect());
    let prefix = if fields.add_special_tokens.unwrap_or(true) { Prefix::Add } else { Prefix::Omit };
    let encode = |text: &String| Ok((Some(text.clone()), serving.model.tokenizer.encode(text, prefix)?));
    let prompts: Vec<Prompt> = match &fields.prompt {
        Prompts::Text(text) => vec![encode(text)?],
        Prompts::Texts(texts) => texts.iter().map(encode).collect::<Result<_, ApiError>>()?,
        Prompts::Tokens(list) => vec![tokens(list)],
        Prompts::TokenLists(lists) => lists.iter().map(|list| tokens(list)).collect(),
    };
    if prompts.is_empty() {
        return Err(ApiError::invalid("prompt", "an empty list is not allowed"));
    }
    Ok(prompts)
}

struct Writer {
    head: ResponseHead,
    choices: Vec<Choice>,
    usage: Usage,
}

impl Writer {
    /// The part of an answer from one engine output.
    fn piece(&mut self, index: usize, output: &SequenceOutput) -> Result<TextDelta, ApiError> {
        let choice = &mut self.choices[index];
        if !choice.no_tokens {
            self.usage.add(output, choice.is_first);
        }
        choice.take(output)
    }

    fn choice(&self, index: usize, piece: TextDelta, is_last: bool) -> Value {
        let choice = &self.choices[index];
        let mut object = Map::new();
        object.insert("index".to_owned(), index.into());
        object.insert("text".to_owned(), piece.text.into());
        let logprobs = if choice.wants_logprobs && (is_last || !piece.logprobs.is_empty()) {
            serde_json::to_value(piece.logprobs).unwrap_or_default()
        } else {
            Value::Null
        };
        object.insert("logprobs".to_owned(), logprobs);
        object.insert("finish_reason".to_owned(), piece.finish_reason.into());
        if let Some(expert_ids) = choice.expert_ids.as_ref().filter(|_| piece.finish_reason.is_some()) {
            expert_ids.write(&mut object);
        }
        Value::Object(object)
    }
}

impl Choice {
    fn take(&mut self, output: &SequenceOutput) -> Result<TextDelta, ApiError> {
        let mut piece = TextDelta::default();
        let tokenizer = &self.serving.model.tokenizer;
        if let Some(expert_ids) = &mut self.expert_ids {
            expert_ids.push(&output.expert_ids);
        }
        if let Some(rows) = &output.prompt_logprobs {
            for (index, (&token, row)) in self.prompt.iter().zip(rows).enumerate() {
                let end = match row {
                    Some(row) => piece.logprobs.push(tokenizer, row, self.offset),
                    None => piece.logprobs.push_first(tokenizer.token_text(token)),
                };
                self.offset = if index < self.num_added { 0 } else { end };
            }
        }
        let prompt_is_over = !output.sampled.is_empty() || output.finish_reason.is_some();
        if let Some(echo) = self.echo.take_if(|_| prompt_is_over) {
            piece.text += &echo;
        }
        if let Some(reason) = output.finish_reason {
            piece.finish_reason = Some(if self.no_tokens { "length" } else { finish_reason(reason)? });
        }
        if self.no_tokens {
            return Ok(piece);
        }
        piece.text += &output.text;
        for row in output.sampled.iter().filter_map(|sampled| sampled.logprobs.as_ref()) {
            self.offset = piece.logprobs.push(tokenizer, row, self.offset);
        }
        Ok(piece)
    }
}

impl StreamEncoder for Writer {
    fn take(&mut self, index: usize, output: &SequenceOutput) -> Result<Vec<Event>, ApiError> {
        let piece = self.piece(index, output)?;
        if piece.text.is_empty() && piece.logprobs.is_empty() && piece.finish_reason.is_none() {
            return Ok(Vec::new());
        }
        Ok(vec![self.head.chunk(OBJECT, self.choice(index, piece, false))])
    }

    fn end(&mut self) -> Vec<Event> {
        self.head.end(OBJECT, self.usage)
    }

    fn fail(&mut self, error: &ApiError) -> Vec<Event> {
        answer::failed(error)
    }
}
