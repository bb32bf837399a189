use super::{AttentionLimits, AttentionScratch, BlockId, PagedKv, SequenceRows, paged_attention};
use crate::testing::{Numbers, assert_close, assert_same_bits, every_cpu};
use crate::{ActivationType, Cpu, Elements, Isa, round_to_bf16};

const NUM_BLOCKS: usize = 97;
const BLOCK_SIZE: usize = 16;

/// Shape of the heads.
#[derive(Clone, Copy)]
struct Heads {
    num_q: usize,
    num_kv: usize,
    head_dim: usize,
}

const HEADS: [Heads; 5] = [
    Heads { num_q: 3, num_kv: 3, head_dim: 8 },
    Heads { num_q: 6, num_kv: 3, head_dim: 12 },
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

/// Sequences of these lengths with scattered blocks, rounded if `activation` says so.
fn sequences(lengths: &[usize], heads: Heads, activation: ActivationType) -> Vec<Tokens> {
    let mut numbers = Numbers::new(41);
    let mut blocks = (0..NUM_BLOCKS as u32).map(|i| BlockId(i * 31 % NUM_BLOCKS as u32));
    let mut vec = |len: usize| {
        let mut x = numbers.vec(len);
        if activation == ActivationType::Bf16 {
            x.iter_mut().for_each(|x| *x = round_to_bf16(*x));
        }
        x
    };
    lengths
        .iter()
        .map(|&len| Tokens {
            q: vec(len * heads.num_q * heads.head_dim).iter().map(|x| x * 4.0).collect(),
            k: vec(len * heads.num_kv * heads.head_dim),
            v: vec(len * heads.num_kv * heads.head_dim),
            block_table: blocks.by_ref().take(len.div_ceil(BLOCK_SIZE)).collect(),
        })
        .collect()
}

/// A KV cache with the scratch for it.
struct Attention {
    cpu: Cpu,
    heads: Heads,
    kv: PagedKv,
    scratch: AttentionScratch,
}

impl Attention {
    fn new(cpu: Cpu, heads: Heads, activation: ActivationType, max_context: usize) -> Attention {
        let limits = AttentionLimits {
            num_threads: cpu.num_threads(),
            max_rows: 1000,
            max_context,
            num_q_heads: heads.num_q,
            num_kv_heads: heads.num_kv,
            head_dim: heads.head_dim,
        };
        let kv = PagedKv::new(activation, NUM_BLOCKS, BLOCK_SIZE, heads.num_kv, heads.head_dim);
        Attention { cpu, heads, kv, scratch: AttentionScratch::new(limits) }
    }

    /// One step: each `(index, start, end)` brings the tokens `start..end` of a sequence. Returns the rows' outputs.
    fn step(&mut self, tokens: &[Tokens], parts: &[(usize, usize, usize)]) -> Vec<f32> {
        let (q_width, kv_width) = (self.heads.num_q * self.heads.head_dim, self.heads.num_kv * self.heads.head_dim);
        let (mut q, mut k, mut v, mut rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for &(index, start, end) in parts {
            q.extend_from_slice(&tokens[index].q[start * q_width..end * q_width]);
            k.extend_from_slice(&tokens[index].k[start * kv_width..end * kv_width]);
            v.extend_from_slice(&tokens[index].v[start * kv_width..end * kv_width]);
            let block_table = tokens[index].block_table.clone();
            rows.push(SequenceRows { num_rows: end - start, first_position: start, block_table });
        }
        self.kv.write(&self.cpu, &k, &v, &rows);
        let mut out = vec![f32::NAN; q.len()];
        paged_attention(&self.cpu, &mut out, &q, &self.kv, &rows, &mut self.scratch);
        out
    }
}

/// Attention of one sequence in f64.
fn reference(tokens: &Tokens, heads: Heads) -> Vec<f64> {
    let Heads { num_q, num_kv, head_dim } = heads;
    let len = tokens.q.len() / (num_q * head_dim);
    let mut out = Vec::new();
    for row in 0..len {
        for head in 0..num_q {
            let kv_head = head / (num_q / num_kv);
            let q = &tokens.q[(row * num_q + head) * head_dim..][..head_dim];
            let number =
                |x: &[f32], position: usize, i: usize| f64::from(x[(position * num_kv + kv_head) * head_dim + i]);
            let scores: Vec<f64> = (0..=row)
                .map(|j| (0..head_dim).map(|i| f64::from(q[i]) * number(&tokens.k, j, i)).sum::<f64>())
                .map(|dot| dot / (head_dim as f64).sqrt())
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let powers: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let sum: f64 = powers.iter().sum();
            for i in 0..head_dim {
                out.push(powers.iter().enumerate().map(|(j, power)| power / sum * number(&tokens.v, j, i)).sum());
            }
        }
    }
    out
}

#[test]
fn attention_matches_f64_on_every_isa_and_awkward_shape() {
    for heads in HEADS {
        for (activation, tolerance) in [(ActivationType::F32, 4e-6), (ActivationType::Bf16, 4e-3)] {
            let tokens = sequences(&[300, 1, 17], heads, activation);
            let expected: Vec<f64> = tokens.iter().flat_map(|tokens| reference(tokens, heads)).collect();
            for cpu in every_cpu() {
                let mut attention = Attention::new(cpu, heads, activation, 300);
                let out = attention.step(&tokens, &[(0, 0, 300), (1, 0, 1), (2, 0, 17)]);
                // An output is a mean of values below 1; bf16 rounds it by 2^-9 at most.
                assert_close(&out, &expected, 0.0, tolerance);
            }
        }
    }
}

#[test]
fn a_row_gives_the_same_bits_in_any_chunking_company_and_thread_count() {
    let heads = Heads { num_q: 6, num_kv: 2, head_dim: 20 };
    let width = heads.num_q * heads.head_dim;
    for activation in [ActivationType::F32, ActivationType::Bf16] {
        let tokens = sequences(&[700, 300, 41], heads, activation);
        for isa in Isa::available() {
            let mut whole = Attention::new(Cpu::new(isa, 1), heads, activation, 700);
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
                let mut attention = Attention::new(Cpu::new(isa, num_threads), heads, activation, 700);
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
    let mut tokens = sequences(&[40, 19], heads, ActivationType::F32);
    for cpu in every_cpu() {
        let num_threads = cpu.num_threads();
        let mut clean = Attention::new(Cpu::new(cpu.isa(), num_threads), heads, ActivationType::F32, 64);
        let expected = clean.step(&tokens, &[(0, 0, 40), (1, 0, 19)]);
        let kv_width = heads.num_kv * heads.head_dim;
        let (k, v) = (tokens[0].k.clone(), tokens[0].v.clone());
        for bad in [f32::NAN, f32::INFINITY] {
            tokens[0].k[30 * kv_width..31 * kv_width].fill(bad);
            tokens[0].v[30 * kv_width..31 * kv_width].fill(bad);
            let mut attention = Attention::new(Cpu::new(cpu.isa(), num_threads), heads, ActivationType::F32, 64);
            let out = attention.step(&tokens, &[(0, 0, 40), (1, 0, 19)]);
            assert_same_bits(&out[..30 * width], &expected[..30 * width]);
            assert!(out[30 * width..40 * width].iter().all(|x| x.is_nan()));
            assert_same_bits(&out[40 * width..], &expected[40 * width..]);
            (tokens[0].k, tokens[0].v) = (k.clone(), v.clone());
        }
    }
}

#[test]
fn the_cache_stores_keys_and_values_rounded_at_the_place_of_their_token() {
    let (num_blocks, block_size, num_heads, head_dim) = (3, 5, 2, 7);
    let cpu = Cpu::new(Isa::best(), 2);
    let mut numbers = Numbers::new(43);
    let [k, v] = [0, 1].map(|_| numbers.vec(4 * num_heads * head_dim));
    // Positions 3 and 4 are the last of block 2, positions 5 and 6 the first of block 0.
    let rows = SequenceRows { num_rows: 4, first_position: 3, block_table: vec![BlockId(2), BlockId(0)] };
    let places = [(2, 3), (2, 4), (0, 0), (0, 1)];
    for activation in [ActivationType::F32, ActivationType::Bf16] {
        let mut kv = PagedKv::new(activation, num_blocks, block_size, num_heads, head_dim);
        kv.write(&cpu, &k, &v, std::slice::from_ref(&rows));
        for (stored, x) in [(kv.keys(), &k), (kv.values(), &v)] {
            let mut expected = vec![0.0; num_blocks * num_heads * block_size * head_dim];
            for (i, &x) in x.iter().enumerate() {
                let ((block, slot), head) = (places[i / head_dim / num_heads], i / head_dim % num_heads);
                let start = ((block * num_heads + head) * block_size + slot) * head_dim;
                expected[start + i % head_dim] = if activation == ActivationType::Bf16 { round_to_bf16(x) } else { x };
            }
            match stored {
                Elements::F32(stored) => assert_eq!(stored, expected),
                Elements::Bf16(stored) => assert!(stored.iter().map(|x| x.to_f32()).eq(expected)),
                Elements::F16(_) => panic!("the cache holds no f16"),
            }
        }
    }
}

#[test]
#[should_panic(expected = "1 blocks for 17 tokens")]
fn a_block_table_that_is_too_short_is_refused() {
    let heads = HEADS[0];
    let mut tokens = sequences(&[17], heads, ActivationType::F32);
    tokens[0].block_table.pop();
    Attention::new(Cpu::new(Isa::scalar(), 1), heads, ActivationType::F32, 17).step(&tokens, &[(0, 0, 17)]);
}
