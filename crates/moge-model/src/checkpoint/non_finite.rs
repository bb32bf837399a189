//! Count NaN and infinite elements of a stored tensor.

use safetensors::tensor::Dtype as StoredDtype;

use crate::checkpoint::storage::StoredTensor;

/// Numbers of elements of a tensor that are not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NonFinite {
    /// Not a number.
    pub num_nan: u64,
    /// Plus or minus infinity.
    pub num_infinite: u64,
}

/// Count the elements of `tensor` that are not finite; 0 for types other than f32, f16 and bf16.
pub fn count_non_finite(tensor: &StoredTensor) -> NonFinite {
    let bytes = tensor.bytes();
    match tensor.dtype() {
        StoredDtype::F32 => count(bytes, |x| u32::from_le_bytes(x) & 0x7fff_ffff, 0x7f80_0000),
        StoredDtype::F16 => count(bytes, |x| u16::from_le_bytes(x) & 0x7fff, 0x7c00),
        StoredDtype::BF16 => count(bytes, |x| u16::from_le_bytes(x) & 0x7fff, 0x7f80),
        _ => NonFinite::default(),
    }
}

/// Without its sign, infinity has the bit pattern `infinity`, and larger patterns are NaN.
fn count<T: Ord + Copy, const N: usize>(bytes: &[u8], magnitude: fn([u8; N]) -> T, infinity: T) -> NonFinite {
    let mut found = NonFinite::default();
    for element in bytes.as_chunks::<N>().0 {
        let magnitude = magnitude(*element);
        found.num_nan += u64::from(magnitude > infinity);
        found.num_infinite += u64::from(magnitude == infinity);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::reader::{Checkpoint, LoadMode};
    use crate::{CheckpointWriter, PlannedTensor};
    use half::{bf16, f16};

    /// Finite extremes, a NaN of either sign, three infinities.
    const NUMBERS: [f32; 9] =
        [0.0, -1.5, 60000.0, f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::INFINITY, f32::MIN_POSITIVE];

    #[test]
    fn nan_and_infinity_are_counted_apart_in_every_type() {
        let f32_bytes: Vec<u8> = NUMBERS.iter().flat_map(|x| x.to_le_bytes()).collect();
        let f16_bytes: Vec<u8> = NUMBERS.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        let bf16_bytes: Vec<u8> = NUMBERS.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
        for (dtype, bytes, expected) in [
            (StoredDtype::F32, f32_bytes, NonFinite { num_nan: 2, num_infinite: 3 }),
            (StoredDtype::F16, f16_bytes, NonFinite { num_nan: 2, num_infinite: 3 }),
            (StoredDtype::BF16, bf16_bytes, NonFinite { num_nan: 2, num_infinite: 3 }),
            (StoredDtype::U8, vec![0xff; NUMBERS.len()], NonFinite::default()),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let plan = vec![PlannedTensor { name: "x".to_string(), dtype, shape: vec![NUMBERS.len()] }];
            let mut writer = CheckpointWriter::create(dir.path(), plan, 1000).unwrap();
            writer.append(&bytes).unwrap();
            writer.finish().unwrap();
            let checkpoint = Checkpoint::open(dir.path(), LoadMode::Mmap, &|_, _| ()).unwrap();
            assert_eq!(count_non_finite(checkpoint.get("x").unwrap()), expected, "{dtype:?}");
        }
    }
}
