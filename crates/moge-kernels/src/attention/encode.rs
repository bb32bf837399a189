//! What multiplies keys and values: queries and weights, in f32, or as integers for an int8 cache.
//!
//! **int8.** A query of a head becomes 16-bit integers with one scale; its products with int8 keys add up exactly. A
//! weight is the exponential of a score, 1 at most, times the scale of the token's value; the weights of a chunk become
//! 16-bit integers with one scale, so that their products with int8 values add up exactly, too. Both roundings are to
//! nearest and small beside that of the cache: a number of a query is off by at most `Q / 65534`, where `Q` is its
//! largest; so a score is off by at most `sqrt(head_dim) * Q * K / 65534`, and a chunk's weighted values by at most
//! `num_keys * V / 65534` where the largest exponential is 1, with `K` and `V` the largest number of the keys and values.

use std::marker::PhantomData;

use super::numbers::{KvFloat, KvNumber, Product};
use super::paged_kv::{KvView, Layout};
use super::split::{CHUNK_LEN, TILE_QUERIES, Tile, part_len};
use crate::exp::exp2_up_to_0;
use crate::simd::{Simd, SimdOp, map};

/// Largest integer of a weight: products of 256 with int8 values add up to less than 2^31.
const INTEGER_LIMIT: f32 = 32767.0;

/// Queries of a run of rows as a thread prepared them.
#[derive(Debug)]
pub(super) struct Queries {
    /// `[num_queries, width]`, scaled by `1 / sqrt(head_dim)`, in units of `ln 2`.
    numbers: Vec<f32>,
    /// The same for an int8 cache: integers, and what one of them is worth.
    integers: Vec<i16>,
    scales: Vec<f32>,
}

impl Queries {
    pub(super) fn new(max_queries: usize, width: usize) -> Queries {
        let len = max_queries * width;
        Queries { numbers: vec![0.0; len], integers: vec![0; len], scales: vec![0.0; max_queries] }
    }

    /// Bytes that [`Queries::new`] takes.
    pub(super) fn bytes(max_queries: usize, width: usize) -> usize {
        max_queries * (6 * width + 4)
    }

    /// Panics unless there is room for `num_queries`.
    pub(super) fn check(&self, num_queries: usize, width: usize) {
        let len = num_queries * width;
        assert!(self.numbers.len() >= len && self.integers.len() >= len && self.scales.len() >= num_queries);
    }

    /// Scale `q`, `[head_dim]`, as query `index`.
    #[inline(always)]
    fn put<S: Simd>(&mut self, simd: S, index: usize, q: &[f32], width: usize) -> &mut [f32] {
        let numbers = &mut self.numbers[index * width..(index + 1) * width];
        numbers[..q.len()].copy_from_slice(q);
        numbers[q.len()..].fill(0.0);
        let scale = simd.splat(std::f32::consts::LOG2_E / (q.len() as f32).sqrt());
        map(
            simd,
            numbers,
            #[inline(always)]
            |x| simd.mul(x, scale),
        );
        numbers
    }
}

/// Prepare queries from `first` on.
pub(super) struct PutQueries<'a, T> {
    queries: &'a mut Queries,
    first: usize,
    /// `[num_queries, head_dim]`.
    q: &'a [f32],
    layout: Layout,
    kind: PhantomData<T>,
}

impl<'a, T: Attend> PutQueries<'a, T> {
    pub(super) fn new(queries: &'a mut Queries, first: usize, q: &'a [f32], layout: Layout) -> PutQueries<'a, T> {
        PutQueries { queries, first, q, layout, kind: PhantomData }
    }
}

impl<T: Attend> SimdOp for PutQueries<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (index, q) in self.q.chunks_exact(self.layout.head_dim).enumerate() {
            T::put_query(simd, self.queries, self.first + index, q, self.layout.width());
        }
    }
}

/// The largest `|x|`; NaN if a number is NaN or infinite.
#[inline(always)]
pub(super) fn max_abs<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let zero = simd.splat(0.0);
    let (mut max, mut not_finite) = (zero, zero);
    for first in (0..x.len()).step_by(S::LANES) {
        let x = &x[first..];
        let x = if x.len() < S::LANES { simd.load_part(x, 0.0) } else { simd.load(x) };
        max = simd.max(max, simd.max(x, simd.sub(zero, x)));
        not_finite = simd.mul_add(x, zero, not_finite);
    }
    simd.max_lane(max) + simd.sum(not_finite)
}

/// Scale that makes numbers up to `max_abs` integers up to `limit`, and its inverse. Numbers too small for a normal
/// scale become 0; with NaN both are NaN.
#[inline(always)]
pub(super) fn integer_scale(max_abs: f32, limit: f32) -> [f32; 2] {
    let scale = max_abs / limit;
    if scale < f32::MIN_POSITIVE { [0.0, 0.0] } else { [scale, 1.0 / scale] }
}

/// How a kind of cache is attended to.
pub(super) trait Attend: KvNumber {
    /// Prepare query `index`, `q` `[head_dim]`.
    fn put_query<S: Simd>(simd: S, queries: &mut Queries, index: usize, q: &[f32], width: usize);

    /// The prepared queries, `[num_queries, width]`.
    fn queries(queries: &Queries) -> &[Self::Factor];

    /// Turn the sums of products in `scores`, a whole number of registers, into the scores of query `index` with the
    /// keys of `heads`.
    fn finish_scores<S: Simd>(
        simd: S,
        scores: &mut [f32],
        queries: &Queries,
        index: usize,
        keys: (KvView<'_, Self>, &[usize]),
    );

    /// The parts of a tile of queries, as many as `num_keys` has, of the scores with the first `num_keys[m]` keys.
    ///
    /// # Safety
    /// There are at most [`TILE_QUERIES`], and a part for each; the `heads` are within the cache and hold as many keys.
    unsafe fn weigh<S: Simd>(
        simd: S,
        values: (KvView<'_, Self>, &[usize]),
        num_keys: &[usize],
        tile: &mut Tile,
        parts: &mut [f32],
    );
}

/// The largest score; a NaN it may lose shows up in the sum of exponentials.
#[inline(always)]
fn max_score<S: Simd>(simd: S, scores: &[f32]) -> f32 {
    let lowest = simd.splat(f32::NEG_INFINITY);
    let mut max = [lowest; 2];
    let mut runs = scores.chunks_exact(2 * S::LANES);
    for run in &mut runs {
        max = [simd.max(max[0], simd.load(run)), simd.max(max[1], simd.load(&run[S::LANES..]))];
    }
    for rest in runs.remainder().chunks(S::LANES) {
        max[0] = simd.max(max[0], load_scores(simd, rest, 0));
    }
    simd.max_lane(simd.max(max[0], max[1]))
}

/// The scores from `first` on; past the last one, minus infinity.
#[inline(always)]
fn load_scores<S: Simd>(simd: S, scores: &[f32], first: usize) -> S::Vector {
    let scores = &scores[first..];
    if scores.len() < S::LANES { simd.load_part(scores, f32::NEG_INFINITY) } else { simd.load(scores) }
}

/// The weighted values of a tile: rows of `factors`, `CHUNK_LEN` apart, with the first `num_keys` values.
///
/// # Safety
/// As for [`Attend::weigh`]; `num_keys` is even.
#[inline(always)]
unsafe fn multiply_values<S: Simd, T: KvNumber>(
    simd: S,
    (values, heads): (KvView<'_, T>, &[usize]),
    factors: *const T::Factor,
    (parts, num_parts): (*mut f32, usize),
    num_keys: usize,
) {
    let layout = values.layout;
    let (block_size, width) = (layout.block_size, layout.width());
    for (index, &head) in heads.iter().enumerate() {
        let first_key = index * block_size;
        // Nothing is a sum, too: the first block sets the parts to zero at least.
        if index > 0 && num_keys <= first_key {
            break;
        }
        let next = heads.get(index + 1).unwrap_or(&head);
        // SAFETY: The caller's promise.
        unsafe {
            let product = Product {
                x: values.values.as_ptr().add(head * layout.head_len()),
                cols: width,
                num_cols: width,
                num_rows: (num_keys - first_key.min(num_keys)).min(block_size),
                factors: factors.add(first_key),
                factor_stride: CHUNK_LEN,
                out: parts,
                out_stride: part_len(width),
                accumulate: index > 0,
                next: values.values.as_ptr().add(next * layout.head_len()),
            };
            product.run(simd, num_parts);
        }
    }
}

impl<T: KvFloat> Attend for T {
    #[inline(always)]
    fn put_query<S: Simd>(simd: S, queries: &mut Queries, index: usize, q: &[f32], width: usize) {
        queries.put(simd, index, q, width);
    }

    #[inline(always)]
    fn queries(queries: &Queries) -> &[f32] {
        &queries.numbers
    }

    #[inline(always)]
    fn finish_scores<S: Simd>(_: S, _: &mut [f32], _: &Queries, _: usize, _: (KvView<'_, T>, &[usize])) {}

    #[inline(always)]
    unsafe fn weigh<S: Simd>(
        simd: S,
        (values, heads): (KvView<'_, T>, &[usize]),
        num_keys: &[usize],
        tile: &mut Tile,
        parts: &mut [f32],
    ) {
        let (layout, width) = (values.layout, values.layout.width());
        let num_shared = num_keys[0] / 2 * 2;
        for ((scores, part), &num_keys) in
            tile.scores.iter_mut().zip(parts.chunks_exact_mut(part_len(width))).zip(num_keys)
        {
            let max = max_score(simd, &scores[..num_keys]);
            let mut sums = simd.splat(0.0);
            for first in (0..num_keys).step_by(S::LANES) {
                let score = load_scores(simd, &scores[..num_keys], first);
                let power = exp2_up_to_0(simd, simd.sub(score, simd.splat(max)));
                sums = simd.add(sums, power);
                simd.store(&mut scores[first..], power);
            }
            part[width..].copy_from_slice(&[simd.sum(sums), max]);
        }
        let scores = tile.scores.as_flattened();
        // SAFETY: The caller's promise.
        unsafe {
            let parts = (parts.as_mut_ptr(), num_keys.len());
            multiply_values(simd, (values, heads), scores.as_ptr(), parts, num_shared);
        }
        // What a query does not see must not even be multiplied by zero: it may be NaN.
        for (m, part) in parts.chunks_exact_mut(part_len(width)).enumerate() {
            for key in num_shared..num_keys[m] {
                let weight = simd.splat(scores[m * CHUNK_LEN + key]);
                let (head, slot) = (heads[key / layout.block_size], key % layout.block_size);
                let pair = &values.values[head * layout.head_len() + slot / 2 * 2 * width..];
                for first in (0..width).step_by(S::LANES) {
                    // SAFETY: A whole number of registers makes a width, and rows come in pairs.
                    let value = unsafe {
                        let x = pair.as_ptr().add(first * <T as KvFloat>::PAIR);
                        if slot % 2 == 0 { T::load_first(simd, x, width) } else { T::load_second(simd, x, width) }
                    };
                    let sum = simd.mul_add(weight, value, simd.load(&part[first..]));
                    simd.store(&mut part[first..], sum);
                }
            }
        }
    }
}

impl Attend for i8 {
    #[inline(always)]
    fn put_query<S: Simd>(simd: S, queries: &mut Queries, index: usize, q: &[f32], width: usize) {
        // Sums of `head_dim` products with int8 stay below 2^31.
        let limit = INTEGER_LIMIT.min((i32::MAX / 128) as f32 / q.len() as f32).floor();
        let numbers = queries.put(simd, index, q, width);
        let [scale, inverse] = integer_scale(max_abs(simd, numbers), limit);
        let inverse = simd.splat(inverse);
        let integers = &mut queries.integers[index * width..(index + 1) * width];
        for first in (0..width).step_by(S::LANES) {
            let x = simd.mul(simd.load(&queries.numbers[index * width + first..]), inverse);
            // SAFETY: A whole number of registers makes a width.
            unsafe { simd.store_i16(integers[first..].as_mut_ptr(), x) };
        }
        queries.scales[index] = scale;
    }

    #[inline(always)]
    fn queries(queries: &Queries) -> &[i16] {
        &queries.integers
    }

    #[inline(always)]
    fn finish_scores<S: Simd>(
        simd: S,
        scores: &mut [f32],
        queries: &Queries,
        index: usize,
        (keys, heads): (KvView<'_, i8>, &[usize]),
    ) {
        let block_size = keys.layout.block_size;
        let query_scale = simd.splat(queries.scales[index]);
        for (scores, head) in scores.chunks_mut(block_size).zip(heads) {
            let key_scales = &keys.key_scales[head * block_size..(head + 1) * block_size];
            scale_integers(
                simd,
                scores,
                #[inline(always)]
                |i| simd.mul(query_scale, simd.load(&key_scales[i..])),
            );
        }
    }

    #[inline(always)]
    unsafe fn weigh<S: Simd>(
        simd: S,
        (values, heads): (KvView<'_, i8>, &[usize]),
        num_keys: &[usize],
        tile: &mut Tile,
        parts: &mut [f32],
    ) {
        let width = values.layout.width();
        let mut factors = ValueFactors { scale: 0.0, factors: [0.0; CHUNK_LEN] };
        let mut scales = [0.0; TILE_QUERIES];
        let most = num_keys[num_keys.len() - 1].next_multiple_of(2);
        for (m, part) in parts.chunks_exact_mut(part_len(width)).enumerate() {
            let (scores, weights) = (&tile.scores[m][..num_keys[m]], &mut tile.weights[m]);
            // Queries that see the same keys, as most of a tile do, share the factors.
            if m == 0 || num_keys[m] != num_keys[m - 1] {
                factors.set(simd, (values, heads), num_keys[m]);
            }
            scales[m] = factors.scale;
            let max = max_score(simd, scores);
            let mut sums = simd.splat(0.0);
            for first in (0..scores.len()).step_by(S::LANES) {
                let power = exp2_up_to_0(simd, simd.sub(load_scores(simd, scores, first), simd.splat(max)));
                sums = simd.add(sums, power);
                let weight = simd.mul(power, simd.load(&factors.factors[first..]));
                // SAFETY: A chunk is a whole number of registers.
                unsafe { simd.store_i16(weights[first..].as_mut_ptr(), weight) };
            }
            // int8 values are never NaN: those that only later queries see are multiplied by zero.
            weights[num_keys[m]..most].fill(0);
            part[width..].copy_from_slice(&[simd.sum(sums), max]);
        }
        let weights = tile.weights.as_flattened();
        // SAFETY: The caller's promise.
        unsafe {
            let parts = (parts.as_mut_ptr(), num_keys.len());
            multiply_values(simd, (values, heads), weights.as_ptr(), parts, most);
        }
        for (part, &scale) in parts.chunks_exact_mut(part_len(width)).zip(&scales) {
            let scale = simd.splat(scale);
            scale_integers(
                simd,
                &mut part[..width],
                #[inline(always)]
                |_| scale,
            );
        }
    }
}

/// What turns exponentials, which are 1 at most, into integer weights.
struct ValueFactors {
    /// What one of the integers is worth: the largest scale of the values is [`INTEGER_LIMIT`] of them.
    scale: f32,
    /// For each value its scale in these units; past the last one 0.
    factors: [f32; CHUNK_LEN],
}

impl ValueFactors {
    #[inline(always)]
    fn set<S: Simd>(&mut self, simd: S, (values, heads): (KvView<'_, i8>, &[usize]), num_keys: usize) {
        let block_size = values.layout.block_size;
        let (factors, rest) = self.factors.split_at_mut(num_keys);
        for (factors, head) in factors.chunks_mut(block_size).zip(heads) {
            factors.copy_from_slice(&values.value_scales[head * block_size..][..factors.len()]);
        }
        rest.fill(0.0);
        let [scale, inverse] = integer_scale(max_abs(simd, factors), INTEGER_LIMIT);
        self.scale = scale;
        let inverse = simd.splat(inverse);
        map(
            simd,
            factors,
            #[inline(always)]
            |x| simd.mul(x, inverse),
        );
    }
}

/// `x[i] = integer in the place of x[i] * scale(i)`, where `scale` gives a register; `x` has a whole number of them.
#[inline(always)]
fn scale_integers<S: Simd>(simd: S, x: &mut [f32], scale: impl Fn(usize) -> S::Vector) {
    for (index, x) in x.chunks_exact_mut(S::LANES).enumerate() {
        // SAFETY: `x` has the length of a register.
        let integers = simd.i32_to_f32(unsafe { simd.load_i32(x.as_ptr().cast()) });
        simd.store(x, simd.mul(integers, scale(index * S::LANES)));
    }
}
