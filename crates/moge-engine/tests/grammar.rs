//! Grammars on a real (small) network: nobody's answer depends on who else has a grammar.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::collections::BTreeMap;

use common::{TestEngine, config, tokenizer};
use moge_engine::{EngineConfig, FinishReason, GrammarCompiler, Request, RowLogprobs, SamplingParams, SeqId};
use moge_model::{BLOCK_SIZE, TokenId};

const CASE: &str = "pangu-pro-moe-v1";

fn engine(num_threads: usize, max_batched_tokens: usize, num_blocks: usize) -> TestEngine {
    let config = EngineConfig { num_blocks, max_batched_tokens, ..config() };
    TestEngine::new(CASE, num_threads, Some(tokenizer()), &config)
}

/// Everything that a sequence gave.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<TokenId>,
    logprobs: Vec<Option<RowLogprobs>>,
    text: String,
    finish_reason: Option<FinishReason>,
}

/// Run the requests, request `i` arriving at step `i * gap`; the answers, and how often a prompt was computed again.
fn run(engine: &mut TestEngine, requests: &[Request], gap: usize) -> (Vec<Answer>, usize) {
    let mut answers = vec![Answer::default(); requests.len()];
    let mut index_of: BTreeMap<SeqId, usize> = BTreeMap::new();
    let mut num_prefilled_tokens = 0;
    for step in 0.. {
        while index_of.len() < requests.len() && index_of.len() * gap <= step {
            let index = index_of.len();
            index_of.insert(engine.add_request(requests[index].clone()).unwrap(), index);
        }
        if index_of.len() == requests.len() && !engine.has_unfinished() {
            break;
        }
        for output in engine.step() {
            let answer = &mut answers[index_of[&output.id]];
            num_prefilled_tokens += output.num_prefilled_tokens + output.num_cached_tokens;
            for sampled in output.sampled {
                answer.tokens.push(sampled.token);
                answer.logprobs.push(sampled.logprobs);
            }
            answer.text += &output.text;
            answer.finish_reason = output.finish_reason;
        }
    }
    (answers, num_prefilled_tokens)
}

/// Every other one with a grammar.
fn requests() -> Vec<Request> {
    let vocab_size = engine(1, 1, 1).model().config().vocab_size;
    let compiler = GrammarCompiler::new(&tokenizer(), vocab_size, &[]).unwrap();
    let grammars = [
        r#"start: %json {"type": "array", "items": {"type": "integer", "maximum": 99999}, "minItems": 8, "maxItems": 9}"#,
        "start: /([A-Z][a-z]{3,9} ){7}end/",
        "start: /[世界é]{12,20}/",
    ];
    (0..10)
        .map(|i| Request {
            prompt: (0..4 + 7 * i).map(|t| TokenId((t * 13 + i) % 200)).collect(),
            sampling: SamplingParams {
                max_tokens: Some(60 + i as usize),
                temperature: if i < 4 { 0.0 } else { 1.1 },
                top_p: 0.95,
                seed: u64::from(i),
                logprobs: Some(3),
                ..SamplingParams::default()
            },
            grammar: (i % 2 == 1).then(|| compiler.compile(grammars[i as usize / 2 % 3]).unwrap()),
        })
        .collect()
}

#[test]
fn answers_are_the_same_alone_and_among_others_with_and_without_grammars() {
    let requests = requests();
    let alone: Vec<Answer> =
        requests.iter().flat_map(|request| run(&mut engine(1, 500, 90), std::slice::from_ref(request), 0).0).collect();
    for answer in alone.iter().step_by(2) {
        assert_eq!(answer.finish_reason, Some(FinishReason::Length));
    }
    let finished = alone.iter().skip(1).step_by(2).filter(|answer| answer.finish_reason == Some(FinishReason::Stop));
    assert!(finished.count() >= 3, "{alone:?}");
    let num_prompt_tokens: usize = requests.iter().map(|request| request.prompt.len()).sum();
    for (num_threads, max_batched_tokens, gap, num_blocks) in [(1, 500, 0, 90), (2, 9, 1, 90), (2, 33, 0, 11)] {
        let mut engine = engine(num_threads, max_batched_tokens, num_blocks);
        let (together, num_prefilled_tokens) = run(&mut engine, &requests, gap);
        assert_eq!(together, alone, "{num_threads} threads, {max_batched_tokens} rows, {num_blocks} blocks");
        let preempted = num_prefilled_tokens > num_prompt_tokens + BLOCK_SIZE;
        assert!(preempted || num_blocks == 90, "few blocks make sequences wait for one another");
        assert_eq!(engine.num_free_blocks(), num_blocks);
    }
}

#[test]
fn answers_of_a_network_match_their_grammars() {
    let requests = requests();
    let (answers, _) = run(&mut engine(2, 64, 90), &requests, 1);
    for (answer, index) in answers
        .iter()
        .zip(0..)
        .filter(|(answer, index)| index % 2 == 1 && answer.finish_reason == Some(FinishReason::Stop))
    {
        let text = &answer.text;
        match index / 2 % 3 {
            0 => assert!((8..=9).contains(&serde_json::from_str::<Vec<i64>>(text).unwrap().len()), "{text}"),
            1 => assert!(text.ends_with(" end") && text.split(' ').count() == 8, "{text}"),
            _ => assert!((12..=20).contains(&text.chars().count()), "{text}"),
        }
    }
}
