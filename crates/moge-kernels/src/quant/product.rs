//! Products with packed weights, spread over threads.

use std::ops::Range;

use super::rows::{Tile, tiles};
use super::tile::{MAX_PANELS, PanelSums, multiply_panels, with_place};
use super::{PANEL_ROWS, PackedFormat, PackedMatrix, QuantizedRows};
use crate::combine::Begin;
use crate::cpu::{Cpu, SharedMut};
use crate::elements::Precision;
use crate::isa::Isa;
use crate::swiglu::swiglu;

/// Least parts of the work for each thread, so that the last ones to finish wait little.
const PARTS_PER_THREAD: usize = 16;
/// Most panels of a part: so often is a tile of inputs used once it is in L2.
const MAX_PART_PANELS: usize = 8;

/// One of the products of [`packed_gemm`].
#[derive(Debug)]
pub struct PackedProduct<'a> {
    /// `[num_rows, weight.rows()]`.
    pub out: &'a mut [f32],
    /// The weight; its columns are those of the input.
    pub weight: PackedMatrix<'a>,
    /// `[weight.rows()]`; none adds nothing.
    pub bias: Option<&'a [f32]>,
}

/// `out[t, n] = bias[n] + sum over k of x[t, k] * weight[n, k]` for some weights that share their input, `[num_rows, k]` of
/// one expert, together.
///
/// Sums inside a quant block (W4A8) or over a row (W8A8) are exact integers; blocks are added in order, in f32, each
/// times its scale.
///
/// # Panics
/// If a length does not fit.
pub fn packed_gemm<const N: usize>(cpu: &Cpu, x: &QuantizedRows, products: [PackedProduct<'_>; N]) {
    assert_eq!(x.offsets().len(), 2, "ends of one expert's rows");
    let products = products.map(|PackedProduct { out, weight, bias }| {
        assert_eq!(x.width(), weight.cols(), "width of x and of the weight");
        assert_eq!(out.len(), x.num_rows() * weight.rows(), "out of {} x {}", x.num_rows(), weight.rows());
        assert!(bias.is_none_or(|bias| bias.len() == weight.rows()), "length of the bias");
        (SharedMut::new(out), weight, bias)
    });
    let part_panels = part_panels(cpu, products.iter().map(|(_, weight, _)| weight.num_panels()).sum());
    let parts = || {
        products.iter().flat_map(|product| runs(0..product.1.num_panels(), part_panels).map(move |run| (product, run)))
    };
    let isa = cpu.isa();
    cpu.for_each(parts().count(), |part| {
        let Some(((out, weight, bias), panels)) = parts().nth(part) else { return };
        let num_cols = weight.rows();
        with_place(|place| {
            for tile in tiles(0..x.num_rows()) {
                each_panel(isa, panels.clone(), *weight, x.tile(tile.clone()), place, |panel, products| {
                    let cols = columns(panel, num_cols);
                    for (row, products) in tile.clone().zip(&products.0) {
                        // SAFETY: Parts are disjoint in columns.
                        let out = unsafe { out.slice(row * num_cols + cols.start..row * num_cols + cols.end) };
                        match bias {
                            Some(bias) => {
                                for (out, (bias, product)) in
                                    out.iter_mut().zip(bias[cols.clone()].iter().zip(products))
                                {
                                    *out = bias + product;
                                }
                            }
                            None => out.copy_from_slice(&products[..cols.len()]),
                        }
                    }
                });
            }
        });
    });
}

/// `out[d, i] = silu(gate[i] . x[d]) * (up[i] . x[d])` with `[gate, up] = gate_up(e)` of the expert `e` whose rows hold `d`.
///
/// Shapes: `out` `[num_dispatched, inter]`, `x` `[num_dispatched, hidden]`, gate and up `[inter, hidden]`, the same for every
/// expert. Sums as for [`packed_gemm`]. `gate_up` is not asked about experts without rows.
///
/// # Panics
/// If a length does not fit.
pub fn packed_swiglu<'w>(
    cpu: &Cpu,
    out: &mut [f32],
    x: &QuantizedRows,
    gate_up: &(dyn Fn(usize) -> [PackedMatrix<'w>; 2] + Sync),
) {
    let Some(first) = first_expert(x.offsets()) else {
        return assert!(out.is_empty(), "out has {} numbers for no row", out.len());
    };
    let inter = gate_up(first)[0].rows();
    assert_eq!(out.len(), x.num_rows() * inter, "out of {} x {inter}", x.num_rows());
    let out = SharedMut::new(out);
    let isa = cpu.isa();
    for_each_part(cpu, x.offsets(), PackedFormat::num_panels(inter), |expert, rows, panels| {
        let weights = gate_up(expert);
        for weight in weights {
            assert_eq!((weight.rows(), weight.cols()), (inter, x.width()), "gate or up of expert {expert}");
        }
        with_place(|products| {
            for tile in tiles(rows) {
                let x = x.tile(tile.clone());
                for some in runs(panels.clone(), MAX_PANELS / 2) {
                    let pairs = some.clone().flat_map(|panel| weights.map(|weight| weight.panel(panel)));
                    multiply_panels(isa, pairs, x, products);
                    for (panel, products) in some.zip(products.chunks_exact(2)) {
                        let cols = columns(panel, inter);
                        for (row, (gate, up)) in tile.clone().zip(products[0].0.iter().zip(&products[1].0)) {
                            // SAFETY: Parts are disjoint in expert, hence in rows, or in columns.
                            let out = unsafe { out.slice(row * inter + cols.start..row * inter + cols.end) };
                            swiglu(isa, out, &gate[..cols.len()], &up[..cols.len()], Precision::F32);
                        }
                    }
                }
            }
        });
    });
}

/// Experts' last products and where they go: see [`packed_experts_down`].
#[derive(Clone, Copy)]
pub struct ExpertsDown<'a, 'w> {
    /// Inner activations of the dispatched rows, `[num_dispatched, inter]`.
    pub inner: &'a QuantizedRows,
    /// The down projection of an expert, `[hidden, inter]`.
    pub down: &'a (dyn Fn(usize) -> PackedMatrix<'w> + Sync),
    /// Row of the residual stream of each dispatched row.
    pub source_rows: &'a [u32],
    /// Factor of each dispatched row.
    pub row_weights: &'a [f32],
}

/// `out[t] (=|+=) sum over experts e in order, sum over the rows d of e that belong to t: row_weights[d] * (down(e) . inner[d])`,
/// added to `out` one after another: the last products of experts and their weighted sum in one.
///
/// Shapes: `out` `[num_rows, hidden]`. Every part of the work has some columns of all rows, so the order of a
/// row's sum is that of its experts.
///
/// # Panics
/// If a length does not fit or a source row is out of bounds.
pub fn packed_experts_down(cpu: &Cpu, out: &mut [f32], begin: Begin, hidden: usize, experts: ExpertsDown<'_, '_>) {
    let ExpertsDown { inner, down, source_rows, row_weights } = experts;
    let num_rows = out.len() / hidden;
    assert_eq!(out.len(), num_rows * hidden, "out in rows of {hidden}");
    assert!(source_rows.len() == inner.num_rows() && row_weights.len() == inner.num_rows(), "rows of the experts");
    assert!(source_rows.iter().all(|&row| (row as usize) < num_rows), "a source row is not below {num_rows}");
    let out = SharedMut::new(out);
    let isa = cpu.isa();
    let num_panels = PackedFormat::num_panels(hidden);
    let part_panels = part_panels(cpu, num_panels);
    cpu.for_each(num_panels.div_ceil(part_panels), |part| {
        let panels = part * part_panels..num_panels.min((part + 1) * part_panels);
        // SAFETY: Parts are disjoint in columns.
        let of_row =
            |row: usize, cols: Range<usize>| unsafe { out.slice(row * hidden + cols.start..row * hidden + cols.end) };
        if begin == Begin::Zero {
            let cols = columns(panels.start, hidden).start..columns(panels.end - 1, hidden).end;
            (0..num_rows).for_each(|row| of_row(row, cols.clone()).fill(0.0));
        }
        with_place(|products| {
            for (expert, pair) in inner.offsets().windows(2).enumerate().filter(|(_, pair)| pair[0] != pair[1]) {
                let weight = down(expert);
                assert_eq!((weight.rows(), weight.cols()), (hidden, inner.width()), "down of expert {expert}");
                for tile in tiles(pair[0]..pair[1]) {
                    let x = inner.tile(tile.clone());
                    each_panel(isa, panels.clone(), weight, x, products, |panel, products| {
                        for (row, products) in tile.clone().zip(&products.0) {
                            let out = of_row(source_rows[row] as usize, columns(panel, hidden));
                            for (out, product) in out.iter_mut().zip(products) {
                                *out += row_weights[row] * product;
                            }
                        }
                    });
                }
            }
        });
    });
}

/// Multiply each of `panels` of a weight, as many at once as possible, and give `body` the products of each.
fn each_panel(
    isa: Isa,
    panels: Range<usize>,
    weight: PackedMatrix<'_>,
    x: Tile<'_>,
    products: &mut [PanelSums; MAX_PANELS],
    mut body: impl FnMut(usize, &PanelSums),
) {
    for some in runs(panels, MAX_PANELS) {
        multiply_panels(isa, some.clone().map(|panel| weight.panel(panel)), x, products);
        some.zip(&*products).for_each(|(panel, products)| body(panel, products));
    }
}

/// `panels` in runs of up to `len`, to be read side by side.
fn runs(panels: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    panels.clone().step_by(len).map(move |first| first..panels.end.min(first + len))
}

/// The columns of an output of `num_cols` that a panel has.
fn columns(panel: usize, num_cols: usize) -> Range<usize> {
    panel * PANEL_ROWS..num_cols.min((panel + 1) * PANEL_ROWS)
}

/// The first expert that has rows.
fn first_expert(offsets: &[usize]) -> Option<usize> {
    offsets.windows(2).position(|pair| pair[0] != pair[1])
}

/// Panels of a part, so that all threads stay busy with `total_panels`.
fn part_panels(cpu: &Cpu, total_panels: usize) -> usize {
    let least_parts = PARTS_PER_THREAD * cpu.num_threads();
    [MAX_PART_PANELS, MAX_PANELS, MAX_PANELS / 2].into_iter().find(|len| total_panels / len >= least_parts).unwrap_or(1)
}

/// Call `body(expert, dispatched rows, panels)` for every expert that has rows and every run of its panels.
fn for_each_part(
    cpu: &Cpu,
    offsets: &[usize],
    num_panels: usize,
    body: impl Fn(usize, Range<usize>, Range<usize>) + Sync,
) {
    let with_rows = || offsets.windows(2).enumerate().filter(|(_, pair)| pair[0] != pair[1]);
    let num_experts = with_rows().count();
    let part_panels = part_panels(cpu, num_experts * num_panels);
    let parts_per_expert = num_panels.div_ceil(part_panels);
    cpu.for_each(num_experts * parts_per_expert, |chunk| {
        if let Some((expert, pair)) = with_rows().nth(chunk / parts_per_expert) {
            let first = chunk % parts_per_expert * part_panels;
            body(expert, pair[0]..pair[1], first..num_panels.min(first + part_panels));
        }
    });
}
