//! Paths and their handlers.

mod chat;
mod completions;
mod misc;
mod openapi;
mod responses;

use axum::Router;
use axum::extract::Request;
use axum::routing::{MethodRouter, get, post};

use crate::app::AppState;
use crate::error::ApiError;

/// All paths; `openapi.json` describes each of them.
fn routes() -> Vec<(&'static str, MethodRouter<AppState>)> {
    vec![
        ("/v1/chat/completions", post(chat::chat_completions)),
        ("/v1/completions", post(completions::completions)),
        ("/v1/responses", post(responses::responses)),
        ("/v1/models", get(misc::models)),
        ("/v1/models/{*name}", get(misc::model)),
        ("/tokenize", post(misc::tokenize)),
        ("/detokenize", post(misc::detokenize)),
        ("/tokenizer_info", get(misc::tokenizer_info)),
        ("/", get(misc::page)),
        ("/health", get(misc::health)),
        ("/ready", get(misc::ready)),
        ("/version", get(misc::version)),
        ("/openapi.json", get(openapi::openapi)),
        ("/metrics", get(misc::metrics)),
        ("/expert_load", get(misc::expert_load)),
    ]
}

/// Parse a body as that of each endpoint that takes one.
pub fn parse_request_body(bytes: &[u8]) {
    use crate::body::{Nothing, parse};
    use crate::params::{FormatFields, SamplingFields};
    let _ = parse::<chat::ChatFields, SamplingFields, FormatFields>(bytes);
    let _ = parse::<completions::CompletionFields, SamplingFields, FormatFields>(bytes);
    let _ = parse::<responses::ResponsesFields, SamplingFields, FormatFields>(bytes);
    let _ = parse::<misc::TokenizeFields, Nothing, Nothing>(bytes);
    let _ = parse::<misc::DetokenizeFields, Nothing, Nothing>(bytes);
}

/// The router of all paths.
pub(crate) fn router(state: AppState) -> Router {
    let routes = routes().into_iter();
    routes
        .fold(Router::new(), |router, (path, methods)| router.route(path, methods))
        .fallback(async |request: Request| ApiError::NotFound(request.uri().path().to_owned()))
        .method_not_allowed_fallback(async |request: Request| ApiError::MethodNotAllowed(request.method().to_string()))
        .with_state(state)
}
