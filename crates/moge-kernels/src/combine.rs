//! The weighted sum over a row's experts.

use crate::cpu::Cpu;
use crate::simd::{Simd, SimdOp};

/// What a sum over experts begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// Nothing: the output is the sum. For what a norm or a sum over ranks has yet to follow.
    Zero,
    /// The output's own values, the residual stream, to which the sum is added.
    Residual,
}

/// Outputs of routed experts, and which of them each row adds up.
#[derive(Clone, Copy, Debug)]
pub struct ExpertOutputs<'a> {
    /// `[num_rows * experts_per_token, hidden]`.
    pub rows: &'a [f32],
    /// The dispatched row of each of a row's experts, `[num_rows, experts_per_token]`.
    pub slots: &'a [u32],
    /// Its weight, `[num_rows, experts_per_token]`.
    pub weights: &'a [f32],
}

/// `out[t] (=|+=) (sum over j of weights[t, j] * rows[slots[t, j]]) + shared[t]`, the sum in the order of `j`.
///
/// Shapes: `out`, `shared` `[num_rows, hidden]`; without `shared` it counts as 0.
///
/// # Panics
/// If a length does not fit or a slot is out of bounds.
pub fn combine(cpu: &Cpu, out: &mut [f32], begin: Begin, experts: ExpertOutputs<'_>, shared: Option<&[f32]>) {
    let ExpertOutputs { rows: expert_out, slots, weights } = experts;
    assert!(shared.is_none_or(|shared| out.len() == shared.len()), "out and shared");
    assert_eq!(slots.len(), weights.len(), "slots and weights");
    if out.is_empty() {
        return;
    }
    assert!(
        !slots.is_empty() && expert_out.len().is_multiple_of(slots.len()),
        "expert outputs of {} slots",
        slots.len()
    );
    let hidden = expert_out.len() / slots.len();
    assert!(hidden > 0 && out.len().is_multiple_of(hidden), "{} numbers in rows of {hidden}", out.len());
    let num_rows = out.len() / hidden;
    assert!(slots.len().is_multiple_of(num_rows), "{} slots for {num_rows} rows", slots.len());
    assert!(slots.iter().all(|&slot| (slot as usize) < slots.len()), "a slot is not below {}", slots.len());
    let per_row = slots.len() / num_rows;
    let isa = cpu.isa();
    cpu.for_each_rows(out, hidden, |rows, out| {
        for (row, out) in rows.zip(out.chunks_exact_mut(hidden)) {
            let choices = row * per_row..(row + 1) * per_row;
            let experts =
                ExpertOutputs { rows: expert_out, slots: &slots[choices.clone()], weights: &weights[choices] };
            let shared = shared.map(|shared| &shared[row * hidden..(row + 1) * hidden]);
            isa.run(CombineRow { out, begin, experts, shared });
        }
    });
}

struct CombineRow<'a> {
    out: &'a mut [f32],
    begin: Begin,
    experts: ExpertOutputs<'a>,
    shared: Option<&'a [f32]>,
}

impl SimdOp for CombineRow<'_> {
    type Output = ();

    /// Plain loops: elementwise, the compiler vectorises them.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        /// A run of the row whose sums stay in registers.
        const RUN: usize = 64;
        let ExpertOutputs { rows, slots, weights } = self.experts;
        let hidden = self.out.len();
        for (index, out) in self.out.chunks_mut(RUN).enumerate() {
            let start = index * RUN;
            let mut sums = [0.0; RUN];
            let sums = &mut sums[..out.len()];
            for (&slot, &weight) in slots.iter().zip(weights) {
                let expert = &rows[slot as usize * hidden + start..][..sums.len()];
                for (sum, x) in sums.iter_mut().zip(expert) {
                    *sum += weight * x;
                }
            }
            if let Some(shared) = self.shared {
                for (sum, shared) in sums.iter_mut().zip(&shared[start..]) {
                    *sum += shared;
                }
            }
            match self.begin {
                Begin::Zero => out.copy_from_slice(sums),
                Begin::Residual => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += *sum),
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{Begin, ExpertOutputs, combine};
    use crate::testing::{Numbers, assert_close, every_cpu};

    #[test]
    fn combine_adds_weighted_experts_and_the_shared_expert_on_every_isa() {
        for cpu in every_cpu() {
            for (num_rows, per_row, hidden) in [(1, 1, 1), (2, 3, 65), (7, 2, 130), (5, 4, 1343)] {
                let mut numbers = Numbers::new(17);
                let expert_out = numbers.vec(num_rows * per_row * hidden);
                let weights = numbers.vec(num_rows * per_row);
                let shared = numbers.vec(num_rows * hidden);
                let before = numbers.vec(num_rows * hidden);
                // A permutation: 1 has no factor in common with anything.
                let num_slots = num_rows * per_row;
                let slots: Vec<u32> = (0..num_slots).map(|i| ((i * 11 + 3) % num_slots) as u32).collect();
                let expected: Vec<f64> = (0..num_rows * hidden)
                    .map(|i| {
                        let (row, col) = (i / hidden, i % hidden);
                        let experts: f64 = (row * per_row..(row + 1) * per_row)
                            .map(|j| f64::from(weights[j]) * f64::from(expert_out[slots[j] as usize * hidden + col]))
                            .sum();
                        experts
                    })
                    .collect();
                let experts = ExpertOutputs { rows: &expert_out, slots: &slots, weights: &weights };
                for (begin, shared) in [
                    (Begin::Residual, Some(&shared)),
                    (Begin::Residual, None),
                    (Begin::Zero, Some(&shared)),
                    (Begin::Zero, None),
                ] {
                    let mut out = before.clone();
                    combine(&cpu, &mut out, begin, experts, shared.map(Vec::as_slice));
                    let begins = |i: usize| if begin == Begin::Residual { f64::from(before[i]) } else { 0.0 };
                    let adds = |i: usize| begins(i) + shared.map_or(0.0, |shared| f64::from(shared[i]));
                    let expected: Vec<f64> = expected.iter().enumerate().map(|(i, sum)| sum + adds(i)).collect();
                    assert_close(&out, &expected, 1e-6, 1e-6);
                }
            }
        }
    }
}
