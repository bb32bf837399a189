//! llama.cpp's types of weights, as far as its quantiser uses them for our models, and random blocks of them.
//!
//! A block's integers are random bits. Its scale, an f16, has a random mantissa and an exponent that gives the numbers
//! the wanted size: powers of two, so that no arithmetic on f16 is needed.
//!
//! The mean over many blocks is zero, which matters: integers such as -8..8 have a mean of -0.5, and a network of
//! weights with a common mean computes nearly the same for every token, so that all tokens would go to the same
//! experts. Therefore a block's sign is random, too.

/// A type of stored numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QuantType {
    F32,
    /// 32 numbers: f16 scale, 4-bit integers less 8.
    Q4_0,
    /// 32 numbers: f16 scale, one high bit each, 4 low bits each, less 16.
    Q5_0,
    /// 32 numbers: f16 scale, int8.
    Q8_0,
    /// 256 numbers: f16 scale of scales and of minima, 8 pairs of 6 bits, 4-bit integers.
    Q4K,
    /// 256 numbers: 4 low bits each, 2 high bits each, 16 int8 scales, f16 scale of scales; less 32.
    Q6K,
}

impl QuantType {
    /// The number that stands for the type in a file.
    pub(crate) fn id(self) -> u32 {
        match self {
            QuantType::F32 => 0,
            QuantType::Q4_0 => 2,
            QuantType::Q5_0 => 6,
            QuantType::Q8_0 => 8,
            QuantType::Q4K => 12,
            QuantType::Q6K => 14,
        }
    }

    pub(crate) fn numbers_per_block(self) -> u64 {
        match self {
            QuantType::F32 => 1,
            QuantType::Q4_0 | QuantType::Q5_0 | QuantType::Q8_0 => 32,
            QuantType::Q4K | QuantType::Q6K => 256,
        }
    }

    fn bytes_per_block(self) -> u64 {
        match self {
            QuantType::F32 => 4,
            QuantType::Q4_0 => 18,
            QuantType::Q5_0 => 22,
            QuantType::Q8_0 => 34,
            QuantType::Q4K => 144,
            QuantType::Q6K => 210,
        }
    }

    /// Bytes of so many numbers, which are whole blocks.
    pub(crate) fn num_bytes(self, num_numbers: u64) -> u64 {
        num_numbers / self.numbers_per_block() * self.bytes_per_block()
    }

    /// Append random numbers, in whole blocks, with mean near zero and a standard deviation near 2^`std_log2`, which
    /// must be at least -6: below, the scales of the two wide blocks would be subnormal.
    pub(crate) fn fill(self, out: &mut Vec<u8>, num_numbers: u64, std_log2: i32, random: &mut Random) {
        let start = out.len();
        out.extend((0..self.num_bytes(num_numbers).div_ceil(8)).flat_map(|_| random.next().to_le_bytes()));
        out.truncate(start + self.num_bytes(num_numbers) as usize);
        for block in out[start..].chunks_exact_mut(self.bytes_per_block() as usize) {
            self.make_valid(block, std_log2);
        }
    }

    /// Turn random bytes into a block of numbers of the wanted size. What is subtracted from an exponent is the binary
    /// logarithm of the standard deviation that uniform integers have, times that of a mantissa (about 1.4), rounded.
    fn make_valid(self, block: &mut [u8], std_log2: i32) {
        match self {
            QuantType::F32 => {
                let bits = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
                // Uniform in -1..1, times 2 to the power of one more than asked: a deviation of 2 / sqrt(3).
                let number = (bits >> 8) as f32 / (1 << 23) as f32 - 1.0;
                block.copy_from_slice(&(number * 2f32.powi(std_log2 + 1)).to_le_bytes());
            }
            QuantType::Q4_0 => set_exponent(block, 0, std_log2 - 3),
            QuantType::Q5_0 => set_exponent(block, 0, std_log2 - 4),
            QuantType::Q8_0 => {
                set_exponent(block, 0, std_log2 - 7);
                // The quantiser never writes -128.
                block[2..].iter_mut().filter(|byte| **byte == 0x80).for_each(|byte| *byte = 0x81);
            }
            QuantType::Q4K => {
                set_exponent(block, 0, std_log2 - 8);
                // The minimum is 8 times the scale, as if 8 were subtracted from the integers.
                block.copy_within(0..2, 2);
                set_exponent(block, 2, std_log2 - 5);
                // Bytes 4..8 and 8..12 hold 6 bits of four scales and of their minima, and above them the upper 2 bits
                // of the other four; bytes 12..16 hold the latter's lower 4 bits. All are the same pair of 32..64.
                for i in 4..8 {
                    block[i] = block[i] & 0x5f | 0xa0;
                    block[i + 4] = block[i];
                    block[i + 8] = (block[i + 8] & 0x0f) * 0x11;
                }
            }
            QuantType::Q6K => {
                for scale in &mut block[192..208] {
                    let size = *scale & 7 | 8;
                    *scale = if *scale < 128 { size } else { size.wrapping_neg() };
                }
                set_exponent(block, 208, std_log2 - 8);
            }
        }
    }
}

/// Make a number between 2^`exponent` and twice that of the f16 at byte `at`; its sign and its mantissa stay.
fn set_exponent(block: &mut [u8], at: usize, exponent: i32) {
    const BIAS: i32 = 15;
    let field = BIAS + exponent;
    debug_assert!((1..31).contains(&field), "an f16 cannot be normal with exponent {exponent}");
    block[at + 1] = block[at + 1] & 0b1000_0011 | (field as u8) << 2;
}

/// Random bits that are the same on every machine: SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    /// Another stream for every seed.
    pub(crate) fn new(seed: u64) -> Random {
        // Seeds follow one another; far apart, their streams do not overlap in practice.
        Random(seed.wrapping_mul(0xd134_2543_de82_ef95))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::{QuantType, Random};

    fn f16(bytes: &[u8]) -> f32 {
        let bits = u16::from_le_bytes([bytes[0], bytes[1]]);
        let exponent = i32::from(bits >> 10 & 31);
        assert!((1..31).contains(&exponent), "not a normal number: {bits:#x}");
        let sign = if bits < 0x8000 { 1.0 } else { -1.0 };
        sign * (1.0 + f32::from(bits & 0x3ff) / 1024.0) * 2f32.powi(exponent - 15)
    }

    /// The numbers of one block, by the definitions of llama.cpp's `ggml-quants.c`. Their order does not matter here.
    fn numbers(quant_type: QuantType, block: &[u8]) -> Vec<f32> {
        let int = |byte: u8| f32::from(byte.cast_signed());
        match quant_type {
            QuantType::F32 => vec![f32::from_le_bytes(block.try_into().unwrap())],
            QuantType::Q4_0 => {
                block[2..].iter().flat_map(|b| [b & 15, b >> 4]).map(|q| f16(block) * (f32::from(q) - 8.0)).collect()
            }
            QuantType::Q5_0 => (0..32)
                .map(|i| {
                    let high = block[2 + i / 8] >> (i % 8) & 1;
                    let low = block[6 + i % 16] >> (i / 16 * 4) & 15;
                    f16(block) * (f32::from(high << 4 | low) - 16.0)
                })
                .collect(),
            QuantType::Q8_0 => block[2..].iter().map(|&q| f16(block) * int(q)).collect(),
            QuantType::Q4K => (0..256)
                .map(|i| {
                    let s = &block[4..16];
                    let (j, q) = (i / 32, block[16 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15);
                    let (scale, min) = match j {
                        0..4 => (s[j] & 63, s[j + 4] & 63),
                        _ => (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4),
                    };
                    f16(block) * f32::from(scale) * f32::from(q) - f16(&block[2..]) * f32::from(min)
                })
                .collect(),
            QuantType::Q6K => (0..256)
                .map(|i| {
                    let low = block[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4) & 15;
                    let high = block[128 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
                    f16(&block[208..]) * int(block[192 + i / 16]) * (f32::from(high << 4 | low) - 32.0)
                })
                .collect(),
        }
    }

    /// Four deviations of the mean of a million numbers in blocks of 256, each with a mean of a ninth of its deviation.
    const MEAN_TOLERANCE: f32 = 0.01;

    #[test]
    fn random_blocks_of_every_type_have_mean_zero_and_the_size_that_was_asked_for() {
        use QuantType::{F32, Q4_0, Q4K, Q5_0, Q6K, Q8_0};
        for quant_type in [F32, Q4_0, Q5_0, Q8_0, Q4K, Q6K] {
            for std_log2 in [-6, 3] {
                let mut bytes = Vec::new();
                quant_type.fill(&mut bytes, 1 << 20, std_log2, &mut Random::new(5));
                let blocks = bytes.chunks_exact(quant_type.bytes_per_block() as usize);
                let all: Vec<f32> = blocks.flat_map(|block| numbers(quant_type, block)).collect();
                assert_eq!(all.len(), 1 << 20);
                let mean = all.iter().sum::<f32>() / all.len() as f32;
                let std = (all.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / all.len() as f32).sqrt();
                let std = std / 2f32.powi(std_log2);
                assert!((0.66..1.5).contains(&std), "{quant_type:?}: {std} times what was asked");
                // With one sign for all blocks it would be 0.11 for the types of 4 bits.
                let relative_mean = mean / 2f32.powi(std_log2) / std;
                assert!(relative_mean.abs() < MEAN_TOLERANCE, "{quant_type:?}: mean {relative_mean}");
            }
        }
    }

    #[test]
    fn tensors_with_different_seeds_differ() {
        let [mut first, mut second] = [Vec::new(), Vec::new()];
        QuantType::Q8_0.fill(&mut first, 32, -6, &mut Random::new(0));
        QuantType::Q8_0.fill(&mut second, 32, -6, &mut Random::new(1));
        assert_ne!(first, second);
    }
}
