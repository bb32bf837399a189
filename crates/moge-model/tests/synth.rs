//! Synthetic checkpoints through the model, the tokenizers and the chat templates.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

mod common;

use std::path::Path;

use common::run_whole;
use moge_model::synth::{SynthConfig, presets, write_checkpoint};
use moge_model::{
    Architecture, ChatRequest, ChatTemplate, GenerationDefaults, LoadMode, Model, ModelConfig, Precision, Prefix,
    TokenId, Tokenizer, eos_token_ids,
};
use serde_json::json;

fn preset(architecture: Architecture, name: &str) -> SynthConfig {
    let found = presets().find(|preset| preset.config.architecture == architecture && preset.name == name);
    found.unwrap().config
}

fn write(dir: &Path, architecture: Architecture, name: &str) -> SynthConfig {
    let config = preset(architecture, name);
    write_checkpoint(dir, &config, &mut |_, _| ()).unwrap();
    config
}

fn root_mean_square(x: &[f32]) -> f32 {
    (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt()
}

/// Different ordinary tokens, spread over the vocabulary.
fn spread_tokens(vocab_size: usize, num_tokens: usize) -> Vec<TokenId> {
    (0..num_tokens).map(|i| TokenId((300 + i * 7919 % (vocab_size - 310)) as u32)).collect()
}

#[test]
fn activations_and_logits_stay_of_order_one_through_every_network() {
    for architecture in Architecture::ALL {
        let dir = tempfile::tempdir().unwrap();
        let config = write(dir.path(), architecture, "small");
        let model = Model::load(dir.path(), LoadMode::Mmap, &|_, _| ()).unwrap();
        let run = run_whole(&model, &spread_tokens(config.vocab_size, 65), Precision::F32);
        assert_eq!(run.trace.hidden.len(), config.num_layers + 1);
        for (layer, hidden) in run.trace.hidden.iter().enumerate() {
            let size = root_mean_square(hidden);
            assert!((0.8..2.0).contains(&size), "{architecture:?}: {size} before layer {layer}");
        }
        let size = root_mean_square(&run.logits);
        assert!((0.8..1.3).contains(&size), "{architecture:?}: logits {size}");
    }
}

#[test]
fn every_layer_routes_near_uniformly_inside_every_expert_group() {
    let dir = tempfile::tempdir().unwrap();
    let config = write(dir.path(), Architecture::PanguProMoe, "small");
    let model = Model::load(dir.path(), LoadMode::Mmap, &|_, _| ()).unwrap();
    let moe = *model.config().moe().unwrap();
    let tokens = spread_tokens(config.vocab_size, 1200);
    let run = run_whole(&model, &tokens, Precision::F32);
    let fair_share = tokens.len() / moe.experts_per_group();
    assert_eq!(run.trace.routes.len(), config.num_layers);
    for (layer, routes) in run.trace.routes.iter().enumerate() {
        let mut num_tokens = vec![0; moe.num_experts];
        for route in routes {
            num_tokens[route.expert.0 as usize] += 1;
        }
        // Rows of the router differ a little in length and direction, hence in their share.
        let near = num_tokens.iter().all(|&n| n > fair_share * 6 / 10 && n < fair_share * 15 / 10);
        assert!(near, "layer {layer}: {num_tokens:?}, fair is {fair_share}");
    }
}

#[test]
fn tokenizers_fit_their_network_and_begin_texts_as_it_expects() {
    for (architecture, prefix) in [
        (Architecture::PanguProMoe, vec!["<s>"]),
        (Architecture::PanguEmbedded, vec!["<s>"]),
        (Architecture::Qwen3, vec![]),
        (Architecture::Qwen3Moe, vec![]),
        (Architecture::Glm4, vec!["[gMASK]", "<sop>"]),
        (Architecture::Llama, vec![]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let config = write(dir.path(), architecture, "tiny");
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(tokenizer.vocab_size(), config.vocab_size, "{architecture:?}");
        for id in (0..config.vocab_size as u32).map(TokenId) {
            assert!(!tokenizer.decode(&[id]).is_empty(), "{architecture:?}: {id:?}");
        }
        let ids = tokenizer.encode(" bazu 系", Prefix::Add).unwrap();
        let pieces: Vec<String> = ids[..prefix.len()].iter().map(|&id| tokenizer.piece(id)).collect();
        assert_eq!(pieces, prefix);
        assert_eq!(tokenizer.decode(&ids[prefix.len()..]), " bazu 系");
        let named = ModelConfig::load(dir.path()).unwrap().eos_token_ids;
        let generation = GenerationDefaults::load(dir.path()).unwrap();
        let eos: Vec<String> =
            eos_token_ids(&named, &generation, Some(&tokenizer)).into_iter().map(|id| tokenizer.piece(id)).collect();
        let expected = match architecture {
            Architecture::PanguProMoe | Architecture::PanguEmbedded => vec!["[unused10]"],
            Architecture::Qwen3 | Architecture::Qwen3Moe => vec!["<|im_end|>", "<|endoftext|>"],
            Architecture::Glm4 => vec!["<|endoftext|>", "<|user|>", "<|observation|>"],
            Architecture::Llama => vec!["<|im_end|>"],
        };
        assert_eq!(eos, expected);
    }
}

#[test]
fn chat_templates_render_turns_of_single_tokens() {
    let messages = [json!({ "role": "system", "content": "S" }), json!({ "role": "user", "content": "U" })];
    for (architecture, expected) in [
        (Architecture::PanguProMoe, "[unused9]系统：S[unused10][unused9]用户：U[unused10][unused9]助手："),
        (
            Architecture::Qwen3,
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            Architecture::Llama,
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
        ),
        (Architecture::Glm4, "[gMASK]<sop><|system|>\nS<|user|>\nU<|assistant|>\n"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), architecture, "tiny");
        let template = ChatTemplate::load(dir.path(), architecture).unwrap();
        let request = ChatRequest { messages: &messages, add_generation_prompt: true, ..ChatRequest::default() };
        assert_eq!(template.render(&request).unwrap(), expected);
    }
}
