//! Small endpoints: models, tokens, and the server's state.

use std::sync::Arc;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::IntoResponse;
use moge_model::{Prefix, TokenId, eos_token_ids};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::app::{AppState, Serving};
use crate::blocking::blocking;
use crate::body::Json;
use crate::conversation::{Conversation, ToolFields};
use crate::error::ApiError;

/// `GET /v1/models`.
pub(crate) async fn models(State(state): State<AppState>) -> Result<axum::Json<Value>, ApiError> {
    let serving = state.serving()?;
    Ok(axum::Json(json!({ "object": "list", "data": [model_object(&state, serving)] })))
}

/// `GET /v1/models/NAME`.
pub(crate) async fn model(
    State(state): State<AppState>,
    name: Result<Path<String>, PathRejection>,
) -> Result<axum::Json<Value>, ApiError> {
    let serving = state.serving()?;
    let Path(name) = name.map_err(|error| ApiError::invalid("model", error.to_string()))?;
    serving.check_name(Some(&name))?;
    Ok(axum::Json(model_object(&state, serving)))
}

fn model_object(state: &AppState, serving: &Serving) -> Value {
    json!({
        "id": serving.model.name,
        "object": "model",
        "created": state.started,
        "owned_by": "moge",
        "max_model_len": serving.model.max_model_len,
    })
}

/// Input to tokenise: a text, or messages.
#[derive(Debug, Deserialize)]
pub(crate) struct TokenizeFields {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
    return_token_strs: Option<bool>,
    tools: Option<Vec<Value>>,
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// `POST /tokenize`.
pub(crate) async fn tokenize(
    State(state): State<AppState>,
    Json(fields, ..): Json<TokenizeFields>,
) -> Result<axum::Json<Value>, ApiError> {
    let serving = Arc::clone(state.serving()?);
    serving.check_name(fields.model.as_deref())?;
    blocking(move || {
        let tokens = tokens_of(&serving, &fields)?;
        let strings: Option<Vec<String>> = fields
            .return_token_strs
            .unwrap_or(false)
            .then(|| tokens.iter().map(|&token| serving.model.tokenizer.piece(token)).collect());
        let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
        let max_model_len = serving.model.max_model_len;
        let count = ids.len();
        Ok(axum::Json(json!({
            "count": count, "max_model_len": max_model_len, "tokens": ids, "token_strs": strings
        })))
    })
    .await?
}

fn tokens_of(serving: &Serving, fields: &TokenizeFields) -> Result<Vec<TokenId>, ApiError> {
    match (&fields.prompt, &fields.messages) {
        (Some(prompt), None) => {
            let prefix = if fields.add_special_tokens.unwrap_or(true) { Prefix::Add } else { Prefix::Omit };
            Ok(serving.model.tokenizer.encode(prompt, prefix)?)
        }
        (None, Some(messages)) => {
            let conversation = Conversation {
                messages: messages.clone(),
                tools: ToolFields { tools: fields.tools.clone().unwrap_or_default(), ..ToolFields::default() },
                template_kwargs: fields.chat_template_kwargs.clone().unwrap_or_default(),
                add_generation_prompt: fields.add_generation_prompt.unwrap_or(true),
                ..Conversation::default()
            };
            conversation.prompt(serving)
        }
        _ => Err(ApiError::invalid("prompt", "either `prompt` or `messages` is needed, and not both")),
    }
}

/// Tokens to become text.
#[derive(Debug, Deserialize)]
pub(crate) struct DetokenizeFields {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// `POST /detokenize`.
pub(crate) async fn detokenize(
    State(state): State<AppState>,
    Json(fields, ..): Json<DetokenizeFields>,
) -> Result<axum::Json<Value>, ApiError> {
    let serving = Arc::clone(state.serving()?);
    serving.check_name(fields.model.as_deref())?;
    let vocab_size = serving.model.config.vocab_size;
    if let Some(index) = fields.tokens.iter().position(|&token| token as usize >= vocab_size) {
        let message = format!("{} is not allowed, must be below {vocab_size}", fields.tokens[index]);
        return Err(ApiError::invalid(format!("tokens[{index}]"), message));
    }
    let tokens: Vec<TokenId> = fields.tokens.into_iter().map(TokenId).collect();
    let text = blocking(move || serving.model.tokenizer.decode(&tokens)).await?;
    Ok(axum::Json(json!({ "prompt": text })))
}

/// `GET /tokenizer_info`: the tokens that begin and end a sequence, for clients that leave tokenising to the server.
pub(crate) async fn tokenizer_info(State(state): State<AppState>) -> Result<axum::Json<Value>, ApiError> {
    let model = &state.serving()?.model;
    let eos = eos_token_ids(&model.config.eos_token_ids, &model.defaults, Some(&model.tokenizer));
    let piece = |id: TokenId| model.tokenizer.piece(id);
    let bos_token = model.tokenizer.bos_id().map(piece);
    let eos_token = eos.first().copied().map(piece);
    Ok(axum::Json(json!({ "bos_token": bos_token, "eos_token": eos_token })))
}

/// `GET /`: the chat page.
pub(crate) async fn page() -> impl IntoResponse {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // The page states the rest of its policy itself; this part it cannot.
        (header::CONTENT_SECURITY_POLICY, "frame-ancestors 'none'"),
    ];
    (headers, include_str!("../page/index.html"))
}

/// `GET /health`: the process lives. The engine's failure ends it.
pub(crate) async fn health() -> &'static str {
    "ok\n"
}

/// `GET /ready`: requests will be answered.
pub(crate) async fn ready(State(state): State<AppState>) -> Result<&'static str, ApiError> {
    state.serving().map(|_| "ready\n")
}

/// `GET /version`.
pub(crate) async fn version() -> axum::Json<Value> {
    axum::Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// `GET /metrics`.
pub(crate) async fn metrics(State(state): State<AppState>) -> impl IntoResponse {
    let text = state.loaded().map(|serving| serving.metrics.render()).unwrap_or_default();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

/// `GET /expert_load`.
pub(crate) async fn expert_load(State(state): State<AppState>) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(state.serving()?.metrics.expert_load()))
}
