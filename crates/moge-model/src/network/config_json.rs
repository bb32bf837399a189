//! `config.json` to a checked [`ModelConfig`]. What the file can get wrong ends here and in `arch/`.

use std::path::Path;

use moge_kernels::Dtype;
use serde_json::Value;

use crate::arch::fields::{Fields, MAX_SIZE, kind_of, shortened};
use crate::arch::spec::{Arch, Biases};
use crate::checkpoint::files;
use crate::checkpoint::quant_scheme::QuantScheme;
use crate::checkpoint::writer::JOURNAL_NAME;
use crate::network::config::{Architecture, ConfigError, LayerConfig, MlpConfig, ModelConfig, RopeConfig, RopeScaling};

/// No network may have more layers, or more experts in all its layers: each is a list entry with a name.
const MAX_LAYERS: usize = 1 << 12;
const MAX_EXPERTS_IN_ALL: usize = 1 << 18;

/// Fields that change the numbers and are not implemented, but for architectures that read them, with the one value
/// that changes nothing. A field that is absent or null is neutral too.
const UNSUPPORTED_FIELDS: &[(&str, Neutral)] = &[
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
    ("rope_interleaved", Neutral::False),
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
        check(&Fields { file, fields: &fields })
    }
}

fn check(fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let architecture = architecture(fields)?;
    let arch = architecture.spec();
    refuse_unimplemented(fields, arch.reads)?;
    let (hidden_size, num_q_heads) = (fields.size("hidden_size")?, fields.size("num_attention_heads")?);
    let num_kv_heads = fields.optional_size("num_key_value_heads")?.unwrap_or(num_q_heads);
    if !num_q_heads.is_multiple_of(num_kv_heads) {
        let problem = format!("{num_kv_heads} does not divide the {num_q_heads} of num_attention_heads");
        return Err(fields.bad("num_key_value_heads", problem));
    }
    let head_dim = head_dim(fields, hidden_size, num_q_heads)?;
    let Biases { qkv: qkv_bias, o: o_bias } = (arch.biases)(fields)?;
    let layers = layers(fields, arch)?;
    Ok(ModelConfig {
        architecture,
        vocab_size: fields.size("vocab_size")?,
        hidden_size,
        num_q_heads,
        num_kv_heads,
        head_dim,
        rms_norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(arch.default_rms_norm_eps) as f32,
        rope: rope(fields, arch, head_dim)?,
        max_position_embeddings: fields.size("max_position_embeddings")?,
        tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        qk_norm: arch.qk_norm,
        qkv_bias,
        o_bias,
        dtype: dtype(fields)?,
        quant: quant(fields, layers.len())?,
        eos_token_ids: eos_token_ids(fields)?,
        layers,
    })
}

fn layers(fields: &Fields<'_>, arch: &Arch) -> Result<Vec<LayerConfig>, ConfigError> {
    let num_layers = fields.size("num_hidden_layers")?;
    if num_layers > MAX_LAYERS {
        return Err(fields.bad("num_hidden_layers", format!("{num_layers} is more than {MAX_LAYERS}")));
    }
    let mut num_experts_in_all = 0;
    let mut layers = Vec::with_capacity(num_layers);
    for layer in 0..num_layers {
        let mlp = (arch.mlp)(fields, layer)?;
        layers.push(LayerConfig { norms: arch.norms, mlp });
        if let MlpConfig::Experts(moe) = mlp {
            num_experts_in_all += moe.num_experts;
            if num_experts_in_all > MAX_EXPERTS_IN_ALL {
                let num_experts = moe.num_experts;
                let problem = format!("{num_experts} in {num_layers} layers are more than {MAX_EXPERTS_IN_ALL}");
                return Err(fields.bad("num_experts", problem));
            }
        }
    }
    Ok(layers)
}

fn quant(fields: &Fields<'_>, num_layers: usize) -> Result<QuantScheme, ConfigError> {
    let Some(value) = fields.get("quantization_config") else { return Ok(QuantScheme::default()) };
    QuantScheme::from_json(value, num_layers).map_err(|(field, problem)| fields.bad(&field, problem))
}

fn architecture(fields: &Fields<'_>) -> Result<Architecture, ConfigError> {
    let supported = || Architecture::ALL.map(Architecture::hf_name).join(", ");
    let names = match fields.get("architectures") {
        Some(Value::Array(names)) => names.as_slice(),
        Some(other) => {
            return Err(fields.bad("architectures", format!("{} is not a list of names", kind_of(other))));
        }
        None => return Err(fields.bad("architectures", format!("missing; supported: {}", supported()))),
    };
    let known = |name: &Value| Architecture::ALL.into_iter().find(|a| name.as_str() == Some(a.hf_name()));
    let found = names.iter().find_map(known);
    found.ok_or_else(|| {
        let names = shortened(&Value::Array(names.to_vec()));
        fields.bad("architectures", format!("{names} is unknown; supported: {}", supported()))
    })
}

fn refuse_unimplemented(fields: &Fields<'_>, reads: &[&str]) -> Result<(), ConfigError> {
    for (field, neutral) in UNSUPPORTED_FIELDS.iter().filter(|(field, _)| !reads.contains(field)) {
        if let Some(value) = fields.get(field)
            && !neutral.accepts(value)
        {
            let problem = format!("{} is not implemented; only {} is", shortened(value), neutral.name());
            return Err(fields.bad(field, problem));
        }
    }
    // Qwen3 files state a window and switch it off beside it.
    if let Some(window) = fields.get("sliding_window")
        && fields.get("use_sliding_window") != Some(&Value::Bool(false))
    {
        return Err(fields.bad("sliding_window", format!("{} is not implemented; only null is", shortened(window))));
    }
    if let Some(types) = fields.get("layer_types") {
        let full = |t: &Value| t.as_str() == Some("full_attention");
        if !types.as_array().is_some_and(|types| types.iter().all(full)) {
            let problem = format!("{} is not implemented; only full_attention is", shortened(types));
            return Err(fields.bad("layer_types", problem));
        }
    }
    Ok(())
}

fn head_dim(fields: &Fields<'_>, hidden_size: usize, num_q_heads: usize) -> Result<usize, ConfigError> {
    let head_dim = match fields.optional_size("head_dim")? {
        Some(stated) => stated,
        None if hidden_size.is_multiple_of(num_q_heads) => hidden_size / num_q_heads,
        None => {
            let problem = format!("{num_q_heads} does not divide the {hidden_size} of hidden_size");
            return Err(fields.bad("num_attention_heads", problem));
        }
    };
    if num_q_heads * head_dim > MAX_SIZE as usize {
        return Err(fields.bad("head_dim", format!("{num_q_heads} heads of {head_dim} are wider than {MAX_SIZE}")));
    }
    if !head_dim.is_multiple_of(2) {
        return Err(fields.bad("head_dim", format!("{head_dim} is odd; RoPE turns pairs")));
    }
    Ok(head_dim)
}

/// RoPE settings stand at the top level, or under `rope_parameters` in newer files.
fn rope(fields: &Fields<'_>, arch: &Arch, head_dim: usize) -> Result<RopeConfig, ConfigError> {
    let nested = object(fields, "rope_parameters")?;
    let number = |field: &str| -> Result<Option<f64>, ConfigError> {
        match nested.map(|nested| nested.positive(field)).transpose()?.flatten() {
            Some(number) => Ok(Some(number)),
            None => fields.positive(field),
        }
    };
    let theta = number("rope_theta")?.or(arch.rope.theta);
    let theta = theta.ok_or_else(|| fields.bad("rope_theta", "missing".to_owned()))?;
    let factor = number("partial_rotary_factor")?.unwrap_or(arch.rope.partial_rotary_factor);
    let rotary_dim = (head_dim as f64 * factor) as usize;
    if factor > 1.0 || rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
        let problem = format!("{factor} of head_dim {head_dim} is not an even number of at most {head_dim}");
        return Err(fields.bad("partial_rotary_factor", problem));
    }
    let scaling = match (nested, object(fields, "rope_scaling")?) {
        (_, Some(stated)) => rope_scaling(fields, "rope_scaling", &stated)?,
        // `rope_parameters` without a type only states the numbers above.
        (Some(nested), None) if nested.get("rope_type").or(nested.get("type")).is_some() => {
            rope_scaling(fields, "rope_parameters", &nested)?
        }
        _ => RopeScaling::None,
    };
    Ok(RopeConfig { theta, rotary_dim, layout: arch.rope.layout, scaling })
}

/// The fields of the object `field`, if it is there.
fn object<'a>(fields: &Fields<'a>, field: &str) -> Result<Option<Fields<'a>>, ConfigError> {
    match fields.get(field) {
        None => Ok(None),
        Some(Value::Object(nested)) => Ok(Some(Fields { file: fields.file, fields: nested })),
        Some(other) => Err(fields.bad(field, format!("{} is not an object", kind_of(other)))),
    }
}

/// The scaling that `stated`, the object `name`, asks for.
fn rope_scaling(fields: &Fields<'_>, name: &str, stated: &Fields<'_>) -> Result<RopeScaling, ConfigError> {
    const SUPPORTED: &str = "default, linear, llama3";
    let Some(kind) = stated.get("rope_type").or_else(|| stated.get("type")) else {
        return Err(fields.bad(&format!("{name}.rope_type"), format!("missing; there are {SUPPORTED}")));
    };
    let number = |field: &str| {
        let value = stated.positive(field).transpose();
        let value = value.unwrap_or_else(|| Err(fields.bad(field, "missing".to_owned())));
        value.map(|value| value as f32).map_err(|error| match error {
            ConfigError::Field { file, field, problem } => {
                ConfigError::Field { file, field: format!("{name}.{field}"), problem }
            }
            other => other,
        })
    };
    match kind.as_str() {
        Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: number("factor")? }),
        Some("llama3") => {
            let (low_freq_factor, high_freq_factor) = (number("low_freq_factor")?, number("high_freq_factor")?);
            if high_freq_factor <= low_freq_factor {
                let problem = format!("{high_freq_factor} is not above the {low_freq_factor} of low_freq_factor");
                return Err(fields.bad(&format!("{name}.high_freq_factor"), problem));
            }
            let original_context = number("original_max_position_embeddings")?;
            let factor = number("factor")?;
            Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context })
        }
        _ => {
            let problem = format!("{} is not implemented; there are {SUPPORTED}", shortened(kind));
            Err(fields.bad(&format!("{name}.rope_type"), problem))
        }
    }
}

fn dtype(fields: &Fields<'_>) -> Result<Dtype, ConfigError> {
    let field = if fields.get("torch_dtype").is_some() { "torch_dtype" } else { "dtype" };
    match fields.get(field) {
        None => Ok(Dtype::Bf16),
        Some(value) => match value.as_str() {
            Some("bfloat16") => Ok(Dtype::Bf16),
            Some("float16") => Ok(Dtype::F16),
            Some("float32") => Ok(Dtype::F32),
            _ => {
                let problem = format!("{} is not one of bfloat16, float16, float32", shortened(value));
                Err(fields.bad(field, problem))
            }
        },
    }
}

fn eos_token_ids(fields: &Fields<'_>) -> Result<Vec<u32>, ConfigError> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| fields.bad("eos_token_id", format!("{} is not a token id", shortened(value))))
    };
    match fields.get("eos_token_id") {
        None => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}

#[cfg(test)]
mod tests;
