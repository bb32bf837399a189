//! Where the weights of each layer lie in the flat vectors, and products with them.

use std::ops::Range;

use moge_kernels::{Accumulate, Cpu, ExpertWeights, ProductRows, TrainGemm};
use moge_model::{MatrixSpec, ModelConfig, Network, Part, Share, TensorSource};

/// The network whose tensors are places in a flat vector, as [`crate::Layout`] orders them.
pub(super) type Spans = Network<MatrixSpan, Range<usize>>;

/// A matrix `[rows, cols]` from `start` on.
#[derive(Clone, Copy, Debug)]
pub(super) struct MatrixSpan {
    pub(super) start: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// The places of the tensors of the network that `config` describes.
pub(super) fn spans(config: &ModelConfig) -> Spans {
    Network::build(config, Share::WHOLE, &mut ParamOffsets { len: 0 })
}

struct ParamOffsets {
    len: usize,
}

impl ParamOffsets {
    fn take(&mut self, len: usize) -> usize {
        self.len += len;
        self.len - len
    }
}

impl TensorSource for ParamOffsets {
    type Matrix = MatrixSpan;
    type Vector = Range<usize>;

    fn matrix(&mut self, _: String, spec: &MatrixSpec) -> MatrixSpan {
        let MatrixSpec { rows, cols, .. } = *spec;
        MatrixSpan { start: self.take(rows * cols), rows, cols }
    }

    fn halves(&mut self, name: String, spec: &MatrixSpec) -> [MatrixSpan; 2] {
        [self.matrix(name.clone(), spec), self.matrix(name, spec)]
    }

    fn vector(&mut self, _: String, shape: &[usize], _: &Part) -> Range<usize> {
        let len = shape.iter().product();
        let start = self.take(len);
        start..start + len
    }
}

impl MatrixSpan {
    /// Two matrices of one width of which the second follows the first, as one.
    pub(super) fn joined([first, second]: [MatrixSpan; 2]) -> MatrixSpan {
        assert_eq!(second.start, first.start + first.rows * first.cols, "the matrices do not follow one another");
        MatrixSpan { rows: first.rows + second.rows, ..first }
    }

    pub(super) fn range(self) -> Range<usize> {
        self.start..self.start + self.rows * self.cols
    }
}

/// A product's threads and memory, and the matrix that it is with.
pub(super) struct Linear<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) products: &'a mut TrainGemm,
    pub(super) span: MatrixSpan,
}

impl Linear<'_> {
    /// `out = x w^T + bias`; `params` are all parameters.
    pub(super) fn forward(self, params: &[f32], out: &mut [f32], x: &[f32], bias: Option<&[f32]>) {
        let MatrixSpan { start, rows, cols } = self.span;
        let weights = ExpertWeights { offsets: &[0, out.len() / rows], starts: &[start], rows, cols };
        self.products.forward(self.cpu, out, ProductRows::new(x, cols), (params, weights), bias);
    }

    /// `dx (=|+=) dy w`.
    pub(super) fn backward_input(self, params: &[f32], dx: &mut [f32], dy: &[f32], store: Accumulate) {
        let MatrixSpan { start, rows, cols } = self.span;
        let weights = ExpertWeights { offsets: &[0, dx.len() / cols], starts: &[start], rows, cols };
        self.products.backward_input(self.cpu, dx, ProductRows::new(dy, rows), (params, weights), store);
    }

    /// `dw (=|+=) dy^T x`.
    pub(super) fn backward_weight(self, grads: &mut Gradients<'_>, dy: &[f32], x: &[f32]) {
        let MatrixSpan { start, rows, cols } = self.span;
        let weights = ExpertWeights { offsets: &[0, x.len() / cols], starts: &[start], rows, cols };
        let (dy, x) = (ProductRows::new(dy, rows), ProductRows::new(x, cols));
        self.products.backward_weight(self.cpu, (grads.numbers, weights), dy, x, grads.store);
    }
}

/// The gradients of all parameters.
pub(super) struct Gradients<'a> {
    pub(super) numbers: &'a mut [f32],
    /// What a pass does with those that other batches of the same step left.
    pub(super) store: Accumulate,
}
