//! Offline: a checkpoint to the packed layout (`moge quantize`), and what that does to a model (`moge perplexity`).

mod error;
mod evaluate;
mod import;
mod item;
mod job;
mod journal;
mod pieces;
mod rounding;
mod source;

pub use error::QuantizeError;
pub use evaluate::{Comparison, EvalModel, Evaluation};
pub use job::Job;
pub use rounding::{RoleError, RoundingErrors, TensorError};
