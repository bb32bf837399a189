//! Errors of a server.

use std::net::SocketAddr;

use thiserror::Error;

/// Error that prevents a server from starting, or ends it.
#[derive(Debug, Error)]
pub enum ServeError {
    /// It cannot listen.
    #[error("cannot listen at {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The I/O error.
        source: std::io::Error,
    },
    /// The system cannot start threads or handle signals.
    #[error("cannot start: {0}")]
    Start(#[from] std::io::Error),
    /// An origin is not valid.
    #[error("CORS: {0:?} is not an origin; an origin is like https://example.org, or * for all")]
    Origin(String),
    /// The engine panicked.
    #[error("the engine has failed")]
    EngineFailed,
}
