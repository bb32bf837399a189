//! A run file as it lies: what serde can check, which is names and types.

use std::collections::BTreeMap;

use moge_kernels::{Dtype, Precision};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRun {
    pub(super) model: RawModel,
    pub(super) output: RawOutput,
    #[serde(default)]
    pub(super) compute: RawCompute,
    #[serde(default)]
    pub(super) loss: RawLoss,
    #[serde(default)]
    pub(super) optimizer: RawOptimizer,
    pub(super) data: BTreeMap<String, RawSource>,
    pub(super) phases: Vec<RawPhase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawModel {
    pub(super) config: String,
    #[serde(default = "random")]
    pub(super) init: String,
    #[serde(default)]
    pub(super) seed: u64,
}

fn random() -> String {
    super::RANDOM.to_owned()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawOutput {
    pub(super) dir: String,
    #[serde(default = "hundred")]
    pub(super) checkpoint_every: u64,
    #[serde(default = "three")]
    pub(super) keep: usize,
    #[serde(default)]
    pub(super) dtype: RawDtype,
}

fn hundred() -> u64 {
    100
}

fn three() -> usize {
    3
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawDtype {
    #[default]
    F32,
    Bf16,
}

impl From<RawDtype> for Dtype {
    fn from(dtype: RawDtype) -> Dtype {
        match dtype {
            RawDtype::F32 => Dtype::F32,
            RawDtype::Bf16 => Dtype::Bf16,
        }
    }
}

impl From<RawDtype> for Precision {
    fn from(dtype: RawDtype) -> Precision {
        match dtype {
            RawDtype::F32 => Precision::F32,
            RawDtype::Bf16 => Precision::Bf16,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawCompute {
    pub(super) dtype: RawDtype,
    pub(super) micro_batch_tokens: u64,
    pub(super) recompute: bool,
}

impl Default for RawCompute {
    fn default() -> RawCompute {
        RawCompute { dtype: RawDtype::F32, micro_batch_tokens: 4096, recompute: false }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawLoss {
    pub(super) aux: f64,
    pub(super) z: f64,
}

impl Default for RawLoss {
    fn default() -> RawLoss {
        RawLoss { aux: 0.001, z: 0.0 }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawOptimizer {
    pub(super) beta1: f64,
    pub(super) beta2: f64,
    pub(super) eps: f64,
    pub(super) weight_decay: f64,
    pub(super) decay_norms_and_biases: bool,
    pub(super) clip: f64,
}

impl Default for RawOptimizer {
    fn default() -> RawOptimizer {
        RawOptimizer { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decay_norms_and_biases: false, clip: 1.0 }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSource {
    pub(super) files: Vec<String>,
    pub(super) format: RawFormat,
    pub(super) field: Option<String>,
    pub(super) on_bad_line: Option<RawOnBadLine>,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawFormat {
    Text,
    Jsonl,
    Tokens,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawOnBadLine {
    Stop,
    Skip,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawPhase {
    pub(super) name: String,
    pub(super) tokens: u64,
    pub(super) sequence_length: u64,
    pub(super) batch_tokens: u64,
    /// A list, as an array of two would take any number of them.
    pub(super) learning_rate: Vec<f64>,
    #[serde(default)]
    pub(super) warmup_tokens: u64,
    pub(super) mixture: BTreeMap<String, f64>,
}
