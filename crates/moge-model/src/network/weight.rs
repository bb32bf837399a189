//! One large tensor and its bytes.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use moge_kernels::{Cpu, Dtype, Elements, Isa, Matrix, PANEL_ROWS, PackedFormat, PackedMatrix, pack_panel};

use crate::checkpoint::storage::{Storage, StoredTensor};
use crate::network::tensors::Part;

/// A large tensor, used where it lies in the checkpoint's file, or packed: `[rows, cols]`.
#[derive(Clone, Debug)]
pub struct Weight {
    storage: Arc<Storage>,
    range: Range<usize>,
    format: Format,
    rows: usize,
    cols: usize,
}

/// What the bytes of a weight are.
#[derive(Clone, Copy, Debug)]
enum Format {
    /// Numbers, row-major.
    Plain(Dtype),
    /// Panels in the packed layout.
    Packed(PackedFormat),
}

/// The form of input that products with a weight read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InputKind {
    /// Activations.
    Float,
    /// Activations quantised to eight bits.
    Int8,
}

/// The numbers of a weight, borrowed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum WeightView<'a> {
    Plain(Matrix<'a>),
    Packed(PackedMatrix<'a>),
}

impl Default for Weight {
    /// Nothing.
    fn default() -> Weight {
        Weight {
            storage: Arc::new(Storage::copy_of(&[])),
            range: 0..0,
            format: Format::Plain(Dtype::F32),
            rows: 0,
            cols: 0,
        }
    }
}

impl Weight {
    /// The numbers, borrowed.
    pub(crate) fn view(&self) -> WeightView<'_> {
        match self.format {
            Format::Plain(_) => WeightView::Plain(self.matrix()),
            Format::Packed(_) => WeightView::Packed(self.packed()),
        }
    }

    /// The form of input that its products read.
    pub(crate) fn input_kind(&self) -> InputKind {
        match self.format {
            Format::Plain(_) => InputKind::Float,
            Format::Packed(_) => InputKind::Int8,
        }
    }

    /// Its rows: the output width.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Its columns: the input width.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that it takes.
    pub(crate) fn num_bytes(&self) -> u64 {
        self.range.len() as u64
    }

    /// The numbers of a weight that is not packed.
    ///
    /// # Panics
    /// If it is.
    pub(crate) fn matrix(&self) -> Matrix<'_> {
        let bytes = &self.storage.bytes()[self.range.clone()];
        let elements = match self.format {
            Format::Plain(Dtype::F32) => Elements::F32(bytemuck::cast_slice(bytes)),
            Format::Plain(Dtype::F16) => Elements::F16(bytemuck::cast_slice::<u8, f16>(bytes)),
            Format::Plain(Dtype::Bf16) => Elements::Bf16(bytemuck::cast_slice::<u8, bf16>(bytes)),
            Format::Packed(format) => unreachable!("a {format:?} weight where only plain ones may be"),
        };
        Matrix::new(elements, self.rows, self.cols)
    }

    /// The panels of a packed weight.
    ///
    /// # Panics
    /// If it is not packed.
    pub(crate) fn packed(&self) -> PackedMatrix<'_> {
        let Format::Packed(format) = self.format else { unreachable!("a plain weight among packed ones") };
        PackedMatrix::new(&self.storage.bytes()[self.range.clone()], format, self.rows, self.cols)
    }

    /// `tensor` as a matrix of `rows` x `cols`. Data that is not aligned for its type is copied.
    pub(crate) fn from_stored(tensor: &StoredTensor, dtype: Dtype, rows: usize, cols: usize) -> Weight {
        let aligned = tensor.bytes().as_ptr().addr().is_multiple_of(dtype.size_bytes());
        let (storage, range) = if aligned {
            (tensor.storage.clone(), tensor.range.clone())
        } else {
            (Arc::new(Storage::copy_of(tensor.bytes())), 0..tensor.range.len())
        };
        Weight { storage, range, format: Format::Plain(dtype), rows, cols }
    }

    /// Panels as they lie in `bytes` of `tensor`.
    pub(crate) fn from_panels(
        tensor: &StoredTensor,
        format: PackedFormat,
        bytes: Range<usize>,
        rows: usize,
        cols: usize,
    ) -> Weight {
        let range = tensor.range.start + bytes.start..tensor.range.start + bytes.end;
        Weight { storage: tensor.storage.clone(), range, format: Format::Packed(format), rows, cols }
    }

    /// The bytes of `storage` from `start` on: panels of `format`, or f32.
    pub(crate) fn from_memory(
        storage: &Arc<Storage>,
        start: usize,
        format: Option<PackedFormat>,
        rows: usize,
        cols: usize,
    ) -> Weight {
        let (format, len) = match format {
            Some(format) => (Format::Packed(format), format.weight_bytes(rows, cols)),
            None => (Format::Plain(Dtype::F32), rows * cols * size_of::<f32>()),
        };
        Weight { storage: storage.clone(), range: start..start + len, format, rows, cols }
    }

    /// A packed copy.
    pub(crate) fn pack(&self, cpu: &Cpu, format: PackedFormat) -> Weight {
        let (mut storage, range) = Storage::aligned(format.weight_bytes(self.rows, self.cols));
        pack(cpu, self.matrix(), format, &mut storage.bytes_mut()[range.clone()]);
        Weight { storage: Arc::new(storage), range, format: Format::Packed(format), ..*self }
    }

    /// A part of it. Rows stay where they lie; columns are copied. Packed weights have parts of whole panels and blocks.
    pub(crate) fn part(self, part: &Part) -> Weight {
        match part {
            Part::Whole => self,
            Part::Rows(rows) => self.row_part(rows.clone()),
            Part::Cols(cols) => self.col_part(cols.clone()),
        }
    }

    fn row_part(self, rows: Range<usize>) -> Weight {
        let bytes_before = |row: usize| match self.format {
            Format::Plain(dtype) => row * self.cols * dtype.size_bytes(),
            Format::Packed(format) => {
                assert!(row.is_multiple_of(PANEL_ROWS), "row {row} is inside a panel");
                format.weight_bytes(row, self.cols)
            }
        };
        let range = self.range.start + bytes_before(rows.start)..self.range.start + bytes_before(rows.end);
        Weight { range, rows: rows.len(), ..self }
    }

    fn col_part(self, cols: Range<usize>) -> Weight {
        // Rows of numbers, or panels, one after another; a panel may end with scales of all its columns.
        let (num_units, tail) = match self.format {
            Format::Plain(_) => (self.rows, 0),
            Format::Packed(format) => (PackedFormat::num_panels(self.rows), format.panel_bytes(0)),
        };
        let bytes_of = |cols: usize| match self.format {
            Format::Plain(dtype) => cols * dtype.size_bytes(),
            Format::Packed(format) => format.panel_bytes(cols) - tail,
        };
        let bytes = bytes_of(cols.start)..bytes_of(cols.end);
        let part_bytes = bytes.len() + tail;
        let (mut storage, range) = Storage::aligned(num_units * part_bytes);
        let units = self.storage.bytes()[self.range.clone()].chunks_exact(bytes_of(self.cols) + tail);
        for (part, unit) in storage.bytes_mut()[range.clone()].chunks_exact_mut(part_bytes).zip(units) {
            part[..bytes.len()].copy_from_slice(&unit[bytes.clone()]);
            part[bytes.len()..].copy_from_slice(&unit[unit.len() - tail..]);
        }
        Weight { storage: Arc::new(storage), range, format: self.format, rows: self.rows, cols: cols.len() }
    }

    /// The upper and the lower half of the rows of a plain weight.
    pub(crate) fn halves(self) -> [Weight; 2] {
        let middle = self.range.start + self.range.len() / 2;
        let lower = Weight { range: middle..self.range.end, rows: self.rows / 2, ..self.clone() };
        [Weight { range: self.range.start..middle, rows: self.rows / 2, ..self }, lower]
    }
}

/// Pack `matrix` into `out`, its panels in `format`.
pub(crate) fn pack(cpu: &Cpu, matrix: Matrix<'_>, format: PackedFormat, out: &mut [u8]) {
    let (isa, num_rows, cols) = (cpu.isa(), matrix.rows(), matrix.cols());
    cpu.for_each_slice(out, format.panel_bytes(cols), |panel, out| {
        let rows = panel * PANEL_ROWS..num_rows.min((panel + 1) * PANEL_ROWS);
        pack_panel(isa, format, &widen(isa, matrix.slice_rows(rows).elements()), cols, out);
    });
}

/// Numbers of any type as f32.
pub(crate) fn widen(isa: Isa, elements: Elements<'_>) -> Vec<f32> {
    let mut numbers = vec![0.0; elements.len()];
    elements.widen(isa, &mut numbers);
    numbers
}

#[cfg(test)]
mod tests {
    use moge_kernels::{GroupedRows, PackedProduct, QuantizedRows, packed_gemm};

    use super::*;

    /// What packed products may differ by where a sum over columns is cut: inputs are quantised for each part.
    const PART_TOLERANCE: f32 = 2e-2;

    fn weight(rows: usize, cols: usize) -> Weight {
        let numbers: Vec<f32> = (0..rows * cols).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect();
        let bytes: &[u8] = bytemuck::cast_slice(&numbers);
        let (mut storage, range) = Storage::aligned(bytes.len());
        storage.bytes_mut()[range.clone()].copy_from_slice(bytes);
        Weight::from_memory(&Arc::new(storage), range.start, None, rows, cols)
    }

    fn product(cpu: &Cpu, weight: &Weight, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; weight.rows()];
        match weight.view() {
            WeightView::Plain(weight) => moge_kernels::gemm(cpu, &mut out, x, weight, None),
            WeightView::Packed(weight) => {
                let mut quantized = QuantizedRows::default();
                let rows = GroupedRows { offsets: &[0, 1], source_rows: None };
                quantized.quantize(cpu, x, x.len(), rows);
                packed_gemm(cpu, &quantized, [PackedProduct { out: &mut out, weight, bias: None }]);
            }
        }
        out
    }

    #[test]
    fn parts_of_a_weight_multiply_as_the_whole_in_every_format() {
        let (rows, cols) = (96, 160);
        let cpu = Cpu::new(Isa::best(), 1);
        let x: Vec<f32> = (0..cols).map(|i| (i * 37 % 101) as f32 / 101.0 - 0.5).collect();
        let plain = weight(rows, cols);
        let packed = [PackedFormat::W8A8, PackedFormat::W4A8].map(|format| plain.pack(&cpu, format));
        for weight in packed.into_iter().chain([plain]) {
            let whole = product(&cpu, &weight, &x);
            let some = product(&cpu, &weight.clone().part(&Part::Rows(32..96)), &x);
            assert_eq!(some, whole[32..]);
            let halves =
                [0..64, 64..160].map(|cols| product(&cpu, &weight.clone().part(&Part::Cols(cols.clone())), &x[cols]));
            for (whole, sum) in whole.iter().zip(halves[0].iter().zip(&halves[1]).map(|(a, b)| a + b)) {
                assert!((whole - sum).abs() <= PART_TOLERANCE, "{:?}: {whole}, {sum}", weight.format);
            }
        }
    }
}
