//! Requests over time: admission, scheduling, sampling. No async, no HTTP.
//!
//! One owner drives everything through `&mut`: [`Engine::step`] schedules a batch, runs the model, samples and
//! hands out what is new. [`Scheduler`] is the part that needs no model; tests drive it with scripted tokens.

mod block_manager;
mod candidate;
mod engine;
mod error;
mod grammar;
mod logprobs;
mod masks;
mod output;
mod request;
mod sample;
mod sampler;
mod sampling_params;
mod scheduler;
mod sequence;
mod stats;
mod step;
mod text;

pub use engine::{Engine, EngineConfig};
pub use error::AdmitError;
pub use grammar::{Grammar, GrammarCompiler, GrammarError, MAX_GRAMMAR_BYTES};
pub use logprobs::{RowLogprobs, TokenLogprob};
pub use output::{FinishReason, Sampled, SequenceOutput, SequenceResult};
pub use request::{Request, SeqId};
pub use sampling_params::{MAX_LIST_LEN, MAX_LOGPROBS, MAX_STOP_BYTES, SamplingParams};
pub use scheduler::{Scheduler, SchedulerConfig};
pub use stats::{EngineStats, ExpertLoad};
pub use step::{ScheduledSequence, Step};
