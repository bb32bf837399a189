//! The network: checkpoint files to weights to logits. Knows nothing of requests.

mod batch;
mod config;
mod ids;
mod kv_cache;
mod model;
pub mod tokenizer;

pub use batch::Batch;
pub use config::{Architecture, ConfigError, MlpConfig, ModelConfig, MoeConfig, NormPlacement, RopeConfig};
pub use ids::{ExpertId, TokenId};
pub use kv_cache::KvCache;
pub use model::{Model, Workspace};
pub use moge_kernels::{ActivationType, BlockId, Cpu, SequenceRows};

/// Tokens that one block of the KV cache holds.
pub const BLOCK_SIZE: usize = 32;
