//! Work that takes long, away from the threads that speak HTTP.

use crate::error::ApiError;

/// Do what takes long without holding up others.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    let failed =
        |error: tokio::task::JoinError| ApiError::Internal(format!("the request could not be prepared: {error}"));
    tokio::task::spawn_blocking(work).await.map_err(failed)
}
