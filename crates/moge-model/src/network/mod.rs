//! The network: its description, its weights, and the forward pass.

pub(crate) mod batch;
pub(crate) mod config;
mod config_json;
pub(crate) mod kv_cache;
pub(crate) mod model;
pub(crate) mod profile;
pub(crate) mod router;
pub(crate) mod weight_bytes;
pub(crate) mod weights;
pub(crate) mod workspace;
