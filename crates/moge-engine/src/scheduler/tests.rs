use super::*;
use crate::{FinishReason, Sampled, SamplingParams, ScheduledSequence};

const EOS: TokenId = TokenId(9);

fn config() -> SchedulerConfig {
    SchedulerConfig {
        vocab_size: 10,
        max_sequence_tokens: 5 * BLOCK_SIZE,
        num_blocks: 7,
        max_batched_tokens: 2 * BLOCK_SIZE,
        max_running: 4,
        max_waiting: 3,
        eos_token_ids: vec![EOS],
        max_draft_tokens: 0,
    }
}

fn request(num_prompt_tokens: usize, max_tokens: usize) -> Request {
    request_of(1, num_prompt_tokens, max_tokens)
}

/// A prompt of one token again and again.
fn request_of(token: u32, num_prompt_tokens: usize, max_tokens: usize) -> Request {
    let sampling = SamplingParams { max_tokens: Some(max_tokens), ..SamplingParams::default() };
    Request { prompt: vec![TokenId(token); num_prompt_tokens], sampling, grammar: None }
}

/// One token if the sequence samples.
fn result(scheduled: &ScheduledSequence, token: u32) -> SequenceResult {
    let sampled = Sampled { token: TokenId(token), logprobs: None };
    SequenceResult { sampled: vec![sampled; scheduled.num_sample_rows.min(1)], ..SequenceResult::default() }
}

/// Run one step in which every sequence that samples gets `token`.
fn step(scheduler: &mut Scheduler, token: u32) -> Vec<SequenceOutput> {
    let step = scheduler.schedule().unwrap();
    let results = step.sequences.iter().map(|s| result(s, token)).collect();
    scheduler.postprocess(&step, results)
}

#[test]
fn a_bad_prompt_is_refused_by_name() {
    let mut scheduler = Scheduler::new(config(), None);
    assert_eq!(scheduler.add_request(request(0, 1)), Err(AdmitError::EmptyPrompt));
    let too_long = AdmitError::PromptTooLong { num_tokens: 160, max_tokens: 159 };
    assert_eq!(scheduler.add_request(request(160, 1)), Err(too_long));
    let mut unknown = request(4, 1);
    unknown.prompt[2] = TokenId(10);
    let error = AdmitError::TokenOutOfVocabulary { index: 2, token: 10, vocab_size: 10 };
    assert_eq!(scheduler.add_request(unknown), Err(error));
    assert!(!scheduler.has_unfinished());
}

#[test]
fn a_request_that_the_cache_can_never_hold_is_refused() {
    let mut scheduler = Scheduler::new(SchedulerConfig { num_blocks: 2, ..config() }, None);
    let error = AdmitError::NeverFits { num_prompt_tokens: 60, max_tokens: 5, num_blocks: 3, max_blocks: 2 };
    assert_eq!(scheduler.add_request(request(60, 5)), Err(error));
    let mut open_end = request(64, 1);
    open_end.sampling.max_tokens = None;
    let error = AdmitError::NeverFits { num_prompt_tokens: 64, max_tokens: 1, num_blocks: 3, max_blocks: 2 };
    assert_eq!(scheduler.add_request(open_end), Err(error));
    scheduler.add_request(request(60, 4)).unwrap();
}

#[test]
fn huge_numbers_in_a_request_overflow_nothing() {
    let mut scheduler = Scheduler::new(config(), None);
    let mut huge = request(3, usize::MAX);
    huge.sampling.top_k = Some(usize::MAX);
    huge.sampling.min_tokens = usize::MAX;
    scheduler.add_request(huge).unwrap();
    assert_eq!(step(&mut scheduler, 2).len(), 1);
    assert_eq!(scheduler.num_free_blocks(), 6, "it got one block, and takes more as it grows");
}

#[test]
fn the_queue_refuses_what_is_too_much() {
    let mut scheduler = Scheduler::new(config(), None);
    for _ in 0..3 {
        scheduler.add_request(request(2, 2)).unwrap();
    }
    assert_eq!(scheduler.add_request(request(2, 2)), Err(AdmitError::QueueFull { max_waiting: 3 }));
    step(&mut scheduler, 2);
    scheduler.add_request(request(2, 2)).unwrap();
}

#[test]
fn without_max_tokens_a_sequence_ends_with_the_context_or_the_cache() {
    for (num_blocks, max_total_tokens) in [(7, 5 * BLOCK_SIZE), (3, 3 * BLOCK_SIZE)] {
        let mut scheduler = Scheduler::new(SchedulerConfig { num_blocks, ..config() }, None);
        let mut open_end = request(10, 1);
        open_end.sampling.max_tokens = None;
        scheduler.add_request(open_end).unwrap();
        let mut num_sampled_tokens = 0;
        let finish_reason = loop {
            let output = step(&mut scheduler, 2).remove(0);
            num_sampled_tokens += output.sampled.len();
            if output.finish_reason.is_some() {
                break output.finish_reason;
            }
        };
        assert_eq!((num_sampled_tokens, finish_reason), (max_total_tokens - 10, Some(FinishReason::Length)));
    }
}

#[test]
fn decodes_come_first_and_a_long_prompt_fills_the_rest() {
    let mut scheduler = Scheduler::new(config(), None);
    let long = scheduler.add_request(request(100, 3)).unwrap();
    let short = scheduler.add_request(request(5, 8)).unwrap();
    let first = step(&mut scheduler, 2);
    assert_eq!(first.iter().map(|o| (o.id, o.num_prefilled_tokens)).collect::<Vec<_>>(), [(long, 64)]);
    let second = step(&mut scheduler, 2);
    let prefilled: Vec<_> = second.iter().map(|o| (o.id, o.num_prefilled_tokens, !o.sampled.is_empty())).collect();
    assert_eq!(prefilled, [(long, 36, true), (short, 5, true)]);
    let next = scheduler.add_request(request_of(3, 90, 3)).unwrap();
    let third = step(&mut scheduler, 2);
    let ids: Vec<_> = third.iter().map(|o| (o.id, o.num_prefilled_tokens)).collect();
    assert_eq!(ids, [(long, 0), (short, 0)], "the new one waits for blocks: 4 + 1 + 3 are more than 7");
    step(&mut scheduler, EOS.0);
    let ids: Vec<_> = step(&mut scheduler, 2).iter().map(|o| (o.id, o.num_prefilled_tokens)).collect();
    assert_eq!(ids, [(next, 64)]);
}

#[test]
fn a_small_request_does_not_overtake_a_large_one() {
    let mut scheduler = Scheduler::new(config(), None);
    scheduler.add_request(request_of(1, 100, 40)).unwrap();
    let large = scheduler.add_request(request_of(2, 90, 60)).unwrap();
    let small = scheduler.add_request(request_of(3, 2, 2)).unwrap();
    step(&mut scheduler, 2);
    step(&mut scheduler, 2);
    assert_eq!((scheduler.num_running(), scheduler.num_waiting(), scheduler.num_free_blocks()), (1, 2, 3));
    step(&mut scheduler, EOS.0);
    step(&mut scheduler, 2);
    let ids: Vec<_> = step(&mut scheduler, 2).iter().map(|output| output.id).collect();
    assert_eq!(ids, [large, small]);
}

#[test]
fn the_youngest_gives_its_blocks_to_the_oldest_and_goes_on_where_it_was() {
    let mut scheduler = Scheduler::new(SchedulerConfig { num_blocks: 5, ..config() }, None);
    let [old, young] = [1, 3].map(|token| scheduler.add_request(request_of(token, 31, 100)).unwrap());
    step(&mut scheduler, 2);
    // Each has two blocks soon; the fifth goes to the old one, and then that of the young one.
    let mut preempted_after = None;
    let mut num_outputs = [1, 1];
    for number in 0..200 {
        let Some(step) = scheduler.schedule() else { break };
        scheduler.check_integrity();
        if !step.preempted.is_empty() {
            assert_eq!((&step.preempted[..], preempted_after), (&[young][..], None));
            preempted_after = Some(number);
        }
        let results = step.sequences.iter().map(|s| result(s, 2)).collect();
        for output in scheduler.postprocess(&step, results) {
            num_outputs[usize::from(output.id == young)] += output.sampled.len();
        }
    }
    assert_eq!(preempted_after, Some(2 * BLOCK_SIZE + 1 - 32), "when both need a third block");
    assert_eq!((num_outputs, old < young), ([100, 100], true));
    assert_eq!(scheduler.num_free_blocks(), 5);
}

#[test]
fn prompts_that_begin_alike_are_computed_once() {
    let mut scheduler = Scheduler::new(config(), None);
    scheduler.add_request(request(70, 1)).unwrap();
    let output = (0..3).map(|_| step(&mut scheduler, 2).remove(0)).find(|o| o.finish_reason.is_some()).unwrap();
    assert_eq!(output.num_cached_tokens, 0);
    for (num_tokens, num_cached) in [(70, 64), (64, 32), (65, 64), (31, 0)] {
        scheduler.add_request(request(num_tokens, 1)).unwrap();
        let output = step(&mut scheduler, 2).remove(0);
        assert_eq!((output.num_cached_tokens, output.num_prefilled_tokens), (num_cached, num_tokens - num_cached));
    }
    let mut with_logprobs = request(40, 1);
    with_logprobs.sampling.prompt_logprobs = Some(0);
    scheduler.add_request(with_logprobs).unwrap();
    assert_eq!(scheduler.schedule().unwrap().batch.tokens.len(), 40, "all its rows want logits");
}

#[test]
fn a_cancelled_sequence_is_gone_at_once_and_only_once() {
    let mut scheduler = Scheduler::new(config(), None);
    let running = scheduler.add_request(request(40, 100)).unwrap();
    step(&mut scheduler, 2);
    let waiting = scheduler.add_request(request(100, 30)).unwrap();
    for id in [waiting, running] {
        let output = scheduler.cancel(id).unwrap();
        assert_eq!((output.id, output.finish_reason), (id, Some(FinishReason::Cancelled)));
        assert_eq!(scheduler.cancel(id), None);
        scheduler.check_integrity();
    }
    assert_eq!((scheduler.num_free_blocks(), scheduler.schedule()), (7, None));
}
