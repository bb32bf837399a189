//! What rounding did to the weights of a checkpoint.

use moge_kernels::PackError;
use moge_model::{PackedSpec, WeightRole, format_name};
use serde::{Deserialize, Serialize};

/// Sums over a tensor's weights, as the journal keeps them. All are finite: JSON has no infinity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Rounding {
    squared_sum: f64,
    squared_error: f64,
    max_error: f32,
}

impl From<PackError> for Rounding {
    fn from(error: PackError) -> Rounding {
        let PackError { squared_sum, squared_error, max_error, .. } = error;
        Rounding { squared_sum, squared_error, max_error }.clamped()
    }
}

impl Rounding {
    /// With the largest numbers for those that are too large, or none.
    fn clamped(self) -> Rounding {
        Rounding {
            squared_sum: self.squared_sum.min(f64::MAX),
            squared_error: self.squared_error.min(f64::MAX),
            max_error: self.max_error.min(f32::MAX),
        }
    }

    /// Root of the squared error over the squared weights; 0 if all weights are.
    fn relative(self) -> f64 {
        if self.squared_sum > 0.0 { (self.squared_error / self.squared_sum).sqrt().min(f64::MAX) } else { 0.0 }
    }
}

/// What rounding did to one tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorError {
    /// The tensor's name.
    pub name: String,
    /// What it is for, as `quantization_config` has it.
    pub role: &'static str,
    /// Its format.
    pub format: &'static str,
    /// Root mean square of the difference, over that of the weights.
    pub relative_error: f64,
    /// The largest difference.
    pub max_error: f32,
    #[serde(skip)]
    rounding: Rounding,
}

/// What rounding did to all tensors of one role.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoleError {
    /// The role, as `quantization_config` has it.
    pub role: &'static str,
    /// The format of its tensors.
    pub format: &'static str,
    /// How many there are.
    pub num_tensors: usize,
    /// Root mean square of the differences, over that of the weights.
    pub relative_error: f64,
    /// The largest difference.
    pub max_error: f32,
    /// The tensor with the largest relative error.
    pub worst_tensor: String,
    /// Its relative error.
    pub worst_relative_error: f64,
}

/// What rounding did to a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RoundingErrors {
    /// By role.
    pub roles: Vec<RoleError>,
    /// By tensor, in the order of the files. Those that are not packed are left out.
    pub tensors: Vec<TensorError>,
}

impl TensorError {
    pub(crate) fn new(name: String, packed: PackedSpec, rounding: Rounding) -> TensorError {
        let (role, format) = (role_name(packed.role), format_name(Some(packed.format)));
        TensorError { name, role, format, relative_error: rounding.relative(), max_error: rounding.max_error, rounding }
    }
}

impl RoundingErrors {
    pub(crate) fn of(tensors: Vec<TensorError>) -> RoundingErrors {
        let mut names: Vec<&'static str> = tensors.iter().map(|tensor| tensor.role).collect();
        names.sort_unstable();
        names.dedup();
        let of_role = |role| RoleError::of(&tensors.iter().filter(|t| t.role == role).collect::<Vec<_>>());
        RoundingErrors { roles: names.into_iter().filter_map(of_role).collect(), tensors }
    }
}

impl RoleError {
    /// Of tensors of one role; `None` if there are none.
    fn of(tensors: &[&TensorError]) -> Option<RoleError> {
        let worst = tensors.iter().max_by(|a, b| a.relative_error.total_cmp(&b.relative_error))?;
        let sum = tensors.iter().fold(Rounding::default(), |sum, tensor| Rounding {
            squared_sum: sum.squared_sum + tensor.rounding.squared_sum,
            squared_error: sum.squared_error + tensor.rounding.squared_error,
            max_error: sum.max_error.max(tensor.max_error),
        });
        let sum = sum.clamped();
        Some(RoleError {
            role: worst.role,
            format: worst.format,
            num_tensors: tensors.len(),
            relative_error: sum.relative(),
            max_error: sum.max_error,
            worst_tensor: worst.name.clone(),
            worst_relative_error: worst.relative_error,
        })
    }
}

/// The field of `quantization_config` that says how weights of this role are quantised.
pub(crate) fn role_name(role: WeightRole) -> &'static str {
    match role {
        WeightRole::Embedding => "embedding",
        WeightRole::Attention => "attention",
        WeightRole::Router => "router",
        WeightRole::RoutedExpert | WeightRole::DenseMlp => "mlp",
        WeightRole::SharedExpert => "shared_expert",
        WeightRole::Head => "lm_head",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_too_large_for_a_number_are_the_largest_and_survive_the_journal() {
        let error =
            PackError { squared_sum: 2.0, squared_error: f64::NAN, max_error: f32::INFINITY, ..PackError::default() };
        let rounding = Rounding::from(error);
        assert_eq!((rounding.squared_error, rounding.max_error), (f64::MAX, f32::MAX));
        assert!(rounding.relative().is_finite());
        let json = serde_json::to_string(&rounding).unwrap();
        assert_eq!(serde_json::from_str::<Rounding>(&json).unwrap(), rounding);
    }
}
