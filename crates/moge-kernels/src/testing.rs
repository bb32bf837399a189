//! What the tests of several kernels share: seeded numbers, comparisons, CPUs to run on.

use crate::{Cpu, Isa};

/// Seeded numbers, uniform in -1..1 (SplitMix64).
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Numbers {
        Numbers(seed)
    }

    fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The next `len` numbers.
    pub(crate) fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.next_u64() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    /// The next number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next_u64() % limit as u64) as usize
    }
}

/// Every ISA on two threads, so that work is really split.
pub(crate) fn every_cpu() -> impl Iterator<Item = Cpu> {
    Isa::available().map(|isa| Cpu::new(isa, 2))
}

/// Each number is within `relative * |expected| + absolute` of what is expected.
#[track_caller]
pub(crate) fn assert_close(found: &[f32], expected: &[f64], relative: f64, absolute: f64) {
    assert_eq!(found.len(), expected.len());
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(error <= relative * expected.abs() + absolute, "number {i}: {found} for {expected}, off by {error:e}");
    }
}

/// All numbers are the same, bit for bit.
#[track_caller]
pub(crate) fn assert_same_bits(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.to_bits(), expected.to_bits(), "number {i}: {found} for {expected}");
    }
}

/// The gradient of `f` at `x` by central differences, right to about 1e-9 for smooth functions of numbers near 1.
pub(crate) fn finite_differences(x: &[f32], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut x: Vec<f64> = x.iter().copied().map(f64::from).collect();
    let len = x.len();
    let derivative = |i: usize| {
        let before = x[i];
        x[i] = before + STEP;
        let above = f(&x);
        x[i] = before - STEP;
        let below = f(&x);
        x[i] = before;
        (above - below) / (2.0 * STEP)
    };
    (0..len).map(derivative).collect()
}
