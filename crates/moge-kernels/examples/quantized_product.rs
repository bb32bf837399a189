//! A product with four-bit weights and eight-bit inputs beside the one in f32.
#![allow(clippy::unwrap_used, reason = "an example")]

use moge_kernels::{
    Cpu, Elements, GroupedRows, Isa, Matrix, PANEL_ROWS, PackedFormat, PackedMatrix, PackedProduct, QuantizedRows,
    gemm, pack_panel, packed_gemm,
};

/// Outputs and inputs of the weight.
const ROWS: usize = 96;
const COLS: usize = 320;

pub(crate) fn main() {
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    let numbers = |len: usize, seed: usize| (0..len).map(move |i| ((i * 7919 + seed) % 1009) as f32 / 504.5 - 1.0);
    let weight: Vec<f32> = numbers(ROWS * COLS, 5).collect();
    let x: Vec<f32> = numbers(COLS, 77).collect();

    let mut exact = vec![0.0; ROWS];
    gemm(&cpu, &mut exact, &x, Matrix::new(Elements::F32(&weight), ROWS, COLS), None);

    let format = PackedFormat::W4A8;
    let mut bytes = vec![0; format.weight_bytes(ROWS, COLS)];
    for (panel, rows) in bytes.chunks_exact_mut(format.panel_bytes(COLS)).zip(weight.chunks(PANEL_ROWS * COLS)) {
        pack_panel(cpu.isa(), format, rows, COLS, panel);
    }
    let mut quantized = QuantizedRows::default();
    quantized.quantize(&cpu, &x, COLS, GroupedRows { offsets: &[0, 1], source_rows: None });
    let mut out = vec![0.0; ROWS];
    let weight = PackedMatrix::new(&bytes, format, ROWS, COLS);
    packed_gemm(&cpu, &quantized, [PackedProduct { out: &mut out, weight, bias: None }]);

    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    let error = norm(&mut out.iter().zip(&exact).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied());
    println!("{} bytes in place of {}; relative error {:.1} %", bytes.len(), 4 * ROWS * COLS, 100.0 * error);
    assert!(error < 0.15);
}
