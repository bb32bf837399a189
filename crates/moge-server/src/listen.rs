//! Connections: accepted, bounded, and told to end.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::response::IntoResponse;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;

use crate::app::{AppState, Phase};
use crate::error::ApiError;

/// Longest time to send the head of a request, and for a connection to be idle.
const MAX_HEAD_TIME: Duration = Duration::from_secs(60);

/// A head of a request that is not complete after so many bytes is refused; also how much of a body is read at a time.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Longest time that a client may not read from its connection.
const MAX_WRITE_TIME: Duration = Duration::from_secs(60);

/// Pause after the system could not accept a connection.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);

/// Interval between warnings that the system cannot accept connections.
const WARN_AGAIN: Duration = Duration::from_secs(60);

/// Accept connections until the server drains, then see them end. Ends with the last connection.
pub(crate) async fn listen(listener: TcpListener, router: Router, state: AppState) {
    let permits = Arc::new(Semaphore::new(state.config.max_connections));
    let busy = busy_router();
    let mut phases = state.phases();
    let mut connections = JoinSet::new();
    let mut warned: Option<Instant> = None;
    loop {
        let stream = tokio::select! {
            () = Phase::Draining.reached(&mut phases) => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) if is_over(&error) => continue,
                Err(error) => {
                    // With too many open files that lasts until some are closed.
                    if warned.is_none_or(|time| time.elapsed() > WARN_AGAIN) {
                        tracing::warn!("no connection: {error}");
                        warned = Some(Instant::now());
                    }
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                    continue;
                }
            }
        };
        let permit = Arc::clone(&permits).try_acquire_owned().ok();
        let router = if permit.is_some() { router.clone() } else { busy.clone() };
        connections.spawn(serve(stream, router, permit, state.phases()));
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Router for connections beyond the limit: `/health`, and status 503 for all else.
fn busy_router() -> Router {
    let busy = async || ApiError::Unavailable("too many connections").into_response();
    Router::new().route("/health", get(async || "ok\n")).fallback(busy)
}

/// True if the client was gone before we had its connection.
fn is_over(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
}

async fn serve(
    stream: TcpStream,
    router: Router,
    permit: Option<OwnedSemaphorePermit>,
    mut phases: watch::Receiver<Phase>,
) {
    // Parts of a stream are small, and each is to arrive when it is sent.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(MAX_WRITE_TIME));
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(MAX_HEAD_TIME).keep_alive(permit.is_some());
    builder.max_buf_size(MAX_HEAD_BYTES);
    let connection = builder.serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(router));
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = Phase::Draining.reached(&mut phases) => {
            // Ends after the request that runs.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!("connection: {error}");
    }
}
