//! Offline: a checkpoint to the packed layout (`moge quantize`), and what that does to a model (`moge perplexity`).

mod damage;
mod error;
mod evaluate;
mod import;
mod item;
mod job;
mod journal;
mod pieces;
mod source;

pub use damage::{Damage, RoleDamage, TensorDamage};
pub use error::QuantizeError;
pub use evaluate::{Comparison, Evaluation, Side};
pub use job::Job;
