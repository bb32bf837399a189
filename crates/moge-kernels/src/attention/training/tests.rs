use super::{AttentionKept, SegmentAttention, SegmentAttentionScratch, attention_backward, attention_forward};
use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu};
use crate::{Cpu, Isa};

/// Query heads, KV heads and width of a head.
const HEADS: [[usize; 3]; 6] = [[6, 2, 12], [4, 4, 10], [12, 4, 64], [5, 1, 48], [3, 1, 33], [100, 1, 7]];

/// Pieces of 1, 2, 17, 0 and 70 rows, and one longer than a tile of keys.
const OFFSETS: [usize; 7] = [0, 1, 3, 20, 20, 90, 391];

/// Numbers are below 1, sums of probabilities times numbers too, so that f32 sums are this close.
const FORWARD_TOLERANCE: f64 = 3e-6;
/// Gradients of keys and values are sums over up to 301 rows of all heads of a KV head.
const BACKWARD_TOLERANCE: f64 = 2e-5;

/// What an attention layer reads, forward and backward.
struct Layer {
    heads: [usize; 3],
    offsets: Vec<usize>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_out: Vec<f32>,
}

/// `[out, log_sums]` and `[dq, dk, dv]`.
struct Results {
    forward: [Vec<f32>; 2],
    backward: [Vec<f32>; 3],
}

impl Layer {
    fn new(heads: [usize; 3], offsets: &[usize]) -> Layer {
        let [num_q, num_kv, head_dim] = heads;
        let num_rows = offsets[offsets.len() - 1];
        let mut numbers = Numbers::new(61);
        // Scores of a few units.
        let q = numbers.vec(num_rows * num_q * head_dim).iter().map(|x| 4.0 * x).collect();
        let [k, v] = [0; 2].map(|_| numbers.vec(num_rows * num_kv * head_dim));
        Layer { heads, offsets: offsets.to_vec(), q, k, v, d_out: numbers.vec(num_rows * num_q * head_dim) }
    }

    fn shape(&self) -> SegmentAttention<'_> {
        let [num_q_heads, num_kv_heads, head_dim] = self.heads;
        SegmentAttention { num_q_heads, num_kv_heads, head_dim, offsets: &self.offsets }
    }

    fn run(&self, cpu: &Cpu) -> Results {
        let [num_q, num_kv, head_dim] = self.heads;
        let num_rows = self.offsets[self.offsets.len() - 1];
        let mut scratch = SegmentAttentionScratch::new(cpu.num_threads(), num_rows, num_q / num_kv, head_dim);
        let qkv: [&[f32]; 3] = [&self.q, &self.k, &self.v];
        let unset = |like: &[f32]| vec![f32::NAN; like.len()];
        let (mut out, mut log_sums) = (unset(&self.q), vec![f32::NAN; num_rows * num_q]);
        attention_forward(cpu, self.shape(), &mut out, &mut log_sums, qkv, &mut scratch);
        let [mut dq, mut dk, mut dv] = qkv.map(unset);
        let kept = AttentionKept { qkv, out: &out, log_sums: &log_sums };
        attention_backward(cpu, self.shape(), [&mut dq, &mut dk, &mut dv], &self.d_out, kept, &mut scratch);
        Results { forward: [out, log_sums], backward: [dq, dk, dv] }
    }

    fn qkv_in_f64(&self) -> [Vec<f64>; 3] {
        [&self.q, &self.k, &self.v].map(|x| x.iter().copied().map(f64::from).collect())
    }

    /// Where the numbers of a row's query head, and of its KV head, begin.
    fn places(&self, row: usize, head: usize) -> [usize; 2] {
        let [num_q, num_kv, head_dim] = self.heads;
        [(row * num_q + head) * head_dim, (row * num_kv + head / (num_q / num_kv)) * head_dim]
    }

    /// First row of the piece, row and query head, of all.
    fn queries(&self) -> impl Iterator<Item = [usize; 3]> {
        let pieces = self.offsets.windows(2);
        pieces.flat_map(move |piece| {
            (piece[0]..piece[1]).flat_map(move |row| (0..self.heads[0]).map(move |head| [piece[0], row, head]))
        })
    }

    /// Scaled scores of one query with the keys of its piece up to its row.
    fn scores(&self, [q, k, _]: &[Vec<f64>; 3], [first, row, head]: [usize; 3]) -> Vec<f64> {
        let head_dim = self.heads[2];
        let q = &q[self.places(row, head)[0]..][..head_dim];
        let keys = (first..=row).map(|j| &k[self.places(j, head)[1]..][..head_dim]);
        keys.map(|k| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (head_dim as f64).sqrt()).collect()
    }

    /// `[out, log_sums]` in f64.
    fn forward_in_f64(&self, qkv: &[Vec<f64>; 3]) -> [Vec<f64>; 2] {
        let (mut out, mut log_sums) = (Vec::new(), Vec::new());
        for query in self.queries() {
            let [first, _, head] = query;
            let powers: Vec<f64> = self.scores(qkv, query).iter().map(|score| score.exp()).collect();
            let sum: f64 = powers.iter().sum();
            log_sums.push(sum.ln());
            out.extend((0..self.heads[2]).map(|i| {
                let value = |j: usize| qkv[2][self.places(first + j, head)[1] + i];
                powers.iter().enumerate().map(|(j, power)| power / sum * value(j)).sum::<f64>()
            }));
        }
        [out, log_sums]
    }

    /// `[dq, dk, dv]` in f64.
    fn backward_in_f64(&self) -> [Vec<f64>; 3] {
        let (qkv, head_dim) = (self.qkv_in_f64(), self.heads[2]);
        let scale = 1.0 / (head_dim as f64).sqrt();
        let [mut dq, mut dk, mut dv] = [0, 1, 2].map(|i: usize| vec![0.0; qkv[i].len()]);
        for query in self.queries() {
            let [first, row, head] = query;
            let powers: Vec<f64> = self.scores(&qkv, query).iter().map(|score| score.exp()).collect();
            let probs: Vec<f64> = powers.iter().map(|power| power / powers.iter().sum::<f64>()).collect();
            let d_out = |i: usize| f64::from(self.d_out[self.places(row, head)[0] + i]);
            let d_probs: Vec<f64> = (first..=row)
                .map(|j| (0..head_dim).map(|i| d_out(i) * qkv[2][self.places(j, head)[1] + i]).sum())
                .collect();
            let mean: f64 = probs.iter().zip(&d_probs).map(|(prob, d_prob)| prob * d_prob).sum();
            for j in first..=row {
                let d_score = probs[j - first] * (d_probs[j - first] - mean) * scale;
                let [q_place, _] = self.places(row, head);
                let [_, k_place] = self.places(j, head);
                for i in 0..head_dim {
                    dq[q_place + i] += d_score * qkv[1][k_place + i];
                    dk[k_place + i] += d_score * qkv[0][q_place + i];
                    dv[k_place + i] += probs[j - first] * d_out(i);
                }
            }
        }
        [dq, dk, dv]
    }
}

#[test]
fn forward_and_backward_match_f64_on_every_isa_and_awkward_shape() {
    for heads in HEADS {
        let layer = Layer::new(heads, &OFFSETS);
        let (forward, backward) = (layer.forward_in_f64(&layer.qkv_in_f64()), layer.backward_in_f64());
        for cpu in every_cpu() {
            let found = layer.run(&cpu);
            for (found, expected) in found.forward.iter().zip(&forward) {
                assert_close(found, expected, FORWARD_TOLERANCE, FORWARD_TOLERANCE);
            }
            for (found, expected) in found.backward.iter().zip(&backward) {
                assert_close(found, expected, BACKWARD_TOLERANCE, BACKWARD_TOLERANCE);
            }
        }
    }
}

#[test]
fn gradients_match_central_finite_differences() {
    const STEP: f64 = 1e-5;
    for heads in [[6, 2, 12], [4, 4, 10]] {
        let layer = Layer::new(heads, &[0, 1, 3, 20, 41]);
        let loss = |qkv: &[Vec<f64>; 3]| -> f64 {
            let [out, _] = layer.forward_in_f64(qkv);
            out.iter().zip(&layer.d_out).map(|(out, d_out)| out * f64::from(*d_out)).sum()
        };
        let mut qkv = layer.qkv_in_f64();
        for cpu in every_cpu() {
            let found = layer.run(&cpu).backward;
            for (which, found) in found.iter().enumerate() {
                // 29 has no factor in common with any width, so that every place in a row is met.
                for i in (0..found.len()).step_by(29) {
                    let x = qkv[which][i];
                    let mut loss_at = |x: f64| {
                        qkv[which][i] = x;
                        loss(&qkv)
                    };
                    let expected = (loss_at(x + STEP) - loss_at(x - STEP)) / (2.0 * STEP);
                    qkv[which][i] = x;
                    assert_close(&[found[i]], &[expected], BACKWARD_TOLERANCE, BACKWARD_TOLERANCE);
                }
            }
        }
    }
}

#[test]
fn results_have_the_same_bits_on_any_number_of_threads_and_in_any_company() {
    for heads in HEADS {
        let [num_q, num_kv, head_dim] = heads;
        let layer = Layer::new(heads, &OFFSETS);
        // The piece of 70 rows alone.
        let mut alone = Layer::new(heads, &[0, 70]);
        let (q, kv) = (20 * num_q * head_dim..90 * num_q * head_dim, 20 * num_kv * head_dim..90 * num_kv * head_dim);
        alone.q.copy_from_slice(&layer.q[q.clone()]);
        alone.d_out.copy_from_slice(&layer.d_out[q.clone()]);
        alone.k.copy_from_slice(&layer.k[kv.clone()]);
        alone.v.copy_from_slice(&layer.v[kv.clone()]);
        for isa in Isa::available() {
            let expected = layer.run(&Cpu::new(isa, 1));
            for num_threads in [2, 3] {
                let found = layer.run(&Cpu::new(isa, num_threads));
                for (found, expected) in found.forward.iter().zip(&expected.forward) {
                    assert_same_bits(found, expected);
                }
                for (found, expected) in found.backward.iter().zip(&expected.backward) {
                    assert_same_bits(found, expected);
                }
            }
            let found = alone.run(&Cpu::new(isa, 1));
            assert_same_bits(&found.forward[0], &expected.forward[0][q.clone()]);
            assert_same_bits(&found.backward[0], &expected.backward[0][q.clone()]);
            assert_same_bits(&found.backward[1], &expected.backward[1][kv.clone()]);
            assert_same_bits(&found.backward[2], &expected.backward[2][kv.clone()]);
        }
    }
}

#[test]
fn what_lies_in_another_piece_does_not_reach_a_row() {
    let heads = [6, 2, 12];
    let clean = Layer::new(heads, &[0, 40, 59]);
    for cpu in every_cpu() {
        let expected = clean.run(&cpu);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut layer = Layer::new(heads, &[0, 40, 59]);
            for x in [&mut layer.q, &mut layer.k, &mut layer.v, &mut layer.d_out] {
                let len = x.len() / 59;
                x[30 * len..31 * len].fill(bad);
            }
            let found = layer.run(&cpu);
            let [out, _] = &found.forward;
            assert!(out[30 * 72..31 * 72].iter().all(|x| x.is_nan()));
            for (found, expected) in found.forward.iter().zip(&expected.forward) {
                let behind = 40 * (found.len() / 59)..;
                assert_same_bits(&found[behind.clone()], &expected[behind]);
            }
            for (found, expected) in found.backward.iter().zip(&expected.backward) {
                let behind = 40 * (found.len() / 59)..;
                assert_same_bits(&found[behind.clone()], &expected[behind]);
            }
        }
    }
}

#[test]
fn scores_beyond_what_an_exponential_holds_are_no_trouble() {
    for cpu in every_cpu() {
        let mut layer = Layer::new([3, 1, 20], &[0, 300]);
        layer.q.iter_mut().for_each(|q| *q *= 1000.0);
        let found = layer.run(&cpu);
        assert!(found.forward.iter().chain(&found.backward).flatten().all(|x| x.is_finite()));
        // The weights of values sum to 1.
        assert!(found.forward[0].iter().all(|x| x.abs() <= 1.0 + 1e-5));
    }
}

#[test]
fn a_batch_without_rows_is_nothing_to_do() {
    for offsets in [&[0][..], &[0, 0]] {
        let found = Layer::new([6, 2, 12], offsets).run(&Cpu::new(Isa::best(), 2));
        assert!(found.forward.iter().chain(&found.backward).all(Vec::is_empty));
    }
}

#[test]
#[should_panic(expected = "offsets of pieces")]
fn offsets_that_fall_are_refused() {
    Layer::new([6, 2, 12], &[0, 5, 3, 9]).run(&Cpu::new(Isa::scalar(), 1));
}

#[test]
#[should_panic(expected = "k and v of 9 x 24")]
fn keys_of_another_number_of_rows_are_refused() {
    let mut layer = Layer::new([6, 2, 12], &[0, 9]);
    layer.k.truncate(8 * 24);
    layer.run(&Cpu::new(Isa::scalar(), 1));
}
