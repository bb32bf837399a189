//! `config.json` to a checked [`ModelConfig`]. What the file can get wrong ends here.

use std::path::Path;

use moge_kernels::{Dtype, RopeLayout};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::checkpoint::files;
use crate::checkpoint::quant_scheme::QuantScheme;
use crate::checkpoint::writer::JOURNAL_NAME;

/// No size in a config may exceed this; keeps every product of three sizes inside 64 bits.
const MAX_SIZE: u64 = 1 << 21;

/// No network may have more layers, or more experts in all its layers: each is a list entry with a name.
const MAX_LAYERS: usize = 1 << 12;
const MAX_EXPERTS_IN_ALL: usize = 1 << 18;

/// The networks that the one decoder runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// `PanguProMoEForCausalLM`: Mixture of Grouped Experts (arXiv 2505.21411).
    PanguProMoe,
    /// `PanguEmbeddedForCausalLM`: dense.
    PanguEmbedded,
    /// `Qwen3ForCausalLM`: dense, q/k norm.
    Qwen3,
    /// `Glm4ForCausalLM`: dense, sandwich norms, interleaved partial RoPE.
    Glm4,
}

/// Where a layer normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and before the MLP.
    Pre,
    /// Before and after both.
    Sandwich,
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How many leading numbers of a head turn; even, at most `head_dim`.
    pub rotary_dim: usize,
    /// Which numbers of a head turn together.
    pub layout: RopeLayout,
}

/// Shape of a routed layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoeConfig {
    /// Routed experts of a layer; shared ones are not counted.
    pub num_experts: usize,
    /// Disjoint sets of consecutive experts; divides `num_experts`.
    pub num_expert_groups: usize,
    /// Experts taken inside each expert group.
    pub top_k_per_group: usize,
    /// Inner width of a routed expert.
    pub expert_intermediate_size: usize,
    /// Inner width of the shared expert.
    pub shared_intermediate_size: usize,
}

/// The MLP of every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpConfig {
    /// One SwiGLU.
    Dense {
        /// Inner width.
        intermediate_size: usize,
    },
    /// Routed experts in groups and a shared expert.
    GroupedExperts(MoeConfig),
}

/// A complete, checked description of a network; has no invalid state.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which network.
    pub architecture: Architecture,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key/value heads; divides `num_q_heads`.
    pub num_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Added to the variance in RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// The head uses the embedding's weights.
    pub tie_word_embeddings: bool,
    /// Where a layer normalises.
    pub norms: NormPlacement,
    /// RMSNorm on every q and k head before RoPE.
    pub qk_norm: bool,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub o_bias: bool,
    /// The MLP of every layer.
    pub mlp: MlpConfig,
    /// Type that the file says its weights have, those that are not quantised.
    pub dtype: Dtype,
    /// Which weights are quantised.
    pub quant: QuantScheme,
    /// End-of-sequence tokens that the file names.
    pub eos_token_ids: Vec<u32>,
}

/// Why a `config.json` is refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{file}: {source}")]
    Read {
        /// The file's path.
        file: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The directory is what `moge quantize` left when it was stopped.
    #[error("{dir}: not finished; the `moge quantize` that began it, run again, will go on")]
    Unfinished {
        /// The checkpoint's directory.
        dir: String,
    },
    /// The file is not a JSON object.
    #[error("{file}: not a JSON object: {problem}")]
    NotJson {
        /// The file's path.
        file: String,
        /// What is wrong, and where.
        problem: String,
    },
    /// A field is missing, wrong, or asks for something that is not implemented.
    #[error("{file}: {field}: {problem}")]
    Field {
        /// The file's path.
        file: String,
        /// The field's name.
        field: String,
        /// What was found and what is allowed.
        problem: String,
    },
}

impl Architecture {
    /// All of them.
    pub const ALL: [Architecture; 4] =
        [Architecture::PanguProMoe, Architecture::PanguEmbedded, Architecture::Qwen3, Architecture::Glm4];

    /// The name in `architectures`.
    pub fn hf_name(self) -> &'static str {
        match self {
            Architecture::PanguProMoe => "PanguProMoEForCausalLM",
            Architecture::PanguEmbedded => "PanguEmbeddedForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
            Architecture::Glm4 => "Glm4ForCausalLM",
        }
    }
}

impl MoeConfig {
    /// Experts of one expert group.
    pub fn experts_per_group(&self) -> usize {
        self.num_experts / self.num_expert_groups
    }

    /// Experts that one token uses.
    pub fn experts_per_token(&self) -> usize {
        self.num_expert_groups * self.top_k_per_group
    }
}

impl ModelConfig {
    /// Read and check `dir/config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, or is refused as [`ModelConfig::from_json`] says.
    pub fn load(dir: &Path) -> Result<ModelConfig, ConfigError> {
        let path = dir.join("config.json");
        let file = path.display().to_string();
        if !files::is_there(&path) && files::is_there(&dir.join(JOURNAL_NAME)) {
            return Err(ConfigError::Unfinished { dir: dir.display().to_string() });
        }
        let text = files::read_file(&path).map_err(|source| ConfigError::Read { file: file.clone(), source })?;
        ModelConfig::from_json(&text, &file)
    }

    /// Check the bytes of a `config.json`; `file` is the name that errors give.
    ///
    /// # Errors
    /// If it is not JSON, a field is missing or has a value that cannot be, sizes do not divide as they must, the
    /// architecture is unknown, or a field asks for arithmetic that is not implemented.
    pub fn from_json(bytes: &[u8], file: &str) -> Result<ModelConfig, ConfigError> {
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|e| ConfigError::NotJson { file: file.to_owned(), problem: e.to_string() })?;
        let Value::Object(fields) = value else {
            let problem = format!("found {}", kind_of(&value));
            return Err(ConfigError::NotJson { file: file.to_owned(), problem });
        };
        RawConfig { file, fields: &fields }.check()
    }

    /// Numbers of the query projection's output: all query heads.
    pub fn q_size(&self) -> usize {
        self.num_q_heads * self.head_dim
    }

    /// Numbers of the key projection's output: all key/value heads.
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }
}

/// The fields of `config.json` as they lie, with readers that name the field when it is wrong.
struct RawConfig<'a> {
    file: &'a str,
    fields: &'a Map<String, Value>,
}

/// Fields that change the numbers and are not implemented, with the one value that changes nothing.
/// A field that is absent or null is neutral too.
const NEUTRAL: &[(&str, Neutral)] = &[
    ("rope_scaling", Neutral::Null),
    ("attn_logit_softcapping", Neutral::Null),
    ("final_logit_softcapping", Neutral::Null),
    ("hidden_act", Neutral::Text("silu")),
    ("use_sliding_window", Neutral::False),
    ("mlp_bias", Neutral::False),
    ("norm_topk_prob", Neutral::False),
    ("scoring_func", Neutral::Text("softmax")),
    ("routed_scaling_factor", Neutral::One),
    ("decoder_sparse_step", Neutral::One),
    ("moe_layer_freq", Neutral::One),
    ("logit_scale", Neutral::One),
    ("embedding_multiplier", Neutral::One),
    ("residual_multiplier", Neutral::One),
    ("logits_scaling", Neutral::One),
    ("first_k_dense_replace", Neutral::Zero),
    ("num_voted_experts", Neutral::Zero),
    ("mlp_only_layers", Neutral::Empty),
];

#[derive(Clone, Copy)]
enum Neutral {
    Null,
    False,
    Zero,
    One,
    Empty,
    Text(&'static str),
}

impl Neutral {
    fn accepts(self, value: &Value) -> bool {
        match self {
            Neutral::Null => value.is_null(),
            Neutral::False => value == &Value::Bool(false),
            Neutral::Zero => value.as_f64() == Some(0.0),
            Neutral::One => value.as_f64() == Some(1.0),
            Neutral::Empty => value.as_array().is_some_and(Vec::is_empty),
            Neutral::Text(text) => value.as_str() == Some(text),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Neutral::Null => "null",
            Neutral::False => "false",
            Neutral::Zero => "0",
            Neutral::One => "1",
            Neutral::Empty => "[]",
            Neutral::Text(text) => text,
        }
    }
}

impl RawConfig<'_> {
    fn check(&self) -> Result<ModelConfig, ConfigError> {
        let architecture = self.architecture()?;
        self.refuse_unimplemented()?;
        // What the reference implementations take where a file states nothing.
        let default_eps = match architecture {
            Architecture::PanguProMoe | Architecture::PanguEmbedded => 1e-5,
            Architecture::Qwen3 => 1e-6,
            Architecture::Glm4 => 1.5625e-7,
        };
        let (hidden_size, num_q_heads) = (self.size("hidden_size")?, self.size("num_attention_heads")?);
        let num_kv_heads = self.optional_size("num_key_value_heads")?.unwrap_or(num_q_heads);
        if !num_q_heads.is_multiple_of(num_kv_heads) {
            let problem = format!("{num_kv_heads} does not divide the {num_q_heads} of num_attention_heads");
            return Err(self.bad("num_key_value_heads", problem));
        }
        let head_dim = self.head_dim(hidden_size, num_q_heads)?;
        let (qkv_bias, o_bias) = match architecture {
            Architecture::PanguProMoe | Architecture::PanguEmbedded => {
                let bias = self.flag("bias")?.unwrap_or(true);
                (bias, bias)
            }
            Architecture::Qwen3 => {
                let bias = self.flag("attention_bias")?.unwrap_or(false);
                (bias, bias)
            }
            Architecture::Glm4 => (self.flag("attention_bias")?.unwrap_or(true), false),
        };
        let mlp = match architecture {
            Architecture::PanguProMoe => MlpConfig::GroupedExperts(self.moe()?),
            _ => MlpConfig::Dense { intermediate_size: self.size("intermediate_size")? },
        };
        let num_layers = self.size("num_hidden_layers")?;
        if num_layers > MAX_LAYERS {
            return Err(self.bad("num_hidden_layers", format!("{num_layers} is more than {MAX_LAYERS}")));
        }
        if let MlpConfig::GroupedExperts(moe) = &mlp
            && moe.num_experts > MAX_EXPERTS_IN_ALL / num_layers
        {
            let problem = format!("{} in {num_layers} layers are more than {MAX_EXPERTS_IN_ALL}", moe.num_experts);
            return Err(self.bad("num_experts", problem));
        }
        Ok(ModelConfig {
            architecture,
            vocab_size: self.size("vocab_size")?,
            hidden_size,
            num_layers,
            num_q_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: self.positive("rms_norm_eps")?.unwrap_or(default_eps) as f32,
            rope: self.rope(architecture, head_dim)?,
            max_position_embeddings: self.size("max_position_embeddings")?,
            tie_word_embeddings: self.flag("tie_word_embeddings")?.unwrap_or(false),
            norms: if architecture == Architecture::Glm4 { NormPlacement::Sandwich } else { NormPlacement::Pre },
            qk_norm: architecture == Architecture::Qwen3,
            qkv_bias,
            o_bias,
            mlp,
            dtype: self.dtype()?,
            quant: self.quant()?,
            eos_token_ids: self.eos_token_ids()?,
        })
    }

    fn quant(&self) -> Result<QuantScheme, ConfigError> {
        let Some(value) = self.get("quantization_config") else { return Ok(QuantScheme::default()) };
        QuantScheme::from_json(value).map_err(|(field, problem)| self.bad(&field, problem))
    }

    fn architecture(&self) -> Result<Architecture, ConfigError> {
        let supported = || Architecture::ALL.map(Architecture::hf_name).join(", ");
        let names = match self.get("architectures") {
            Some(Value::Array(names)) => names.as_slice(),
            Some(other) => {
                return Err(self.bad("architectures", format!("{} is not a list of names", kind_of(other))));
            }
            None => return Err(self.bad("architectures", format!("missing; supported: {}", supported()))),
        };
        let known = |name: &Value| Architecture::ALL.into_iter().find(|a| name.as_str() == Some(a.hf_name()));
        let found = names.iter().find_map(known);
        found.ok_or_else(|| {
            let names = shortened(&Value::Array(names.to_vec()));
            self.bad("architectures", format!("{names} is unknown; supported: {}", supported()))
        })
    }

    fn refuse_unimplemented(&self) -> Result<(), ConfigError> {
        for (field, neutral) in NEUTRAL {
            if let Some(value) = self.get(field)
                && !neutral.accepts(value)
            {
                let problem = format!("{} is not implemented; only {} is", shortened(value), neutral.name());
                return Err(self.bad(field, problem));
            }
        }
        // Qwen3 files state a window and switch it off beside it.
        if let Some(window) = self.get("sliding_window")
            && self.get("use_sliding_window") != Some(&Value::Bool(false))
        {
            return Err(self.bad("sliding_window", format!("{} is not implemented; only null is", shortened(window))));
        }
        if let Some(types) = self.get("layer_types") {
            let full = |t: &Value| t.as_str() == Some("full_attention");
            if !types.as_array().is_some_and(|types| types.iter().all(full)) {
                let problem = format!("{} is not implemented; only full_attention is", shortened(types));
                return Err(self.bad("layer_types", problem));
            }
        }
        Ok(())
    }

    fn head_dim(&self, hidden_size: usize, num_q_heads: usize) -> Result<usize, ConfigError> {
        let head_dim = match self.optional_size("head_dim")? {
            Some(stated) => stated,
            None if hidden_size.is_multiple_of(num_q_heads) => hidden_size / num_q_heads,
            None => {
                let problem = format!("{num_q_heads} does not divide the {hidden_size} of hidden_size");
                return Err(self.bad("num_attention_heads", problem));
            }
        };
        if num_q_heads * head_dim > MAX_SIZE as usize {
            return Err(self.bad("head_dim", format!("{num_q_heads} heads of {head_dim} are wider than {MAX_SIZE}")));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(self.bad("head_dim", format!("{head_dim} is odd; RoPE turns pairs")));
        }
        Ok(head_dim)
    }

    fn moe(&self) -> Result<MoeConfig, ConfigError> {
        let num_experts = self.size("num_experts")?;
        let experts_per_token = self.size("num_experts_per_tok")?;
        // V1 files do not state the number of expert groups: one expert comes from each.
        let num_expert_groups = self.optional_size("num_expert_groups")?.unwrap_or(experts_per_token);
        let not_multiple = |field, value: usize| {
            self.bad(field, format!("{value} is not a multiple of the {num_expert_groups} expert groups"))
        };
        if !num_experts.is_multiple_of(num_expert_groups) {
            return Err(not_multiple("num_experts", num_experts));
        }
        if !experts_per_token.is_multiple_of(num_expert_groups) {
            return Err(not_multiple("num_experts_per_tok", experts_per_token));
        }
        if experts_per_token > num_experts {
            let problem = format!("{experts_per_token} is more than the {num_experts} of num_experts");
            return Err(self.bad("num_experts_per_tok", problem));
        }
        Ok(MoeConfig {
            num_experts,
            num_expert_groups,
            top_k_per_group: experts_per_token / num_expert_groups,
            expert_intermediate_size: self.size("moe_intermediate_size")?,
            shared_intermediate_size: self.size("shared_expert_intermediate_size")?,
        })
    }

    /// RoPE settings stand at the top level, or under `rope_parameters` in newer files.
    fn rope(&self, architecture: Architecture, head_dim: usize) -> Result<RopeConfig, ConfigError> {
        let nested = match self.get("rope_parameters") {
            None => None,
            Some(Value::Object(fields)) => Some(RawConfig { file: self.file, fields }),
            Some(other) => {
                return Err(self.bad("rope_parameters", format!("{} is not an object", kind_of(other))));
            }
        };
        if let Some(nested) = &nested
            && let Some(kind) = nested.get("rope_type").or_else(|| nested.get("type"))
            && kind.as_str() != Some("default")
        {
            let problem = format!("{} is not implemented; only default is", shortened(kind));
            return Err(self.bad("rope_parameters.rope_type", problem));
        }
        let number = |field: &str| -> Result<Option<f64>, ConfigError> {
            match nested.as_ref().map(|nested| nested.positive(field)).transpose()?.flatten() {
                Some(number) => Ok(Some(number)),
                None => self.positive(field),
            }
        };
        let theta = number("rope_theta")?.ok_or_else(|| self.bad("rope_theta", "missing".to_owned()))?;
        let default_factor = if architecture == Architecture::Glm4 { 0.5 } else { 1.0 };
        let factor = number("partial_rotary_factor")?.unwrap_or(default_factor);
        let rotary_dim = (head_dim as f64 * factor) as usize;
        if factor > 1.0 || rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            let problem = format!("{factor} of head_dim {head_dim} is not an even number of at most {head_dim}");
            return Err(self.bad("partial_rotary_factor", problem));
        }
        let layout = match architecture {
            Architecture::Glm4 => RopeLayout::Interleaved,
            _ => RopeLayout::RotateHalf,
        };
        Ok(RopeConfig { theta, rotary_dim, layout })
    }

    fn dtype(&self) -> Result<Dtype, ConfigError> {
        let field = if self.get("torch_dtype").is_some() { "torch_dtype" } else { "dtype" };
        match self.get(field) {
            None => Ok(Dtype::Bf16),
            Some(value) => match value.as_str() {
                Some("bfloat16") => Ok(Dtype::Bf16),
                Some("float16") => Ok(Dtype::F16),
                Some("float32") => Ok(Dtype::F32),
                _ => {
                    let problem = format!("{} is not one of bfloat16, float16, float32", shortened(value));
                    Err(self.bad(field, problem))
                }
            },
        }
    }

    fn eos_token_ids(&self) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.bad("eos_token_id", format!("{} is not a token id", shortened(value))))
        };
        match self.get("eos_token_id") {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }

    /// The field's value; a null counts as absent.
    fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    fn size(&self, field: &str) -> Result<usize, ConfigError> {
        self.optional_size(field)?.ok_or_else(|| self.bad(field, "missing".to_owned()))
    }

    fn optional_size(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64() {
            Some(size @ 1..=MAX_SIZE) => Ok(Some(size as usize)),
            _ => Err(self.bad(field, format!("{} is not a whole number in 1..={MAX_SIZE}", shortened(value)))),
        }
    }

    fn positive(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x > 0.0 && (x as f32).is_finite() && x as f32 > 0.0 => Ok(Some(x)),
            _ => Err(self.bad(field, format!("{} is not a number above 0", shortened(value)))),
        }
    }

    fn flag(&self, field: &str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let flag = value.as_bool();
        flag.map(Some).ok_or_else(|| self.bad(field, format!("{} is not true or false", shortened(value))))
    }

    fn bad(&self, field: &str, problem: String) -> ConfigError {
        ConfigError::Field { file: self.file.to_owned(), field: field.to_owned(), problem }
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The value as JSON, cut where it is long: it goes into an error message.
fn shortened(value: &Value) -> String {
    const MAX_CHARS: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests;
