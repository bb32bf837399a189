//! Rows of the embedding table.

use crate::cpu::Cpu;
use crate::elements::{Elements, Matrix};
use crate::simd::{Simd, SimdOp, Stored};

/// `out[r] = table[tokens[r]]`, widened to f32.
///
/// Shapes: `out` `[tokens.len(), hidden]`, `table` `[vocab_size, hidden]`.
///
/// # Panics
/// If a length does not fit or a token is not below `vocab_size`.
pub fn embed(cpu: &Cpu, out: &mut [f32], table: Matrix<'_>, tokens: &[u32]) {
    let hidden = table.cols();
    assert_eq!(out.len(), tokens.len() * hidden, "out of {} x {hidden}", tokens.len());
    let isa = cpu.isa();
    cpu.for_each_rows(out, hidden, |rows, out| {
        for (out, &token) in out.chunks_exact_mut(hidden).zip(&tokens[rows]) {
            let token = token as usize;
            assert!(token < table.rows(), "token {token} is not below {}", table.rows());
            match table.elements().slice(token * hidden..(token + 1) * hidden) {
                Elements::F32(x) => out.copy_from_slice(x),
                Elements::F16(x) => isa.run(Widen { out, x }),
                Elements::Bf16(x) => isa.run(Widen { out, x }),
            }
        }
    });
}

struct Widen<'a, W> {
    out: &'a mut [f32],
    x: &'a [W],
}

impl<W: Stored> SimdOp for Widen<'_, W> {
    type Output = ();

    /// A plain loop: a row is short.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            *out = x.widen();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::embed;
    use crate::testing::{Numbers, assert_same_bits, every_cpu};
    use crate::{Elements, Matrix};
    use half::{bf16, f16};

    #[test]
    fn embed_copies_the_rows_of_the_tokens_from_every_stored_type() {
        let (vocab_size, hidden) = (13, 37);
        let table = Numbers::new(3).vec(vocab_size * hidden);
        let as_f16: Vec<f16> = table.iter().map(|&x| f16::from_f32(x)).collect();
        let as_bf16: Vec<bf16> = table.iter().map(|&x| bf16::from_f32(x)).collect();
        let tokens = [12, 0, 5, 5];
        let rows = |number: &dyn Fn(usize) -> f32| -> Vec<f32> {
            tokens.iter().flat_map(|&t| t as usize * hidden..(t as usize + 1) * hidden).map(number).collect()
        };
        for cpu in every_cpu() {
            let mut out = vec![0.0; tokens.len() * hidden];
            embed(&cpu, &mut out, Matrix::new(Elements::F32(&table), vocab_size, hidden), &tokens);
            assert_same_bits(&out, &rows(&|i| table[i]));
            embed(&cpu, &mut out, Matrix::new(Elements::F16(&as_f16), vocab_size, hidden), &tokens);
            assert_same_bits(&out, &rows(&|i| as_f16[i].to_f32()));
            embed(&cpu, &mut out, Matrix::new(Elements::Bf16(&as_bf16), vocab_size, hidden), &tokens);
            assert_same_bits(&out, &rows(&|i| as_bf16[i].to_f32()));
        }
    }
}
