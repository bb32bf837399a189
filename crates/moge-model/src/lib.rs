//! The network: checkpoint files to weights to logits. Knows nothing of requests.

mod batch;
mod checkpoint_writer;
mod config;
mod ids;
mod kv_cache;
mod model;

pub use batch::Batch;
pub use checkpoint_writer::{CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, PlannedTensor, WriteError};
pub use config::{Architecture, ConfigError, MlpConfig, ModelConfig, MoeConfig, NormPlacement, RopeConfig};
pub use ids::{ExpertId, TokenId};
pub use kv_cache::KvCache;
pub use model::{Model, Workspace};
pub use moge_kernels::{ActivationType, BlockId, Cpu, SequenceRows};

/// Tokens that one block of the KV cache holds.
pub const BLOCK_SIZE: usize = 32;
