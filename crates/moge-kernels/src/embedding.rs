//! Rows of the embedding table.

use crate::cpu::{Cpu, SharedMut};
use crate::elements::{Elements, Matrix};
use crate::norm::add_row;
use crate::simd::{Simd, SimdOp, Stored};
use crate::sums::columns_per_chunk;

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

/// The gradient of [`embed`]: `dtable[tokens[r]] += dy[r]`, the rows in order.
///
/// Shapes: `dtable` `[vocab_size, hidden]`, `dy` `[tokens.len(), hidden]`. Each thread has some columns of all rows, so
/// the order does not depend on their number.
///
/// # Panics
/// If a length does not fit or a token is not below `vocab_size`.
pub fn embed_backward(cpu: &Cpu, dtable: &mut [f32], dy: &[f32], tokens: &[u32]) {
    let hidden = dy.len().checked_div(tokens.len()).unwrap_or(0);
    assert_eq!(dy.len(), tokens.len() * hidden, "dy of {} tokens", tokens.len());
    if dy.is_empty() {
        return;
    }
    assert!(dtable.len().is_multiple_of(hidden), "{} numbers are not rows of {hidden}", dtable.len());
    let vocab_size = dtable.len() / hidden;
    assert!(tokens.iter().all(|&token| (token as usize) < vocab_size), "a token is not below {vocab_size}");
    let isa = cpu.isa();
    let columns = columns_per_chunk(cpu, hidden);
    let dtable = SharedMut::new(dtable);
    cpu.for_each(hidden.div_ceil(columns), |chunk| {
        let columns = chunk * columns..hidden.min((chunk + 1) * columns);
        for (dy, &token) in dy.chunks_exact(hidden).zip(tokens) {
            let row = token as usize * hidden;
            // SAFETY: Chunks have different columns, and this part ends before the chunk takes another.
            let dtable = unsafe { dtable.slice(row + columns.start..row + columns.end) };
            add_row(isa, dtable, &dy[columns.clone()]);
        }
    });
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{embed, embed_backward};
    use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu, finite_differences};
    use crate::{Cpu, Elements, Isa, Matrix};
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

    #[test]
    fn embed_backward_matches_finite_differences_and_adds_to_what_is_there() {
        let (vocab_size, hidden) = (5, 37);
        let tokens = [4, 0, 2, 2, 4, 2];
        let mut numbers = Numbers::new(4);
        let (dy, before) = (numbers.vec(tokens.len() * hidden), numbers.vec(vocab_size * hidden));
        // The operator is linear, so its gradient is the same everywhere.
        let gradient = finite_differences(&vec![0.0; before.len()], |table| {
            let y = tokens.iter().flat_map(|&token| &table[token as usize * hidden..][..hidden]);
            y.zip(&dy).map(|(y, &dy)| y * f64::from(dy)).sum()
        });
        let expected: Vec<f64> = before.iter().zip(gradient).map(|(&x, gradient)| f64::from(x) + gradient).collect();
        for cpu in every_cpu() {
            let mut dtable = before.clone();
            embed_backward(&cpu, &mut dtable, &dy, &tokens);
            assert_close(&dtable, &expected, 1e-6, 1e-6);
            embed_backward(&cpu, &mut dtable, &[], &[]);
            assert_close(&dtable, &expected, 1e-6, 1e-6);
        }
    }

    #[test]
    fn embed_backward_has_the_same_bits_at_any_number_of_threads_and_on_any_isa() {
        let (vocab_size, hidden) = (7, 83);
        let mut numbers = Numbers::new(5);
        let tokens: Vec<u32> = (0..131).map(|_| numbers.below(vocab_size) as u32).collect();
        let dy = numbers.vec(tokens.len() * hidden);
        let run = |isa, num_threads| {
            let mut dtable = vec![0.0; vocab_size * hidden];
            embed_backward(&Cpu::new(isa, num_threads), &mut dtable, &dy, &tokens);
            dtable
        };
        let expected = run(Isa::scalar(), 1);
        for isa in Isa::available() {
            for num_threads in [1, 2, 5] {
                assert_same_bits(&run(isa, num_threads), &expected);
            }
        }
    }
}
