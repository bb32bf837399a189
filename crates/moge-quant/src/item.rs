//! The tensors of the output and where their numbers come from: floats, or int8 with scales as msmodelslim writes it.

use std::path::Path;

use moge_model::{CheckpointError, PlannedTensor, StoredTensor, TensorSpec};
use safetensors::Dtype;

use crate::error::QuantizeError;

/// Largest remainder of a bias that is rounding: half a step of the int32 that was stored, and as much again.
const MAX_ROUNDING: f64 = 1.0;

/// A tensor of the output, and where its numbers come from.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) spec: TensorSpec,
    pub(crate) input: Input,
}

/// Where numbers come from.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    /// A tensor of floats.
    Floats(StoredTensor),
    /// A tensor of int8 with scales.
    Levels(Levels),
    /// A bias that other tensors hold.
    Bias(StaticBias),
}

/// An int8 weight.
#[derive(Clone, Debug)]
pub(crate) struct Levels {
    /// `[out, in]`.
    pub(crate) levels: StoredTensor,
    /// `[out]`.
    pub(crate) scales: StoredTensor,
    pub(crate) scale_divisor: f32,
    /// The bias that must vanish, as the network has no place for it.
    pub(crate) vanishing_bias: Option<StaticBias>,
}

/// A bias that is folded into what a static weight has.
#[derive(Clone, Debug)]
pub(crate) struct StaticBias {
    /// `[out, in]`.
    pub(crate) levels: StoredTensor,
    pub(crate) quant_bias: StoredTensor,
    pub(crate) input_offset: f64,
    pub(crate) deq_scale: StoredTensor,
}

impl Item {
    /// As it will be written.
    pub(crate) fn planned(&self) -> PlannedTensor {
        let dtype = match (&self.spec.packed, &self.input) {
            (Some(_), _) => Dtype::U8,
            (None, Input::Floats(tensor)) => tensor.dtype(),
            (None, _) => Dtype::F32,
        };
        PlannedTensor { name: self.spec.name.clone(), dtype, shape: self.spec.stored_shape() }
    }

    /// The large tensor that is read for it.
    pub(crate) fn tensor(&self) -> &StoredTensor {
        match &self.input {
            Input::Floats(tensor) => tensor,
            Input::Levels(levels) => &levels.levels,
            Input::Bias(bias) => &bias.levels,
        }
    }
}

impl Levels {
    /// Scales of the rows from `first_row` on, as many as `out` has.
    pub(crate) fn scales(&self, first_row: usize, out: &mut [f32]) {
        for (row, scale) in (first_row..).zip(out) {
            *scale = number(&self.scales, row) as f32 / self.scale_divisor;
        }
    }

    /// True if the bias of row `row` with the levels `levels` vanishes, or there is none.
    pub(crate) fn bias_vanishes(&self, row: usize, levels: &[i8]) -> bool {
        self.vanishing_bias.as_ref().is_none_or(|bias| {
            let shift = bias.input_offset * sum(levels);
            // The int32 may come from arithmetic in f32.
            (number(&bias.quant_bias, row) + shift).abs() <= MAX_ROUNDING + f64::from(f32::EPSILON) * shift.abs()
        })
    }
}

impl StaticBias {
    /// The bias, `[out]`.
    pub(crate) fn numbers(&self) -> Vec<f32> {
        let cols = self.levels.shape()[1];
        let rows = self.levels.bytes().chunks_exact(cols).enumerate();
        let bias = rows.map(|(row, levels)| {
            let sum = sum(bytemuck::cast_slice(levels));
            (number(&self.quant_bias, row) + self.input_offset * sum) * number(&self.deq_scale, row)
        });
        bias.map(|bias| bias as f32).collect()
    }
}

fn sum(levels: &[i8]) -> f64 {
    levels.iter().map(|&level| i64::from(level)).sum::<i64>() as f64
}

/// Number `index` of a tensor of a type that [`Import::check_numbers`] allows; int64 carries the bits of an f32.
pub(crate) fn number(tensor: &StoredTensor, index: usize) -> f64 {
    let bytes = tensor.bytes();
    match tensor.dtype() {
        Dtype::F32 => f32::from_le_bytes(element(bytes, index)).into(),
        Dtype::F16 => half::f16::from_le_bytes(element(bytes, index)).into(),
        Dtype::BF16 => half::bf16::from_le_bytes(element(bytes, index)).into(),
        Dtype::I32 => i32::from_le_bytes(element(bytes, index)).into(),
        Dtype::I8 => i8::from_le_bytes(element(bytes, index)).into(),
        Dtype::I64 => f32::from_bits(int64(tensor, index) as u32).into(),
        dtype => unreachable!("{dtype:?} was refused"),
    }
}

pub(crate) fn int64(tensor: &StoredTensor, index: usize) -> i64 {
    i64::from_le_bytes(element(tensor.bytes(), index))
}

fn element<const N: usize>(bytes: &[u8], index: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[index * N + i])
}

/// Fail if there are problems.
pub(crate) fn refuse(dir: &Path, problems: Vec<moge_model::TensorProblem>) -> Result<(), QuantizeError> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(CheckpointError::Tensors { dir: dir.display().to_string(), problems }.into())
}
