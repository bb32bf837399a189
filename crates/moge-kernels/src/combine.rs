//! The weighted sum over a row's experts, added to the residual stream.

use crate::cpu::Cpu;
use crate::isa::Isa;
use crate::simd::{Simd, SimdOp};

/// `residual[t] += (sum over j of weights[t, j] * expert_out[slots[t, j]]) + shared[t]`, the sum in the order of `j`.
///
/// Shapes: `residual`, `shared` `[num_rows, hidden]`; `expert_out` `[num_rows * experts_per_token, hidden]`; `slots` and
/// `weights` `[num_rows, experts_per_token]`: the dispatched row of each of a row's experts, and its weight.
///
/// # Panics
/// If a length does not fit or a slot is out of bounds.
pub fn combine(cpu: &Cpu, residual: &mut [f32], expert_out: &[f32], slots: &[u32], weights: &[f32], shared: &[f32]) {
    assert_eq!(residual.len(), shared.len(), "residual and shared");
    assert_eq!(slots.len(), weights.len(), "slots and weights");
    if residual.is_empty() {
        return;
    }
    assert!(
        !slots.is_empty() && expert_out.len().is_multiple_of(slots.len()),
        "expert outputs of {} slots",
        slots.len()
    );
    let hidden = expert_out.len() / slots.len();
    assert!(hidden > 0 && residual.len().is_multiple_of(hidden), "{} numbers in rows of {hidden}", residual.len());
    let num_rows = residual.len() / hidden;
    assert!(slots.len().is_multiple_of(num_rows), "{} slots for {num_rows} rows", slots.len());
    assert!(slots.iter().all(|&slot| (slot as usize) < slots.len()), "a slot is not below {}", slots.len());
    let per_row = slots.len() / num_rows;
    let isa = cpu.isa();
    cpu.for_each_rows(residual, hidden, |rows, residual| {
        for (row, residual) in rows.zip(residual.chunks_exact_mut(hidden)) {
            let choices = row * per_row..(row + 1) * per_row;
            let (slots, weights) = (&slots[choices.clone()], &weights[choices]);
            let shared = &shared[row * hidden..(row + 1) * hidden];
            combine_row(isa, residual, expert_out, slots, weights, shared);
        }
    });
}

fn combine_row(isa: Isa, residual: &mut [f32], expert_out: &[f32], slots: &[u32], weights: &[f32], shared: &[f32]) {
    isa.run(CombineRow { residual, expert_out, slots, weights, shared });
}

struct CombineRow<'a> {
    residual: &'a mut [f32],
    expert_out: &'a [f32],
    slots: &'a [u32],
    weights: &'a [f32],
    shared: &'a [f32],
}

impl SimdOp for CombineRow<'_> {
    type Output = ();

    /// Plain loops: elementwise, the compiler vectorises them.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        /// A run of the row whose sums stay in registers.
        const RUN: usize = 64;
        let hidden = self.residual.len();
        for (index, residual) in self.residual.chunks_mut(RUN).enumerate() {
            let start = index * RUN;
            let mut sums = [0.0; RUN];
            let sums = &mut sums[..residual.len()];
            for (&slot, &weight) in self.slots.iter().zip(self.weights) {
                let expert = &self.expert_out[slot as usize * hidden + start..][..sums.len()];
                for (sum, x) in sums.iter_mut().zip(expert) {
                    *sum += weight * x;
                }
            }
            let shared = &self.shared[start..][..sums.len()];
            for (residual, (sum, shared)) in residual.iter_mut().zip(sums.iter().zip(shared)) {
                *residual += sum + shared;
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::combine;
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
                        f64::from(before[i]) + experts + f64::from(shared[i])
                    })
                    .collect();
                let mut residual = before.clone();
                combine(&cpu, &mut residual, &expert_out, &slots, &weights, &shared);
                assert_close(&residual, &expected, 1e-6, 1e-6);
            }
        }
    }
}
