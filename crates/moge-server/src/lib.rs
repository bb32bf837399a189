//! An engine behind OpenAI's HTTP API: chat, completions and responses, streamed or whole.
//!
//! One thread owns the engine ([`moge_engine::Engine`]); the rest is asynchronous and talks to it through channels, so
//! that no client holds up a step. A client that goes away cancels what it asked for.

mod answer;
mod app;
mod blocking;
mod body;
mod clock;
mod conversation;
#[cfg(test)]
mod draft_tests;
mod engine_thread;
mod error;
mod expert_ids;
mod listen;
mod metrics;
mod middleware;
mod output;
mod params;
mod routes;
mod serve_error;
mod server;
mod structured;

pub use app::{ServedModel, ServerConfig};
#[doc(hidden)]
pub use routes::parse_request_body;
pub use serve_error::ServeError;
pub use server::Server;
