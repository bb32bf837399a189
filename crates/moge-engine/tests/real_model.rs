//! The engine on real (small) networks: what it says does not depend on what else runs.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::{Path, PathBuf};

use moge_engine::{Engine, EngineConfig, FinishReason, Request, RowLogprobs, SamplingParams, SeqId};
use moge_model::{ActivationType, Cpu, Isa, KvType, LoadMode, Model, TokenId};
use safetensors::SafeTensors;

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens").join(case)
}

fn recorded_tokens(case: &str, name: &str) -> Vec<TokenId> {
    let bytes = std::fs::read(golden(case).join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let words = tensors.tensor(name).unwrap().data().chunks_exact(4);
    words.map(|word| TokenId(u32::from_le_bytes(word.try_into().unwrap()))).collect()
}

fn engine(case: &str, num_threads: usize, max_batched_tokens: usize) -> Engine {
    let model = Model::load(&golden(case), LoadMode::Mmap, &|_, _| ()).unwrap();
    let config = EngineConfig {
        activation: ActivationType::F32,
        kv: KvType::F32,
        num_blocks: 90,
        max_batched_tokens,
        max_running: 17,
        max_waiting: 20,
        eos_token_ids: Vec::new(),
    };
    Engine::new(model, Cpu::new(Isa::select().unwrap(), num_threads), None, &config)
}

/// Everything that a sequence gave.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<TokenId>,
    logprobs: Vec<Option<RowLogprobs>>,
    prompt_logprobs: Option<Vec<Option<RowLogprobs>>>,
    finish_reason: Option<FinishReason>,
}

/// Run the requests, request `i` arriving at step `i * gap`.
fn run(engine: &mut Engine, requests: &[Request], gap: usize) -> Vec<Answer> {
    let mut answers: Vec<Answer> = requests.iter().map(|_| Answer::default()).collect();
    let mut ids: Vec<SeqId> = Vec::new();
    let mut step = 0;
    while ids.len() < requests.len() || engine.has_unfinished() {
        while ids.len() < requests.len() && ids.len() * gap <= step {
            ids.push(engine.add_request(requests[ids.len()].clone()).unwrap());
        }
        for output in engine.step() {
            let answer = &mut answers[ids.iter().position(|&id| id == output.id).unwrap()];
            if let Some(sampled) = output.sampled {
                answer.tokens.push(sampled.token);
                answer.logprobs.push(sampled.logprobs);
            }
            answer.prompt_logprobs = output.prompt_logprobs.or(answer.prompt_logprobs.take());
            answer.finish_reason = output.finish_reason;
        }
        step += 1;
    }
    assert_eq!(engine.num_free_blocks(), 90, "all blocks come back");
    answers
}

fn greedy_request(prompt: Vec<TokenId>) -> Request {
    Request { prompt, sampling: SamplingParams { max_tokens: Some(64), ..SamplingParams::default() } }
}

#[test]
fn greedy_answers_among_others_equal_pytorch() {
    for case in ["pangu-pro-moe-v1", "pangu-pro-moe-k2", "pangu-embedded", "qwen3", "glm4"] {
        let prompt = recorded_tokens(case, "greedy_prompt");
        let expected = recorded_tokens(case, "greedy_tokens");
        let mut requests = vec![greedy_request(prompt)];
        requests.extend((1..12).map(|i| {
            let mut request = greedy_request((0..3 * i).map(|t| TokenId(t * 7 % 140)).collect());
            request.sampling.temperature = 0.9;
            request.sampling.seed = u64::from(i);
            request
        }));
        requests.rotate_left(5); // the one under test neither first nor last
        let answers = run(&mut engine(case, 2, 40), &requests, 1);
        assert_eq!(answers[7].tokens, expected, "{case}");
        assert_eq!(answers[7].finish_reason, Some(FinishReason::Length));
    }
}

#[test]
fn a_seed_gives_the_same_tokens_and_logprobs_alone_and_in_any_company() {
    let requests: Vec<Request> = (0..9)
        .map(|i| Request {
            prompt: (0..4 + 9 * i).map(|t| TokenId((t * 13 + i) % 200)).collect(),
            sampling: SamplingParams {
                max_tokens: Some(20 + i as usize),
                temperature: 1.3,
                top_k: (i % 2 == 0).then_some(50),
                top_p: 0.9,
                repetition_penalty: 1.1,
                seed: 77,
                logprobs: Some(3),
                prompt_logprobs: (i % 3 == 0).then_some(2),
                ..SamplingParams::default()
            },
        })
        .collect();
    let alone: Vec<Answer> = requests
        .iter()
        .flat_map(|request| run(&mut engine("pangu-pro-moe-v1", 1, 500), std::slice::from_ref(request), 0))
        .collect();
    assert!(alone.iter().all(|answer| answer.tokens.len() >= 20));
    for (num_threads, max_batched_tokens, gap) in [(1, 500, 0), (2, 33, 0), (3, 9, 2), (2, 64, 5)] {
        let together = run(&mut engine("pangu-pro-moe-v1", num_threads, max_batched_tokens), &requests, gap);
        assert_eq!(together, alone, "{num_threads} threads, {max_batched_tokens} rows, gap {gap}");
    }
}

#[test]
fn a_cancelled_sequence_gives_its_blocks_back_and_the_others_go_on() {
    let prompt = recorded_tokens("pangu-pro-moe-v1", "greedy_prompt");
    let mut engine = engine("pangu-pro-moe-v1", 2, 16);
    let cancelled = engine.add_request(greedy_request((0..70).map(TokenId).collect())).unwrap();
    let kept = engine.add_request(greedy_request(prompt)).unwrap();
    let mut tokens = Vec::new();
    for step in 0.. {
        if step == 3 {
            assert_eq!(engine.cancel(cancelled).unwrap().finish_reason, Some(FinishReason::Cancelled));
        }
        if !engine.has_unfinished() {
            break;
        }
        let outputs = engine.step();
        tokens.extend(outputs.into_iter().filter(|o| o.id == kept).filter_map(|o| o.sampled).map(|s| s.token));
    }
    assert_eq!(tokens, recorded_tokens("pangu-pro-moe-v1", "greedy_tokens"));
    assert_eq!(engine.num_free_blocks(), 90);
}
