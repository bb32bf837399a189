//! The network: checkpoint files to weights to logits. Knows nothing of requests.

mod batch;
mod chat_template;
mod checkpoint;
mod checkpoint_writer;
mod config;
mod files;
mod generation_config;
mod ids;
mod kv_cache;
mod model;
mod non_finite;
mod profile;
mod quant_scheme;
mod router;
pub mod synth;
pub mod tokenizer;
mod weight_bytes;
mod weights;
mod workspace;

pub use batch::Batch;
pub use chat_template::{ChatRequest, ChatTemplate, ChatTemplateError, Thinking, thinking_delimiters, thinking_tokens};
pub use checkpoint::{Checkpoint, CheckpointError, LoadMode, StoredTensor, TensorProblem};
pub use checkpoint_writer::{
    CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, JOURNAL_NAME, PlannedTensor, WriteError, io_error, sync_directory,
    write_file,
};
pub use config::{Architecture, ConfigError, MlpConfig, ModelConfig, MoeConfig, NormPlacement, RopeConfig};
pub use files::{open_file, read_file, small_files};
pub use generation_config::{GenerationDefaults, GenerationDefaultsError};
pub use ids::{ExpertId, TokenId};
pub use kv_cache::KvCache;
pub use model::{LoadError, Model};
pub use moge_kernels::{
    ActivationType, BlockId, Cpu, Dtype, Isa, KvType, MAX_THREADS, PackedFormat, SequenceRows, available_threads,
};
pub use non_finite::{NonFinite, count_non_finite};
pub use profile::{Operator, Profile};
pub use quant_scheme::{QuantScheme, WeightRole, format_from_name, format_name};
pub use router::{Dispatch, Route, route_token};
pub use tokenizer::{Detokenizer, Prefix, SentencePieceError, StopStrings, Tokenizer, TokenizerError, eos_token_ids};
pub use weight_bytes::{LayerBytes, WeightBytes};
pub use weights::{Experts, Layer, LayerMlp, Linear, Network, PostNorms, Swiglu, TensorSource, Weight};
pub use weights::{PackedSpec, TensorSpec, expected_tensors, source_name, stored_bytes, tensor_problems};
pub use workspace::{StepLimits, Trace, Workspace};

/// Tokens that one block of the KV cache holds.
pub const BLOCK_SIZE: usize = 32;
