//! Checkpoints on disk: reading, writing, which weights are packed, numbers that are not finite.

pub(crate) mod files;
pub(crate) mod non_finite;
pub(crate) mod quant_scheme;
pub(crate) mod reader;
pub(crate) mod writer;
