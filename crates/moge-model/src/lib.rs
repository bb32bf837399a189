//! The network: checkpoint files to weights to logits. Knows nothing of requests.

mod batch;
mod chat_template;
mod config;
mod generation_config;
mod ids;
mod kv_cache;
mod model;
pub mod tokenizer;

pub use batch::Batch;
pub use chat_template::{ChatRequest, ChatTemplate, ChatTemplateError, Thinking, thinking_delimiters, thinking_tokens};
pub use config::{Architecture, ConfigError, MlpConfig, ModelConfig, MoeConfig, NormPlacement, RopeConfig};
pub use generation_config::{GenerationDefaults, GenerationDefaultsError};
pub use ids::{ExpertId, TokenId};
pub use kv_cache::KvCache;
pub use model::{Model, Workspace};
pub use moge_kernels::{ActivationType, BlockId, Cpu, SequenceRows};
pub use tokenizer::{Detokenizer, Prefix, SentencePieceError, StopStrings, Tokenizer, TokenizerError};

/// Tokens that one block of the KV cache holds.
pub const BLOCK_SIZE: usize = 32;
