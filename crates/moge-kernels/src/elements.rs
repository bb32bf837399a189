//! Stored numbers as the kernels see them: borrowed slices tagged with their type.

use half::{bf16, f16};

use crate::isa::Isa;
use crate::simd::{Simd, SimdOp, Stored};

/// Type of a stored number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an IEEE single.
    Bf16,
}

impl Dtype {
    /// Bytes that one number takes.
    pub fn size_bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// Precision of activations and of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Activations and KV stay f32.
    F32,
    /// What a matrix product or the KV cache reads is rounded to bf16 (nearest, ties to even); sums stay f32.
    Bf16,
}

/// What a kernel does with what its output holds already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulate {
    /// Replace it; it need not be set.
    Set,
    /// Add to it.
    Add,
}

/// Borrowed numbers of any stored type.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// f32 numbers.
    F32(&'a [f32]),
    /// f16 numbers.
    F16(&'a [f16]),
    /// bf16 numbers.
    Bf16(&'a [bf16]),
}

impl<'a> Elements<'a> {
    /// How many numbers there are.
    pub fn len(self) -> usize {
        match self {
            Elements::F32(x) => x.len(),
            Elements::F16(x) => x.len(),
            Elements::Bf16(x) => x.len(),
        }
    }

    /// True if there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Their type.
    pub fn dtype(self) -> Dtype {
        match self {
            Elements::F32(_) => Dtype::F32,
            Elements::F16(_) => Dtype::F16,
            Elements::Bf16(_) => Dtype::Bf16,
        }
    }

    /// The numbers at `range`.
    ///
    /// # Panics
    /// If `range` is out of bounds.
    pub fn slice(self, range: std::ops::Range<usize>) -> Elements<'a> {
        match self {
            Elements::F32(x) => Elements::F32(&x[range]),
            Elements::F16(x) => Elements::F16(&x[range]),
            Elements::Bf16(x) => Elements::Bf16(&x[range]),
        }
    }

    /// Write the numbers to `out` as f32.
    ///
    /// # Panics
    /// If `out` has another length.
    pub fn widen(self, isa: Isa, out: &mut [f32]) {
        assert_eq!(out.len(), self.len(), "numbers to widen");
        match self {
            Elements::F32(x) => out.copy_from_slice(x),
            Elements::F16(x) => isa.run(Widen { x, out }),
            Elements::Bf16(x) => isa.run(Widen { x, out }),
        }
    }
}

struct Widen<'a, T> {
    x: &'a [T],
    out: &'a mut [f32],
}

impl<T: Stored> SimdOp for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (x, out) in self.x.chunks(S::LANES).zip(self.out.chunks_mut(S::LANES)) {
            if x.len() == S::LANES {
                // SAFETY: `x` has as many numbers as a register.
                simd.store(out, unsafe { T::load(simd, x.as_ptr()) });
            } else {
                for (x, out) in x.iter().zip(out) {
                    *out = x.widen();
                }
            }
        }
    }
}

/// A borrowed row-major matrix `[rows, cols]`; as a weight `[output width, input width]`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    elements: Elements<'a>,
    rows: usize,
    cols: usize,
}

impl<'a> Matrix<'a> {
    /// View `elements` as `[rows, cols]`.
    ///
    /// # Panics
    /// If the number of elements is not `rows * cols`.
    pub fn new(elements: Elements<'a>, rows: usize, cols: usize) -> Matrix<'a> {
        assert_eq!(elements.len(), rows * cols, "matrix of {rows} x {cols}");
        Matrix { elements, rows, cols }
    }

    /// Number of rows: the output width of a weight.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Number of columns: the input width of a weight.
    pub fn cols(self) -> usize {
        self.cols
    }

    /// All elements, row after row.
    pub fn elements(self) -> Elements<'a> {
        self.elements
    }

    /// The rows at `range`, as a matrix.
    ///
    /// # Panics
    /// If `range` is out of bounds.
    pub fn slice_rows(self, range: std::ops::Range<usize>) -> Matrix<'a> {
        let elements = self.elements.slice(range.start * self.cols..range.end * self.cols);
        Matrix { elements, rows: range.len(), cols: self.cols }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{Elements, Matrix};
    use crate::Isa;
    use crate::round_to_bf16;
    use half::{bf16, f16};

    #[test]
    fn rounding_to_bf16_agrees_with_the_half_crate_on_every_upper_half() {
        for upper in 0..=u32::from(u16::MAX) {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(upper << 16 | lower);
                assert_eq!(round_to_bf16(x).to_bits(), bf16::from_f32(x).to_f32().to_bits(), "{x:e}");
            }
        }
    }

    #[test]
    fn a_matrix_gives_a_run_of_its_rows() {
        let numbers: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let matrix = Matrix::new(Elements::F32(&numbers), 3, 2).slice_rows(1..3);
        assert_eq!((matrix.rows(), matrix.cols()), (2, 2));
        assert!(matches!(matrix.elements(), Elements::F32([2.0, 3.0, 4.0, 5.0])));
    }

    #[test]
    fn every_type_is_widened_exactly_at_awkward_lengths_on_every_isa() {
        let numbers: Vec<f32> = (0..37).map(|i| i as f32 * 0.25 - 4.0).collect();
        let (halves, brains): (Vec<f16>, Vec<bf16>) =
            numbers.iter().map(|&x| (f16::from_f32(x), bf16::from_f32(x))).unzip();
        for (isa, len) in Isa::available().flat_map(|isa| [0, 1, 7, 8, 17, 37].map(|len| (isa, len))) {
            for elements in [Elements::F32(&numbers), Elements::F16(&halves), Elements::Bf16(&brains)] {
                let mut out = vec![0.0; len];
                elements.slice(0..len).widen(isa, &mut out);
                assert_eq!(out, numbers[..len]);
            }
        }
    }
}
