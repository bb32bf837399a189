//! Which weights of a network are quantised, and how: `quantization_config` of a `config.json` that `moge quantize` wrote.

use moge_kernels::{PACKED_LAYOUT_VERSION, PackedFormat};
use serde_json::{Map, Value, json};

/// Value of `quant_method` in a checkpoint in the packed layout.
const QUANT_METHOD: &str = "moge";

/// What a large tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightRole {
    /// The token embedding. Never quantised.
    Embedding,
    /// A projection of attention.
    Attention,
    /// A router. Never quantised.
    Router,
    /// A routed expert.
    RoutedExpert,
    /// The MLP of a layer without experts.
    DenseMlp,
    /// The shared expert.
    SharedExpert,
    /// The output head.
    Head,
}

/// How each kind of weight is quantised; `None`: it stays as it is. The default quantises nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuantScheme {
    /// Routed experts, or the MLP of a dense network.
    pub mlp: Option<PackedFormat>,
    /// The shared expert.
    pub shared_expert: Option<PackedFormat>,
    /// The projections of attention.
    pub attention: Option<PackedFormat>,
    /// The output head.
    pub lm_head: Option<PackedFormat>,
}

/// Name of a format in files and on the command line; `none` for weights that stay as they are.
pub fn format_name(format: Option<PackedFormat>) -> &'static str {
    match format {
        Some(PackedFormat::W8A8) => "w8a8",
        Some(PackedFormat::W4A8) => "w4a8",
        None => "none",
    }
}

/// The format of this name, see [`format_name`]; `None` if there is no such name.
pub fn format_from_name(name: &str) -> Option<Option<PackedFormat>> {
    [Some(PackedFormat::W8A8), Some(PackedFormat::W4A8), None].into_iter().find(|&format| format_name(format) == name)
}

impl QuantScheme {
    /// Everything in `format`, but the head in W8A8.
    pub fn uniform(format: PackedFormat) -> QuantScheme {
        let format = Some(format);
        QuantScheme { mlp: format, shared_expert: format, attention: format, lm_head: Some(PackedFormat::W8A8) }
    }

    /// True if nothing is quantised.
    pub fn is_none(&self) -> bool {
        *self == QuantScheme::default()
    }

    /// How weights of `role` are quantised.
    pub fn format(&self, role: WeightRole) -> Option<PackedFormat> {
        match role {
            WeightRole::Embedding | WeightRole::Router => None,
            WeightRole::Attention => self.attention,
            WeightRole::RoutedExpert | WeightRole::DenseMlp => self.mlp,
            WeightRole::SharedExpert => self.shared_expert,
            WeightRole::Head => self.lm_head,
        }
    }

    /// The value of `quantization_config`.
    pub fn to_json(&self) -> Value {
        let mut fields = Map::new();
        fields.insert("quant_method".to_owned(), QUANT_METHOD.into());
        fields.insert("layout_version".to_owned(), PACKED_LAYOUT_VERSION.into());
        for (name, format) in self.fields() {
            fields.insert(name.to_owned(), format_name(format).into());
        }
        Value::Object(fields)
    }

    /// The scheme in the value of `quantization_config`; else which field is wrong, and how.
    pub(crate) fn from_json(value: &Value) -> Result<QuantScheme, (String, String)> {
        let bad = |field: &str, problem: String| Err((format!("quantization_config.{field}"), problem));
        let get = |field: &str| value.get(field).unwrap_or(&Value::Null);
        if get("quant_method") != QUANT_METHOD {
            return bad("quant_method", format!("{} is not implemented; only {QUANT_METHOD} is", get("quant_method")));
        }
        if *get("layout_version") != json!(PACKED_LAYOUT_VERSION) {
            let problem = format!(
                "{} is not the layout that this program reads, {PACKED_LAYOUT_VERSION}; quantise the checkpoint again",
                get("layout_version")
            );
            return bad("layout_version", problem);
        }
        let mut scheme = QuantScheme::default();
        for (field, place) in [
            ("mlp", &mut scheme.mlp),
            ("shared_expert", &mut scheme.shared_expert),
            ("attention", &mut scheme.attention),
            ("lm_head", &mut scheme.lm_head),
        ] {
            match get(field).as_str().and_then(format_from_name) {
                Some(format) => *place = format,
                None => return bad(field, format!("{} is unknown; there are w8a8, w4a8, none", get(field))),
            }
        }
        Ok(scheme)
    }

    fn fields(&self) -> [(&'static str, Option<PackedFormat>); 4] {
        [
            ("mlp", self.mlp),
            ("shared_expert", self.shared_expert),
            ("attention", self.attention),
            ("lm_head", self.lm_head),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scheme_survives_its_json() {
        let scheme = QuantScheme {
            mlp: Some(PackedFormat::W4A8),
            shared_expert: None,
            attention: Some(PackedFormat::W8A8),
            lm_head: Some(PackedFormat::W8A8),
        };
        assert_eq!(QuantScheme::from_json(&scheme.to_json()), Ok(scheme));
    }

    #[test]
    fn another_method_version_or_format_is_refused_by_field() {
        for (field, value, said) in [
            ("quant_method", json!("gptq"), "only moge is"),
            ("layout_version", json!(2), "2 is not the layout that this program reads, 1"),
            ("layout_version", Value::Null, "null is not the layout"),
            ("attention", json!("w3a8"), "\"w3a8\" is unknown; there are w8a8, w4a8, none"),
            ("mlp", json!(4), "4 is unknown"),
        ] {
            let mut changed = QuantScheme::default().to_json();
            changed[field] = value;
            let (name, problem) = QuantScheme::from_json(&changed).unwrap_err();
            assert_eq!(name, format!("quantization_config.{field}"));
            assert!(problem.contains(said), "{problem}");
        }
    }
}
