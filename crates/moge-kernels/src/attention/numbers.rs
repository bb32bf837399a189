//! The numbers that a KV cache holds, and how they are multiplied.
//!
//! Attention multiplies twice: queries with keys, where the inner dimension is that of a head, and weights with values,
//! where it is the tokens. For both, a block holds a matrix whose lanes are the outer dimension: keys lie
//! `[head_dim, tokens]`, values `[tokens, head_dim]`. So a query's number or a weight is broadcast, all query heads of a
//! KV head share each load, and no register is ever summed over its lanes.
//!
//! Narrow numbers lie in pairs along the inner dimension: `[inner / 2, outer, 2]`. A pair of bf16 is one lane of 32 bits,
//! widened by a shift or a mask; a pair of int8 is what one integer instruction multiplies and adds.

use half::bf16;

use crate::simd::{Simd, Stored};

/// A number of the KV cache.
pub(super) trait KvNumber: Copy + Send + Sync + 'static {
    /// Inner numbers that lie side by side.
    const PAIR: usize;

    /// What it is multiplied with.
    type Factor: Copy;

    /// A register of sums; in memory they take the place of as many f32.
    type Sums<S: Simd>: Copy;

    /// Sums of nothing.
    fn zero<S: Simd>(simd: S) -> Self::Sums<S>;

    /// Sums at `x`.
    ///
    /// # Safety
    /// [`Simd::LANES`] numbers are readable at `x`.
    unsafe fn load_sums<S: Simd>(simd: S, x: *const f32) -> Self::Sums<S>;

    /// Write sums to `out`.
    ///
    /// # Safety
    /// [`Simd::LANES`] numbers are writable at `out`.
    unsafe fn store_sums<S: Simd>(simd: S, out: *mut f32, sums: Self::Sums<S>);

    /// Add to `sums[m][r]` the products of two inner rows, of a `matrix` of so many columns, with the two `factors` of
    /// `m`, which are so far apart; the first product comes first.
    ///
    /// # Safety
    /// At the place in the matrix two rows begin, with `R * LANES` columns left. Two factors are readable at each of the
    /// `M` places.
    unsafe fn add_two_rows<S: Simd, const M: usize, const R: usize>(
        simd: S,
        sums: &mut [[Self::Sums<S>; R]; M],
        matrix: (*const Self, usize),
        factors: (*const Self::Factor, usize),
    );

    /// Where row `row` and column `col` of a matrix of `cols` columns are.
    #[inline(always)]
    fn place(row: usize, col: usize, cols: usize) -> usize {
        let second = row % Self::PAIR;
        (row - second) * cols + col * Self::PAIR + second
    }
}

/// A floating-point number of the cache.
pub(super) trait KvFloat: Stored {
    /// As [`KvNumber::PAIR`].
    const PAIR: usize;

    /// The first of two rows at `x`.
    ///
    /// # Safety
    /// At `x` lie two rows of a matrix of `cols` columns, of which [`Simd::LANES`] are left.
    unsafe fn load_first<S: Simd>(simd: S, x: *const Self, cols: usize) -> S::Vector;

    /// The second of two rows at `x`.
    ///
    /// # Safety
    /// As for [`KvFloat::load_first`].
    unsafe fn load_second<S: Simd>(simd: S, x: *const Self, cols: usize) -> S::Vector;
}

impl KvFloat for f32 {
    const PAIR: usize = 1;

    #[inline(always)]
    unsafe fn load_first<S: Simd>(simd: S, x: *const f32, _: usize) -> S::Vector {
        // SAFETY: The caller's promise.
        unsafe { simd.load_f32(x) }
    }

    #[inline(always)]
    unsafe fn load_second<S: Simd>(simd: S, x: *const f32, cols: usize) -> S::Vector {
        // SAFETY: The caller's promise: the second row follows.
        unsafe { simd.load_f32(x.add(cols)) }
    }
}

impl KvFloat for bf16 {
    const PAIR: usize = 2;

    #[inline(always)]
    unsafe fn load_first<S: Simd>(simd: S, x: *const bf16, _: usize) -> S::Vector {
        // SAFETY: The caller's promise: the rows lie in pairs.
        unsafe { simd.load_bf16_first(x) }
    }

    #[inline(always)]
    unsafe fn load_second<S: Simd>(simd: S, x: *const bf16, _: usize) -> S::Vector {
        // SAFETY: The caller's promise: the rows lie in pairs.
        unsafe { simd.load_bf16_second(x) }
    }
}

impl<T: KvFloat> KvNumber for T {
    const PAIR: usize = <T as KvFloat>::PAIR;

    type Factor = f32;

    type Sums<S: Simd> = S::Vector;

    #[inline(always)]
    fn zero<S: Simd>(simd: S) -> S::Vector {
        simd.splat(0.0)
    }

    #[inline(always)]
    unsafe fn load_sums<S: Simd>(simd: S, x: *const f32) -> S::Vector {
        // SAFETY: The caller's promise.
        unsafe { simd.load_f32(x) }
    }

    #[inline(always)]
    unsafe fn store_sums<S: Simd>(simd: S, out: *mut f32, sums: S::Vector) {
        // SAFETY: The caller's promise.
        unsafe { simd.store_f32(out, sums) }
    }

    #[inline(always)]
    unsafe fn add_two_rows<S: Simd, const M: usize, const R: usize>(
        simd: S,
        sums: &mut [[S::Vector; R]; M],
        (x, cols): (*const T, usize),
        (factors, stride): (*const f32, usize),
    ) {
        let mut numbers = [simd.splat(0.0); R];
        for second in 0..2 {
            for r in 0..R {
                // SAFETY: The caller's promise.
                numbers[r] = unsafe {
                    let x = x.add(r * S::LANES * <T as KvFloat>::PAIR);
                    if second == 0 { T::load_first(simd, x, cols) } else { T::load_second(simd, x, cols) }
                };
            }
            for m in 0..M {
                // SAFETY: The caller's promise.
                let factor = simd.splat(unsafe { *factors.add(m * stride + second) });
                for r in 0..R {
                    sums[m][r] = simd.mul_add(factor, numbers[r], sums[m][r]);
                }
            }
        }
    }
}

impl KvNumber for i8 {
    const PAIR: usize = 2;

    type Factor = i16;

    type Sums<S: Simd> = S::Ints;

    #[inline(always)]
    fn zero<S: Simd>(simd: S) -> S::Ints {
        simd.zero_i32()
    }

    #[inline(always)]
    unsafe fn load_sums<S: Simd>(simd: S, x: *const f32) -> S::Ints {
        // SAFETY: The caller's promise.
        unsafe { simd.load_i32(x.cast()) }
    }

    #[inline(always)]
    unsafe fn store_sums<S: Simd>(simd: S, out: *mut f32, sums: S::Ints) {
        // SAFETY: The caller's promise.
        unsafe { simd.store_i32(out.cast(), sums) }
    }

    #[inline(always)]
    unsafe fn add_two_rows<S: Simd, const M: usize, const R: usize>(
        simd: S,
        sums: &mut [[S::Ints; R]; M],
        (x, _): (*const i8, usize),
        (factors, stride): (*const i16, usize),
    ) {
        // SAFETY: The caller's promise, here and below.
        let numbers: [S::Pairs; R] = std::array::from_fn(
            #[inline(always)]
            |r| unsafe { simd.load_i8_pairs(x.add(2 * r * S::LANES)) },
        );
        for m in 0..M {
            // SAFETY: As above.
            let pair = unsafe { simd.splat_pair(factors.add(m * stride)) };
            for r in 0..R {
                sums[m][r] = simd.add_pair_products(numbers[r], pair, sums[m][r]);
            }
        }
    }
}

/// `out[m][c] = sum over k of factors[m][k] * x[k][c]`, added to what `out` holds if `accumulate` says so.
pub(super) struct Product<T: KvNumber> {
    /// A block, and its columns.
    pub(super) x: *const T,
    pub(super) cols: usize,
    /// How many columns are wanted, a multiple of [`Simd::LANES`].
    pub(super) num_cols: usize,
    /// How many rows to multiply; even.
    pub(super) num_rows: usize,
    /// Factors of each `m`, `factor_stride` apart.
    pub(super) factors: *const T::Factor,
    pub(super) factor_stride: usize,
    /// Sums of each `m`, `out_stride` apart.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    pub(super) accumulate: bool,
    /// A block that will be wanted next.
    pub(super) next: *const T,
}

impl<T: KvNumber> Product<T> {
    /// Compute it for `num_out` rows of `out`, at most 6.
    ///
    /// # Safety
    /// The block, the factors and the sums have these sizes; the sums are alone at their place.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd>(&self, simd: S, num_out: usize) {
        // SAFETY: The caller's promise.
        unsafe {
            match num_out {
                1 => self.rows::<S, 1>(simd),
                2 => self.rows::<S, 2>(simd),
                3 => self.rows::<S, 3>(simd),
                4 => self.rows::<S, 4>(simd),
                5 => self.rows::<S, 5>(simd),
                _ => self.rows::<S, 6>(simd),
            }
        }
    }

    /// # Safety
    /// As for [`Product::run`] with `M` rows.
    #[inline(always)]
    unsafe fn rows<S: Simd, const M: usize>(&self, simd: S) {
        let mut col = 0;
        // SAFETY: The caller's promise, and the columns are below `num_cols`.
        unsafe {
            while col + 2 * S::LANES <= self.num_cols {
                self.columns::<S, M, 2>(simd, col);
                col += 2 * S::LANES;
            }
            while col < self.num_cols {
                self.columns::<S, M, 1>(simd, col);
                col += S::LANES;
            }
        }
    }

    /// Columns `col..col + R * LANES`.
    ///
    /// # Safety
    /// As for [`Product::run`] with `M` rows, and the columns are below `num_cols`.
    #[inline(always)]
    unsafe fn columns<S: Simd, const M: usize, const R: usize>(&self, simd: S, col: usize) {
        let mut sums = [[T::zero(simd); R]; M];
        // SAFETY: The caller's promise.
        unsafe {
            if self.accumulate {
                for m in 0..M {
                    for r in 0..R {
                        sums[m][r] = T::load_sums(simd, self.out.add(m * self.out_stride + col + r * S::LANES));
                    }
                }
            }
            let mut x = self.x.add(col * T::PAIR);
            let mut next = self.next.wrapping_add(col * T::PAIR);
            let mut factors = self.factors;
            for _ in 0..self.num_rows / 2 {
                for row in (0..2).step_by(T::PAIR) {
                    simd.prefetch(next.wrapping_add(row * self.cols).cast());
                }
                T::add_two_rows(simd, &mut sums, (x, self.cols), (factors, self.factor_stride));
                // Past the last row this may point behind the block: nothing is read there.
                x = x.wrapping_add(2 * self.cols);
                next = next.wrapping_add(2 * self.cols);
                factors = factors.wrapping_add(2);
            }
            for m in 0..M {
                for r in 0..R {
                    T::store_sums(simd, self.out.add(m * self.out_stride + col + r * S::LANES), sums[m][r]);
                }
            }
        }
    }
}
