//! The plan of a checkpoint that will be written: its tensors, their distribution to shards, the shards' headers.

use std::collections::HashMap;
use std::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::checkpoint::index::SINGLE_SHARD_NAME;
use crate::checkpoint::write_file::WriteError;

/// Bytes of a cache line.
pub(super) const LINE_BYTES: u64 = 64;

/// A tensor that will be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Type of its numbers.
    pub dtype: Dtype,
    /// Its dimensions, slowest first.
    pub shape: Vec<usize>,
}

/// A file of the checkpoint: its tensors as a range of the plan.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) name: String,
    pub(super) tensors: Range<usize>,
}

/// Bytes of a tensor's data. The plan has been checked, so nothing overflows.
pub(super) fn num_bytes(tensor: &PlannedTensor) -> u64 {
    tensor.shape.iter().product::<usize>() as u64 * (tensor.dtype.bitsize() / 8) as u64
}

fn check_plan(tensors: &[PlannedTensor]) -> Result<(), WriteError> {
    let mut total_bits = 0usize;
    for tensor in tensors {
        let refuse = |problem: String| Err(WriteError::Plan { name: tensor.name.clone(), problem });
        let bits =
            tensor.shape.iter().try_fold(tensor.dtype.bitsize(), |product, &dimension| product.checked_mul(dimension));
        let Some(sum) = bits.and_then(|bits| total_bits.checked_add(bits)) else {
            return refuse(format!("shape {:?} is too large", tensor.shape));
        };
        total_bits = sum;
        if !tensor.dtype.bitsize().is_multiple_of(8) {
            return refuse(format!("type {} has no whole number of bytes", tensor.dtype));
        }
    }
    match tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        Some(pair) => Err(WriteError::Plan { name: pair[0].name.clone(), problem: "is in the plan twice".to_string() }),
        None => Ok(()),
    }
}

/// Sort by name, fill shards greedily, and order each shard by falling alignment: whole cache lines, then by type.
pub(super) fn split_into_shards(
    mut tensors: Vec<PlannedTensor>,
    max_shard_bytes: u64,
) -> Result<(Vec<PlannedTensor>, Vec<Shard>), WriteError> {
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    check_plan(&tensors)?;
    let mut ranges = Vec::new();
    let (mut start, mut shard_bytes) = (0, 0);
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = num_bytes(tensor);
        if index > start && shard_bytes + bytes > max_shard_bytes {
            ranges.push(start..index);
            (start, shard_bytes) = (index, 0);
        }
        shard_bytes += bytes;
    }
    ranges.push(start..tensors.len());
    for range in &ranges {
        tensors[range.clone()].sort_by_key(|tensor| {
            let is_aligned = num_bytes(tensor).is_multiple_of(LINE_BYTES);
            (!is_aligned, std::cmp::Reverse(tensor.dtype.bitsize()))
        });
    }
    let num_shards = ranges.len();
    let shards = ranges.into_iter().enumerate().map(|(index, tensors)| Shard {
        name: match num_shards {
            1 => SINGLE_SHARD_NAME.to_string(),
            _ => format!("model-{:05}-of-{num_shards:05}.safetensors", index + 1),
        },
        tensors,
    });
    Ok((tensors, shards.collect()))
}

/// The length, the JSON header, and spaces up to whole cache lines; the format wants a multiple of 8 bytes.
pub(super) fn header_bytes(tensors: &[PlannedTensor]) -> Result<Vec<u8>, WriteError> {
    let mut offset = 0;
    let infos = tensors.iter().map(|tensor| {
        let start = offset;
        offset += num_bytes(tensor) as usize;
        let info = TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (start, offset) };
        (tensor.name.clone(), info)
    });
    let about = HashMap::from([("format".to_string(), "pt".to_string())]);
    let refuse = |problem: String| {
        let name = tensors.first().map_or_else(String::new, |tensor| tensor.name.clone());
        WriteError::Plan { name, problem }
    };
    let metadata = Metadata::new(Some(about), infos.collect()).map_err(|error| refuse(error.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| refuse(error.to_string()))?;
    let length_bytes = size_of::<u64>();
    json.resize((length_bytes + json.len()).next_multiple_of(LINE_BYTES as usize) - length_bytes, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    Ok(header)
}
