//! Which weights of a network are quantised, and how: `quantization_config` of a `config.json` that `moge quantize` wrote.

use std::collections::BTreeMap;

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

/// How the weights of a layer are quantised; `None`: they stay as they are. The default quantises nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerFormats {
    /// Routed experts, or the MLP of a layer without.
    pub mlp: Option<PackedFormat>,
    /// The shared expert.
    pub shared_expert: Option<PackedFormat>,
    /// The projections of attention.
    pub attention: Option<PackedFormat>,
}

/// How the weights of a network are quantised. The default quantises nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QuantScheme {
    /// All layers but those that `exceptions` names.
    pub layers: LayerFormats,
    /// Layers with formats of their own, by index.
    pub exceptions: BTreeMap<usize, LayerFormats>,
    /// The output head.
    pub lm_head: Option<PackedFormat>,
}

/// Name of a format in files and on the command line; `none` for weights that stay as they are.
pub fn format_name(format: Option<PackedFormat>) -> &'static str {
    format.map_or("none", PackedFormat::name)
}

/// All names that [`format_name`] gives.
pub fn format_names() -> String {
    PackedFormat::ALL.map(PackedFormat::name).join(", ") + ", " + format_name(None)
}

/// The format of this name, see [`format_name`]; `None` if there is no such name.
pub fn format_from_name(name: &str) -> Option<Option<PackedFormat>> {
    if name == format_name(None) { Some(None) } else { PackedFormat::from_name(name).map(Some) }
}

impl LayerFormats {
    /// Everything in `format`.
    pub fn uniform(format: PackedFormat) -> LayerFormats {
        LayerFormats { mlp: Some(format), shared_expert: Some(format), attention: Some(format) }
    }

    fn fields(&mut self) -> [(&'static str, &mut Option<PackedFormat>); 3] {
        [("mlp", &mut self.mlp), ("shared_expert", &mut self.shared_expert), ("attention", &mut self.attention)]
    }

    /// The fields of the object `value`, whose place in the file is `place`.
    fn from_json(value: &Value, place: &str) -> Result<LayerFormats, WrongField> {
        let mut formats = LayerFormats::default();
        for (field, format) in formats.fields() {
            *format = read_format(value, place, field)?;
        }
        Ok(formats)
    }

    fn to_json(mut self) -> Map<String, Value> {
        let name = |(field, format): (&str, &mut Option<_>)| (field.to_owned(), format_name(*format).into());
        self.fields().map(name).into_iter().collect()
    }
}

impl QuantScheme {
    /// Everything in `format`, but the head in W8A8.
    pub fn uniform(format: PackedFormat) -> QuantScheme {
        QuantScheme {
            layers: LayerFormats::uniform(format),
            exceptions: BTreeMap::new(),
            lm_head: Some(PackedFormat::W8A8),
        }
    }

    /// True if nothing is quantised.
    pub fn is_none(&self) -> bool {
        *self == QuantScheme::default()
    }

    /// How the weights of one layer are quantised.
    pub fn of_layer(&self, layer: usize) -> LayerFormats {
        *self.exceptions.get(&layer).unwrap_or(&self.layers)
    }

    /// How the weight of `role` in `layer` is quantised; the embedding and the head belong to none.
    pub fn format(&self, role: WeightRole, layer: Option<usize>) -> Option<PackedFormat> {
        let formats = layer.map_or(self.layers, |layer| self.of_layer(layer));
        match role {
            WeightRole::Embedding | WeightRole::Router => None,
            WeightRole::Attention => formats.attention,
            WeightRole::RoutedExpert | WeightRole::DenseMlp => formats.mlp,
            WeightRole::SharedExpert => formats.shared_expert,
            WeightRole::Head => self.lm_head,
        }
    }

    /// The value of `quantization_config`.
    pub fn to_json(&self) -> Value {
        let mut fields = Map::new();
        fields.insert("quant_method".to_owned(), QUANT_METHOD.into());
        fields.insert("layout_version".to_owned(), PACKED_LAYOUT_VERSION.into());
        fields.extend(self.layers.to_json());
        fields.insert("lm_head".to_owned(), format_name(self.lm_head).into());
        if !self.exceptions.is_empty() {
            let layer = |(layer, formats): (&usize, &LayerFormats)| (layer.to_string(), formats.to_json().into());
            fields.insert("layers".to_owned(), Value::Object(self.exceptions.iter().map(layer).collect()));
        }
        Value::Object(fields)
    }

    /// The scheme in the value of `quantization_config` of a network of `num_layers`; else which field is wrong, and how.
    pub(crate) fn from_json(value: &Value, num_layers: usize) -> Result<QuantScheme, WrongField> {
        const PLACE: &str = "quantization_config";
        let bad = |field: &str, problem: String| Err((format!("{PLACE}.{field}"), problem));
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
        let mut exceptions = BTreeMap::new();
        match get("layers") {
            Value::Null => {}
            Value::Object(layers) => {
                for (layer, formats) in layers {
                    match layer.parse().ok().filter(|&layer| layer < num_layers) {
                        None => return bad("layers", format!("{layer:?} is not a layer below {num_layers}")),
                        Some(index) => {
                            let place = format!("{PLACE}.layers.{layer}");
                            exceptions.insert(index, LayerFormats::from_json(formats, &place)?);
                        }
                    }
                }
            }
            other => return bad("layers", format!("{other} is not an object")),
        }
        let layers = LayerFormats::from_json(value, PLACE)?;
        Ok(QuantScheme { layers, exceptions, lm_head: read_format(value, PLACE, "lm_head")? })
    }
}

/// A field, and what is wrong with it.
type WrongField = (String, String);

fn read_format(object: &Value, place: &str, field: &str) -> Result<Option<PackedFormat>, WrongField> {
    let value = object.get(field).unwrap_or(&Value::Null);
    value
        .as_str()
        .and_then(format_from_name)
        .ok_or_else(|| (format!("{place}.{field}"), format!("{value} is unknown; there are {}", format_names())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scheme_survives_its_json() {
        let attention = Some(PackedFormat::W8A8);
        let layers = LayerFormats { mlp: Some(PackedFormat::W4A8), shared_expert: None, attention };
        let exceptions = BTreeMap::from([(0, LayerFormats::default()), (11, LayerFormats { mlp: None, ..layers })]);
        let scheme = QuantScheme { layers, exceptions, lm_head: Some(PackedFormat::W8A8) };
        assert_eq!(QuantScheme::from_json(&scheme.to_json(), 12), Ok(scheme.clone()));
        let (field, problem) = QuantScheme::from_json(&scheme.to_json(), 11).unwrap_err();
        assert_eq!(
            (field.as_str(), problem.as_str()),
            ("quantization_config.layers", "\"11\" is not a layer below 11")
        );
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
            let (name, problem) = QuantScheme::from_json(&changed, 3).unwrap_err();
            assert_eq!(name, format!("quantization_config.{field}"));
            assert!(problem.contains(said), "{problem}");
        }
    }
}
