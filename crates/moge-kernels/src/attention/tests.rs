use super::{AttentionLimits, AttentionRows, AttentionScratch, BlockId, KvType, PagedKv, QkvParams, SequenceRows};
use super::{paged_attention, write_qkv};
use crate::attention::numbers::KvNumber;
use crate::attention::paged_kv::KvStorage;
use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu};
use crate::{Cpu, Isa, Precision, RopeAngles, RopeHead, RopeLayout, round_to_bf16};
use half::bf16;

const NUM_BLOCKS: usize = 97;
const BLOCK_SIZE: usize = 32;
const KV_TYPES: [KvType; 3] = [KvType::F32, KvType::Bf16, KvType::Int8];

/// Shape of the heads.
#[derive(Clone, Copy)]
struct Heads {
    num_q: usize,
    num_kv: usize,
    head_dim: usize,
}

const HEADS: [Heads; 5] = [
    Heads { num_q: 3, num_kv: 3, head_dim: 8 },
    Heads { num_q: 6, num_kv: 3, head_dim: 13 },
    Heads { num_q: 10, num_kv: 2, head_dim: 128 },
    Heads { num_q: 4, num_kv: 1, head_dim: 192 },
    Heads { num_q: 7, num_kv: 1, head_dim: 34 },
];

/// One sequence: queries, keys and values of all its tokens, and its blocks.
struct Tokens {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    block_table: Vec<BlockId>,
}

/// Sequences of these lengths with scattered blocks.
fn sequences(lengths: &[usize], heads: Heads) -> Vec<Tokens> {
    let mut numbers = Numbers::new(41);
    let mut blocks = (0..NUM_BLOCKS as u32).map(|i| BlockId(i * 31 % NUM_BLOCKS as u32));
    lengths
        .iter()
        .map(|&len| Tokens {
            q: numbers.vec(len * heads.num_q * heads.head_dim).iter().map(|x| x * 4.0).collect(),
            k: numbers.vec(len * heads.num_kv * heads.head_dim),
            v: numbers.vec(len * heads.num_kv * heads.head_dim),
            block_table: blocks.by_ref().take(len.div_ceil(BLOCK_SIZE)).collect(),
        })
        .collect()
}

/// `x`, `[head_dim]` for each token and head, as a cache holds it.
fn round_as(kv_type: KvType, x: &[f32], head_dim: usize) -> Vec<f32> {
    let round_head = |x: &[f32]| -> Vec<f32> {
        let scale = x.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0;
        x.iter()
            .map(|&x| match kv_type {
                KvType::F32 => x,
                KvType::Bf16 => round_to_bf16(x),
                KvType::Int8 => (x * (1.0 / scale)).round_ties_even() * scale,
            })
            .collect()
    };
    x.chunks_exact(head_dim).flat_map(round_head).collect()
}

/// A KV cache with the scratch for it.
struct Attention {
    cpu: Cpu,
    heads: Heads,
    activation: Precision,
    kv: PagedKv,
    scratch: AttentionScratch,
}

impl Attention {
    fn new(cpu: Cpu, heads: Heads, kv_type: KvType, max_context: usize) -> Attention {
        let limits = AttentionLimits {
            num_threads: cpu.num_threads(),
            max_rows: 1000,
            max_context,
            num_q_heads: heads.num_q,
            num_kv_heads: heads.num_kv,
            head_dim: heads.head_dim,
        };
        let kv = PagedKv::new(kv_type, NUM_BLOCKS, BLOCK_SIZE, heads.num_kv, heads.head_dim);
        Attention { cpu, heads, activation: Precision::F32, kv, scratch: AttentionScratch::new(limits) }
    }

    /// One step: each `(index, start, end)` brings the tokens `start..end` of a sequence. Returns the rows' outputs.
    fn step(&mut self, tokens: &[Tokens], parts: &[(usize, usize, usize)]) -> Vec<f32> {
        let (q_width, kv_width) = (self.heads.num_q * self.heads.head_dim, self.heads.num_kv * self.heads.head_dim);
        let (mut q, mut k, mut v, mut sequences) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for &(index, start, end) in parts {
            q.extend_from_slice(&tokens[index].q[start * q_width..end * q_width]);
            k.extend_from_slice(&tokens[index].k[start * kv_width..end * kv_width]);
            v.extend_from_slice(&tokens[index].v[start * kv_width..end * kv_width]);
            let block_table = tokens[index].block_table.clone();
            sequences.push(SequenceRows { num_rows: end - start, first_position: start, block_table });
        }
        // Angles of zero turn nothing.
        let num_rows = q.len() / q_width;
        let (cos, sin) = (vec![1.0; num_rows], vec![0.0; num_rows]);
        let params = QkvParams {
            norms: None,
            eps: 0.0,
            angles: RopeAngles { cos: &cos, sin: &sin },
            rope: RopeHead { head_dim: self.heads.head_dim, rotary_dim: 2, layout: RopeLayout::RotateHalf },
            activation: Precision::F32,
        };
        write_qkv(&self.cpu, [&mut q, &mut k, &mut v], params, &mut self.kv, &sequences, &mut self.scratch);
        let mut out = vec![f32::NAN; q.len()];
        let rows = AttentionRows { q: &q, sequences: &sequences, activation: self.activation };
        paged_attention(&self.cpu, &mut out, rows, &self.kv, &mut self.scratch);
        out
    }
}

/// Attention of one sequence in f64, to keys and values as a cache holds them.
fn reference(tokens: &Tokens, heads: Heads, kv_type: KvType) -> Vec<f64> {
    let Heads { num_q, num_kv, head_dim } = heads;
    let [k, v] = [&tokens.k, &tokens.v].map(|x| round_as(kv_type, x, head_dim));
    let len = tokens.q.len() / (num_q * head_dim);
    let mut out = Vec::new();
    for row in 0..len {
        for head in 0..num_q {
            let kv_head = head / (num_q / num_kv);
            let q = &tokens.q[(row * num_q + head) * head_dim..][..head_dim];
            let number =
                |x: &[f32], position: usize, i: usize| f64::from(x[(position * num_kv + kv_head) * head_dim + i]);
            let scores: Vec<f64> = (0..=row)
                .map(|j| (0..head_dim).map(|i| f64::from(q[i]) * number(&k, j, i)).sum::<f64>())
                .map(|dot| dot / (head_dim as f64).sqrt())
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let powers: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let sum: f64 = powers.iter().sum();
            for i in 0..head_dim {
                out.push(powers.iter().enumerate().map(|(j, power)| power / sum * number(&v, j, i)).sum());
            }
        }
    }
    out
}

/// Values are below 1 and scores a few units, so f32 sums are this close.
const TOLERANCE: f64 = 4e-6;
/// For an int8 cache queries and weights are rounded to 16 bits. A score of 192 products of numbers up to 4 and 1 is
/// then off by 192 * 4 / 65534 / sqrt(192) = 9e-4 at most, a value weighted with 256 keys by 256 / 65534 = 4e-3; these
/// roundings are independent, so that a tenth of it is seldom.
const INT8_TOLERANCE: f64 = 4e-4;

#[test]
fn attention_matches_f64_on_every_isa_and_awkward_shape() {
    for heads in HEADS {
        let tokens = sequences(&[300, 1, 33], heads);
        for kv_type in KV_TYPES {
            let expected: Vec<f64> = tokens.iter().flat_map(|tokens| reference(tokens, heads, kv_type)).collect();
            let tolerance = if kv_type == KvType::Int8 { INT8_TOLERANCE } else { TOLERANCE };
            for cpu in every_cpu() {
                let mut attention = Attention::new(cpu, heads, kv_type, 300);
                let out = attention.step(&tokens, &[(0, 0, 300), (1, 0, 1), (2, 0, 33)]);
                assert_close(&out, &expected, 0.0, tolerance);
            }
        }
    }
}

#[test]
fn an_int8_cache_is_within_its_bound_of_what_was_written() {
    for heads in HEADS {
        let tokens = sequences(&[260], heads);
        let expected = reference(&tokens[0], heads, KvType::F32);
        for cpu in every_cpu() {
            let out = Attention::new(cpu, heads, KvType::Int8, 260).step(&tokens, &[(0, 0, 260)]);
            // A key's number is off by 1 / 254 at most, so a score by 4 * sqrt(192) / 254 at most; a value by 1 / 254.
            assert_close(&out, &expected, 0.0, 4.0 * (heads.head_dim as f64).sqrt() / 254.0 + 1.0 / 254.0);
        }
    }
}

#[test]
fn outcomes_are_rounded_to_bf16_activations_whatever_the_cache() {
    let heads = Heads { num_q: 4, num_kv: 2, head_dim: 12 };
    let tokens = sequences(&[39], heads);
    for kv_type in KV_TYPES {
        let mut attention = Attention::new(Cpu::new(Isa::best(), 2), heads, kv_type, 39);
        let exact = attention.step(&tokens, &[(0, 0, 39)]);
        attention.activation = Precision::Bf16;
        let rounded = attention.step(&tokens, &[(0, 0, 39)]);
        assert_same_bits(&rounded, &exact.iter().map(|&x| round_to_bf16(x)).collect::<Vec<f32>>());
    }
}

#[test]
fn a_row_gives_the_same_bits_in_any_chunking_company_and_thread_count() {
    let heads = Heads { num_q: 6, num_kv: 2, head_dim: 20 };
    let width = heads.num_q * heads.head_dim;
    let tokens = sequences(&[700, 300, 41], heads);
    for kv_type in KV_TYPES {
        for isa in Isa::available() {
            let mut whole = Attention::new(Cpu::new(isa, 1), heads, kv_type, 700);
            let alone: Vec<Vec<f32>> = [700, 300, 41]
                .iter()
                .enumerate()
                .map(|(index, &len)| whole.step(&tokens, &[(index, 0, len)]))
                .collect();
            let check = |out: &[f32], parts: &[(usize, usize, usize)]| {
                let expected: Vec<f32> =
                    parts.iter().flat_map(|&(i, start, end)| alone[i][start * width..end * width].to_vec()).collect();
                assert_same_bits(out, &expected);
            };
            for num_threads in [1, 2, 3] {
                let mut attention = Attention::new(Cpu::new(isa, num_threads), heads, kv_type, 700);
                let mixed = [(1, 0, 255), (0, 0, 511), (2, 0, 1)];
                check(&attention.step(&tokens, &mixed), &mixed);
                // Decodes: the first is spread over the threads by chunk, the second finds no slots left.
                let decodes = [(0, 511, 512), (1, 255, 256), (2, 1, 2)];
                check(&attention.step(&tokens, &decodes), &decodes);
                let decodes = [(0, 512, 513), (1, 256, 257), (2, 2, 3)];
                check(&attention.step(&tokens, &decodes), &decodes);
                let mixed = [(2, 3, 41), (0, 513, 518), (1, 257, 260)];
                check(&attention.step(&tokens, &mixed), &mixed);
                let mixed = [(0, 518, 519), (1, 260, 300)];
                check(&attention.step(&tokens, &mixed), &mixed);
                // Three rows of two chunks each, spread when there is room for six.
                let mut roomy = Attention::new(Cpu::new(isa, num_threads), heads, kv_type, 1800);
                let verified = [(0, 511, 514)];
                roomy.step(&tokens, &[(0, 0, 511)]);
                check(&roomy.step(&tokens, &verified), &verified);
                let rest = [(0, 519, 700)];
                check(&attention.step(&tokens, &rest), &rest);
            }
        }
    }
}

#[test]
fn what_lies_behind_a_row_or_in_another_sequence_does_not_reach_it() {
    let heads = Heads { num_q: 4, num_kv: 2, head_dim: 12 };
    let width = heads.num_q * heads.head_dim;
    let kv_width = heads.num_kv * heads.head_dim;
    for kv_type in KV_TYPES {
        for cpu in every_cpu() {
            let mut tokens = sequences(&[40, 19], heads);
            let num_threads = cpu.num_threads();
            let mut clean = Attention::new(Cpu::new(cpu.isa(), num_threads), heads, kv_type, 64);
            let expected = clean.step(&tokens, &[(0, 0, 40), (1, 0, 19)]);
            let (k, v) = (tokens[0].k.clone(), tokens[0].v.clone());
            for bad in [f32::NAN, f32::INFINITY] {
                tokens[0].k[30 * kv_width..31 * kv_width].fill(bad);
                tokens[0].v[30 * kv_width..31 * kv_width].fill(bad);
                let mut attention = Attention::new(Cpu::new(cpu.isa(), num_threads), heads, kv_type, 64);
                let out = attention.step(&tokens, &[(0, 0, 40), (1, 0, 19)]);
                assert_same_bits(&out[..30 * width], &expected[..30 * width]);
                assert!(out[30 * width..40 * width].iter().all(|x| x.is_nan()));
                assert_same_bits(&out[40 * width..], &expected[40 * width..]);
                // What stays of them in the blocks does not reach the next sequence there.
                (tokens[0].k, tokens[0].v) = (k.clone(), v.clone());
                assert_same_bits(&attention.step(&tokens, &[(0, 0, 29)]), &expected[..29 * width]);
            }
        }
    }
}

#[test]
fn zeros_and_numbers_too_small_for_a_scale_stay_finite() {
    let heads = Heads { num_q: 4, num_kv: 2, head_dim: 12 };
    for cpu in every_cpu() {
        let mut tokens = sequences(&[40], heads);
        tokens[0].q.fill(0.0);
        tokens[0].k.fill(1e-40);
        tokens[0].v.fill(1e-40);
        let out = Attention::new(cpu, heads, KvType::Int8, 40).step(&tokens, &[(0, 0, 40)]);
        assert!(out.iter().all(|x| x.abs() <= 1e-38));
    }
}

#[test]
fn the_cache_stores_keys_and_values_rounded_at_the_place_of_their_token() {
    let heads = Heads { num_q: 6, num_kv: 2, head_dim: 7 };
    let tokens = Tokens { block_table: vec![BlockId(2), BlockId(0)], ..sequences(&[35], heads).remove(0) };
    // Positions 30 and 31 are the last of block 2, positions 32 to 34 the first of block 0.
    let places = [(2, 30), (2, 31), (0, 0), (0, 1), (0, 2)];
    for kv_type in KV_TYPES {
        let mut attention = Attention::new(Cpu::new(Isa::best(), 2), heads, kv_type, 64);
        attention.step(std::slice::from_ref(&tokens), &[(0, 30, 35)]);
        let [k, v] = [&tokens.k, &tokens.v].map(|x| round_as(kv_type, x, heads.head_dim));
        for (index, (block, slot)) in places.into_iter().enumerate() {
            for head in 0..heads.num_kv {
                let [found_k, found_v] = stored(&attention.kv, block, head, slot);
                let start = ((30 + index) * heads.num_kv + head) * heads.head_dim;
                assert_same_bits(&found_k, &k[start..start + heads.head_dim]);
                assert_same_bits(&found_v, &v[start..start + heads.head_dim]);
            }
        }
        let [untouched, _] = stored(&attention.kv, 2, 1, 29);
        assert_eq!(untouched, [0.0; 7]);
    }
}

/// Key and value of a head in the cache.
fn stored(kv: &PagedKv, block: usize, head: usize, slot: usize) -> [Vec<f32>; 2] {
    let (layout, head) = (kv.layout, block * kv.layout.num_kv_heads + head);
    fn read<T: KvNumber>(x: &[T], rows: [usize; 3], widen: impl Fn(T) -> f32) -> Vec<f32> {
        let [start, slot, width] = rows;
        (0..7)
            .map(|i| {
                widen(x[start + if width == 0 { T::place(i, slot, BLOCK_SIZE) } else { T::place(slot, i, width) }])
            })
            .collect()
    }
    let start = head * layout.head_len();
    let (key, value) = ([start, slot, 0], [start, slot, layout.width()]);
    match &kv.store {
        KvStorage::F32(x) => [read(&x.keys, key, |x| x), read(&x.values, value, |x| x)],
        KvStorage::Bf16(x) => {
            let x = x.view(layout).as_bf16();
            [read(x.keys, key, bf16::to_f32), read(x.values, value, bf16::to_f32)]
        }
        KvStorage::Int8(x) => {
            let place = head * BLOCK_SIZE + slot;
            let widen = |scale: f32| move |x: i8| f32::from(x) * scale;
            [read(&x.keys, key, widen(x.key_scales[place])), read(&x.values, value, widen(x.value_scales[place]))]
        }
    }
}

#[test]
#[should_panic(expected = "block 5 is written to twice in one step")]
fn two_sequences_that_write_to_one_block_are_refused() {
    let heads = HEADS[0];
    let mut tokens = sequences(&[17, 18], heads);
    tokens[0].block_table[0] = BlockId(5);
    tokens[1].block_table[0] = BlockId(5);
    Attention::new(Cpu::new(Isa::scalar(), 1), heads, KvType::F32, 17).step(&tokens, &[(0, 0, 17), (1, 0, 18)]);
}

#[test]
#[should_panic(expected = "1 blocks for 33 tokens")]
fn a_block_table_that_is_too_short_is_refused() {
    let heads = HEADS[0];
    let mut tokens = sequences(&[33], heads);
    tokens[0].block_table.pop();
    Attention::new(Cpu::new(Isa::scalar(), 1), heads, KvType::F32, 33).step(&tokens, &[(0, 0, 33)]);
}
