//! Rotary position embedding (arXiv 2104.09864).

use crate::elements::ActivationType;
use crate::simd::Simd;

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

/// Turn each pair `(a, b)` of one head to `(a cos - b sin, b cos + a sin)`, in place; then round every number of
/// the head, turned or not, if `activation` says so.
///
/// Shapes: `x` `[head_dim]`, cosines and sines `[rotary_dim / 2]`. Plain loops: the compiler vectorises them.
#[inline(always)]
pub(crate) fn rope_head<S: Simd>(
    simd: S,
    x: &mut [f32],
    [cos, sin]: [&[f32]; 2],
    head: RopeHead,
    activation: ActivationType,
) {
    let half = head.rotary_dim / 2;
    let (cos, sin) = (&cos[..half], &sin[..half]);
    let turning = &mut x[..2 * half];
    match head.layout {
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
    if activation == ActivationType::Bf16 {
        crate::simd::map(
            simd,
            x,
            #[inline(always)]
            |x| simd.round_to_bf16(x),
        );
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{RopeHead, RopeLayout, rope_angles, rope_head, rope_inverse_frequencies};
    use crate::simd::{Simd, SimdOp};
    use crate::testing::{Numbers, assert_close};
    use crate::{ActivationType, Isa, round_to_bf16};

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
        for isa in Isa::available() {
            for (head_dim, rotary_dim) in [(2, 2), (12, 8), (128, 64), (34, 34)] {
                for layout in [RopeLayout::RotateHalf, RopeLayout::Interleaved] {
                    check(isa, RopeHead { head_dim, rotary_dim, layout });
                }
            }
        }
    }

    fn check(isa: Isa, head: RopeHead) {
        let half = head.rotary_dim / 2;
        let before = Numbers::new(7).vec(head.head_dim);
        let (mut cos, mut sin) = (vec![0.0; half], vec![0.0; half]);
        rope_angles(&mut cos, &mut sin, &[13], &rope_inverse_frequencies(1000.0, head.rotary_dim));
        let mut expected: Vec<f64> = before.iter().copied().map(f64::from).collect();
        for i in 0..half {
            let (first, second) = match head.layout {
                RopeLayout::RotateHalf => (i, half + i),
                RopeLayout::Interleaved => (2 * i, 2 * i + 1),
            };
            let (a, b) = (f64::from(before[first]), f64::from(before[second]));
            let (c, s) = (f64::from(cos[i]), f64::from(sin[i]));
            expected[first] = a * c - b * s;
            expected[second] = b * c + a * s;
        }
        let turn = |activation| {
            let mut x = before.clone();
            isa.run(Turn { x: &mut x, angles: [&cos, &sin], head, activation });
            x
        };
        let x = turn(ActivationType::F32);
        assert_close(&x, &expected, 1e-6, 2e-7);
        let rounded = turn(ActivationType::Bf16);
        assert!(rounded.iter().zip(&x).all(|(&rounded, &x)| rounded == round_to_bf16(x)));
    }

    struct Turn<'a> {
        x: &'a mut [f32],
        angles: [&'a [f32]; 2],
        head: RopeHead,
        activation: ActivationType,
    }

    impl SimdOp for Turn<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            rope_head(simd, self.x, self.angles, self.head, self.activation);
        }
    }
}
