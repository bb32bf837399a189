//! Errors of reading a checkpoint.

use moge_kernels::QUANT_BLOCK_LEN;
use thiserror::Error;

/// Reasons to refuse a checkpoint.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// A file cannot be read.
    #[error("{file}: {source}")]
    Read {
        /// The file's path.
        file: String,
        /// The I/O error.
        source: std::io::Error,
    },
    /// Neither `model.safetensors.index.json` nor `model.safetensors` is there.
    #[error("{dir}: no model.safetensors.index.json and no model.safetensors{advice}")]
    NoWeights {
        /// The checkpoint's directory.
        dir: String,
        /// Advice for the user, or empty.
        advice: &'static str,
    },
    /// A safetensors header is not valid: its length, its JSON, or its offsets.
    #[error("{file}: not a valid safetensors file ({file_bytes} bytes): {problem}")]
    Header {
        /// The file's path.
        file: String,
        /// The file's size.
        file_bytes: u64,
        /// The problem.
        problem: String,
    },
    /// The index is not valid.
    #[error("{file}: {field}: {problem}")]
    Index {
        /// The index file's path.
        file: String,
        /// The entry.
        field: String,
        /// The value found and the values allowed.
        problem: String,
    },
    /// Tensors are missing, unexpected, or have another shape or type than the config requires.
    #[error("{dir}: {} of the tensors do not fit config.json: {}", .problems.len(), first_problems(.problems))]
    Tensors {
        /// The checkpoint's directory.
        dir: String,
        /// One line for each tensor.
        problems: Vec<TensorProblem>,
    },
}

/// A tensor that does not fit the config.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TensorProblem {
    /// The config requires it and no file has it.
    #[error("{name}: missing, should be {shape:?}")]
    Missing {
        /// The tensor's name.
        name: String,
        /// The shape that the config requires.
        shape: Vec<usize>,
    },
    /// A file has it and the config has no place for it.
    #[error("{name}: unexpected, is {shape:?}")]
    Unexpected {
        /// The tensor's name.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// It has another shape.
    #[error("{name}: shape is {found:?}, should be {expected:?}")]
    Shape {
        /// The tensor's name.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that the config requires.
        expected: Vec<usize>,
    },
    /// It has a type that the engine cannot run.
    #[error("{name}: dtype is {found}, allowed are {allowed}")]
    Dtype {
        /// The tensor's name.
        name: String,
        /// Its type.
        found: String,
        /// Types that it may have.
        allowed: &'static str,
    },
    /// Its width is not one that its quantised format allows.
    #[error(
        "{name}: {width} columns cannot be {format}, which needs a multiple of {QUANT_BLOCK_LEN} (w4a8), or at most 65536 (w8a8)"
    )]
    Width {
        /// The tensor's name.
        name: String,
        /// Its columns.
        width: usize,
        /// The format.
        format: &'static str,
    },
}

fn first_problems(problems: &[TensorProblem]) -> String {
    const MAX_SHOWN: usize = 4;
    let mut shown: Vec<String> = problems.iter().take(MAX_SHOWN).map(ToString::to_string).collect();
    if problems.len() > MAX_SHOWN {
        shown.push(format!("and {} more", problems.len() - MAX_SHOWN));
    }
    shown.join("; ")
}
