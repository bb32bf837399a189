//! Drafts on a real (small) network: they change how many steps an answer takes, and nothing else.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use common::{TestEngine, config, tokenizer};
use moge_engine::{EngineConfig, FinishReason, Grammar, GrammarCompiler, Request, RowLogprobs, SamplingParams, SeqId};
use moge_model::TokenId;

const MAX_DRAFT_TOKENS: usize = 4;

/// Where the last request finds the end of its answer.
const STOP_TOKEN: TokenId = TokenId(77);

/// Blocks of the KV cache and rows of a step.
#[derive(Clone, Copy, Debug)]
struct Size {
    num_blocks: usize,
    max_batched_tokens: usize,
}

const AMPLE: Size = Size { num_blocks: 90, max_batched_tokens: 400 };

fn engine(Size { num_blocks, max_batched_tokens }: Size) -> TestEngine {
    let config = EngineConfig { num_blocks, max_batched_tokens, max_draft_tokens: MAX_DRAFT_TOKENS, ..config() };
    TestEngine::new("pangu-pro-moe-v1", 2, Some(tokenizer()), &config)
}

/// Everything that a sequence gave.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<TokenId>,
    logprobs: Vec<Option<RowLogprobs>>,
    texts: Vec<String>,
    text: String,
    prompt_logprobs: Option<Vec<Option<RowLogprobs>>>,
    expert_ids: Vec<u8>,
    finish_reason: Option<FinishReason>,
}

/// Proposes what follows the tokens that request `index` has said so far.
type Drafter<'a> = dyn Fn(usize, &[TokenId]) -> Vec<TokenId> + 'a;

/// Run the requests, all from the first step on; their answers, and the number of steps.
fn run(engine: &mut TestEngine, requests: &[Request], drafter: &Drafter) -> (Vec<Answer>, usize) {
    let mut answers = vec![Answer::default(); requests.len()];
    let ids: Vec<SeqId> = requests.iter().map(|request| engine.add_request(request.clone()).unwrap()).collect();
    let mut num_steps = 0;
    while engine.has_unfinished() {
        for (index, &id) in ids.iter().enumerate() {
            engine.set_draft(id, drafter(index, &answers[index].tokens));
        }
        for output in engine.step() {
            let answer = &mut answers[ids.iter().position(|&id| id == output.id).unwrap()];
            assert_eq!(answer.finish_reason, None);
            answer.texts.extend(output.token_texts().map(str::to_owned));
            for sampled in output.sampled {
                answer.tokens.push(sampled.token);
                answer.logprobs.push(sampled.logprobs);
            }
            answer.text += &output.text;
            answer.prompt_logprobs = output.prompt_logprobs.or(answer.prompt_logprobs.take());
            answer.expert_ids.extend(output.expert_ids);
            answer.finish_reason = output.finish_reason;
        }
        num_steps += 1;
    }
    assert_eq!(engine.num_free_blocks(), engine.stats().num_blocks, "all blocks come back");
    (answers, num_steps)
}

fn no_draft(_: usize, _: &[TokenId]) -> Vec<TokenId> {
    Vec::new()
}

fn request(prompt: Vec<TokenId>, sampling: SamplingParams) -> Request {
    let sampling = SamplingParams { max_tokens: Some(75), logprobs: Some(3), ..sampling };
    Request { prompt, sampling, grammar: None }
}

fn prompt(num_tokens: u32) -> Vec<TokenId> {
    (0..num_tokens).map(|t| TokenId(t * 13 % 140)).collect()
}

fn hot(seed: u64) -> SamplingParams {
    SamplingParams { temperature: 1.2, top_p: 0.95, seed, ..SamplingParams::default() }
}

/// Requests in which every field that changes what is sampled, or where an answer ends, has a part.
fn requests() -> Vec<Request> {
    let compiler = GrammarCompiler::new(&tokenizer(), engine(AMPLE).model().config().vocab_size, &[STOP_TOKEN]);
    let grammar = |lark: &str| -> Option<Grammar> { Some(compiler.as_ref().unwrap().compile(lark).unwrap()) };
    let penalties = SamplingParams {
        repetition_penalty: 1.2,
        presence_penalty: 0.4,
        frequency_penalty: 0.3,
        min_p: 0.01,
        top_k: Some(60),
        ..hot(3)
    };
    let stop_token = SamplingParams {
        stop_token_ids: vec![STOP_TOKEN],
        logit_bias: [(STOP_TOKEN, 5.0), (TokenId(9), 2.0)].into(),
        ..hot(4)
    };
    let json = r#"start: %json {"type": "array", "items": {"type": "integer", "maximum": 99999}, "minItems": 2, "maxItems": 3}"#;
    let mut requests = vec![
        request(prompt(7), SamplingParams::default()),
        request(prompt(19), penalties),
        request(prompt(20), SamplingParams { min_tokens: 9, ..stop_token.clone() }),
        request(prompt(21), stop_token.clone()),
        Request { grammar: grammar(json), ..request(prompt(4), hot(5)) },
        Request { grammar: grammar("start: /([A-Z][a-z]{3,9} ){2}end/"), ..request(prompt(5), stop_token) },
        request(prompt(33), SamplingParams { return_expert_ids: true, ..hot(6) }),
        request(prompt(30), SamplingParams { prompt_logprobs: Some(2), ..hot(7) }),
    ];
    requests.extend((10..13).map(|seed| request(prompt(70), hot(seed))));
    // A stop string that the answer holds in its middle.
    let mut stopped = request(prompt(11), hot(8));
    let (free, _) = run(&mut engine(AMPLE), std::slice::from_ref(&stopped), &no_draft);
    let stop: String = free[0].text.chars().skip(free[0].text.chars().count() / 2).take(3).collect();
    stopped.sampling.stop = vec![stop];
    requests.push(stopped);
    requests
}

#[test]
fn answers_are_the_same_bits_with_drafts_that_are_right_wrong_or_both() {
    let requests = requests();
    let (expected, num_steps) = run(&mut engine(AMPLE), &requests, &no_draft);
    let ends: Vec<Option<FinishReason>> = expected.iter().map(|answer| answer.finish_reason).collect();
    let num_ends = |reason| ends.iter().filter(|&&end| end == Some(reason)).count();
    assert!(num_ends(FinishReason::Stop) >= 4 && num_ends(FinishReason::Length) >= 4, "{ends:?}");
    let rest = |index: usize, said: &[TokenId]| expected[index].tokens[said.len()..].to_vec();
    let wrong = |token: TokenId| TokenId((token.0 + 1) % 140);
    let all_wrong = |index: usize, said: &[TokenId]| rest(index, said).into_iter().map(wrong).collect();
    let right_at_first = |index: usize, said: &[TokenId]| {
        let mut draft = rest(index, said);
        let num_right = (said.len() * 7 + index) % 4;
        draft.iter_mut().skip(num_right).take(1).for_each(|token| *token = wrong(*token));
        draft
    };
    let random = |index: usize, said: &[TokenId]| (1..6).map(|i| TokenId((i * said.len() + index) as u32)).collect();
    let tight = [Size { num_blocks: 6, max_batched_tokens: 60 }, Size { num_blocks: 30, max_batched_tokens: 19 }];
    for size in [AMPLE].into_iter().chain(tight) {
        let drafters: [(&str, &Drafter); 4] =
            [("right", &rest), ("wrong", &all_wrong), ("half right", &right_at_first), ("random", &random)];
        for (name, drafter) in drafters {
            let mut engine = engine(size);
            let (answers, num_steps_with_drafts) = run(&mut engine, &requests, drafter);
            for (answer, expected) in answers.iter().zip(&expected) {
                assert_eq!(answer.tokens, expected.tokens, "{name} drafts, {size:?}");
                assert!(answer == expected, "{name} drafts, {size:?}, {} and {}", answer.text, expected.text);
            }
            assert_eq!(engine.stats().num_preemptions > 0, size.num_blocks == 6);
            if name == "right" && size.num_blocks == AMPLE.num_blocks {
                let fewest_steps = num_steps.div_ceil(MAX_DRAFT_TOKENS + 1);
                assert!(num_steps_with_drafts <= fewest_steps + 2, "{num_steps_with_drafts} for {num_steps}");
            }
            // Once more: now the prompts are found, also what was behind them.
            let (again, _) = run(&mut engine, &requests, drafter);
            assert!(again == expected, "{name} drafts, {size:?}, prompts found in the cache");
        }
    }
}

#[test]
fn what_drafts_did_not_keep_is_found_by_nobody() {
    let mut engine = engine(AMPLE);
    let first = request(prompt(30), hot(1));
    let (expected, _) = run(&mut engine, std::slice::from_ref(&first), &no_draft);
    // The draft fills a block with tokens that are all rejected; a prompt of just these tokens computes them.
    let draft = vec![TokenId(1); MAX_DRAFT_TOKENS];
    let (answers, _) = run(&mut engine, &[first], &|_, _| draft.clone());
    assert_eq!(answers, expected);
    let mut longer = prompt(30);
    longer.extend([&expected[0].tokens[..1], &draft].concat());
    let alone = run(&mut self::engine(AMPLE), &[request(longer.clone(), hot(2))], &no_draft).0;
    assert_eq!(run(&mut engine, &[request(longer, hot(2))], &no_draft).0, alone);
}
