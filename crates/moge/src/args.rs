//! Values of options that several commands have.

use clap::ValueEnum;
use moge_model::PackedFormat;

/// Precision of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    /// As the checkpoint says.
    Auto,
    /// Activations in f32; weights are widened as they are read.
    F32,
    /// Activations rounded to bf16, sums in f32.
    Bf16,
}

/// How weights are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// Eight bits, a scale for each output.
    W8a8,
    /// Four bits, a scale for each output and 32 inputs; the output head in eight.
    W4a8,
}

impl FormatArg {
    /// The format.
    pub(crate) fn format(self) -> PackedFormat {
        match self {
            FormatArg::W8a8 => PackedFormat::W8A8,
            FormatArg::W4a8 => PackedFormat::W4A8,
        }
    }
}

/// How the KV cache stores its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvArg {
    /// As the activations are.
    Auto,
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// int8 with a scale for each token and head.
    Int8,
}

/// How the weights come into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoadArg {
    /// Map the files.
    Mmap,
    /// Read the files.
    Read,
}
