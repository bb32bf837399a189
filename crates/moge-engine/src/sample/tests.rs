use std::collections::BTreeMap;

use moge_model::{BLOCK_SIZE, Batch, Isa};

use super::*;
use crate::{Request, RowLogprobs, Scheduler, SchedulerConfig};

const VOCAB_SIZE: usize = 19;
const NUM_BLOCKS: usize = 90;
const EOS: TokenId = TokenId(18);

/// A model whose KV cache holds the tokens themselves, and whose logits are a hash of all tokens up to the row.
struct ToyModel {
    kv_cache: Vec<TokenId>,
}

impl ToyModel {
    fn forward(&mut self, batch: &Batch) -> Vec<f32> {
        let mut row = 0;
        let mut logits = Vec::new();
        for rows in &batch.sequences {
            for position in rows.first_position..rows.first_position + rows.num_rows {
                let slot = |position: usize| {
                    rows.block_table[position / BLOCK_SIZE].0 as usize * BLOCK_SIZE + position % BLOCK_SIZE
                };
                self.kv_cache[slot(position)] = batch.tokens[row];
                if batch.logit_rows.contains(&(row as u32)) {
                    let prefix: Vec<TokenId> = (0..=position).map(|position| self.kv_cache[slot(position)]).collect();
                    logits.extend(toy_logits(&prefix));
                }
                row += 1;
            }
        }
        logits
    }
}

fn toy_logits(prefix: &[TokenId]) -> Vec<f32> {
    let hash = prefix.iter().fold(7u32, |hash, token| (hash ^ token.0).wrapping_mul(0x0100_0193).rotate_left(5));
    (0..VOCAB_SIZE as u32).map(|id| (hash.wrapping_mul(2 * id + 1) >> 16) as f32 / 16384.0).collect()
}

/// All that became of one request.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    sampled: Vec<Sampled>,
    prompt_logprobs: Option<Vec<Option<RowLogprobs>>>,
    finish_reason: Option<FinishReason>,
}

/// Serve `requests`, each added before the step of the given number; the answers in the same order.
fn serve(max_batched_tokens: usize, requests: &[(usize, Request)]) -> Vec<Answer> {
    serve_with_drafts(max_batched_tokens, requests, &|_, _| Vec::new())
}

/// The same where `drafter` proposes what follows the tokens that a request has said so far.
fn serve_with_drafts(
    max_batched_tokens: usize,
    requests: &[(usize, Request)],
    drafter: &dyn Fn(usize, &[Sampled]) -> Vec<TokenId>,
) -> Vec<Answer> {
    let mut scheduler = Scheduler::new(
        SchedulerConfig {
            vocab_size: VOCAB_SIZE,
            max_sequence_tokens: 10 * BLOCK_SIZE,
            num_blocks: NUM_BLOCKS,
            max_batched_tokens,
            max_running: 21,
            max_waiting: 30,
            eos_token_ids: vec![EOS, TokenId(VOCAB_SIZE as u32)], // one that a file may name and no model can sample
            max_draft_tokens: 5,
        },
        None,
    );
    let mut model = ToyModel { kv_cache: vec![TokenId(0); NUM_BLOCKS * BLOCK_SIZE] };
    let (cpu, samplers) = (Cpu::new(Isa::select().unwrap(), 2), Samplers::default());
    let mut index_of = BTreeMap::new();
    let mut answers: Vec<Answer> = requests.iter().map(|_| Answer::default()).collect();
    let last_arrival = requests.iter().map(|(arrival, _)| *arrival).max().unwrap();
    for number in 0.. {
        for (index, (_, request)) in requests.iter().enumerate().filter(|(_, (arrival, _))| *arrival == number) {
            index_of.insert(scheduler.add_request(request.clone()).unwrap(), index);
        }
        for (&id, &index) in &index_of {
            scheduler.set_draft(id, drafter(index, &answers[index].sampled));
        }
        let Some(step) = scheduler.schedule() else {
            if number >= last_arrival {
                break;
            }
            continue;
        };
        let rows = scheduler.logit_rows(&step, BTreeMap::new());
        let results = sample(&cpu, &samplers, &rows, &model.forward(&step.batch), VOCAB_SIZE);
        for output in scheduler.postprocess(&step, results) {
            let answer = &mut answers[index_of[&output.id]];
            assert_eq!(answer.finish_reason, None);
            answer.sampled.extend(output.sampled);
            answer.prompt_logprobs = answer.prompt_logprobs.take().or(output.prompt_logprobs);
            answer.finish_reason = output.finish_reason;
        }
    }
    assert_eq!(scheduler.num_free_blocks(), NUM_BLOCKS);
    answers
}

fn serve_one(request: Request) -> Answer {
    serve(1000, &[(0, request)]).remove(0)
}

/// A request of its own for each `n`.
fn request(n: usize) -> Request {
    Request {
        prompt: (0..11 * n + 3).map(|i| TokenId(((i * i + 5 * n) % VOCAB_SIZE) as u32)).collect(),
        sampling: SamplingParams {
            max_tokens: Some(13 + n),
            temperature: 0.8,
            top_k: n.is_multiple_of(2).then_some(8),
            top_p: 0.95,
            frequency_penalty: 0.1,
            repetition_penalty: 1.1,
            seed: 1000 + n as u64,
            ignore_eos: true,
            logprobs: Some(3),
            prompt_logprobs: n.is_multiple_of(3).then_some(2),
            ..SamplingParams::default()
        },
        grammar: None,
    }
}

#[test]
fn the_same_seed_gives_the_same_answer_in_any_batch_and_with_any_chunks() {
    let alone: Vec<Answer> = (0..17).map(|n| serve_one(request(n))).collect();
    for max_batched_tokens in [1, 7, 64, 1000] {
        for spread in [0, 1, 5] {
            let requests: Vec<(usize, Request)> = (0..17).map(|n| ((n * 7 % 17) * spread, request(n))).collect();
            let together = serve(max_batched_tokens, &requests);
            assert_eq!(together, alone, "{max_batched_tokens} tokens per step, a request every {spread} steps");
        }
    }
}

#[test]
fn a_draft_changes_no_token_and_no_log_probability() {
    let alone: Vec<Answer> = (0..17).map(|n| serve_one(request(n))).collect();
    for max_batched_tokens in [7, 64, 1000] {
        for num_right in 0..6 {
            let drafter = |index: usize, said: &[Sampled]| {
                let mut rest: Vec<TokenId> = alone[index].sampled[said.len()..].iter().map(|s| s.token).collect();
                // None is what is said there.
                rest.iter_mut().skip(num_right).for_each(|token| token.0 = (token.0 + 1) % VOCAB_SIZE as u32);
                rest
            };
            let requests: Vec<(usize, Request)> = (0..17).map(|n| (n % 4, request(n))).collect();
            let together = serve_with_drafts(max_batched_tokens, &requests, &drafter);
            assert_eq!(together, alone, "{max_batched_tokens} tokens per step, {num_right} of a draft are right");
        }
    }
}

#[test]
fn another_seed_gives_another_answer() {
    let mut other = request(4);
    other.sampling.seed += 1;
    assert_ne!(serve_one(other).sampled, serve_one(request(4)).sampled);
}

#[test]
fn logprobs_belong_to_the_token_after_their_row() {
    let Request { prompt, sampling, grammar } = request(9); // 102 prompt tokens: more than one chunk of prompt logits
    let answer = serve_one(Request { prompt: prompt.clone(), sampling, grammar });
    let expected: Vec<Option<RowLogprobs>> =
        (0..prompt.len()).map(|i| (i > 0).then(|| row_logprobs(&toy_logits(&prompt[..i]), prompt[i], 2))).collect();
    assert_eq!(answer.prompt_logprobs, Some(expected));
    let mut prefix = prompt;
    for sampled in &answer.sampled {
        assert_eq!(sampled.logprobs, Some(row_logprobs(&toy_logits(&prefix), sampled.token, 3)));
        prefix.push(sampled.token);
    }
    assert_eq!((answer.sampled.len(), answer.finish_reason), (22, Some(FinishReason::Length)));
}

#[test]
fn no_stop_token_is_sampled_before_min_tokens_and_it_is_the_last_one_after() {
    let with = |min_tokens, ignore_eos| {
        let sampling = SamplingParams {
            max_tokens: Some(6),
            min_tokens,
            ignore_eos,
            logit_bias: [(EOS, 100.0)].into(),
            ..SamplingParams::default()
        };
        let answer = serve_one(Request { prompt: vec![TokenId(3)], sampling, grammar: None });
        let is_eos: Vec<bool> = answer.sampled.iter().map(|sampled| sampled.token == EOS).collect();
        (is_eos, answer.finish_reason)
    };
    assert_eq!(with(0, false), (vec![true], Some(FinishReason::Stop)));
    assert_eq!(with(2, false), (vec![false, false, true], Some(FinishReason::Stop)));
    assert_eq!(with(6, false), (vec![false; 6], Some(FinishReason::Length)));
    assert_eq!(with(2, true), (vec![true; 6], Some(FinishReason::Length)));
}

#[test]
fn a_row_without_a_possible_token_ends_its_own_sequence_only() {
    let mut scheduler = Scheduler::new(
        SchedulerConfig {
            vocab_size: 3,
            max_sequence_tokens: 8,
            num_blocks: 2,
            max_batched_tokens: 5,
            max_running: 4,
            max_waiting: 6,
            eos_token_ids: vec![],
            max_draft_tokens: 0,
        },
        None,
    );
    let [broken, sound] = [0, 1].map(|token| {
        let request = Request { prompt: vec![TokenId(token)], sampling: SamplingParams::default(), grammar: None };
        scheduler.add_request(request).unwrap()
    });
    let step = scheduler.schedule().unwrap();
    let logits = [f32::NAN, f32::NAN, f32::NEG_INFINITY, 1.0, f32::NAN, 2.0];
    let rows = scheduler.logit_rows(&step, BTreeMap::new());
    let results = sample(&Cpu::new(Isa::select().unwrap(), 2), &Samplers::default(), &rows, &logits, 3);
    assert_eq!((&results[0].sampled[..], results[0].end), (&[][..], Some(FinishReason::NoFiniteLogit)));
    let outputs = scheduler.postprocess(&step, results);
    assert_eq!((outputs[0].id, outputs[0].finish_reason), (broken, Some(FinishReason::NoFiniteLogit)));
    assert_eq!((outputs[1].id, outputs[1].finish_reason), (sound, None));
    assert_eq!(outputs[1].sampled, [Sampled { token: TokenId(2), logprobs: None }]);
    assert_eq!((scheduler.num_running(), scheduler.num_free_blocks()), (1, 1));
}
