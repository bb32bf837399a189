//! Checkpoint names to weights. The only place that knows the names.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use moge_kernels::{Cpu, Dtype, Elements, Isa, Matrix, PANEL_ROWS, PackedFormat, PackedMatrix, pack_panel};
use safetensors::tensor::Dtype as StoredDtype;

use crate::arch::spec::TensorNames;
use crate::checkpoint::error::{CheckpointError, TensorProblem};
use crate::checkpoint::quant_scheme::{QuantScheme, WeightRole, format_name};
use crate::checkpoint::reader::Checkpoint;
use crate::checkpoint::storage::{Storage, StoredTensor};
use crate::network::config::{LayerConfig, MlpConfig, ModelConfig, MoeConfig, NormPlacement};

/// A large tensor, used where it lies in the checkpoint's file, or packed: `[rows, cols]`.
#[derive(Clone, Debug)]
pub struct Weight {
    storage: Arc<Storage>,
    range: Range<usize>,
    format: Format,
    rows: usize,
    cols: usize,
}

/// What the bytes of a weight are.
#[derive(Clone, Copy, Debug)]
enum Format {
    /// Numbers, row-major.
    Plain(Dtype),
    /// Panels in the packed layout.
    Packed(PackedFormat),
}

/// The numbers of a weight, borrowed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum WeightView<'a> {
    Plain(Matrix<'a>),
    Packed(PackedMatrix<'a>),
}

impl Weight {
    /// The numbers, borrowed.
    pub(crate) fn view(&self) -> WeightView<'_> {
        match self.format {
            Format::Plain(_) => WeightView::Plain(self.matrix()),
            Format::Packed(_) => WeightView::Packed(self.packed()),
        }
    }

    /// True if it is in the packed layout.
    pub(crate) fn is_packed(&self) -> bool {
        matches!(self.format, Format::Packed(_))
    }

    /// Its columns: the input width.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that it takes.
    pub(crate) fn num_bytes(&self) -> u64 {
        self.range.len() as u64
    }

    /// The numbers of a weight that is not packed.
    ///
    /// # Panics
    /// If it is.
    pub(crate) fn matrix(&self) -> Matrix<'_> {
        let bytes = &self.storage.bytes()[self.range.clone()];
        let elements = match self.format {
            Format::Plain(Dtype::F32) => Elements::F32(bytemuck::cast_slice(bytes)),
            Format::Plain(Dtype::F16) => Elements::F16(bytemuck::cast_slice::<u8, f16>(bytes)),
            Format::Plain(Dtype::Bf16) => Elements::Bf16(bytemuck::cast_slice::<u8, bf16>(bytes)),
            Format::Packed(format) => unreachable!("a {format:?} weight where only plain ones may be"),
        };
        Matrix::new(elements, self.rows, self.cols)
    }

    /// The panels of a packed weight.
    ///
    /// # Panics
    /// If it is not packed.
    pub(crate) fn packed(&self) -> PackedMatrix<'_> {
        let Format::Packed(format) = self.format else { unreachable!("a plain weight among packed ones") };
        PackedMatrix::new(&self.storage.bytes()[self.range.clone()], format, self.rows, self.cols)
    }

    /// `tensor` as a matrix of `rows` x `cols`. Data that is not aligned for its type is copied.
    fn from_stored(tensor: &StoredTensor, dtype: Dtype, rows: usize, cols: usize) -> Weight {
        let aligned = tensor.bytes().as_ptr().addr().is_multiple_of(dtype.size_bytes());
        let (storage, range) = if aligned {
            (tensor.storage.clone(), tensor.range.clone())
        } else {
            (Arc::new(Storage::copy_of(tensor.bytes())), 0..tensor.range.len())
        };
        Weight { storage, range, format: Format::Plain(dtype), rows, cols }
    }

    /// Panels as they lie in `bytes` of `tensor`.
    fn from_panels(
        tensor: &StoredTensor,
        format: PackedFormat,
        bytes: Range<usize>,
        rows: usize,
        cols: usize,
    ) -> Weight {
        let range = tensor.range.start + bytes.start..tensor.range.start + bytes.end;
        Weight { storage: tensor.storage.clone(), range, format: Format::Packed(format), rows, cols }
    }

    /// A packed copy.
    fn pack(&self, cpu: &Cpu, format: PackedFormat) -> Weight {
        let panel_bytes = format.panel_bytes(self.cols);
        let (mut storage, range) = Storage::aligned(format.weight_bytes(self.rows, self.cols));
        let bytes = &mut storage.bytes_mut()[range.clone()];
        let isa = cpu.isa();
        cpu.for_each_slice(bytes, panel_bytes, |panel, out| {
            let rows = panel * PANEL_ROWS..self.rows.min((panel + 1) * PANEL_ROWS);
            pack_panel(isa, format, &widen(isa, self.matrix().slice_rows(rows).elements()), self.cols, out);
        });
        Weight { storage: Arc::new(storage), range, format: Format::Packed(format), ..*self }
    }

    /// The upper and the lower half of the rows of a plain weight.
    fn halves(self) -> [Weight; 2] {
        let middle = self.range.start + self.range.len() / 2;
        let lower = Weight { range: middle..self.range.end, rows: self.rows / 2, ..self.clone() };
        [Weight { range: self.range.start..middle, rows: self.rows / 2, ..self }, lower]
    }
}

/// Numbers of any type as f32.
fn widen(isa: Isa, elements: Elements<'_>) -> Vec<f32> {
    let mut numbers = vec![0.0; elements.len()];
    elements.widen(isa, &mut numbers);
    numbers
}

/// Name of the token embedding.
const EMBEDDING_NAME: &str = "model.embed_tokens.weight";
/// Name of the output head.
const HEAD_NAME: &str = "lm_head.weight";

/// The tensor that `name` takes its numbers from: a tied head those of the embedding, whatever copy lies beside it.
pub fn source_name<'a>(config: &ModelConfig, name: &'a str) -> &'a str {
    if config.tie_word_embeddings && name == HEAD_NAME { EMBEDDING_NAME } else { name }
}

/// Where [`Network::build`] gets its tensors: a checkpoint, or a list of what is wanted.
pub trait TensorSource {
    /// A large tensor.
    type Matrix;
    /// A small tensor, widened to f32.
    type Vector;

    /// The tensor `name` of shape `[rows, cols]`.
    fn matrix(&mut self, name: String, role: WeightRole, rows: usize, cols: usize) -> Self::Matrix;

    /// The two halves, `[rows, cols]` each, of the tensor `name` of shape `[2 * rows, cols]`.
    fn halves(&mut self, name: String, role: WeightRole, rows: usize, cols: usize) -> [Self::Matrix; 2];

    /// The tensor `name` of shape `shape`.
    fn vector(&mut self, name: String, shape: &[usize]) -> Self::Vector;
}

/// All weights of a network.
#[derive(Debug)]
pub struct Network<M = Weight, V = Vec<f32>> {
    /// Token embedding `[vocab_size, hidden_size]`.
    pub embedding: M,
    /// The layers in order.
    pub layers: Vec<Layer<M, V>>,
    /// Weight of the last norm, `[hidden_size]`.
    pub final_norm: V,
    /// Output head `[vocab_size, hidden_size]`.
    pub head: M,
}

/// One layer.
#[derive(Debug)]
pub struct Layer<M = Weight, V = Vec<f32>> {
    /// Norm before attention, `[hidden_size]`.
    pub attention_norm: V,
    /// Norm before the MLP, `[hidden_size]`.
    pub mlp_norm: V,
    /// Norms after attention and after the MLP, where the network has them.
    pub post_norms: Option<PostNorms<V>>,
    /// Query projection.
    pub q: Linear<M, V>,
    /// Key projection.
    pub k: Linear<M, V>,
    /// Value projection.
    pub v: Linear<M, V>,
    /// Output projection.
    pub o: Linear<M, V>,
    /// Norms of each q and k head, `[head_dim]`, where the network has them.
    pub qk_norms: Option<[V; 2]>,
    /// The MLP.
    pub mlp: LayerMlp<M, V>,
}

/// Norms of a sandwich layer that come after its two halves.
#[derive(Debug)]
pub struct PostNorms<V = Vec<f32>> {
    /// Of the attention's output, `[hidden_size]`.
    pub attention: V,
    /// Of the MLP's output, `[hidden_size]`.
    pub mlp: V,
}

/// A projection.
#[derive(Debug)]
pub struct Linear<M = Weight, V = Vec<f32>> {
    /// `[output width, input width]`.
    pub weight: M,
    /// `[output width]`.
    pub bias: Option<V>,
}

/// The MLP of a layer.
#[derive(Debug)]
pub enum LayerMlp<M = Weight, V = Vec<f32>> {
    /// One SwiGLU.
    Dense(Swiglu<M>),
    /// Routed experts, and perhaps a shared one.
    Experts(Experts<M, V>),
}

/// `down(silu(gate(x)) * up(x))`.
#[derive(Debug)]
pub struct Swiglu<M = Weight> {
    /// Gate and up, `[intermediate_size, hidden_size]` each.
    pub gate_up: [M; 2],
    /// `[hidden_size, intermediate_size]`.
    pub down: M,
}

/// Weights of a layer's experts.
#[derive(Debug)]
pub struct Experts<M = Weight, V = Vec<f32>> {
    /// The router, `[num_experts, hidden_size]`.
    pub router: M,
    /// Learned factor of each expert's weight, `[num_experts]`, where the network has it.
    pub router_scale: Option<V>,
    /// Routed experts in order; an expert group is a run of `experts_per_group`.
    pub routed: Vec<Swiglu<M>>,
    /// The shared expert, if there is one.
    pub shared: Option<Swiglu<M>>,
}

impl<M: Clone, V> Network<M, V> {
    /// Ask `source` for every tensor of the network that `config` describes, in the order of [`expected_tensors`].
    pub fn build<S: TensorSource<Matrix = M, Vector = V>>(config: &ModelConfig, source: &mut S) -> Network<M, V> {
        let hidden = config.hidden_size;
        let embedding = source.matrix(EMBEDDING_NAME.to_owned(), WeightRole::Embedding, config.vocab_size, hidden);
        let layers = (0..config.num_layers()).map(|layer| Layer::build(config, layer, source)).collect();
        let final_norm = source.vector("model.norm.weight".to_owned(), &[hidden]);
        // A quantised head has its own bytes, tied or not.
        let head = if config.tie_word_embeddings && config.quant.lm_head.is_none() {
            embedding.clone()
        } else {
            source.matrix(HEAD_NAME.to_owned(), WeightRole::Head, config.vocab_size, hidden)
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
        let LayerConfig { norms, mlp } = config.layers[layer];
        let names = &config.architecture.spec().names;
        let hidden = config.hidden_size;
        let norm = |name: &str, source: &mut S| source.vector(format!("{prefix}.{name}.weight"), &[hidden]);
        let linear = |name: &str, rows: usize, cols: usize, bias: bool, source: &mut S| {
            let name = format!("{prefix}.self_attn.{name}");
            let weight = source.matrix(format!("{name}.weight"), WeightRole::Attention, rows, cols);
            Linear { weight, bias: bias.then(|| source.vector(format!("{name}.bias"), &[rows])) }
        };
        let post_norms = (norms == NormPlacement::Sandwich).then(|| PostNorms {
            attention: norm(names.post_attention_norm, source),
            mlp: norm(names.post_mlp_norm, source),
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
            mlp: LayerMlp::build(&mlp, hidden, &format!("{prefix}.mlp"), names, source),
        }
    }
}

impl<M: Clone, V> LayerMlp<M, V> {
    fn build<S: TensorSource<Matrix = M, Vector = V>>(
        mlp: &MlpConfig,
        hidden: usize,
        prefix: &str,
        names: &TensorNames,
        source: &mut S,
    ) -> LayerMlp<M, V> {
        match mlp {
            MlpConfig::Experts(moe) => LayerMlp::Experts(Experts::build(moe, hidden, prefix, source)),
            MlpConfig::Dense { intermediate_size } => {
                let sizes = [*intermediate_size, hidden];
                LayerMlp::Dense(Swiglu::build(prefix, WeightRole::DenseMlp, sizes, names.fused_gate_up, source))
            }
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
        let mut swiglu =
            |name: String, role, intermediate| Swiglu::build(&name, role, [intermediate, hidden], false, source);
        let routed = (0..moe.num_experts)
            .map(|e| swiglu(format!("{prefix}.experts.{e}"), WeightRole::RoutedExpert, moe.expert_intermediate_size))
            .collect();
        let shared = moe
            .shared_intermediate_size
            .map(|size| swiglu(format!("{prefix}.shared_expert"), WeightRole::SharedExpert, size));
        Experts {
            router: source.matrix(format!("{prefix}.gate.weight"), WeightRole::Router, moe.num_experts, hidden),
            router_scale: moe
                .router_scale
                .then(|| source.vector(format!("{prefix}.router_scale"), &[1, moe.num_experts])),
            routed,
            shared,
        }
    }
}

impl<M> Swiglu<M> {
    /// The weights of inner width `intermediate` below `prefix`.
    fn build<S: TensorSource<Matrix = M>>(
        prefix: &str,
        role: WeightRole,
        [intermediate, hidden]: [usize; 2],
        fused: bool,
        source: &mut S,
    ) -> Swiglu<M> {
        let gate_up = if fused {
            source.halves(format!("{prefix}.gate_up_proj.weight"), role, intermediate, hidden)
        } else {
            ["gate_proj", "up_proj"]
                .map(|name| source.matrix(format!("{prefix}.{name}.weight"), role, intermediate, hidden))
        };
        Swiglu { gate_up, down: source.matrix(format!("{prefix}.down_proj.weight"), role, hidden, intermediate) }
    }
}

/// A tensor that a network needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the checkpoint.
    pub name: String,
    /// The shape of its numbers; a packed tensor is stored in another, see [`PackedSpec::stored_shape`].
    pub shape: Vec<usize>,
    /// How it is packed; `None`: its numbers are stored as they are.
    pub packed: Option<PackedSpec>,
}

/// How a tensor is packed: one weight, or several of the same shape one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedSpec {
    /// What the weight is for.
    pub role: WeightRole,
    /// The format.
    pub format: PackedFormat,
    /// Weights in the tensor: 2 where gate and up are one tensor, else 1.
    pub num_parts: usize,
    /// Rows of each.
    pub rows: usize,
    /// Columns of each.
    pub cols: usize,
}

impl PackedSpec {
    /// The shape of its bytes: panels, bytes of a panel.
    pub fn stored_shape(&self) -> [usize; 2] {
        [self.num_parts * PackedFormat::num_panels(self.rows), self.format.panel_bytes(self.cols)]
    }
}

impl TensorSpec {
    /// How many numbers it has.
    pub fn num_elements(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }

    /// That its width is not one that its format allows; `None` if it is.
    pub fn width_problem(&self) -> Option<TensorProblem> {
        let packed = self.packed.filter(|packed| !packed.format.allows_cols(packed.cols))?;
        let format = format_name(Some(packed.format));
        Some(TensorProblem::Width { name: self.name.clone(), width: packed.cols, format })
    }

    /// The shape that it has in a file.
    pub fn stored_shape(&self) -> Vec<usize> {
        self.packed.map_or_else(|| self.shape.clone(), |packed| packed.stored_shape().to_vec())
    }
}

/// Bytes that the tensors of a network take in a file, those that are not packed in the type that `config` states.
pub fn stored_bytes(config: &ModelConfig) -> u64 {
    let bytes = |spec: &TensorSpec| match &spec.packed {
        Some(packed) => packed.stored_shape().iter().map(|&size| size as u64).product(),
        None => spec.num_elements().saturating_mul(config.dtype.size_bytes() as u64),
    };
    expected_tensors(config).iter().map(bytes).fold(0, u64::saturating_add)
}

/// Every tensor of the network that `config` describes.
pub fn expected_tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut list = SpecList { quant: config.quant, specs: Vec::new() };
    Network::build(config, &mut list);
    list.specs
}

struct SpecList {
    quant: QuantScheme,
    specs: Vec<TensorSpec>,
}

impl SpecList {
    fn add(&mut self, name: String, role: WeightRole, num_parts: usize, [rows, cols]: [usize; 2]) {
        let packed = self.quant.format(role).map(|format| PackedSpec { role, format, num_parts, rows, cols });
        self.specs.push(TensorSpec { name, shape: vec![num_parts * rows, cols], packed });
    }
}

impl TensorSource for SpecList {
    type Matrix = ();
    type Vector = ();

    fn matrix(&mut self, name: String, role: WeightRole, rows: usize, cols: usize) {
        self.add(name, role, 1, [rows, cols]);
    }

    fn halves(&mut self, name: String, role: WeightRole, rows: usize, cols: usize) -> [(); 2] {
        self.add(name, role, 2, [rows, cols]);
        [(); 2]
    }

    fn vector(&mut self, name: String, shape: &[usize]) {
        self.specs.push(TensorSpec { name, shape: shape.to_vec(), packed: None });
    }
}

/// The tensors of `checkpoint` that do not fit `config`; empty if it is whole.
pub fn tensor_problems(config: &ModelConfig, checkpoint: &Checkpoint) -> Vec<TensorProblem> {
    let expected = expected_tensors(config);
    let mut problems = Vec::new();
    for spec in &expected {
        if let Some(problem) = spec.width_problem() {
            problems.push(problem);
            continue;
        }
        let (name, shape) = (spec.name.clone(), spec.stored_shape());
        match checkpoint.get(&name) {
            None => problems.push(TensorProblem::Missing { name, shape }),
            Some(tensor) if *tensor.shape() != shape => {
                problems.push(TensorProblem::Shape { name, found: tensor.shape().to_vec(), expected: shape });
            }
            Some(tensor) if !has_allowed_dtype(spec, tensor.dtype()) => {
                let allowed = if spec.packed.is_some() { "U8" } else { "F32, F16, BF16" };
                problems.push(TensorProblem::Dtype { name, found: format!("{:?}", tensor.dtype()), allowed });
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

fn has_allowed_dtype(spec: &TensorSpec, dtype: StoredDtype) -> bool {
    match spec.packed {
        Some(_) => dtype == StoredDtype::U8,
        None => float_dtype(dtype).is_some(),
    }
}

/// Tensors of other software that carry no weights, and the head's copy of a tied embedding.
fn is_ignored(config: &ModelConfig, name: &str) -> bool {
    const IGNORED_SUFFIXES: [&str; 2] = [".rotary_emb.inv_freq", ".kv_cache_offset"];
    IGNORED_SUFFIXES.iter().any(|suffix| name.ends_with(suffix)) || (config.tie_word_embeddings && name == HEAD_NAME)
}

fn float_dtype(dtype: StoredDtype) -> Option<Dtype> {
    match dtype {
        StoredDtype::F32 => Some(Dtype::F32),
        StoredDtype::F16 => Some(Dtype::F16),
        StoredDtype::BF16 => Some(Dtype::Bf16),
        _ => None,
    }
}

/// A checkpoint whose tensors were all checked against its config.
struct CheckedCheckpoint<'a> {
    checkpoint: &'a Checkpoint,
    quant: QuantScheme,
}

impl CheckedCheckpoint<'_> {
    fn tensor(&self, name: &str) -> &StoredTensor {
        self.checkpoint.get(name).expect("checked to be there")
    }

    fn plain(&self, name: &str, rows: usize, cols: usize) -> Weight {
        let tensor = self.tensor(name);
        let dtype = float_dtype(tensor.dtype()).expect("checked to be a float type");
        Weight::from_stored(tensor, dtype, rows, cols)
    }
}

impl TensorSource for CheckedCheckpoint<'_> {
    type Matrix = Weight;
    type Vector = Vec<f32>;

    fn matrix(&mut self, name: String, role: WeightRole, rows: usize, cols: usize) -> Weight {
        match self.quant.format(role) {
            None => self.plain(&name, rows, cols),
            Some(format) => {
                let bytes = 0..format.weight_bytes(rows, cols);
                Weight::from_panels(self.tensor(&name), format, bytes, rows, cols)
            }
        }
    }

    fn halves(&mut self, name: String, role: WeightRole, rows: usize, cols: usize) -> [Weight; 2] {
        match self.quant.format(role) {
            None => self.plain(&name, 2 * rows, cols).halves(),
            Some(format) => {
                let len = format.weight_bytes(rows, cols);
                [0..len, len..2 * len].map(|bytes| Weight::from_panels(self.tensor(&name), format, bytes, rows, cols))
            }
        }
    }

    fn vector(&mut self, name: String, shape: &[usize]) -> Vec<f32> {
        widen(Isa::best(), self.plain(&name, 1, shape.iter().product()).matrix().elements())
    }
}

/// A checkpoint without packed weights, packed while it is read.
struct Packing<'a> {
    config: &'a ModelConfig,
    checkpoint: CheckedCheckpoint<'a>,
    cpu: &'a Cpu,
    scheme: QuantScheme,
    progress: &'a dyn Fn(u64),
    bytes_read: u64,
}

impl Packing<'_> {
    fn pack(&mut self, weight: Weight, role: WeightRole) -> Weight {
        self.bytes_read += weight.num_bytes();
        let packed = match self.scheme.format(role) {
            Some(format) => weight.pack(self.cpu, format),
            None => weight,
        };
        (self.progress)(self.bytes_read);
        packed
    }
}

impl TensorSource for Packing<'_> {
    type Matrix = Weight;
    type Vector = Vec<f32>;

    fn matrix(&mut self, name: String, role: WeightRole, rows: usize, cols: usize) -> Weight {
        let name = source_name(self.config, &name);
        let weight = self.checkpoint.matrix(name.to_owned(), role, rows, cols);
        self.pack(weight, role)
    }

    fn halves(&mut self, name: String, role: WeightRole, rows: usize, cols: usize) -> [Weight; 2] {
        self.checkpoint.halves(name, role, rows, cols).map(|weight| self.pack(weight, role))
    }

    fn vector(&mut self, name: String, shape: &[usize]) -> Vec<f32> {
        self.checkpoint.vector(name, shape)
    }
}

impl Network {
    /// Check that `checkpoint` is whole and take its tensors; large ones stay where they lie.
    ///
    /// # Errors
    /// If a tensor is missing, unexpected, or of the wrong shape or type; all such tensors are listed.
    pub(crate) fn load(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Network, CheckpointError> {
        check(config, checkpoint)?;
        Ok(Network::build(config, &mut CheckedCheckpoint { checkpoint, quant: config.quant }))
    }

    /// As [`Network::load`], packing as `scheme` says the weights of a checkpoint that has none packed. `progress` gets
    /// the bytes of the checkpoint that were read.
    ///
    /// # Errors
    /// As [`Network::load`], and if a weight has a width that its format does not allow.
    pub(crate) fn load_packing(
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        cpu: &Cpu,
        scheme: QuantScheme,
        progress: &dyn Fn(u64),
    ) -> Result<Network, CheckpointError> {
        check(config, checkpoint)?;
        let packed_config = ModelConfig { quant: scheme, ..config.clone() };
        check_widths(&packed_config, checkpoint)?;
        let checkpoint = CheckedCheckpoint { checkpoint, quant: config.quant };
        Ok(Network::build(
            &packed_config,
            &mut Packing { config: &packed_config, checkpoint, cpu, scheme, progress, bytes_read: 0 },
        ))
    }
}

fn check(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
    refuse(checkpoint, tensor_problems(config, checkpoint))
}

/// Refuse a scheme with a format that some weight's width does not allow.
fn check_widths(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
    refuse(checkpoint, expected_tensors(config).iter().filter_map(TensorSpec::width_problem).collect())
}

fn refuse(checkpoint: &Checkpoint, problems: Vec<TensorProblem>) -> Result<(), CheckpointError> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(CheckpointError::Tensors { dir: checkpoint.dir().display().to_string(), problems })
}
