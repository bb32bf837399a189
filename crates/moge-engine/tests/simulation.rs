//! Seeded random traffic through `schedule()` and `postprocess()`. Sampled tokens are scripted; the model is a KV
//! cache that holds tokens instead of keys and values, so that a wrong block, slot or position shows at once.

use std::collections::BTreeMap;

use moge_engine::{
    AdmitError, FinishReason, NoFiniteLogit, Request, RowLogprobs, Sampled, SamplingParams, Scheduler, SchedulerConfig,
    SeqId, SequenceOutput, SequenceResult, Step,
};
use moge_model::{BLOCK_SIZE, SequenceRows, TokenId};

const EOS: TokenId = TokenId(0);
const VOCAB_SIZE: usize = 23;
const NUM_TRAFFIC_STEPS: usize = 150;

#[test]
fn random_traffic_is_served_in_order_without_a_leak_or_a_lost_row() {
    let mut total = Counts::default();
    for seed in 0..60 {
        let mut simulation = Simulation::new(seed);
        for _ in 0..NUM_TRAFFIC_STEPS {
            simulation.arrive();
            simulation.cancel();
            simulation.step();
        }
        simulation.drain();
        total.add(&simulation.counts);
    }
    // The traffic reached every path.
    let Counts { stop, length, cancelled, failed, queue_full, never_fits, chunked, prompt_logprobs } = total;
    for count in [stop, length, cancelled, failed, queue_full, never_fits, chunked, prompt_logprobs] {
        assert!(count > 50, "{total:?}");
    }
}

/// How often things happened.
#[derive(Debug, Default)]
struct Counts {
    stop: usize,
    length: usize,
    cancelled: usize,
    failed: usize,
    queue_full: usize,
    never_fits: usize,
    chunked: usize,
    prompt_logprobs: usize,
}

/// What a client knows about its sequence.
struct Client {
    params: SamplingParams,
    num_prompt_tokens: usize,
    /// Prompt and what was sampled.
    tokens: Vec<TokenId>,
    num_computed_tokens: usize,
}

struct Simulation {
    rng: Rng,
    config: SchedulerConfig,
    scheduler: Scheduler,
    /// Unfinished sequences.
    clients: BTreeMap<SeqId, Client>,
    /// The token in each slot of each block.
    kv_cache: Vec<[Option<TokenId>; BLOCK_SIZE]>,
    counts: Counts,
}

impl Simulation {
    fn new(seed: u64) -> Simulation {
        let mut rng = Rng(seed);
        let config = SchedulerConfig {
            vocab_size: VOCAB_SIZE,
            max_sequence_tokens: rng.range(BLOCK_SIZE, 7 * BLOCK_SIZE),
            num_blocks: rng.range(2, 14),
            max_batched_tokens: rng.range(1, 90),
            max_running: rng.range(1, 11),
            max_waiting: rng.range(1, 8),
            eos_token_ids: vec![EOS],
        };
        let scheduler = Scheduler::new(config.clone(), None);
        let kv_cache = vec![[None; BLOCK_SIZE]; config.num_blocks];
        Simulation { rng, config, scheduler, clients: BTreeMap::new(), kv_cache, counts: Counts::default() }
    }

    /// Perhaps some new requests.
    fn arrive(&mut self) {
        for _ in 0..self.rng.range(0, 3) {
            let prompt: Vec<TokenId> = (0..self.rng.range(1, 5 * BLOCK_SIZE)).map(|_| self.rng.token()).collect();
            let max_tokens = self.rng.range(1, 40);
            let params = SamplingParams {
                max_tokens: (max_tokens < 30).then_some(max_tokens),
                min_tokens: self.rng.range(0, 3).min(max_tokens),
                ignore_eos: self.rng.one_in(3),
                stop_token_ids: if self.rng.one_in(2) { vec![TokenId(5)] } else { vec![] },
                prompt_logprobs: self.rng.one_in(3).then_some(0),
                ..SamplingParams::default()
            };
            let request = Request { prompt: prompt.clone(), sampling: params.clone() };
            match self.scheduler.add_request(request) {
                Ok(id) => {
                    let num_prompt_tokens = prompt.len();
                    let client = Client { params, num_prompt_tokens, tokens: prompt, num_computed_tokens: 0 };
                    assert!(self.clients.last_key_value().is_none_or(|(&last, _)| last < id));
                    self.clients.insert(id, client);
                }
                Err(AdmitError::QueueFull { max_waiting }) => {
                    assert_eq!(self.scheduler.num_waiting(), max_waiting);
                    self.counts.queue_full += 1;
                }
                Err(AdmitError::NeverFits { num_blocks, max_blocks, .. }) => {
                    assert!(num_blocks > max_blocks);
                    self.counts.never_fits += 1;
                }
                Err(AdmitError::PromptTooLong { num_tokens, max_tokens }) => assert!(num_tokens > max_tokens),
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Perhaps cancel a sequence, or one that has ended before.
    fn cancel(&mut self) {
        if !self.rng.one_in(12) {
            return;
        }
        let id = SeqId(self.rng.next() % (self.clients.last_key_value().map_or(0, |(id, _)| id.0) + 2));
        let output = self.scheduler.cancel(id);
        assert_eq!(output.is_some(), self.clients.remove(&id).is_some());
        if let Some(output) = output {
            assert_eq!((output.id, output.finish_reason), (id, Some(FinishReason::Cancelled)));
            self.counts.cancelled += 1;
        }
        self.scheduler.check_integrity();
    }

    fn step(&mut self) {
        let Some(step) = self.scheduler.schedule() else {
            assert!(!self.scheduler.has_unfinished(), "there is work and none is scheduled");
            return;
        };
        self.check_step(&step);
        self.scheduler.check_integrity();
        let results: Vec<SequenceResult> = step
            .sequences
            .iter()
            .zip(&step.batch.sequences)
            .map(|(s, rows)| self.result(s.id, rows, s.samples))
            .collect();
        let outputs = self.scheduler.postprocess(&step, results.clone());
        assert_eq!(outputs.len(), results.len());
        for ((rows, result), output) in step.batch.sequences.iter().zip(results).zip(outputs) {
            self.take_output(rows.num_rows, result, output);
        }
        self.scheduler.check_integrity();
    }

    /// Without new arrivals everything ends, and soon: each step computes at least one token of the oldest sequence.
    fn drain(&mut self) {
        let most_steps: usize = self.clients.len() * self.config.max_sequence_tokens;
        for _ in 0..most_steps {
            self.step();
        }
        assert!(!self.scheduler.has_unfinished() && self.clients.is_empty(), "a sequence starves");
        assert_eq!(self.scheduler.num_free_blocks(), self.config.num_blocks);
    }

    /// The batch is well-formed, in its budget, fair, and each row continues its sequence.
    fn check_step(&mut self, step: &Step) {
        let batch = &step.batch;
        assert_eq!(step.sequences.len(), batch.sequences.len());
        assert_eq!(batch.num_rows(), batch.sequences.iter().map(|rows| rows.num_rows).sum::<usize>());
        assert!(batch.num_rows() <= self.config.max_batched_tokens);
        assert!(batch.logit_rows.len() <= self.config.max_logit_rows());
        assert!(batch.logit_rows.is_sorted_by(|a, b| a < b));
        self.check_fairness(step);
        let mut logit_rows = Vec::new();
        let mut end_row = 0;
        for (scheduled, rows) in step.sequences.iter().zip(&batch.sequences) {
            let client = &self.clients[&scheduled.id];
            let SequenceRows { num_rows, first_position, ref block_table } = *rows;
            let end = first_position + num_rows;
            assert_eq!(first_position, client.num_computed_tokens, "each token is computed once and in order");
            assert_eq!(batch.tokens[end_row..end_row + num_rows], client.tokens[first_position..end]);
            assert_eq!(scheduled.samples, end == client.tokens.len());
            end_row += num_rows;
            for position in first_position..end {
                let block = block_table[position / BLOCK_SIZE].0 as usize;
                self.kv_cache[block][position % BLOCK_SIZE] = Some(client.tokens[position]);
            }
            let slots = block_table.iter().flat_map(|block| self.kv_cache[block.0 as usize]);
            assert!(slots.take(end).eq(client.tokens[..end].iter().copied().map(Some)), "the cache was overwritten");
            let is_prefill = first_position < client.num_prompt_tokens;
            let wants_all = is_prefill && client.params.prompt_logprobs.is_some();
            let num_logit_rows = if wants_all { num_rows } else { usize::from(scheduled.samples) };
            assert_eq!(scheduled.num_logit_rows, num_logit_rows);
            logit_rows.extend((end_row - num_logit_rows) as u32..end_row as u32);
            self.counts.chunked += usize::from(is_prefill && !scheduled.samples);
        }
        assert_eq!(batch.logit_rows, logit_rows);
    }

    /// All decodes come first; then prefills in order of arrival, none started before an older one.
    fn check_fairness(&self, step: &Step) {
        let is_decode = |id: &SeqId| self.clients[id].num_computed_tokens >= self.clients[id].num_prompt_tokens;
        let scheduled: Vec<SeqId> = step.sequences.iter().map(|s| s.id).collect();
        let decodes: Vec<SeqId> = self.clients.keys().copied().filter(is_decode).collect();
        assert_eq!(scheduled[..decodes.len()], decodes);
        assert!(scheduled[decodes.len()..].is_sorted_by(|a, b| a < b));
        let untouched = |id: &&SeqId| self.clients[id].num_computed_tokens == 0 && !scheduled.contains(id);
        let waits = self.clients.keys().find(untouched);
        let youngest = scheduled.iter().max();
        let wanted_prompt_logits = |id: &SeqId| self.clients[id].params.prompt_logprobs.is_some();
        // Only prompt log-probabilities, whose rows are limited, may let a younger sequence begin first.
        assert!(waits.is_none_or(|id| wanted_prompt_logits(id) || youngest < Some(id)));
    }

    fn result(&mut self, id: SeqId, rows: &SequenceRows, samples: bool) -> SequenceResult {
        let client = &self.clients[&id];
        let mut prompt_logprobs = Vec::new();
        if client.params.prompt_logprobs.is_some() {
            let following = rows.first_position + 1..(rows.first_position + rows.num_rows + 1);
            let in_prompt = following.filter(|&position| position < client.num_prompt_tokens);
            prompt_logprobs.extend(in_prompt.map(|position| logprobs_of(client.tokens[position])));
        }
        let sampled = samples.then(|| {
            let token = self.rng.token();
            if self.rng.one_in(100) { Err(NoFiniteLogit) } else { Ok(Sampled { token, logprobs: None }) }
        });
        SequenceResult { prompt_logprobs, sampled }
    }

    fn take_output(&mut self, num_rows: usize, result: SequenceResult, output: SequenceOutput) {
        let client = self.clients.get_mut(&output.id).expect("a sequence that nobody asked for");
        let was_prefill = client.num_computed_tokens < client.num_prompt_tokens;
        client.num_computed_tokens += num_rows;
        assert_eq!(output.num_prefilled_tokens, if was_prefill { num_rows } else { 0 });
        let prompt_is_complete = was_prefill && client.num_computed_tokens == client.num_prompt_tokens;
        let wants_prompt_logprobs = client.params.prompt_logprobs.is_some();
        assert_eq!(output.prompt_logprobs.is_some(), prompt_is_complete && wants_prompt_logprobs);
        if let Some(prompt_logprobs) = output.prompt_logprobs {
            let following = client.tokens[1..client.num_prompt_tokens].iter().map(|&token| Some(logprobs_of(token)));
            assert!(prompt_logprobs.into_iter().eq(std::iter::once(None).chain(following)));
            self.counts.prompt_logprobs += 1;
        }
        let expected = match result.sampled.clone() {
            None => None,
            Some(Err(NoFiniteLogit)) => Some(FinishReason::NoFiniteLogit),
            Some(Ok(sampled)) => client.append(sampled.token, &self.config),
        };
        assert_eq!(output.finish_reason, expected);
        assert_eq!(output.sampled, result.sampled.and_then(Result::ok));
        match expected {
            None => return,
            Some(FinishReason::Stop) => self.counts.stop += 1,
            Some(FinishReason::Length) => self.counts.length += 1,
            Some(FinishReason::NoFiniteLogit) => self.counts.failed += 1,
            Some(FinishReason::Cancelled) => panic!("nobody cancelled"),
        }
        self.clients.remove(&output.id);
    }
}

impl Client {
    /// Take a token; whether and why it must be the last one.
    fn append(&mut self, token: TokenId, config: &SchedulerConfig) -> Option<FinishReason> {
        self.tokens.push(token);
        let num_output_tokens = self.tokens.len() - self.num_prompt_tokens;
        let is_eos = token == EOS && !self.params.ignore_eos;
        if num_output_tokens > self.params.min_tokens && (is_eos || self.params.stop_token_ids.contains(&token)) {
            return Some(FinishReason::Stop);
        }
        let context = config.max_sequence_tokens;
        let is_full = match self.params.max_tokens {
            Some(max_tokens) => num_output_tokens == max_tokens || self.tokens.len() == context,
            None => self.tokens.len() == context.min(config.num_blocks * BLOCK_SIZE),
        };
        is_full.then_some(FinishReason::Length)
    }
}

impl Counts {
    fn add(&mut self, other: &Counts) {
        self.stop += other.stop;
        self.length += other.length;
        self.cancelled += other.cancelled;
        self.failed += other.failed;
        self.queue_full += other.queue_full;
        self.never_fits += other.never_fits;
        self.chunked += other.chunked;
        self.prompt_logprobs += other.prompt_logprobs;
    }
}

fn logprobs_of(token: TokenId) -> RowLogprobs {
    RowLogprobs { token, logprob: -1.0 - f64::from(token.0), top: Vec::new() }
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// At least `low`, below `high`.
    fn range(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low) as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.range(0, n) == 0
    }

    fn token(&mut self) -> TokenId {
        TokenId(self.range(0, VOCAB_SIZE) as u32)
    }
}
