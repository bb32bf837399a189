//! The network: checkpoint files to weights to logits. Knows nothing of requests.

mod arch;
mod checkpoint;
pub mod cost;
mod ids;
mod network;
pub mod synth;
mod text;

pub use arch::spec::ToolFormat;
pub use checkpoint::error::{CheckpointError, TensorProblem};
pub use checkpoint::files::{open_file, read_file, small_files};
pub use checkpoint::non_finite::{NonFinite, count_non_finite};
pub use checkpoint::quant_scheme::{
    LayerFormats, QuantScheme, WeightRole, format_from_name, format_name, format_names,
};
pub use checkpoint::reader::{Checkpoint, LoadMode};
pub use checkpoint::shards::PlannedTensor;
pub use checkpoint::storage::StoredTensor;
pub use checkpoint::write_file::{WriteError, io_error, sync_directory, write_file};
pub use checkpoint::writer::{CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, JOURNAL_NAME};
pub use ids::{ExpertId, TokenId};
pub use moge_kernels::{
    BlockId, Cpu, Dtype, Isa, KvType, MAX_THREADS, PackedFormat, Precision, SequenceRows, available_threads,
};
pub use network::batch::Batch;
pub use network::config::{
    Architecture, ConfigError, LayerConfig, MlpConfig, ModelConfig, MoeConfig, NormPlacement, RopeConfig, RopeScaling,
    Router,
};
pub use network::cpu::{StepLimits, Workspace};
pub use network::kv_cache::KvCache;
pub use network::load::tensor_problems;
pub use network::model::{LoadError, Model};
pub use network::output::{StepOutput, Trace};
pub use network::profile::{Operator, Profile};
pub use network::router::{Dispatch, Route, choose_experts, route_token, weigh_routes};
pub use network::tensors::{MatrixSpec, PackedSpec, Part, TensorSource, TensorSpec, source_name};
pub use network::weight::Weight;
pub use network::weights::{Experts, Layer, LayerMlp, Linear, Network, PostNorms, Share, Swiglu, expected_tensors};
pub use text::chat_template::error::ChatTemplateError;
pub use text::chat_template::{ChatRequest, ChatTemplate, Thinking, thinking_delimiters, thinking_tokens};
pub use text::generation_config::{GenerationDefaults, GenerationDefaultsError};
pub use text::tokenizer;
pub use text::tokenizer::detokenizer::Detokenizer;
pub use text::tokenizer::error::TokenizerError;
pub use text::tokenizer::sentencepiece::SentencePieceError;
pub use text::tokenizer::stop_strings::StopStrings;
pub use text::tokenizer::{Prefix, Tokenizer, eos_token_ids};

/// Tokens that one block of the KV cache holds.
pub const BLOCK_SIZE: usize = 32;
