//! The models that both engines run: our presets, and the same shapes as llama.cpp names and quantises them.

use super::gguf::{Content, Tensor, Value};
use super::quant_type::QuantType;

/// A model of the comparison.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Model {
    /// What the command line calls it: the preset of `moge synth`.
    pub(crate) preset: &'static str,
    /// The architecture of llama.cpp with these layers.
    architecture: &'static str,
    num_layers: u64,
    hidden_size: u64,
    num_q_heads: u64,
    num_kv_heads: u64,
    head_dim: u64,
    vocab_size: u64,
    rope_theta: f32,
    mlp: Mlp,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mlp {
    Dense { intermediate_size: u64 },
    Experts { num_experts: u64, experts_per_token: u64, expert_intermediate_size: u64, shared_intermediate_size: u64 },
}

/// Four layers of Pangu Pro MoE at full width. llama.cpp has no grouped router; `qwen2moe` takes the best 8 of all 64
/// experts, and adds a gate of one row to the shared expert: the same work.
pub(crate) const PANGU_PRO_MOE_4L: Model = Model {
    preset: "pangu-pro-moe-4l",
    architecture: "qwen2moe",
    num_layers: 4,
    hidden_size: 5120,
    num_q_heads: 40,
    num_kv_heads: 8,
    head_dim: 128,
    vocab_size: 32_000,
    rope_theta: 16e6,
    mlp: Mlp::Experts {
        num_experts: 64,
        experts_per_token: 8,
        expert_intermediate_size: 1344,
        shared_intermediate_size: 5376,
    },
};

/// Qwen3-0.6B, whose embedding table is also its head.
pub(crate) const QWEN3_0_6B: Model = Model {
    preset: "qwen3-0.6b",
    architecture: "qwen3",
    num_layers: 28,
    hidden_size: 1024,
    num_q_heads: 16,
    num_kv_heads: 8,
    head_dim: 128,
    vocab_size: 151_936,
    rope_theta: 1e6,
    mlp: Mlp::Dense { intermediate_size: 3072 },
};

/// Which types llama.cpp's quantiser gives the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mix {
    Q4_0,
    Q4KM,
    Q8_0,
}

impl Mix {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Mix::Q4_0 => "Q4_0",
            Mix::Q4KM => "Q4_K_M",
            Mix::Q8_0 => "Q8_0",
        }
    }

    /// What `general.file_type` says.
    fn file_type(self) -> u32 {
        match self {
            Mix::Q4_0 => 2,
            Mix::Q4KM => 15,
            Mix::Q8_0 => 7,
        }
    }

    /// The type that llama.cpp's quantiser (`llama_tensor_get_type`, without importance matrix) gives a matrix.
    fn quant_type(self, role: Role, width: u64) -> QuantType {
        let wanted = match (self, role) {
            (Mix::Q8_0, _) => QuantType::Q8_0,
            (_, Role::Head) | (Mix::Q4KM, Role::Sensitive { more_bits: true }) => QuantType::Q6K,
            (Mix::Q4_0, _) => QuantType::Q4_0,
            (Mix::Q4KM, _) => QuantType::Q4K,
        };
        // Where blocks of 256 do not fit, the quantiser falls back to a type with blocks of 32.
        match wanted {
            QuantType::Q4K if !width.is_multiple_of(256) => QuantType::Q5_0,
            QuantType::Q6K if !width.is_multiple_of(256) => QuantType::Q8_0,
            fits => fits,
        }
    }
}

/// What the quantiser looks at when it chooses a type.
#[derive(Clone, Copy)]
enum Role {
    /// The head, and an embedding table that is also the head.
    Head,
    /// Values of attention and down projections: of some layers they get more bits.
    Sensitive {
        more_bits: bool,
    },
    Plain,
}

/// Deviation of the embeddings, 2^3. Everything else adds numbers of order one to the residual stream, so that a
/// token's own random embedding decides over its experts: they are hit about equally often.
const EMBEDDING_STD_LOG2: i32 = 3;
/// Deviation of the other weights, 2^-6: about one over the square root of the width.
const WEIGHT_STD_LOG2: i32 = -6;

impl Model {
    pub(crate) fn metadata(&self, mix: Mix) -> Vec<(String, Value)> {
        let mut metadata = vec![
            ("general.architecture".to_string(), Value::Text(self.architecture)),
            ("general.name".to_string(), Value::Text(self.preset)),
            ("general.quantization_version".to_string(), Value::U32(2)),
            ("general.file_type".to_string(), Value::U32(mix.file_type())),
            // Tokens without texts, as many as `vocab_size` says.
            ("tokenizer.ggml.model".to_string(), Value::Text("no_vocab")),
        ];
        let own = |key: &str| format!("{}.{key}", self.architecture);
        let mut put = |key: &str, number: u64| metadata.push((own(key), Value::U32(number as u32)));
        put("vocab_size", self.vocab_size);
        put("context_length", 32_768);
        put("block_count", self.num_layers);
        put("embedding_length", self.hidden_size);
        put("attention.head_count", self.num_q_heads);
        put("attention.head_count_kv", self.num_kv_heads);
        put("attention.key_length", self.head_dim);
        put("attention.value_length", self.head_dim);
        match self.mlp {
            Mlp::Dense { intermediate_size } => put("feed_forward_length", intermediate_size),
            Mlp::Experts { num_experts, experts_per_token, expert_intermediate_size, shared_intermediate_size } => {
                put("feed_forward_length", shared_intermediate_size);
                put("expert_count", num_experts);
                put("expert_used_count", experts_per_token);
                put("expert_feed_forward_length", expert_intermediate_size);
                put("expert_shared_feed_forward_length", shared_intermediate_size);
            }
        }
        metadata.push((own("attention.layer_norm_rms_epsilon"), Value::F32(1e-5)));
        metadata.push((own("rope.freq_base"), Value::F32(self.rope_theta)));
        metadata
    }

    pub(crate) fn tensors(&self, mix: Mix) -> Vec<Tensor> {
        let is_tied = matches!(self.mlp, Mlp::Dense { .. });
        let table = [self.hidden_size, self.vocab_size];
        let role = if is_tied { Role::Head } else { Role::Plain };
        let embeddings = matrix("token_embd.weight".to_string(), &table, mix, role);
        let mut tensors = vec![
            Tensor { content: Content::Random { std_log2: EMBEDDING_STD_LOG2 }, ..embeddings },
            norm("output_norm.weight".to_string(), self.hidden_size),
        ];
        if !is_tied {
            tensors.push(matrix("output.weight".to_string(), &table, mix, Role::Head));
        }
        for layer in 0..self.num_layers {
            self.push_attention(&mut tensors, mix, layer);
            self.push_mlp(&mut tensors, mix, layer);
        }
        tensors
    }

    fn push_attention(&self, tensors: &mut Vec<Tensor>, mix: Mix, layer: u64) {
        let named = |name: &str| format!("blk.{layer}.attn_{name}");
        let (q_width, kv_width) = (self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let projections =
            [("q", q_width, Role::Plain), ("k", kv_width, Role::Plain), ("v", kv_width, self.sensitive(layer))];
        tensors.push(norm(named("norm.weight"), self.hidden_size));
        for (name, width, role) in projections {
            tensors.push(matrix(named(&format!("{name}.weight")), &[self.hidden_size, width], mix, role));
            match self.mlp {
                Mlp::Experts { .. } => tensors.push(plain(named(&format!("{name}.bias")), &[width])),
                Mlp::Dense { .. } if name != "v" => {
                    tensors.push(norm(named(&format!("{name}_norm.weight")), self.head_dim));
                }
                Mlp::Dense { .. } => {}
            }
        }
        tensors.push(matrix(named("output.weight"), &[q_width, self.hidden_size], mix, Role::Plain));
    }

    fn push_mlp(&self, tensors: &mut Vec<Tensor>, mix: Mix, layer: u64) {
        let named = |name: &str| format!("blk.{layer}.ffn_{name}.weight");
        tensors.push(norm(named("norm"), self.hidden_size));
        let mut push_swiglu = |suffix: &str, inner: u64, num_experts: Option<u64>| {
            for (name, input, output, role) in [
                ("gate", self.hidden_size, inner, Role::Plain),
                ("up", self.hidden_size, inner, Role::Plain),
                ("down", inner, self.hidden_size, self.sensitive(layer)),
            ] {
                let shape: Vec<u64> = [input, output].into_iter().chain(num_experts).collect();
                tensors.push(matrix(named(&format!("{name}{suffix}")), &shape, mix, role));
            }
        };
        match self.mlp {
            Mlp::Dense { intermediate_size } => push_swiglu("", intermediate_size, None),
            Mlp::Experts { num_experts, expert_intermediate_size, shared_intermediate_size, .. } => {
                push_swiglu("_exps", expert_intermediate_size, Some(num_experts));
                push_swiglu("_shexp", shared_intermediate_size, None);
                tensors.push(plain(named("gate_inp"), &[self.hidden_size, num_experts]));
                tensors.push(plain(named("gate_inp_shexp"), &[self.hidden_size]));
            }
        }
    }

    /// The quantiser's `use_more_bits`: the first and the last eighth of the layers, and every third between.
    fn sensitive(&self, layer: u64) -> Role {
        let (first, last) = (self.num_layers / 8, 7 * self.num_layers / 8);
        Role::Sensitive { more_bits: layer < first || layer >= last || (layer - first) % 3 == 2 }
    }
}

fn matrix(name: String, shape: &[u64], mix: Mix, role: Role) -> Tensor {
    let quant_type = mix.quant_type(role, shape[0]);
    Tensor { name, shape: shape.to_vec(), quant_type, content: Content::Random { std_log2: WEIGHT_STD_LOG2 } }
}

/// A tensor that the quantiser leaves alone.
fn plain(name: String, shape: &[u64]) -> Tensor {
    let content = Content::Random { std_log2: WEIGHT_STD_LOG2 };
    Tensor { name, shape: shape.to_vec(), quant_type: QuantType::F32, content }
}

fn norm(name: String, width: u64) -> Tensor {
    Tensor { name, shape: vec![width], quant_type: QuantType::F32, content: Content::Ones }
}

#[cfg(test)]
mod tests {
    use super::{Mix, Model, PANGU_PRO_MOE_4L, QWEN3_0_6B, QuantType};

    fn type_of(model: &Model, mix: Mix, name: &str) -> QuantType {
        let tensors = model.tensors(mix);
        tensors.iter().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("{name}")).quant_type
    }

    #[test]
    fn the_mixed_types_are_those_that_llama_cpp_chooses() {
        let types = |mix: Mix, names: &[&str]| -> Vec<QuantType> {
            names.iter().map(|name| type_of(&PANGU_PRO_MOE_4L, mix, name)).collect()
        };
        use QuantType::{F32, Q4_0, Q4K, Q5_0, Q6K, Q8_0};
        let names = [
            "token_embd.weight",
            "output.weight",
            "blk.1.attn_v.weight",
            "blk.2.attn_v.weight",
            "blk.1.ffn_down_shexp.weight",
            "blk.3.ffn_down_shexp.weight",
            "blk.1.ffn_down_exps.weight",
            "blk.3.ffn_down_exps.weight",
            "blk.3.ffn_up_exps.weight",
            "blk.0.ffn_gate_inp.weight",
        ];
        assert_eq!(types(Mix::Q4KM, &names), [Q4K, Q6K, Q4K, Q6K, Q4K, Q6K, Q5_0, Q8_0, Q4K, F32]);
        assert_eq!(types(Mix::Q4_0, &names), [Q4_0, Q6K, Q4_0, Q4_0, Q4_0, Q4_0, Q4_0, Q4_0, Q4_0, F32]);
        assert_eq!(types(Mix::Q8_0, &names[..9]), [Q8_0; 9]);
    }

    #[test]
    fn a_table_that_is_also_the_head_gets_the_type_of_the_head() {
        assert_eq!(type_of(&QWEN3_0_6B, Mix::Q4_0, "token_embd.weight"), QuantType::Q6K);
        assert_eq!(type_of(&QWEN3_0_6B, Mix::Q8_0, "token_embd.weight"), QuantType::Q8_0);
        assert!(QWEN3_0_6B.tensors(Mix::Q4_0).iter().all(|tensor| tensor.name != "output.weight"));
    }

    #[test]
    fn the_models_have_as_many_weights_as_their_presets() {
        for (model, num_weights) in [
            // The biases of four output projections are absent, the gates of four shared experts are added, and no
            // expert has a scale in the router.
            (PANGU_PRO_MOE_4L, 4 * (1_467_045_952u64 - 5120 - 64 + 5120) + 2 * 32_000 * 5120 + 5120),
            (QWEN3_0_6B, 596_049_920),
        ] {
            let tensors = model.tensors(Mix::Q4_0);
            let found: u64 = tensors.iter().map(|tensor| tensor.shape.iter().product::<u64>()).sum();
            assert_eq!(found, num_weights, "{}", model.preset);
        }
    }
}
