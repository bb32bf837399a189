//! Random numbers that are a function of (seed, tensor name, element index), so that neither chunks nor threads change
//! them.

use half::{bf16, f16};
use moge_kernels::Dtype;

/// Numbers spread evenly over `mean - amplitude .. mean + amplitude`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Uniform {
    /// The middle.
    pub mean: f32,
    /// Largest distance from it.
    pub amplitude: f32,
}

impl Uniform {
    /// Mean zero and the given standard deviation.
    pub fn with_deviation(deviation: f32) -> Uniform {
        // The standard deviation of a uniform distribution is its amplitude over the root of 3.
        Uniform { mean: 0.0, amplitude: deviation * 3f32.sqrt() }
    }
}

/// The random numbers of one tensor.
#[derive(Clone, Copy, Debug)]
pub struct TensorRng {
    key: u64,
}

impl TensorRng {
    /// Those of the tensor of this name.
    pub fn new(seed: u64, tensor: &str) -> TensorRng {
        TensorRng { key: tensor.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte))) }
    }

    /// The first `len` elements.
    pub fn numbers(self, range: Uniform, len: usize) -> Vec<f32> {
        let bytes = self.bytes(Dtype::F32, range, 0, len);
        bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    /// Elements `start..start + len` as little-endian numbers of type `dtype`.
    ///
    /// # Panics
    /// If `start` is odd: two elements come from one draw.
    pub(super) fn bytes(self, dtype: Dtype, range: Uniform, start: u64, len: usize) -> Vec<u8> {
        match dtype {
            Dtype::F32 => self.encode(range, start, len, f32::to_le_bytes),
            Dtype::F16 => self.encode(range, start, len, |x| f16::from_f32(x).to_le_bytes()),
            Dtype::Bf16 => self.encode(range, start, len, |x| bf16::from_f32(x).to_le_bytes()),
        }
    }

    fn encode<const N: usize>(self, range: Uniform, start: u64, len: usize, encode: fn(f32) -> [u8; N]) -> Vec<u8> {
        assert!(start.is_multiple_of(2), "chunks start at even elements");
        let scale = range.amplitude / 2f32.powi(31);
        let number = |bits: u32| encode(range.mean + bits.cast_signed() as f32 * scale);
        let mut bytes = vec![0; len * N];
        for (draw, pair) in (start / 2..).zip(bytes.chunks_mut(2 * N)) {
            let bits = mix(self.key.wrapping_add(draw.wrapping_mul(GOLDEN_GAMMA)));
            let (first, second) = pair.split_at_mut(N);
            first.copy_from_slice(&number(bits as u32));
            // The last pair of a tensor may be half.
            if !second.is_empty() {
                second.copy_from_slice(&number((bits >> 32) as u32));
            }
        }
        bytes
    }
}

/// 2^64 over the golden ratio, odd: the step of the SplitMix64 sequence.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of SplitMix64 (Steele, Lea, Flood 2014): every input bit changes about half of the output bits.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(GOLDEN_GAMMA);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(rng: TensorRng, range: Uniform, start: u64, len: usize) -> Vec<f32> {
        let bytes = rng.bytes(Dtype::F32, range, start, len);
        bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    #[test]
    fn chunks_of_any_size_join_to_the_same_tensor() {
        let (rng, range) = (TensorRng::new(3, "w"), Uniform { mean: 0.5, amplitude: 2.0 });
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let whole = rng.bytes(dtype, range, 0, 101);
            let parts = [(0, 40), (40, 2), (42, 59)];
            let joined: Vec<u8> = parts.iter().flat_map(|&(start, len)| rng.bytes(dtype, range, start, len)).collect();
            assert_eq!(whole, joined);
        }
    }

    #[test]
    fn seed_and_name_both_change_the_numbers() {
        let range = Uniform::with_deviation(1.0);
        let first = floats(TensorRng::new(3, "w"), range, 0, 7);
        assert_ne!(first, floats(TensorRng::new(4, "w"), range, 0, 7));
        assert_ne!(first, floats(TensorRng::new(3, "v"), range, 0, 7));
    }

    #[test]
    fn numbers_have_the_mean_and_deviation_asked_for() {
        let num_elements = 200_000;
        for (mean, deviation) in [(0.0, 0.25), (1.0, 0.1)] {
            let range = Uniform { mean, ..Uniform::with_deviation(deviation) };
            let x = floats(TensorRng::new(5, "layers.0.w"), range, 0, num_elements);
            let found_mean = x.iter().sum::<f32>() / num_elements as f32;
            let variance = x.iter().map(|x| (x - found_mean).powi(2)).sum::<f32>() / num_elements as f32;
            // Five standard errors of the mean.
            assert!((found_mean - mean).abs() < 5.0 * deviation / (num_elements as f32).sqrt(), "{found_mean}");
            assert!((variance.sqrt() / deviation - 1.0).abs() < 0.01, "{}", variance.sqrt());
            assert!(x.iter().all(|x| (x - mean).abs() <= range.amplitude * 1.000_001));
        }
    }
}
