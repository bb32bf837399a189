//! A network made of a vector of parameters is the one of a checkpoint with the same numbers.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use common::{Golden, run_whole as run};
use moge_model::{Cpu, Isa, KvType, Model, PackedFormat, Precision, QuantScheme, expected_tensors};

/// The numbers of a checkpoint as training has them.
fn params(model: &Model) -> Vec<f32> {
    let mut params = Vec::new();
    for spec in expected_tensors(model.config()) {
        let tensor = model.checkpoint().unwrap().get(&spec.name).unwrap();
        let words = tensor.bytes();
        match words.len() as u64 / spec.num_elements() {
            4 => params.extend(words.chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap()))),
            _ if tensor.dtype() == safetensors::Dtype::BF16 => {
                params.extend(words.chunks(2).map(|x| half::bf16::from_le_bytes([x[0], x[1]]).to_f32()));
            }
            _ => params.extend(words.chunks(2).map(|x| half::f16::from_le_bytes([x[0], x[1]]).to_f32())),
        }
    }
    params
}

#[test]
fn logits_are_those_of_the_checkpoint_and_follow_an_update() {
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    for case in common::CASES {
        let golden = Golden::load(case);
        let (config, tokens) = (golden.model.config(), golden.tokens("tokens"));
        let params = params(&golden.model);
        let expected = run(&golden.model, &tokens, Precision::F32).logits;
        let mut model = Model::from_params(&cpu, config, &params, QuantScheme::default()).unwrap();
        assert!(run(&model, &tokens, Precision::F32).logits == expected, "{case}");
        model.update_params(&cpu, &vec![0.0; params.len()]);
        assert!(run(&model, &tokens, Precision::F32).logits.iter().all(|&x| x == 0.0), "{case}: nothing is left");
        model.update_params(&cpu, &params);
        assert!(run(&model, &tokens, Precision::F32).logits == expected, "{case}");
    }
}

#[test]
fn packed_weights_are_those_of_quantising_a_checkpoint() {
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    for case in ["pangu-pro-moe-v1", "qwen3-tied", "glm4", "qwen3-moe-mixed"] {
        let golden = Golden::load(case);
        let tokens = golden.tokens("tokens");
        let scheme = QuantScheme::uniform(PackedFormat::W8A8);
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens").join(case);
        let loaded = Model::load_quantizing(&dir, &cpu, scheme.clone(), &|_, _| ()).unwrap();
        let made = Model::from_params(&cpu, golden.model.config(), &params(&golden.model), scheme).unwrap();
        assert_eq!(made.config(), loaded.config());
        let logits = |model| common::run_with_kv(model, &tokens, Precision::F32, KvType::F32).logits;
        assert!(logits(&made) == logits(&loaded), "{case}");
    }
}

#[test]
fn a_width_that_the_format_does_not_allow_is_refused_by_name() {
    let golden = Golden::load("pangu-pro-moe-v1");
    let cpu = Cpu::new(Isa::select().unwrap(), 1);
    let scheme = QuantScheme::uniform(PackedFormat::W4A8);
    let problem = Model::from_params(&cpu, golden.model.config(), &params(&golden.model), scheme).unwrap_err();
    assert!(problem.to_string().contains("self_attn.q_proj.weight"), "{problem}");
}
