//! Rotary position embedding (arXiv 2104.09864).

use crate::cpu::Cpu;
use crate::elements::ActivationType;
use crate::simd::{Simd, SimdOp};

/// Which numbers of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// Number `i` with number `i + rotary_dim / 2` (NeoX, Llama).
    RotateHalf,
    /// Number `2i` with number `2i + 1` (GPT-J, GLM).
    Interleaved,
}

/// Which part of each head turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeHead {
    /// Width of a head.
    pub head_dim: usize,
    /// How many leading numbers of a head turn; even, from 2 to `head_dim`.
    pub rotary_dim: usize,
    /// Which of them turn together.
    pub layout: RopeLayout,
}

/// Cosines and sines of the rows of a step.
#[derive(Clone, Copy, Debug)]
pub struct RopeAngles<'a> {
    /// `[num_rows, rotary_dim / 2]`.
    pub cos: &'a [f32],
    /// `[num_rows, rotary_dim / 2]`.
    pub sin: &'a [f32],
}

/// `theta^(-2i / rotary_dim)` for `i` below `rotary_dim / 2`, computed in f64 and rounded.
pub fn rope_inverse_frequencies(theta: f64, rotary_dim: usize) -> Vec<f32> {
    (0..rotary_dim / 2).map(|i| (1.0 / theta.powf(2.0 * i as f64 / rotary_dim as f64)) as f32).collect()
}

/// Cosine and sine of `position * inverse_frequency`.
///
/// Shapes: `cos` and `sin` `[positions.len(), inverse_frequencies.len()]`. The angle is an f32 product, as in the
/// reference implementations, for which the models were trained; its cosine and sine are taken in f64 and rounded.
///
/// # Panics
/// If a length does not fit.
pub fn rope_angles(cos: &mut [f32], sin: &mut [f32], positions: &[u32], inverse_frequencies: &[f32]) {
    let half = inverse_frequencies.len();
    assert_eq!(cos.len(), positions.len() * half, "cos of {} x {half}", positions.len());
    assert_eq!(sin.len(), cos.len(), "sin and cos");
    let angles = positions.iter().flat_map(|&position| inverse_frequencies.iter().map(move |f| position as f32 * f));
    for ((cos, sin), angle) in cos.iter_mut().zip(sin).zip(angles) {
        let (sin64, cos64) = f64::from(angle).sin_cos();
        (*cos, *sin) = (cos64 as f32, sin64 as f32);
    }
}

/// Turn each pair `(a, b)` of every head to `(a cos - b sin, b cos + a sin)`, in place; then round every number of
/// `x`, turned or not, if `activation` says so.
///
/// Shapes: `x` `[num_rows, num_heads * head_dim]`, `angles` `[num_rows, rotary_dim / 2]`.
///
/// # Panics
/// If a length does not fit, or `rotary_dim` is odd, 0 or above `head_dim`.
pub fn rope(cpu: &Cpu, x: &mut [f32], angles: RopeAngles<'_>, head: RopeHead, activation: ActivationType) {
    let RopeHead { head_dim, rotary_dim, .. } = head;
    let is_allowed = rotary_dim.is_multiple_of(2) && (2..=head_dim).contains(&rotary_dim);
    assert!(is_allowed, "rotary_dim {rotary_dim} of head_dim {head_dim}");
    assert_eq!(angles.cos.len(), angles.sin.len(), "cos and sin");
    let half = rotary_dim / 2;
    if x.is_empty() {
        return;
    }
    let num_rows = angles.cos.len() / half;
    assert!(num_rows > 0 && angles.cos.len() == num_rows * half, "{} cosines for pairs of {half}", angles.cos.len());
    assert!(x.len().is_multiple_of(num_rows * head_dim), "{} numbers for {num_rows} rows", x.len());
    let width = x.len() / num_rows;
    let isa = cpu.isa();
    cpu.for_each_rows(x, width, |rows, x| {
        for (row, x) in rows.zip(x.chunks_exact_mut(width)) {
            let (cos, sin) = (&angles.cos[row * half..(row + 1) * half], &angles.sin[row * half..(row + 1) * half]);
            isa.run(RopeRow { x, cos, sin, head, activation });
        }
    });
}

struct RopeRow<'a> {
    x: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    head: RopeHead,
    activation: ActivationType,
}

impl SimdOp for RopeRow<'_> {
    type Output = ();

    /// Plain loops: the compiler vectorises them.
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let half = self.head.rotary_dim / 2;
        let (cos, sin) = (&self.cos[..half], &self.sin[..half]);
        for x in self.x.chunks_exact_mut(self.head.head_dim) {
            let turning = &mut x[..2 * half];
            match self.head.layout {
                RopeLayout::RotateHalf => {
                    let (a, b) = turning.split_at_mut(half);
                    for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                }
                RopeLayout::Interleaved => {
                    for ((pair, cos), sin) in turning.chunks_exact_mut(2).zip(cos).zip(sin) {
                        let (a, b) = (pair[0], pair[1]);
                        (pair[0], pair[1]) = (a * cos - b * sin, b * cos + a * sin);
                    }
                }
            }
        }
        if self.activation == ActivationType::Bf16 {
            crate::simd::map(
                simd,
                self.x,
                #[inline(always)]
                |x| simd.round_to_bf16(x),
            );
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{RopeAngles, RopeHead, RopeLayout, rope, rope_angles, rope_inverse_frequencies};
    use crate::testing::{Numbers, assert_close, every_cpu};
    use crate::{ActivationType, round_to_bf16};

    #[test]
    fn inverse_frequencies_fall_from_one_by_equal_factors() {
        let frequencies = rope_inverse_frequencies(10_000.0, 8);
        assert_close(&frequencies, &[1.0, 0.1, 0.01, 0.001], 1e-7, 0.0);
    }

    #[test]
    fn angles_are_f32_products_and_their_cosines_exact_to_f32() {
        let positions = [0, 1, 131_071];
        let frequencies = rope_inverse_frequencies(16_000_000.0, 6);
        let (mut cos, mut sin) = (vec![0.0; 9], vec![0.0; 9]);
        rope_angles(&mut cos, &mut sin, &positions, &frequencies);
        for (row, position) in positions.iter().enumerate() {
            for (i, frequency) in frequencies.iter().enumerate() {
                let angle = f64::from(*position as f32 * frequency);
                assert_eq!(cos[row * 3 + i], angle.cos() as f32);
                assert_eq!(sin[row * 3 + i], angle.sin() as f32);
            }
        }
    }

    #[test]
    fn rope_turns_each_pair_by_its_angle_on_every_isa_and_layout() {
        for cpu in every_cpu() {
            for (num_rows, num_heads, head_dim, rotary_dim) in
                [(1, 1, 2, 2), (3, 5, 12, 8), (9, 7, 128, 64), (2, 3, 34, 34)]
            {
                for layout in [RopeLayout::RotateHalf, RopeLayout::Interleaved] {
                    check(&cpu, num_rows, num_heads, RopeHead { head_dim, rotary_dim, layout });
                }
            }
        }
    }

    fn check(cpu: &crate::Cpu, num_rows: usize, num_heads: usize, head: RopeHead) {
        let half = head.rotary_dim / 2;
        let before = Numbers::new(7).vec(num_rows * num_heads * head.head_dim);
        let positions: Vec<u32> = (0..num_rows as u32).map(|row| 3 + 5 * row).collect();
        let (mut cos, mut sin) = (vec![0.0; num_rows * half], vec![0.0; num_rows * half]);
        rope_angles(&mut cos, &mut sin, &positions, &rope_inverse_frequencies(1000.0, head.rotary_dim));
        let mut expected: Vec<f64> = before.iter().copied().map(f64::from).collect();
        for row in 0..num_rows {
            for head_index in 0..num_heads {
                let start = (row * num_heads + head_index) * head.head_dim;
                for i in 0..half {
                    let (first, second) = match head.layout {
                        RopeLayout::RotateHalf => (start + i, start + half + i),
                        RopeLayout::Interleaved => (start + 2 * i, start + 2 * i + 1),
                    };
                    let (a, b) = (f64::from(before[first]), f64::from(before[second]));
                    let (c, s) = (f64::from(cos[row * half + i]), f64::from(sin[row * half + i]));
                    expected[first] = a * c - b * s;
                    expected[second] = b * c + a * s;
                }
            }
        }
        let angles = RopeAngles { cos: &cos, sin: &sin };
        let mut x = before.clone();
        rope(cpu, &mut x, angles, head, ActivationType::F32);
        assert_close(&x, &expected, 1e-6, 2e-7);
        let mut rounded = before;
        rope(cpu, &mut rounded, angles, head, ActivationType::Bf16);
        assert!(rounded.iter().zip(&x).all(|(&rounded, &x)| rounded == round_to_bf16(x)));
    }
}
