//! The network: checkpoint files to weights to logits. Knows nothing of requests.

mod batch;
mod config;
mod ids;

pub use batch::{Batch, BatchSequence};
pub use config::{Architecture, ConfigError, MlpConfig, ModelConfig, MoeConfig, NormPlacement, RopeConfig};
pub use ids::{BlockId, ExpertId, TokenId};

/// Tokens that one block of the KV cache holds.
pub const BLOCK_SIZE: usize = 32;
