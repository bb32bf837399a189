//! A tensor in pieces: what is in memory at a time.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use bytemuck::AnyBitPattern;
use half::{bf16, f16};
use moge_kernels::{Cpu, Elements, PANEL_ROWS, PackError, PackedFormat, pack_int8, pack_panel};
use moge_model::{Isa, PackedSpec, StoredTensor, count_non_finite};
use safetensors::Dtype;

use crate::error::QuantizeError;
use crate::import::misplaced_bias;
use crate::item::{Input, Item, Levels};

/// Bytes of a source that are converted at a time: panels enough for many threads. Two pieces and three results are in
/// memory at once.
const PIECE_BYTES: usize = 64 << 20;

/// A part of an item: panels of a packed tensor, rows of one that is copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorChunk {
    range: Range<usize>,
}

/// A piece as it will be written.
pub(crate) struct Converted {
    pub(crate) bytes: Vec<u8>,
    pub(crate) error: PackError,
}

impl Item {
    /// All of it in pieces, in order.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = TensorChunk> + use<> {
        let num_rows = self.tensor().shape()[0];
        let (len, unit_rows) = match (&self.input, self.spec.packed) {
            // The sums of all rows make one small tensor.
            (Input::Bias(_), _) => (1, 1),
            (_, Some(packed)) => (packed.num_parts * PackedFormat::num_panels(packed.rows), PANEL_ROWS),
            (_, None) => (num_rows, 1),
        };
        let unit_bytes = self.tensor().bytes().len() / num_rows * unit_rows;
        let step = (PIECE_BYTES / unit_bytes.max(1)).max(1);
        (0..len).step_by(step).map(move |start| TensorChunk { range: start..len.min(start + step) })
    }

    /// What of its tensor a piece reads.
    pub(crate) fn source(&self, piece: &TensorChunk) -> StoredTensor {
        let tensor = self.tensor();
        match (&self.input, self.spec.packed) {
            (Input::Bias(_), _) => tensor.clone(),
            (_, Some(packed)) => {
                let last = panel_rows(packed, piece.range.end - 1);
                tensor.rows(panel_rows(packed, piece.range.start).start..last.end)
            }
            (_, None) => tensor.rows(piece.range.clone()),
        }
    }

    /// Convert a piece with all threads; `dir` is the source's, for errors.
    ///
    /// # Errors
    /// If an int8 weight has a bias that has no place.
    pub(crate) fn convert(&self, cpu: &Cpu, piece: &TensorChunk, dir: &Path) -> Result<Converted, QuantizeError> {
        match (&self.input, self.spec.packed) {
            (Input::Bias(bias), _) => {
                let numbers = bias.numbers();
                let num_non_finite = numbers.iter().filter(|x| !x.is_finite()).count();
                let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
                Ok(Converted { bytes, error: PackError { num_non_finite, ..PackError::default() } })
            }
            (_, Some(packed)) => self.pack(cpu, packed, piece, dir),
            (_, None) => {
                let source = self.source(piece);
                let found = count_non_finite(&source);
                let num_non_finite = (found.num_nan + found.num_infinite) as usize;
                let error = PackError { num_non_finite, ..PackError::default() };
                Ok(Converted { bytes: source.bytes().to_vec(), error })
            }
        }
    }

    fn pack(&self, cpu: &Cpu, packed: PackedSpec, piece: &TensorChunk, dir: &Path) -> Result<Converted, QuantizeError> {
        let panel_bytes = packed.format.panel_bytes(packed.cols);
        let mut bytes = vec![0; piece.range.len() * panel_bytes];
        let isa = cpu.isa();
        // By panel, so that the sum does not depend on the threads.
        let results = Mutex::new(vec![Ok(PackError::default()); piece.range.len()]);
        cpu.for_each_slice(&mut bytes, panel_bytes, |panel, out| {
            let rows = panel_rows(packed, piece.range.start + panel);
            let result = match &self.input {
                Input::Levels(levels) => pack_imported(isa, packed, levels, rows, out),
                _ => Ok(pack_panel(isa, packed.format, &floats(isa, &self.tensor().rows(rows)), packed.cols, out)),
            };
            results.lock().unwrap_or_else(PoisonError::into_inner)[panel] = result;
        });
        let mut error = PackError::default();
        for result in results.into_inner().unwrap_or_else(PoisonError::into_inner) {
            error = error.merge(result.map_err(|row| misplaced_bias(dir, self, row))?);
        }
        Ok(Converted { bytes, error })
    }
}

/// Rows of the tensor that make panel `panel`.
fn panel_rows(packed: PackedSpec, panel: usize) -> Range<usize> {
    let panels_per_part = PackedFormat::num_panels(packed.rows);
    let (part, panel) = (panel / panels_per_part, panel % panels_per_part);
    let first = part * packed.rows;
    first + panel * PANEL_ROWS..first + packed.rows.min((panel + 1) * PANEL_ROWS)
}

/// Pack rows of an int8 weight: W8A8 keeps the levels, W4A8 rounds again. Fails with a row whose bias has no place.
fn pack_imported(
    isa: Isa,
    packed: PackedSpec,
    levels: &Levels,
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<PackError, usize> {
    let first_row = rows.start;
    let mut scales = vec![0.0; rows.len()];
    levels.scales(first_row, &mut scales);
    let part = levels.levels.rows(rows);
    let numbers: &[i8] = bytemuck::cast_slice(part.bytes());
    let bad_row =
        numbers.chunks_exact(packed.cols).zip(first_row..).find(|(row, index)| !levels.bias_vanishes(*index, row));
    if let Some((_, row)) = bad_row {
        return Err(row);
    }
    match packed.format {
        PackedFormat::W8A8 => {
            pack_int8(numbers, &scales, packed.cols, out);
            Ok(PackError::default())
        }
        PackedFormat::W4A8 => {
            let rows = numbers.chunks_exact(packed.cols).zip(&scales);
            let weights: Vec<f32> =
                rows.flat_map(|(row, scale)| row.iter().map(move |&w| f32::from(w) * scale)).collect();
            Ok(pack_panel(isa, packed.format, &weights, packed.cols, out))
        }
    }
}

/// The numbers of a tensor of a float type.
fn floats(isa: Isa, tensor: &StoredTensor) -> Vec<f32> {
    let bytes = tensor.bytes();
    match tensor.dtype() {
        Dtype::F32 => widen(isa, Elements::F32(&aligned(bytes))),
        Dtype::F16 => widen(isa, Elements::F16(&aligned::<f16>(bytes))),
        Dtype::BF16 => widen(isa, Elements::Bf16(&aligned::<bf16>(bytes))),
        dtype => unreachable!("{dtype:?} was refused"),
    }
}

/// Data of a file need not be aligned for its type; where it is not, it is copied.
fn aligned<T: AnyBitPattern>(bytes: &[u8]) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(numbers) => Cow::Borrowed(numbers),
        Err(_) => bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect(),
    }
}

fn widen(isa: Isa, elements: Elements<'_>) -> Vec<f32> {
    let mut out = vec![0.0; elements.len()];
    elements.widen(isa, &mut out);
    out
}
