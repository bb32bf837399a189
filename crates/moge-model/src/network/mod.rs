//! The network: its description, its weights, and the forward pass.

pub(crate) mod batch;
pub(crate) mod config;
pub(crate) mod kv_cache;
pub(crate) mod model;
pub(crate) mod profile;
pub(crate) mod router;
pub(crate) mod weight_bytes;
pub(crate) mod weights;
pub(crate) mod workspace;
