//! Checkpoint names to weights. The only place that knows the names.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use moge_kernels::{Dtype, Elements, Matrix};
use safetensors::tensor::Dtype as StoredDtype;

use crate::checkpoint::{Checkpoint, CheckpointError, Storage, StoredTensor, TensorProblem};
use crate::config::{MlpConfig, ModelConfig, MoeConfig, NormPlacement};

/// A large tensor, used where it lies in the checkpoint's file: `[rows, cols]`, row-major.
#[derive(Clone, Debug)]
pub(crate) struct Weight {
    storage: Arc<Storage>,
    range: Range<usize>,
    dtype: Dtype,
    rows: usize,
    cols: usize,
}

impl Weight {
    /// The numbers, borrowed.
    pub(crate) fn matrix(&self) -> Matrix<'_> {
        let bytes = &self.storage.bytes()[self.range.clone()];
        let elements = match self.dtype {
            Dtype::F32 => Elements::F32(bytemuck::cast_slice(bytes)),
            Dtype::F16 => Elements::F16(bytemuck::cast_slice::<u8, f16>(bytes)),
            Dtype::Bf16 => Elements::Bf16(bytemuck::cast_slice::<u8, bf16>(bytes)),
        };
        Matrix::new(elements, self.rows, self.cols)
    }

    /// `tensor` as a matrix of `rows` x `cols`. Data that is not aligned for its type is copied.
    fn from_stored(tensor: &StoredTensor, dtype: Dtype, rows: usize, cols: usize) -> Weight {
        let aligned = tensor.bytes().as_ptr().addr().is_multiple_of(dtype.size_bytes());
        let (storage, range) = if aligned {
            (tensor.storage.clone(), tensor.range.clone())
        } else {
            (Arc::new(Storage::copy_of(tensor.bytes())), 0..tensor.range.len())
        };
        Weight { storage, range, dtype, rows, cols }
    }

    /// The upper and the lower half of the rows.
    fn halves(self) -> [Weight; 2] {
        let middle = self.range.start + self.range.len() / 2;
        let lower = Weight { range: middle..self.range.end, rows: self.rows / 2, ..self.clone() };
        [Weight { range: self.range.start..middle, rows: self.rows / 2, ..self }, lower]
    }

    fn to_f32(&self) -> Vec<f32> {
        match self.matrix().elements() {
            Elements::F32(x) => x.to_vec(),
            Elements::F16(x) => x.iter().map(|x| x.to_f32()).collect(),
            Elements::Bf16(x) => x.iter().map(|x| x.to_f32()).collect(),
        }
    }
}

/// Where [`Network::build`] gets its tensors: a checkpoint, or a list of what is wanted.
pub(crate) trait TensorSource {
    /// A large tensor.
    type Matrix;
    /// A small tensor, widened to f32.
    type Vector;

    /// The tensor `name` of shape `[rows, cols]`.
    fn matrix(&mut self, name: String, rows: usize, cols: usize) -> Self::Matrix;

    /// The two halves, `[rows, cols]` each, of the tensor `name` of shape `[2 * rows, cols]`.
    fn halves(&mut self, name: String, rows: usize, cols: usize) -> [Self::Matrix; 2];

    /// The tensor `name` of shape `shape`.
    fn vector(&mut self, name: String, shape: &[usize]) -> Self::Vector;
}

/// All weights of a network.
#[derive(Debug)]
pub(crate) struct Network<M = Weight, V = Vec<f32>> {
    /// Token embedding `[vocab_size, hidden_size]`.
    pub(crate) embedding: M,
    /// The layers in order.
    pub(crate) layers: Vec<Layer<M, V>>,
    /// Weight of the last norm, `[hidden_size]`.
    pub(crate) final_norm: V,
    /// Output head `[vocab_size, hidden_size]`.
    pub(crate) head: M,
}

/// One layer.
#[derive(Debug)]
pub(crate) struct Layer<M = Weight, V = Vec<f32>> {
    /// Norm before attention, `[hidden_size]`.
    pub(crate) attention_norm: V,
    /// Norm before the MLP, `[hidden_size]`.
    pub(crate) mlp_norm: V,
    /// Norms after attention and after the MLP, where the network has them.
    pub(crate) post_norms: Option<PostNorms<V>>,
    /// Query projection.
    pub(crate) q: Linear<M, V>,
    /// Key projection.
    pub(crate) k: Linear<M, V>,
    /// Value projection.
    pub(crate) v: Linear<M, V>,
    /// Output projection.
    pub(crate) o: Linear<M, V>,
    /// Norms of each q and k head, `[head_dim]`, where the network has them.
    pub(crate) qk_norms: Option<[V; 2]>,
    /// The MLP.
    pub(crate) mlp: LayerMlp<M, V>,
}

/// Norms of a sandwich layer that come after its two halves.
#[derive(Debug)]
pub(crate) struct PostNorms<V = Vec<f32>> {
    /// Of the attention's output, `[hidden_size]`.
    pub(crate) attention: V,
    /// Of the MLP's output, `[hidden_size]`.
    pub(crate) mlp: V,
}

/// A projection.
#[derive(Debug)]
pub(crate) struct Linear<M = Weight, V = Vec<f32>> {
    /// `[output width, input width]`.
    pub(crate) weight: M,
    /// `[output width]`.
    pub(crate) bias: Option<V>,
}

/// The MLP of a layer.
#[derive(Debug)]
pub(crate) enum LayerMlp<M = Weight, V = Vec<f32>> {
    /// One SwiGLU.
    Dense(Swiglu<M>),
    /// Routed experts and a shared one.
    GroupedExperts(Experts<M, V>),
}

/// `down(silu(gate(x)) * up(x))`.
#[derive(Debug)]
pub(crate) struct Swiglu<M = Weight> {
    /// Gate and up, `[intermediate_size, hidden_size]` each.
    pub(crate) gate_up: [M; 2],
    /// `[hidden_size, intermediate_size]`.
    pub(crate) down: M,
}

/// Weights of a layer's experts.
#[derive(Debug)]
pub(crate) struct Experts<M = Weight, V = Vec<f32>> {
    /// The router, `[num_experts, hidden_size]`.
    pub(crate) router: M,
    /// Learned factor of each expert's weight, `[num_experts]`.
    pub(crate) router_scale: V,
    /// Routed experts in order; an expert group is a run of `experts_per_group`.
    pub(crate) routed: Vec<Swiglu<M>>,
    /// The shared expert.
    pub(crate) shared: Swiglu<M>,
}

impl<M: Clone, V> Network<M, V> {
    /// Ask `source` for every tensor of the network that `config` describes.
    pub(crate) fn build<S: TensorSource<Matrix = M, Vector = V>>(
        config: &ModelConfig,
        source: &mut S,
    ) -> Network<M, V> {
        let hidden = config.hidden_size;
        let embedding = source.matrix("model.embed_tokens.weight".to_owned(), config.vocab_size, hidden);
        let layers = (0..config.num_layers).map(|layer| Layer::build(config, layer, source)).collect();
        let final_norm = source.vector("model.norm.weight".to_owned(), &[hidden]);
        let head = if config.tie_word_embeddings {
            embedding.clone()
        } else {
            source.matrix("lm_head.weight".to_owned(), config.vocab_size, hidden)
        };
        Network { embedding, layers, final_norm, head }
    }
}

impl<M: Clone, V> Layer<M, V> {
    fn build<S: TensorSource<Matrix = M, Vector = V>>(
        config: &ModelConfig,
        layer: usize,
        source: &mut S,
    ) -> Layer<M, V> {
        let prefix = format!("model.layers.{layer}");
        let hidden = config.hidden_size;
        let norm = |name: &str, source: &mut S| source.vector(format!("{prefix}.{name}.weight"), &[hidden]);
        let linear = |name: &str, rows: usize, cols: usize, bias: bool, source: &mut S| {
            let name = format!("{prefix}.self_attn.{name}");
            let weight = source.matrix(format!("{name}.weight"), rows, cols);
            Linear { weight, bias: bias.then(|| source.vector(format!("{name}.bias"), &[rows])) }
        };
        // In a sandwich layer "post_attention_layernorm" is still the norm before the MLP.
        let post_norms = (config.norms == NormPlacement::Sandwich).then(|| PostNorms {
            attention: norm("post_self_attn_layernorm", source),
            mlp: norm("post_mlp_layernorm", source),
        });
        Layer {
            attention_norm: norm("input_layernorm", source),
            mlp_norm: norm("post_attention_layernorm", source),
            post_norms,
            q: linear("q_proj", config.q_size(), hidden, config.qkv_bias, source),
            k: linear("k_proj", config.kv_size(), hidden, config.qkv_bias, source),
            v: linear("v_proj", config.kv_size(), hidden, config.qkv_bias, source),
            o: linear("o_proj", hidden, config.q_size(), config.o_bias, source),
            qk_norms: config.qk_norm.then(|| {
                ["q_norm", "k_norm"]
                    .map(|name| source.vector(format!("{prefix}.self_attn.{name}.weight"), &[config.head_dim]))
            }),
            mlp: match config.mlp {
                MlpConfig::GroupedExperts(moe) => {
                    LayerMlp::GroupedExperts(Experts::build(&moe, hidden, &format!("{prefix}.mlp"), source))
                }
                MlpConfig::Dense { intermediate_size } => {
                    let fused = config.norms == NormPlacement::Sandwich;
                    LayerMlp::Dense(Swiglu::build(&format!("{prefix}.mlp"), hidden, intermediate_size, fused, source))
                }
            },
        }
    }
}

impl<M: Clone, V> Experts<M, V> {
    fn build<S: TensorSource<Matrix = M, Vector = V>>(
        moe: &MoeConfig,
        hidden: usize,
        prefix: &str,
        source: &mut S,
    ) -> Experts<M, V> {
        let mut swiglu = |name: String, intermediate| Swiglu::build(&name, hidden, intermediate, false, source);
        let routed = (0..moe.num_experts)
            .map(|expert| swiglu(format!("{prefix}.experts.{expert}"), moe.expert_intermediate_size))
            .collect();
        let shared = swiglu(format!("{prefix}.shared_expert"), moe.shared_intermediate_size);
        Experts {
            router: source.matrix(format!("{prefix}.gate.weight"), moe.num_experts, hidden),
            router_scale: source.vector(format!("{prefix}.router_scale"), &[1, moe.num_experts]),
            routed,
            shared,
        }
    }
}

impl<M> Swiglu<M> {
    fn build<S: TensorSource<Matrix = M>>(
        prefix: &str,
        hidden: usize,
        intermediate: usize,
        fused: bool,
        source: &mut S,
    ) -> Swiglu<M> {
        let gate_up = if fused {
            source.halves(format!("{prefix}.gate_up_proj.weight"), intermediate, hidden)
        } else {
            ["gate_proj", "up_proj"].map(|name| source.matrix(format!("{prefix}.{name}.weight"), intermediate, hidden))
        };
        Swiglu { gate_up, down: source.matrix(format!("{prefix}.down_proj.weight"), hidden, intermediate) }
    }
}

/// A tensor that a network needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// How many numbers it has.
    pub fn num_elements(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }
}

/// Every tensor of the network that `config` describes.
pub fn expected_tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut list = SpecList(Vec::new());
    Network::build(config, &mut list);
    list.0
}

struct SpecList(Vec<TensorSpec>);

impl TensorSource for SpecList {
    type Matrix = ();
    type Vector = ();

    fn matrix(&mut self, name: String, rows: usize, cols: usize) {
        self.vector(name, &[rows, cols]);
    }

    fn halves(&mut self, name: String, rows: usize, cols: usize) -> [(); 2] {
        self.vector(name, &[2 * rows, cols]);
        [(); 2]
    }

    fn vector(&mut self, name: String, shape: &[usize]) {
        self.0.push(TensorSpec { name, shape: shape.to_vec() });
    }
}

/// The tensors of `checkpoint` that do not fit `config`; empty if it is whole.
pub fn tensor_problems(config: &ModelConfig, checkpoint: &Checkpoint) -> Vec<TensorProblem> {
    let expected = expected_tensors(config);
    let mut problems = Vec::new();
    for TensorSpec { name, shape } in &expected {
        match checkpoint.get(name) {
            None => problems.push(TensorProblem::Missing { name: name.clone(), shape: shape.clone() }),
            Some(tensor) if tensor.shape() != shape => {
                let found = tensor.shape().to_vec();
                problems.push(TensorProblem::Shape { name: name.clone(), found, expected: shape.clone() });
            }
            Some(tensor) if float_dtype(tensor.dtype()).is_none() => {
                problems.push(TensorProblem::Dtype { name: name.clone(), found: format!("{:?}", tensor.dtype()) });
            }
            Some(_) => {}
        }
    }
    let expected: std::collections::HashSet<&str> = expected.iter().map(|spec| spec.name.as_str()).collect();
    for (name, tensor) in checkpoint.tensors() {
        if !expected.contains(name) && !is_ignored(config, name) {
            problems.push(TensorProblem::Unexpected { name: name.to_owned(), shape: tensor.shape().to_vec() });
        }
    }
    problems
}

/// Left-overs of training frameworks that carry no weights, and the head's copy of a tied embedding.
fn is_ignored(config: &ModelConfig, name: &str) -> bool {
    ["rotary_emb.inv_freq", "module", "kv_cache_offset"].iter().any(|part| name.contains(part))
        || (config.tie_word_embeddings && name == "lm_head.weight")
}

fn float_dtype(dtype: StoredDtype) -> Option<Dtype> {
    match dtype {
        StoredDtype::F32 => Some(Dtype::F32),
        StoredDtype::F16 => Some(Dtype::F16),
        StoredDtype::BF16 => Some(Dtype::Bf16),
        _ => None,
    }
}

/// A checkpoint whose tensors were all checked against the config.
struct CheckedCheckpoint<'a>(&'a Checkpoint);

impl CheckedCheckpoint<'_> {
    fn tensor(&self, name: &str) -> (&StoredTensor, Dtype) {
        let tensor = self.0.get(name).expect("checked to be there");
        (tensor, float_dtype(tensor.dtype()).expect("checked to be a float type"))
    }
}

impl TensorSource for CheckedCheckpoint<'_> {
    type Matrix = Weight;
    type Vector = Vec<f32>;

    fn matrix(&mut self, name: String, rows: usize, cols: usize) -> Weight {
        let (tensor, dtype) = self.tensor(&name);
        Weight::from_stored(tensor, dtype, rows, cols)
    }

    fn halves(&mut self, name: String, rows: usize, cols: usize) -> [Weight; 2] {
        self.matrix(name, 2 * rows, cols).halves()
    }

    fn vector(&mut self, name: String, shape: &[usize]) -> Vec<f32> {
        self.matrix(name, 1, shape.iter().product()).to_f32()
    }
}

impl Network {
    /// Check that `checkpoint` is whole and take its tensors; large ones stay where they lie.
    ///
    /// # Errors
    /// If a tensor is missing, unexpected, or of the wrong shape or type; all such tensors are listed.
    pub(crate) fn load(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Network, CheckpointError> {
        let problems = tensor_problems(config, checkpoint);
        if !problems.is_empty() {
            return Err(CheckpointError::Tensors { dir: checkpoint.dir().display().to_string(), problems });
        }
        Ok(Network::build(config, &mut CheckedCheckpoint(checkpoint)))
    }
}
