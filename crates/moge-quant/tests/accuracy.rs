//! What quantising does to the logits of random networks: the whole model in each format beside f32.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::path::Path;

use moge_kernels::{Cpu, Isa, KvType, PackedFormat, Precision};
use moge_model::{Architecture, LoadMode, Model, QuantScheme, TokenId};
use moge_quant::{Comparison, EvalModel, Evaluation};

use common::{mixed_scheme, synth, synth_config};

const CONTEXT: usize = 70;

/// The model in `dir` in f32 but for what `scheme` and `kv` say, beside itself in f32.
fn compare(dir: &Path, scheme: Option<QuantScheme>, kv: KvType) -> Comparison {
    let cpu = Cpu::new(Isa::best(), 2);
    let side = |scheme: Option<QuantScheme>, kv| {
        let model = match scheme {
            Some(scheme) => Model::load_quantizing(dir, &cpu, scheme, &|_, _| ()),
            None => Model::load(dir, LoadMode::Mmap, &|_, _| ()),
        };
        EvalModel::new(model.unwrap(), &cpu, Precision::F32, kv, CONTEXT)
    };
    let tokens: Vec<TokenId> = (0..3 * CONTEXT as u32).map(|i| TokenId(i * 7919 % 251)).collect();
    let windows: Vec<&[TokenId]> = tokens.chunks(CONTEXT).collect();
    let (mut model, mut baseline) = (side(scheme, kv), side(None, KvType::F32));
    let evaluation = Evaluation::run(&cpu, &mut model, Some(&mut baseline), &windows, 1, &mut |_| ());
    evaluation.baseline.unwrap()
}

#[test]
fn logits_of_every_network_in_every_format_are_near_those_in_f32() {
    let uniform = |format| Some(QuantScheme::uniform(format));
    let formats = [
        ("nothing quantised", None, KvType::F32, 0.0),
        ("int8 KV cache", None, KvType::Int8, 0.02),
        ("w8a8", uniform(PackedFormat::W8A8), KvType::F32, 0.04),
        ("w4a8, attention w8a8", Some(mixed_scheme()), KvType::F32, 0.2),
        ("w4a8", uniform(PackedFormat::W4A8), KvType::F32, 0.3),
    ];
    for architecture in Architecture::ALL {
        let dir = tempfile::tempdir().unwrap();
        synth(dir.path(), &synth_config(architecture));
        for (name, scheme, kv, bound) in formats.clone() {
            let found = compare(dir.path(), scheme, kv);
            println!("{architecture:?} {name}: {found:?}");
            assert!(found.logit_error <= bound, "{architecture:?} {name}: {found:?}");
            assert!(found.kl_mean <= 0.5 * bound * bound, "{architecture:?} {name}: {found:?}");
        }
    }
}
