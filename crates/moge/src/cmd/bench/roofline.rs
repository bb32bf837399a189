//! The machine's own limits, measured beside each repetition.

use std::fmt;

use moge_kernels::{Int8Product, MemoryRead, f32_flops_per_s, int8_ops_per_s};
use moge_model::{Cpu, ModelConfig, PackedFormat};
use serde::Serialize;

/// What bounds a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Ceiling {
    /// Multiply-accumulates of int8.
    Int8,
    /// Fused multiply-adds of f32, to which bf16 is widened.
    Bf16,
    /// Reading memory.
    Memory,
}

impl fmt::Display for Ceiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Ceiling::Int8 => "int8",
            Ceiling::Bf16 => "bf16",
            Ceiling::Memory => "memory",
        })
    }
}

/// What it takes to measure ceilings.
pub(crate) struct Ceilings<'a> {
    cpu: &'a Cpu,
    /// The integer products that most of the model's weights take.
    product: Int8Product,
    memory: MemoryRead,
}

/// The ceilings before any case.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct CeilingReport {
    memory_read_gb_s: f64,
    int8_gop_s: f64,
    bf16_gflop_s: f64,
}

impl<'a> Ceilings<'a> {
    /// Ceilings of the threads of `cpu`, for a model like this.
    pub(crate) fn new(cpu: &'a Cpu, config: &ModelConfig) -> Ceilings<'a> {
        let product = config.quant.layers.mlp.map_or(Int8Product::I8xI8, PackedFormat::int8_product);
        Ceilings { cpu, product, memory: MemoryRead::new(cpu) }
    }

    /// Bytes or operations per second, now.
    pub(crate) fn measure(&self, ceiling: Ceiling) -> f64 {
        match ceiling {
            Ceiling::Int8 => int8_ops_per_s(self.cpu, self.product),
            Ceiling::Bf16 => f32_flops_per_s(self.cpu),
            Ceiling::Memory => self.memory.bytes_per_s(self.cpu),
        }
    }

    /// All of them: of each the best of some measurements, as other programs may be in the way of one.
    pub(crate) fn report(&self) -> CeilingReport {
        let best = |ceiling| (0..5).map(|_| self.measure(ceiling) / 1e9).fold(0.0, f64::max);
        CeilingReport {
            memory_read_gb_s: best(Ceiling::Memory),
            int8_gop_s: best(Ceiling::Int8),
            bf16_gflop_s: best(Ceiling::Bf16),
        }
    }
}

impl fmt::Display for CeilingReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CeilingReport { memory_read_gb_s, int8_gop_s, bf16_gflop_s } = self;
        write!(f, "memory {memory_read_gb_s:.1} GB/s, int8 {int8_gop_s:.0} GOP/s, bf16 {bf16_gflop_s:.0} GOP/s")
    }
}
