//! Arithmetic on slices: the only crate that computes, and the only one that knows CPU features.
//!
//! Invariants: no kernel allocates, does I/O or keeps global state; all scratch memory comes from the
//! caller. Each output element is reduced in one fixed order that depends on the format and the
//! [`Isa`], never on the number of rows, the number of threads or the place in a batch.

mod attention;
mod cpu;
mod elements;
mod rope;

pub use attention::{BlockId, SequenceRows};
pub use cpu::Cpu;
pub use elements::{ActivationType, Dtype, Elements, Matrix};
pub use rope::RopeLayout;
