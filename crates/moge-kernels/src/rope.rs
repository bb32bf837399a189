//! Rotary position embedding (arXiv 2104.09864).

use crate::cpu::Cpu;
use crate::elements::Precision;
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

/// Turn each pair `(a, b)` of every head to `(a cos - b sin, b cos + a sin)`, in place; the rest of a head stays.
///
/// Shapes: `x` `[num_rows, num_heads * head_dim]`, where `angles` set the number of rows.
///
/// # Panics
/// If a length does not fit.
pub fn rope(cpu: &Cpu, x: &mut [f32], angles: RopeAngles<'_>, head: RopeHead) {
    turn_rows(cpu, x, angles, head, Direction::Forward);
}

/// The gradient of [`rope`], in place: the turn back, each pair to `(a cos + b sin, b cos - a sin)`.
///
/// Shapes: as for [`rope`].
///
/// # Panics
/// If a length does not fit.
pub fn rope_backward(cpu: &Cpu, dx: &mut [f32], angles: RopeAngles<'_>, head: RopeHead) {
    turn_rows(cpu, dx, angles, head, Direction::Back);
}

/// Which way pairs turn.
#[derive(Clone, Copy)]
enum Direction {
    Forward,
    Back,
}

fn turn_rows(cpu: &Cpu, x: &mut [f32], angles: RopeAngles<'_>, head: RopeHead, direction: Direction) {
    let half = head.rotary_dim / 2;
    assert!(half > 0 && 2 * half <= head.head_dim, "rotary_dim {} of head_dim {}", head.rotary_dim, head.head_dim);
    assert!(angles.cos.len().is_multiple_of(half), "{} cosines are not rows of {half}", angles.cos.len());
    assert_eq!(angles.sin.len(), angles.cos.len(), "sines and cosines");
    let num_rows = angles.cos.len() / half;
    let row_len = x.len().checked_div(num_rows).unwrap_or(0);
    let whole = x.len() == num_rows * row_len && row_len.is_multiple_of(head.head_dim);
    assert!(whole, "{} numbers are not {num_rows} rows of heads of {}", x.len(), head.head_dim);
    let isa = cpu.isa();
    cpu.for_each_rows(x, row_len, |rows, x| {
        let range = rows.start * half..rows.end * half;
        let angles = [&angles.cos[range.clone()], &angles.sin[range]];
        isa.run(TurnRows { x, row_len, angles, head, direction });
    });
}

struct TurnRows<'a> {
    x: &'a mut [f32],
    row_len: usize,
    angles: [&'a [f32]; 2],
    head: RopeHead,
    direction: Direction,
}

impl SimdOp for TurnRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let half = self.head.rotary_dim / 2;
        let [cos, sin] = self.angles.map(|x| x.chunks_exact(half));
        for ((row, cos), sin) in self.x.chunks_exact_mut(self.row_len).zip(cos).zip(sin) {
            for x in row.chunks_exact_mut(self.head.head_dim) {
                match self.direction {
                    Direction::Forward => turn(x, [cos, sin], self.head, turned),
                    Direction::Back => turn(x, [cos, sin], self.head, turned_back),
                }
            }
        }
    }
}

#[inline(always)]
fn turned(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a * cos - b * sin, b * cos + a * sin)
}

#[inline(always)]
fn turned_back(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a * cos + b * sin, b * cos - a * sin)
}

/// Replace each pair of one head by what `turned` makes of it. Plain loops: the compiler vectorises them.
///
/// Shapes: `x` `[head_dim]`, cosines and sines `[rotary_dim / 2]`.
#[inline(always)]
fn turn(x: &mut [f32], [cos, sin]: [&[f32]; 2], head: RopeHead, turned: impl Fn(f32, f32, f32, f32) -> (f32, f32)) {
    let half = head.rotary_dim / 2;
    let (cos, sin) = (&cos[..half], &sin[..half]);
    let turning = &mut x[..2 * half];
    match head.layout {
        RopeLayout::RotateHalf => {
            let (a, b) = turning.split_at_mut(half);
            for i in 0..half {
                (a[i], b[i]) = turned(a[i], b[i], cos[i], sin[i]);
            }
        }
        RopeLayout::Interleaved => {
            let (pairs, _) = turning.as_chunks_mut::<2>();
            let pairs = &mut pairs[..half];
            for i in 0..half {
                let [a, b] = pairs[i];
                pairs[i] = turned(a, b, cos[i], sin[i]).into();
            }
        }
    }
}

/// [`rope`] of one head; then round every number of the head, turned or not, if `activation` says so.
///
/// Shapes: `x` `[head_dim]`, cosines and sines `[rotary_dim / 2]`.
#[inline(always)]
pub(crate) fn rope_head<S: Simd>(simd: S, x: &mut [f32], angles: [&[f32]; 2], head: RopeHead, activation: Precision) {
    turn(x, angles, head, turned);
    if activation == Precision::Bf16 {
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
    use super::{
        RopeAngles, RopeHead, RopeLayout, rope, rope_angles, rope_backward, rope_head, rope_inverse_frequencies,
    };
    use crate::simd::{Simd, SimdOp};
    use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu, finite_differences};
    use crate::{Isa, Precision, round_to_bf16};

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
        let x = turn(Precision::F32);
        assert_close(&x, &expected, 1e-6, 2e-7);
        let rounded = turn(Precision::Bf16);
        assert!(rounded.iter().zip(&x).all(|(&rounded, &x)| rounded == round_to_bf16(x)));
    }

    struct Turn<'a> {
        x: &'a mut [f32],
        angles: [&'a [f32]; 2],
        head: RopeHead,
        activation: Precision,
    }

    impl SimdOp for Turn<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            rope_head(simd, self.x, self.angles, self.head, self.activation);
        }
    }

    /// Every shape of rows and heads with its angles: `check(head, num_heads, cos, sin)`.
    fn each_case(check: impl Fn(RopeHead, usize, &[f32], &[f32])) {
        for (num_rows, num_heads, head_dim, rotary_dim) in
            [(1, 3, 2, 2), (5, 2, 12, 8), (3, 4, 34, 34), (131, 3, 48, 40)]
        {
            for layout in [RopeLayout::RotateHalf, RopeLayout::Interleaved] {
                let positions: Vec<u32> = (0..num_rows).map(|row| row * 7 % 5).collect();
                let frequencies = rope_inverse_frequencies(1000.0, rotary_dim);
                let mut cos = vec![0.0; positions.len() * frequencies.len()];
                let mut sin = cos.clone();
                rope_angles(&mut cos, &mut sin, &positions, &frequencies);
                check(RopeHead { head_dim, rotary_dim, layout }, num_heads, &cos, &sin);
            }
        }
    }

    #[test]
    fn rope_turns_every_head_of_every_row_as_it_turns_one() {
        for cpu in every_cpu() {
            each_case(|head, num_heads, cos, sin| {
                let half = head.rotary_dim / 2;
                let before = Numbers::new(5).vec(cos.len() / half * num_heads * head.head_dim);
                let (mut x, mut expected) = (before.clone(), before);
                rope(&cpu, &mut x, RopeAngles { cos, sin }, head);
                for (i, x) in expected.chunks_exact_mut(head.head_dim).enumerate() {
                    let row = i / num_heads * half..(i / num_heads + 1) * half;
                    let angles = [&cos[row.clone()], &sin[row]];
                    cpu.isa().run(Turn { x, angles, head, activation: Precision::F32 });
                }
                assert_same_bits(&x, &expected);
            });
        }
    }

    #[test]
    fn rope_backward_matches_finite_differences_on_every_isa_and_layout() {
        for cpu in every_cpu() {
            each_case(|head, num_heads, cos, sin| {
                let half = head.rotary_dim / 2;
                let mut numbers = Numbers::new(6);
                let dy = numbers.vec(cos.len() / half * num_heads * head.head_dim);
                let mut dx = dy.clone();
                rope_backward(&cpu, &mut dx, RopeAngles { cos, sin }, head);
                for (i, (dx, dy)) in dx.chunks_exact(head.head_dim).zip(dy.chunks_exact(head.head_dim)).enumerate() {
                    let row = i / num_heads * half;
                    // The turn is linear, so its gradient is the same everywhere.
                    let expected = finite_differences(&vec![0.0; head.head_dim], |x| {
                        let mut sum: f64 = x.iter().zip(dy).skip(2 * half).map(|(x, &dy)| x * f64::from(dy)).sum();
                        for i in 0..half {
                            let (first, second) = match head.layout {
                                RopeLayout::RotateHalf => (i, half + i),
                                RopeLayout::Interleaved => (2 * i, 2 * i + 1),
                            };
                            let (c, s) = (f64::from(cos[row + i]), f64::from(sin[row + i]));
                            sum += f64::from(dy[first]) * (x[first] * c - x[second] * s);
                            sum += f64::from(dy[second]) * (x[second] * c + x[first] * s);
                        }
                        sum
                    });
                    assert_close(dx, &expected, 1e-6, 2e-7);
                }
            });
        }
    }
}
