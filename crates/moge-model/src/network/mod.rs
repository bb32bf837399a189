//! The network: its description, its weights, and the forward pass.

pub(crate) mod batch;
pub(crate) mod config;
mod config_json;
pub(crate) mod cpu;
mod decoder;
pub(crate) mod kv_cache;
pub(crate) mod load;
pub(crate) mod model;
pub(crate) mod output;
mod params;
pub(crate) mod profile;
pub(crate) mod router;
pub(crate) mod tensors;
pub(crate) mod weight;
pub(crate) mod weights;
