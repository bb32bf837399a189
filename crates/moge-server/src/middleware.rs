//! Processing common to all requests: request id, API key, log line.

use std::any::Any;
use std::time::Instant;

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::app::AppState;
use crate::error::ApiError;
use crate::serve_error::ServeError;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest request id from a client.
const MAX_ID_BYTES: usize = 128;

/// Paths that need no key: liveness checks, and the page, which asks for a key.
const OPEN_PATHS: [&str; 5] = ["/", "/health", "/ready", "/version", "/openapi.json"];

/// Wrap all routes in the common processing.
pub(crate) fn wrap(router: Router, state: &AppState, cors: CorsLayer) -> Router {
    router
        .layer(CatchPanicLayer::custom(panicked))
        .layer(axum::middleware::from_fn_with_state(state.clone(), every_request))
        .layer(cors)
}

/// The origins whose pages may call the server.
///
/// # Errors
/// If an origin is not valid.
pub(crate) fn cors(origins: &[String]) -> Result<CorsLayer, ServeError> {
    let origin = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        let parsed = origins.iter().map(|origin| match origin.parse() {
            Ok(value) if origin.contains("://") => Ok(value),
            _ => Err(ServeError::Origin(origin.clone())),
        });
        AllowOrigin::list(parsed.collect::<Result<Vec<HeaderValue>, ServeError>>()?)
    };
    let methods = [Method::GET, Method::POST];
    // Any header, by its name: `*` would not stand for `Authorization`.
    let layer =
        CorsLayer::new().allow_origin(origin).allow_methods(methods).allow_headers(AllowHeaders::mirror_request());
    Ok(layer.expose_headers([REQUEST_ID, header::RETRY_AFTER]))
}

async fn every_request(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = request.headers().get(REQUEST_ID).filter(|id| id.len() <= MAX_ID_BYTES).cloned();
    let id = id.or_else(|| HeaderValue::from_str(&state.new_id("req-")).ok());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let is_open = OPEN_PATHS.contains(&path.as_str());
    let mut response = if is_open || is_known(&state.config.api_keys, request.headers()) {
        next.run(request).await
    } else {
        ApiError::Unauthorized.into_response()
    };
    let (status, time) = (response.status(), start.elapsed());
    let shown_id = id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or_default();
    if is_open {
        tracing::debug!(%method, path, status = status.as_u16(), ms = time.as_millis() as u64, id = shown_id);
    } else {
        tracing::info!(%method, path, status = status.as_u16(), ms = time.as_millis() as u64, id = shown_id);
    }
    if let Some(serving) = state.loaded() {
        serving.metrics.answered(&route, status.as_u16(), time);
    }
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// True if the request has one of `keys`, or no key is required. The time taken depends on nothing but the lengths of the
/// keys.
fn is_known(keys: &[String], headers: &HeaderMap) -> bool {
    let given = headers.get(header::AUTHORIZATION).map_or(&b""[..], HeaderValue::as_bytes);
    let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
    let matches = keys.iter().map(|key| bool::from(key.as_bytes().ct_eq(given)));
    keys.is_empty() || matches.fold(false, |any, one| any | one)
}

/// A handler's bug costs its request, not the server.
#[expect(clippy::needless_pass_by_value, reason = "the layer calls it so")]
fn panicked(payload: Box<dyn Any + Send>) -> Response {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
    tracing::error!("panic in a request: {text:?}");
    ApiError::Internal("the server has a defect that this request met".to_owned()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_keys_open_and_without_keys_all_do() {
        let headers =
            |value: &'static str| HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static(value))]);
        let keys = ["one".to_owned(), "other-key".to_owned()];
        assert!(is_known(&keys, &headers("Bearer one")));
        assert!(is_known(&keys, &headers("Bearer other-key")));
        for bad in ["Bearer on", "Bearer one ", "one", "bearer one", "Bearer ", ""] {
            assert!(!is_known(&keys, &headers(bad)), "{bad:?}");
        }
        assert!(!is_known(&keys, &HeaderMap::new()));
        assert!(is_known(&[], &HeaderMap::new()));
    }

    #[test]
    fn what_is_no_origin_is_refused() {
        let _ = cors(&["https://example.org".to_owned(), "http://localhost:3000".to_owned()]).unwrap();
        let _ = cors(&["*".to_owned()]).unwrap();
        let error = cors(&["example.org".to_owned()]).unwrap_err().to_string();
        assert_eq!(
            error,
            "CORS: \"example.org\" is not an origin; an origin is like https://example.org, or * for all"
        );
    }
}
