//! Checkpoints on disk: reading, writing, which weights are packed, elements that are not finite.

pub(crate) mod error;
pub(crate) mod files;
mod index;
pub(crate) mod non_finite;
pub(crate) mod quant_scheme;
pub(crate) mod reader;
pub(crate) mod shards;
pub(crate) mod storage;
pub(crate) mod write_file;
pub(crate) mod writer;
