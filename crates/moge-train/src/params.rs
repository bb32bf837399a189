//! Where each tensor of a network lies in the flat vectors of parameters, gradients and moments.

use std::ops::Range;

use moge_model::{ModelConfig, expected_tensors};

/// A tensor and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamTensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its dimensions, slowest first.
    pub shape: Vec<usize>,
    /// Its numbers in the flat vector.
    pub range: Range<usize>,
}

/// All tensors of a network, one after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The tensors, in the order of their ranges.
    pub tensors: Vec<ParamTensor>,
    /// Numbers in all.
    pub len: usize,
}

impl Layout {
    /// The layout of the network that `config` describes.
    pub fn new(config: &ModelConfig) -> Layout {
        let mut len = 0;
        let tensor = |spec: moge_model::TensorSpec| {
            let start = len;
            len += spec.shape.iter().product::<usize>();
            ParamTensor { name: spec.name, shape: spec.shape, range: start..len }
        };
        let tensors = expected_tensors(config).into_iter().map(tensor).collect();
        Layout { tensors, len }
    }
}
