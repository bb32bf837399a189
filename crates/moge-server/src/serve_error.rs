//! Why a server does not start, or stops by itself.

use std::net::SocketAddr;

use thiserror::Error;

/// Why a server does not start, or stops by itself.
#[derive(Debug, Error)]
pub enum ServeError {
    /// It cannot listen.
    #[error("cannot listen at {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The system gives no threads or signals.
    #[error("cannot start: {0}")]
    Start(#[from] std::io::Error),
    /// An origin is none.
    #[error("CORS: {0:?} is no origin; an origin is like https://example.org, or * for all")]
    Origin(String),
    /// The engine panicked.
    #[error("the engine has failed")]
    EngineFailed,
}
