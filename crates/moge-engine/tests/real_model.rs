//! The engine on real (small) networks: what it says does not depend on what else runs.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use common::{TestEngine, config, cpu, golden};
use moge_engine::{
    AdmitError, Engine, EngineConfig, EngineStats, FinishReason, Request, RowLogprobs, SamplingParams, SeqId,
};
use moge_model::{
    BLOCK_SIZE, Batch, BlockId, KvCache, KvType, LoadMode, Model, Precision, SequenceRows, StepLimits, StepOutput,
    TokenId, Workspace,
};
use safetensors::SafeTensors;

fn recorded_tokens(case: &str, name: &str) -> Vec<TokenId> {
    let bytes = std::fs::read(golden(case).join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let words = tensors.tensor(name).unwrap().data().chunks_exact(4);
    words.map(|word| TokenId(u32::from_le_bytes(word.try_into().unwrap()))).collect()
}

/// An engine with plenty of blocks.
fn engine(case: &str, num_threads: usize, max_batched_tokens: usize) -> TestEngine {
    engine_with_blocks(case, 90, num_threads, max_batched_tokens)
}

fn engine_with_blocks(case: &str, num_blocks: usize, num_threads: usize, max_batched_tokens: usize) -> TestEngine {
    let config = EngineConfig { num_blocks, max_batched_tokens, max_sequence_tokens: usize::MAX, ..config() };
    TestEngine::new(case, num_threads, None, &config)
}

/// Everything that a sequence gave.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<TokenId>,
    logprobs: Vec<Option<RowLogprobs>>,
    prompt_logprobs: Option<Vec<Option<RowLogprobs>>>,
    expert_ids: Vec<u8>,
    finish_reason: Option<FinishReason>,
}

/// Run the requests, request `i` arriving at step `i * gap`.
fn run(engine: &mut TestEngine, requests: &[Request], gap: usize) -> Vec<Answer> {
    let mut answers: Vec<Answer> = requests.iter().map(|_| Answer::default()).collect();
    let mut ids: Vec<SeqId> = Vec::new();
    let mut step = 0;
    while ids.len() < requests.len() || engine.has_unfinished() {
        while ids.len() < requests.len() && ids.len() * gap <= step {
            ids.push(engine.add_request(requests[ids.len()].clone()).unwrap());
        }
        for output in engine.step() {
            let answer = &mut answers[ids.iter().position(|&id| id == output.id).unwrap()];
            for sampled in output.sampled {
                answer.tokens.push(sampled.token);
                answer.logprobs.push(sampled.logprobs);
            }
            answer.prompt_logprobs = output.prompt_logprobs.or(answer.prompt_logprobs.take());
            answer.expert_ids.extend(output.expert_ids);
            answer.finish_reason = output.finish_reason;
        }
        step += 1;
    }
    assert_eq!(engine.num_free_blocks(), engine.stats().num_blocks, "all blocks come back");
    answers
}

fn greedy_request(prompt: Vec<TokenId>) -> Request {
    Request { prompt, sampling: SamplingParams { max_tokens: Some(64), ..SamplingParams::default() }, grammar: None }
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
            grammar: None,
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
        tokens.extend(outputs.into_iter().filter(|o| o.id == kept).flat_map(|o| o.sampled).map(|s| s.token));
    }
    assert_eq!(tokens, recorded_tokens("pangu-pro-moe-v1", "greedy_tokens"));
    assert_eq!(engine.num_free_blocks(), 90);
}

/// The answer to each request from an engine of its own.
fn alone(case: &str, requests: &[Request]) -> Vec<Answer> {
    requests.iter().flat_map(|request| run(&mut engine(case, 1, 500), std::slice::from_ref(request), 0)).collect()
}

/// Requests that begin with one block and grow to several: greedy ones and sampled ones.
fn growing_requests() -> Vec<Request> {
    (0..7)
        .map(|i| Request {
            prompt: (0..11 + 4 * i).map(|t| TokenId((t * 13 + i) % 140)).collect(),
            sampling: SamplingParams {
                max_tokens: Some(90 + i as usize),
                temperature: if i % 2 == 0 { 0.0 } else { 1.1 },
                seed: 5,
                logprobs: Some(2),
                prompt_logprobs: (i == 3).then_some(1),
                return_expert_ids: i > 3,
                ..SamplingParams::default()
            },
            grammar: None,
        })
        .collect()
}

#[test]
fn answers_are_the_same_where_blocks_are_so_few_that_sequences_are_preempted() {
    for case in ["pangu-pro-moe-v1", "pangu-pro-moe-k2"] {
        let requests = growing_requests();
        let alone = alone(case, &requests);
        for (num_blocks, max_batched_tokens, gap) in [(5, 40, 0), (7, 500, 0), (9, 13, 3)] {
            let mut engine = engine_with_blocks(case, num_blocks, 2, max_batched_tokens);
            let together = run(&mut engine, &requests, gap);
            assert!(together == alone, "{case}, {num_blocks} blocks, {max_batched_tokens} rows, gap {gap}");
            assert!(engine.stats().num_preemptions > 2, "{case}, {num_blocks} blocks: {:?}", engine.stats());
        }
    }
}

#[test]
fn a_prompt_found_in_the_cache_gives_the_same_answer_and_is_counted() {
    let opening: Vec<TokenId> = (0..70).map(|t| TokenId(t * 3 % 140)).collect();
    let requests: Vec<Request> = (0..6)
        .map(|i| Request {
            prompt: opening.iter().copied().chain((0..i).map(|t| TokenId(t + i))).collect(),
            sampling: SamplingParams {
                max_tokens: Some(40),
                temperature: 0.9,
                logprobs: Some(1),
                return_expert_ids: i == 4,
                prompt_logprobs: (i == 5).then_some(0),
                ..SamplingParams::default()
            },
            grammar: None,
        })
        .collect();
    let alone = alone("pangu-pro-moe-v1", &requests);
    for gap in [0, 1, 3, 60] {
        let mut engine = engine("pangu-pro-moe-v1", 2, 70);
        assert!(run(&mut engine, &requests, gap) == alone, "gap {gap}");
        let EngineStats { num_prompt_tokens_looked_up, num_prompt_tokens_cached, .. } = engine.stats();
        // The first finds nothing, and the last two do not look.
        assert_eq!(num_prompt_tokens_looked_up, 70 + 71 + 72 + 73);
        let expected = 3 * 2 * BLOCK_SIZE as u64;
        assert_eq!(num_prompt_tokens_cached, expected, "gap {gap}");
    }
}

/// The expert of each choice of a plain forward pass, `[token, routed layer, experts_per_token]`, inside its group.
fn traced_expert_ids(case: &str, tokens: &[TokenId], experts_per_token: usize, experts_per_group: u32) -> Vec<u8> {
    let model = Model::load(&golden(case), LoadMode::Mmap, &|_, _| ()).unwrap();
    let num_rows = tokens.len();
    let num_blocks = num_rows.div_ceil(BLOCK_SIZE);
    let limits = StepLimits { max_rows: num_rows, max_logit_rows: 0, max_context: num_rows, num_threads: 1 };
    let mut work = Workspace::new(model.config(), Precision::F32, limits);
    let mut output = StepOutput::default();
    output.record_trace();
    let block_table = (0..num_blocks as u32).map(BlockId).collect();
    let batch = Batch {
        tokens: tokens.to_vec(),
        sequences: vec![SequenceRows { num_rows, first_position: 0, block_table }],
        ..Batch::default()
    };
    let mut kv_cache = KvCache::new(model.config(), KvType::F32, num_blocks);
    model.forward(&cpu(1), &batch, &mut kv_cache, &mut work, &mut output);
    let layers = &output.trace.as_ref().unwrap().routes;
    let rows = (0..num_rows).flat_map(|row| layers.iter().map(move |layer| &layer[row * experts_per_token..]));
    rows.flat_map(|row| &row[..experts_per_token]).map(|route| (route.expert.0 % experts_per_group) as u8).collect()
}

#[test]
fn expert_ids_are_those_of_a_plain_forward_pass_of_all_tokens_but_the_last() {
    for (case, experts_per_token, experts_per_group) in [("pangu-pro-moe-v1", 3, 4), ("pangu-pro-moe-k2", 4, 5)] {
        let mut requests = growing_requests();
        requests.iter_mut().for_each(|request| request.sampling.return_expert_ids = request.prompt.len() % 3 != 0);
        for (num_blocks, max_batched_tokens, gap) in [(90, 500, 0), (90, 9, 2), (5, 31, 1)] {
            let mut engine = engine_with_blocks(case, num_blocks, 2, max_batched_tokens);
            let answers = run(&mut engine, &requests, gap);
            assert_eq!(engine.stats().num_preemptions > 0, num_blocks == 5);
            for (request, answer) in requests.iter().zip(&answers) {
                let tokens = [&request.prompt[..], &answer.tokens[..answer.tokens.len() - 1]].concat();
                let expected = match request.sampling.return_expert_ids {
                    true => traced_expert_ids(case, &tokens, experts_per_token, experts_per_group),
                    false => Vec::new(),
                };
                assert!(answer.expert_ids == expected, "{case}, {num_blocks} blocks, {} tokens", tokens.len());
            }
        }
    }
}

#[test]
fn expert_load_counts_every_token_in_every_layer_and_is_absent_without_experts() {
    let mut engine = engine("pangu-pro-moe-k2", 2, 16);
    let mut request = greedy_request((0..41).map(TokenId).collect());
    request.sampling.return_expert_ids = true;
    let answer = run(&mut engine, &[request.clone()], 0).remove(0);
    let load = engine.expert_load().unwrap();
    assert_eq!((load.num_expert_groups, load.experts_per_group), (2, 5));
    let mut expected = vec![0; 20];
    for (token, layers) in answer.expert_ids.chunks_exact(8).enumerate() {
        for (choice, &expert) in layers.iter().enumerate() {
            let (layer, group) = (choice / 4, choice % 4 / 2);
            // In the last layer only tokens that another is sampled after are computed.
            let counts = layer == 0 || token >= 40;
            expected[layer * 10 + group * 5 + usize::from(expert)] += u64::from(counts);
        }
    }
    assert_eq!(load.counts, expected);

    let mut dense = self::engine("qwen3", 1, 16);
    assert_eq!(dense.expert_load(), None);
    let refused = dense.add_request(request).unwrap_err();
    assert!(matches!(refused, AdmitError::InvalidParameter { field: "return_expert_ids", .. }), "{refused}");
}

#[test]
fn a_long_prompt_that_arrives_takes_no_step_from_those_that_decode() {
    let mut engine = engine("pangu-pro-moe-v1", 2, 24);
    let decoding: Vec<SeqId> =
        (1..6).map(|i| engine.add_request(greedy_request(vec![TokenId(i); 3])).unwrap()).collect();
    engine.step();
    let long = engine.add_request(greedy_request((0..300).map(TokenId).collect())).unwrap();
    for left in (0..300usize).step_by(24 - 5).rev() {
        let outputs = engine.step();
        let sampled: Vec<SeqId> = outputs.iter().filter(|output| !output.sampled.is_empty()).map(|o| o.id).collect();
        assert_eq!(sampled[..5], decoding);
        assert_eq!(sampled[5..], if left == 0 { vec![long] } else { vec![] });
    }
}

#[test]
fn answers_to_one_prompt_compute_it_once_also_if_they_start_together() {
    let prompt: Vec<TokenId> = (0..100).map(|t| TokenId(t * 3 % 140)).collect();
    let request = |seed| {
        let sampling = SamplingParams { temperature: 0.9, seed, max_tokens: Some(3), ..SamplingParams::default() };
        Request { prompt: prompt.clone(), sampling, grammar: None }
    };
    // In one step and in several.
    for max_batched_tokens in [500, 40] {
        let mut engine = engine("pangu-pro-moe-v1", 2, max_batched_tokens);
        (0..5).for_each(|seed| _ = engine.add_request(request(seed)).unwrap());
        let mut num_prefilled_tokens = 0;
        while engine.has_unfinished() {
            num_prefilled_tokens += engine.step().iter().map(|output| output.num_prefilled_tokens).sum::<usize>();
        }
        assert_eq!(num_prefilled_tokens, 100 + 4 * (100 - 3 * BLOCK_SIZE), "{max_batched_tokens} rows");
    }
}

#[test]
fn two_engines_share_one_pool_of_threads() {
    let cpu = cpu(2);
    let prompt = recorded_tokens("pangu-pro-moe-v1", "greedy_prompt");
    let model = || Model::load(&golden("pangu-pro-moe-v1"), LoadMode::Mmap, &|_, _| ()).unwrap();
    let mut engines = [0, 1].map(|_| Engine::new(model(), &cpu, None, &config()));
    let mut tokens = [Vec::new(), Vec::new()];
    for engine in &mut engines {
        engine.add_request(greedy_request(prompt.clone())).unwrap();
    }
    while engines.iter().any(Engine::has_unfinished) {
        for (engine, tokens) in engines.iter_mut().zip(&mut tokens) {
            tokens.extend(engine.step(&cpu).into_iter().flat_map(|output| output.sampled).map(|s| s.token));
        }
    }
    let expected = recorded_tokens("pangu-pro-moe-v1", "greedy_tokens");
    assert_eq!(tokens, [expected.clone(), expected]);
}

#[test]
fn a_cleared_prefix_cache_finds_no_prompt_and_changes_no_answer() {
    let prompt: Vec<TokenId> = (0..70).map(|t| TokenId(t * 3 % 140)).collect();
    let mut engine = engine("pangu-pro-moe-v1", 2, 70);
    let first = run(&mut engine, &[greedy_request(prompt.clone())], 0);
    let cached = |engine: &TestEngine| engine.stats().num_prompt_tokens_cached;
    engine.clear_prefix_cache();
    assert_eq!(run(&mut engine, &[greedy_request(prompt.clone())], 0), first);
    assert_eq!(cached(&engine), 0);
    // Cleared while it runs, too.
    engine.clear_prefix_cache();
    engine.add_request(greedy_request(prompt.clone())).unwrap();
    let mut tokens = Vec::new();
    while engine.has_unfinished() {
        tokens.extend(engine.step().into_iter().flat_map(|output| output.sampled).map(|s| s.token));
        engine.clear_prefix_cache();
    }
    assert_eq!(tokens, first[0].tokens);
    assert_eq!(run(&mut engine, &[greedy_request(prompt.clone())], 0), first);
    assert_eq!(cached(&engine), 0);
    assert_eq!(run(&mut engine, &[greedy_request(prompt)], 0), first);
    assert_eq!(cached(&engine), 2 * BLOCK_SIZE as u64, "what was computed since is found");
}
