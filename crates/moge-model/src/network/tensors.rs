//! What tensors a network asks for, and the sources that answer.

use std::ops::Range;

use moge_kernels::PackedFormat;

use crate::checkpoint::error::TensorProblem;
use crate::checkpoint::quant_scheme::{WeightRole, format_name};
use crate::network::config::ModelConfig;

/// Name of the token embedding.
pub(crate) const EMBEDDING_NAME: &str = "model.embed_tokens.weight";
/// Name of the output head.
pub(crate) const HEAD_NAME: &str = "lm_head.weight";

/// The tensor that `name` takes its numbers from: a tied head those of the embedding, whatever copy lies beside it.
pub fn source_name<'a>(config: &ModelConfig, name: &'a str) -> &'a str {
    if config.tie_word_embeddings && name == HEAD_NAME { EMBEDDING_NAME } else { name }
}

/// Where [`crate::Network::build`] gets its tensors: a checkpoint, a vector of parameters, or a list of what is wanted.
pub trait TensorSource {
    /// A large tensor.
    type Matrix;
    /// A small tensor, widened to f32.
    type Vector;

    /// The part that `spec` names of the tensor `name` of shape `[spec.rows, spec.cols]`.
    fn matrix(&mut self, name: String, spec: &MatrixSpec) -> Self::Matrix;

    /// The same part of each of the two halves, `[spec.rows, spec.cols]` each, of the tensor `name`.
    fn halves(&mut self, name: String, spec: &MatrixSpec) -> [Self::Matrix; 2];

    /// The part of the tensor `name` of shape `shape`; rows are its elements.
    fn vector(&mut self, name: String, shape: &[usize], part: &Part) -> Self::Vector;
}

/// A large tensor that a network asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatrixSpec {
    /// What it is for.
    pub role: WeightRole,
    /// Its layer; `None` for embedding and head.
    pub layer: Option<usize>,
    /// Rows of the whole tensor.
    pub rows: usize,
    /// Columns of the whole tensor.
    pub cols: usize,
    /// The part of it that is wanted.
    pub part: Part,
}

/// A part of a matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// Some rows: outputs.
    Rows(Range<usize>),
    /// Some columns: inputs.
    Cols(Range<usize>),
}

/// A tensor that a network needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the checkpoint.
    pub name: String,
    /// The shape of its numbers; a packed tensor is stored in another, see [`PackedSpec::stored_shape`].
    pub shape: Vec<usize>,
    /// How it is packed; `None`: its numbers are stored as they are.
    pub packed: Option<PackedSpec>,
}

/// How a tensor is packed: one weight, or several of the same shape one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedSpec {
    /// What the weight is for.
    pub role: WeightRole,
    /// The format.
    pub format: PackedFormat,
    /// Weights in the tensor: 2 where gate and up are one tensor, else 1.
    pub num_parts: usize,
    /// Rows of each.
    pub rows: usize,
    /// Columns of each.
    pub cols: usize,
}

impl PackedSpec {
    /// The shape of its bytes: panels, bytes of a panel.
    pub fn stored_shape(&self) -> [usize; 2] {
        [self.num_parts * PackedFormat::num_panels(self.rows), self.format.panel_bytes(self.cols)]
    }
}

impl TensorSpec {
    /// How many numbers it has.
    pub fn num_elements(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }

    /// That its width is not one that its format allows; `None` if it is.
    pub fn width_problem(&self) -> Option<TensorProblem> {
        let packed = self.packed.filter(|packed| !packed.format.allows_cols(packed.cols))?;
        let format = format_name(Some(packed.format));
        Some(TensorProblem::Width { name: self.name.clone(), width: packed.cols, format })
    }

    /// The shape that it has in a file.
    pub fn stored_shape(&self) -> Vec<usize> {
        self.packed.map_or_else(|| self.shape.clone(), |packed| packed.stored_shape().to_vec())
    }
}
