//! The random values of each tensor, and the threads that generate them.

use std::ops::Range;
use std::sync::mpsc::sync_channel;

use moge_kernels::Dtype;
use safetensors::Dtype as StoredDtype;

use super::random::{TensorRng, Uniform};
use crate::checkpoint::shards::PlannedTensor;
use crate::checkpoint::write_file::WriteError;
use crate::checkpoint::writer::CheckpointWriter;
use crate::network::config::ModelConfig;

/// Elements that are generated and written at a time; even. 4 MiB of f32: large enough that a write is cheap.
const CHUNK_ELEMENTS: u64 = 1 << 20;

/// Chunks that may wait for the writer, per thread.
const WAITING_CHUNKS: usize = 2;

/// Source of the random numbers, and the threads that generate them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source {
    pub(super) seed: u64,
    pub(super) num_threads: usize,
}

/// Random numbers for the tensor `name`, such that activations stay of order one through all layers: a projection keeps
/// the variance of its input, and the `2 * num_layers` additions to the residual stream have variance one together.
pub(super) fn distribution(config: &ModelConfig, name: &str, shape: &[usize]) -> Uniform {
    let per_addition = 1.0 / (2.0 * config.num_layers() as f32).sqrt();
    let ends_with = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    if ends_with(&[".router_scale"]) {
        return Uniform { mean: 1.0, amplitude: 0.5 };
    }
    // What every token gets alike moves all of them towards the same experts: it must stay small.
    if ends_with(&["o_proj.bias"]) {
        return Uniform { mean: 0.0, amplitude: 0.1 * per_addition };
    }
    if ends_with(&[".bias"]) {
        return Uniform { mean: 0.0, amplitude: 0.1 };
    }
    if ends_with(&["post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"]) {
        return Uniform { mean: per_addition, amplitude: 0.25 * per_addition };
    }
    if ends_with(&["norm.weight"]) {
        return Uniform { mean: 1.0, amplitude: 0.25 };
    }
    let input_width = shape.last().copied().unwrap_or(1) as f32;
    let keeps_variance = 1.0 / input_width.sqrt();
    Uniform::with_deviation(match name {
        // As the head too, it must give logits of order one; alone, a residual stream of order one.
        _ if ends_with(&["embed_tokens.weight"]) && !config.tie_word_embeddings => 1.0,
        _ if ends_with(&["o_proj.weight", "down_proj.weight"]) => keeps_variance * per_addition,
        _ => keeps_variance,
    })
}

/// Make all tensors of `writer`'s plan with several threads and append them in order. Memory is bounded by a few chunks
/// per thread. `progress` gets the bytes written.
pub(super) fn write_tensors(
    writer: &mut CheckpointWriter,
    config: &ModelConfig,
    source: Source,
    progress: &mut dyn FnMut(u64),
) -> Result<(), WriteError> {
    let tensors = writer.tensors().to_vec();
    let chunks: Vec<Chunk> = tensors.iter().flat_map(|tensor| chunks_of(tensor, config, source.seed)).collect();
    let mut written_bytes = 0;
    std::thread::scope(|scope| {
        let receivers: Vec<_> = (0..source.num_threads)
            .map(|thread| {
                let (sender, receiver) = sync_channel(WAITING_CHUNKS);
                let mine = chunks.iter().skip(thread).step_by(source.num_threads);
                scope.spawn(move || {
                    for chunk in mine {
                        // The receiver is gone once a write has failed.
                        if sender.send(chunk.bytes(config.dtype)).is_err() {
                            return;
                        }
                    }
                });
                receiver
            })
            .collect();
        for receiver in receivers.iter().cycle().take(chunks.len()) {
            // A thread that ends early has panicked; the scope passes that on.
            let Ok(bytes) = receiver.recv() else { break };
            writer.append(&bytes)?;
            written_bytes += bytes.len() as u64;
            progress(written_bytes);
        }
        Ok(())
    })
}

/// A run of a tensor's elements.
struct Chunk {
    rng: TensorRng,
    distribution: Uniform,
    elements: Range<u64>,
}

impl Chunk {
    fn bytes(&self, dtype: Dtype) -> Vec<u8> {
        let len = (self.elements.end - self.elements.start) as usize;
        self.rng.bytes(dtype, self.distribution, self.elements.start, len)
    }
}

fn chunks_of(tensor: &PlannedTensor, config: &ModelConfig, seed: u64) -> impl Iterator<Item = Chunk> + use<> {
    let rng = TensorRng::new(seed, &tensor.name);
    let distribution = distribution(config, &tensor.name, &tensor.shape);
    let num_elements = tensor.shape.iter().map(|&size| size as u64).product::<u64>();
    (0..num_elements).step_by(CHUNK_ELEMENTS as usize).map(move |start| Chunk {
        rng,
        distribution,
        elements: start..num_elements.min(start + CHUNK_ELEMENTS),
    })
}

/// The type in the file's header.
pub(super) fn stored_dtype(dtype: Dtype) -> StoredDtype {
    match dtype {
        Dtype::F32 => StoredDtype::F32,
        Dtype::F16 => StoredDtype::F16,
        Dtype::Bf16 => StoredDtype::BF16,
    }
}
