//! Seeded random traffic through `schedule()` and `postprocess()`. Sampled tokens are scripted; the model is a KV
//! cache that holds a hash of all tokens up to each instead of keys and values, so that a wrong block, slot or position
//! shows at once.

mod client;
mod counts;
mod script;

use std::collections::BTreeMap;

use moge_engine::{
    AdmitError, EngineStats, FinishReason, Request, Sampled, SamplingParams, ScheduledSequence, Scheduler,
    SchedulerConfig, SeqId, SequenceOutput, SequenceResult, Step,
};
use moge_model::{BLOCK_SIZE, SequenceRows, TokenId};

use client::Client;
use counts::Counts;
use script::{EOS, Rng, VOCAB_SIZE, logprobs_of, places, scripted, text_hashes};

const NUM_TRAFFIC_STEPS: usize = 300;

#[test]
fn random_traffic_is_served_in_order_without_a_leak_or_a_lost_row() {
    let mut total = Counts::default();
    for seed in 0..100 {
        let mut simulation = Simulation::new(seed);
        for _ in 0..NUM_TRAFFIC_STEPS {
            simulation.arrive();
            simulation.cancel();
            simulation.draft();
            simulation.step();
        }
        simulation.drain();
        total.add(&simulation.counts);
    }
    // The traffic reached every path.
    let Counts { stop, length, cancelled, failed, queue_full, never_fits, chunked, prompt_logprobs, .. } = total;
    let Counts { preempted, cached, expert_ids, accepted, rejected, rows, .. } = total;
    let [waiting, preempted_first, prefill, decode] = cancelled;
    let ends = [stop, length, failed, queue_full, never_fits];
    for count in ends.into_iter().chain([chunked, prompt_logprobs, expert_ids, preempted, cached]) {
        assert!(count > 50, "{total:?}");
    }
    for count in [waiting, preempted_first, prefill, decode] {
        assert!(count > 10, "{total:?}");
    }
    assert!(accepted > 5_000 && rejected > 5_000, "{total:?}");
    assert!(rows > 50_000, "{total:?}");
}

struct Simulation {
    rng: Rng,
    /// Many sequences grow long side by side, and there are too few blocks for them.
    is_crowded: bool,
    config: SchedulerConfig,
    scheduler: Scheduler,
    /// Unfinished sequences.
    clients: BTreeMap<SeqId, Client>,
    /// The text that ends in each slot of each block, as [`text_hashes`] tells it.
    kv_cache: Vec<[Option<u64>; BLOCK_SIZE]>,
    /// What many prompts begin with.
    openings: [Vec<TokenId>; 2],
    counts: Counts,
    num_steps: usize,
    /// Tokens that need not be computed, as they were in the cache; computed ones that a preemption lost; and those
    /// that sequences had in the end.
    num_found_tokens: usize,
    num_lost_tokens: usize,
    num_kept_tokens: usize,
    /// What the scheduler should count.
    stats: EngineStats,
}

impl Simulation {
    fn new(seed: u64) -> Simulation {
        let mut rng = Rng(seed);
        let is_crowded = seed % 2 == 1;
        let (least_tokens, least_running) = if is_crowded { (4 * BLOCK_SIZE, 5) } else { (BLOCK_SIZE, 1) };
        let config = SchedulerConfig {
            vocab_size: VOCAB_SIZE,
            max_sequence_tokens: rng.range(least_tokens, 7 * BLOCK_SIZE),
            num_blocks: rng.range(2, 14),
            max_batched_tokens: rng.range(least_tokens / 4, 90),
            max_running: rng.range(least_running, 11),
            max_waiting: rng.range(1, 8),
            eos_token_ids: vec![EOS],
            max_draft_tokens: rng.range(0, 6),
        };
        let scheduler = Scheduler::new(config.clone(), None);
        let kv_cache = vec![[None; BLOCK_SIZE]; config.num_blocks];
        let mut openings = [0; 2].map(|_| (0..3 * BLOCK_SIZE).map(|_| rng.token()).collect::<Vec<_>>());
        // The same tokens after others: they must not be taken for each other.
        let [one, other] = &mut openings;
        one[BLOCK_SIZE..].copy_from_slice(&other[BLOCK_SIZE..]);
        Simulation {
            rng,
            is_crowded,
            config,
            scheduler,
            clients: BTreeMap::new(),
            kv_cache,
            openings,
            counts: Counts::default(),
            num_steps: 0,
            num_found_tokens: 0,
            num_lost_tokens: 0,
            num_kept_tokens: 0,
            stats: EngineStats::default(),
        }
    }

    /// Perhaps some new requests.
    fn arrive(&mut self) {
        for _ in 0..self.rng.range(0, 3) {
            let most_tokens = if self.is_crowded || self.rng.one_in(2) { BLOCK_SIZE } else { 5 * BLOCK_SIZE };
            let mut prompt: Vec<TokenId> = (0..self.rng.range(1, most_tokens)).map(|_| self.rng.token()).collect();
            if self.rng.one_in(2) {
                let opening = &self.openings[self.rng.range(0, 2)];
                let num_tokens = self.rng.range(1, 2 * opening.len()).min(opening.len());
                prompt.splice(..num_tokens.min(prompt.len()), opening[..num_tokens].iter().copied());
            }
            let max_tokens =
                if self.rng.one_in(2) { self.rng.range(1, 30) } else { self.rng.range(20, 4 * BLOCK_SIZE) };
            let params = SamplingParams {
                max_tokens: (max_tokens < 3 * BLOCK_SIZE).then_some(max_tokens),
                min_tokens: self.rng.range(0, 3).min(max_tokens),
                ignore_eos: self.is_crowded || self.rng.one_in(2),
                stop_token_ids: if !self.is_crowded && self.rng.one_in(2) { vec![TokenId(5)] } else { vec![] },
                prompt_logprobs: self.rng.one_in(4).then_some(0),
                return_expert_ids: self.rng.one_in(4),
                ..SamplingParams::default()
            };
            let request = Request { prompt: prompt.clone(), sampling: params.clone(), grammar: None };
            match self.scheduler.add_request(request) {
                Ok(id) => {
                    // The oldest computes a token in every step.
                    let deadline = self.num_steps + (self.clients.len() + 1) * self.config.max_sequence_tokens;
                    let client = Client::new(params, prompt, deadline);
                    assert!(self.clients.last_key_value().is_none_or(|(&last, _)| last < id));
                    self.clients.insert(id, client);
                }
                Err(AdmitError::QueueFull { max_waiting }) => {
                    // Who was preempted waits too.
                    assert!(self.scheduler.num_waiting() >= max_waiting);
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
        let any = SeqId(self.rng.next() % (self.clients.last_key_value().map_or(0, |(id, _)| id.0) + 2));
        let unfinished = self.clients.keys().nth(self.rng.range(0, self.clients.len().max(1))).copied();
        let id = if self.rng.one_in(4) { any } else { unfinished.unwrap_or(any) };
        let output = self.scheduler.cancel(id);
        let client = self.clients.remove(&id);
        assert_eq!(output.is_some(), client.is_some());
        if let (Some(output), Some(client)) = (output, client) {
            assert_eq!((output.id, output.finish_reason), (id, Some(FinishReason::Cancelled)));
            let moment = match client.num_computed_tokens {
                0 => usize::from(client.was_preempted),
                _ if client.is_prefill => 2,
                _ => 3,
            };
            self.counts.cancelled[moment] += 1;
            self.num_kept_tokens += client.num_computed_tokens;
        }
        self.scheduler.check_integrity();
    }

    /// Perhaps propose what some sequences say next: rightly, wrongly, or rightly at first.
    fn draft(&mut self) {
        for (&id, client) in &mut self.clients {
            if self.rng.one_in(2) {
                continue;
            }
            let (num_tokens, num_right) = (self.rng.range(0, 8), self.rng.range(0, 12));
            let mut tokens = client.tokens.clone();
            for index in 0..num_tokens {
                let random = if self.rng.one_in(9) { TokenId(VOCAB_SIZE as u32) } else { self.rng.token() };
                tokens.push(if index < num_right { scripted(&tokens).unwrap_or(random) } else { random });
            }
            client.draft = tokens.split_off(client.tokens.len());
            self.scheduler.set_draft(id, client.draft.clone());
        }
        // One that has never been.
        self.scheduler.set_draft(SeqId(u64::MAX), vec![EOS]);
    }

    fn step(&mut self) {
        let Some(step) = self.scheduler.schedule() else {
            assert!(!self.scheduler.has_unfinished(), "there is work and none is scheduled");
            return;
        };
        self.restart(&step);
        self.check_step(&step);
        self.check_stats();
        let results: Vec<SequenceResult> =
            step.sequences.iter().zip(&step.batch.sequences).map(|(s, rows)| self.result(s, rows)).collect();
        let outputs = self.scheduler.postprocess(&step, results.clone());
        assert_eq!(outputs.len(), results.len());
        for (((scheduled, rows), result), output) in
            step.sequences.iter().zip(&step.batch.sequences).zip(results).zip(outputs)
        {
            self.take_output(scheduled, rows.num_rows, result, output);
        }
        self.num_steps += 1;
        assert!(self.clients.values().all(|client| self.num_steps < client.deadline), "a sequence starves");
        self.scheduler.check_integrity();
        self.check_conservation();
    }

    /// Whatever was computed or found is kept, or was lost to a preemption.
    fn check_conservation(&self) {
        let num_held_tokens: usize = self.clients.values().map(|client| client.num_computed_tokens).sum();
        let come = self.counts.rows + self.num_found_tokens;
        assert_eq!(come, num_held_tokens + self.num_kept_tokens + self.num_lost_tokens);
    }

    fn check_stats(&self) {
        let num_running = self.scheduler.num_running();
        let expected = EngineStats {
            num_running,
            num_waiting: self.clients.len() - num_running,
            num_blocks: self.config.num_blocks,
            num_free_blocks: self.scheduler.num_free_blocks(),
            ..self.stats
        };
        assert_eq!(self.scheduler.stats(), expected);
    }

    /// Take note of who lost what was computed, and of who found something computed.
    fn restart(&mut self, step: &Step) {
        for id in &step.preempted {
            assert_ne!(Some(id), self.clients.keys().next(), "the oldest goes on");
            let client = self.clients.get_mut(id).expect("a sequence that nobody asked for");
            self.num_lost_tokens += std::mem::take(&mut client.num_computed_tokens);
            client.is_prefill = true;
            client.was_preempted = true;
            self.stats.num_preemptions += 1;
            self.counts.preempted += 1;
        }
        assert!(step.preempted.is_sorted_by(|a, b| a > b), "the youngest first");
        for (scheduled, rows) in step.sequences.iter().zip(&step.batch.sequences) {
            let client = self.clients.get_mut(&scheduled.id).expect("a sequence that nobody asked for");
            let num_found_tokens = if client.num_computed_tokens == 0 { rows.first_position } else { 0 };
            if num_found_tokens > 0 {
                assert!(num_found_tokens.is_multiple_of(BLOCK_SIZE) && !client.wants_prompt_logprobs());
                assert!(!client.params.return_expert_ids || num_found_tokens <= client.num_ever_computed_tokens);
                client.num_computed_tokens = num_found_tokens;
                self.num_found_tokens += num_found_tokens;
                self.counts.cached += 1;
            }
            if client.num_cached_tokens.is_none() {
                client.num_cached_tokens = Some(num_found_tokens);
                self.stats.num_prompt_tokens_cached += num_found_tokens as u64;
                let may_find = !client.wants_prompt_logprobs() && !client.params.return_expert_ids;
                self.stats.num_prompt_tokens_looked_up += if may_find { client.num_prompt_tokens as u64 } else { 0 };
            }
        }
        assert_eq!(self.clients.keys().next(), step.sequences.iter().map(|s| &s.id).min(), "the oldest has a part");
    }

    /// Without new arrivals everything ends, and soon.
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
        let (mut logit_rows, mut route_rows) = (Vec::new(), Vec::new());
        let mut end_row = 0;
        for (scheduled, rows) in step.sequences.iter().zip(&batch.sequences) {
            let client = &self.clients[&scheduled.id];
            let SequenceRows { num_rows, first_position, ref block_table } = *rows;
            let end = first_position + num_rows;
            assert_eq!(first_position, client.num_computed_tokens, "each token is computed once and in order");
            let num_draft_rows = scheduled.num_draft_rows();
            assert!(num_draft_rows <= self.config.max_draft_tokens);
            let tokens = [&client.tokens, &client.draft[..num_draft_rows]].concat();
            assert_eq!(batch.tokens[end_row..end_row + num_rows], tokens[first_position..end]);
            let samples = end - num_draft_rows == client.tokens.len();
            assert_eq!(scheduled.num_sample_rows, if samples { 1 + num_draft_rows } else { 0 });
            end_row += num_rows;
            let texts = text_hashes(&tokens[..end]);
            for position in first_position..end {
                let block = block_table[position / BLOCK_SIZE].0 as usize;
                self.kv_cache[block][position % BLOCK_SIZE] = Some(texts[position]);
            }
            let slots = block_table.iter().flat_map(|block| self.kv_cache[block.0 as usize]);
            assert!(slots.take(end).eq(texts.into_iter().map(Some)), "the cache holds another text");
            let is_prefill = client.is_prefill;
            let num_prompt_logit_rows =
                if client.wants_prompt_logprobs() { num_rows - scheduled.num_sample_rows } else { 0 };
            assert_eq!(scheduled.num_prompt_logit_rows, num_prompt_logit_rows);
            let num_logit_rows = num_prompt_logit_rows + scheduled.num_sample_rows;
            logit_rows.extend((end_row - num_logit_rows) as u32..end_row as u32);
            let num_new_tokens = end.saturating_sub(client.num_ever_computed_tokens);
            let num_route_rows = if client.params.return_expert_ids { num_new_tokens } else { 0 };
            assert_eq!(scheduled.num_route_rows, num_route_rows);
            route_rows.extend((end_row - num_route_rows) as u32..end_row as u32);
            self.counts.chunked += usize::from(is_prefill && !samples);
        }
        assert_eq!(batch.logit_rows, logit_rows);
        assert_eq!(batch.route_rows, route_rows);
        self.counts.rows += batch.num_rows();
    }

    /// All decodes come first; then prefills in order of arrival, none started before an older one.
    fn check_fairness(&self, step: &Step) {
        let is_decode = |id: &SeqId| !self.clients[id].is_prefill;
        let scheduled: Vec<SeqId> = step.sequences.iter().map(|s| s.id).collect();
        let decodes: Vec<SeqId> = self.clients.keys().copied().filter(is_decode).collect();
        assert_eq!(scheduled[..decodes.len()], decodes);
        assert!(scheduled[decodes.len()..].is_sorted_by(|a, b| a < b));
        let untouched = |id: &&SeqId| self.clients[id].num_computed_tokens == 0 && !scheduled.contains(id);
        let waits = self.clients.keys().find(untouched);
        let youngest = scheduled.iter().max();
        let wanted_prompt_logits = |id: &SeqId| self.clients[id].wants_prompt_logprobs();
        // Only prompt log-probabilities, whose rows are limited, may let a younger sequence begin first.
        assert!(waits.is_none_or(|id| wanted_prompt_logits(id) || youngest < Some(id)));
    }

    /// What sampling makes of the rows of a sequence.
    fn result(&self, scheduled: &ScheduledSequence, rows: &SequenceRows) -> SequenceResult {
        let client = &self.clients[&scheduled.id];
        let end = rows.first_position + rows.num_rows;
        let mut prompt_logprobs = Vec::new();
        if client.wants_prompt_logprobs() {
            let following = rows.first_position + 1..end + 1;
            let in_prompt = following.filter(|&position| position < client.num_prompt_tokens);
            prompt_logprobs.extend(in_prompt.map(|position| logprobs_of(client.tokens[position])));
        }
        let expert_ids = places(end - scheduled.num_route_rows..end);
        let mut result = SequenceResult { prompt_logprobs, expert_ids, ..SequenceResult::default() };
        let mut tokens = client.tokens.clone();
        for index in 0..scheduled.num_sample_rows {
            match scripted(&tokens) {
                Err(reason) => {
                    result.end = Some(reason);
                    break;
                }
                Ok(token) => {
                    result.sampled.push(Sampled { token, logprobs: None });
                    tokens.push(token);
                    if client.draft.get(index) != Some(&token) {
                        break;
                    }
                }
            }
        }
        result
    }

    fn take_output(
        &mut self,
        scheduled: &ScheduledSequence,
        num_rows: usize,
        result: SequenceResult,
        output: SequenceOutput,
    ) {
        let client = self.clients.get_mut(&output.id).expect("a sequence that nobody asked for");
        let mut finish_reason = None;
        let mut taken = result.sampled.into_iter();
        let num_prefilled_tokens = if client.is_prefill { num_rows - scheduled.num_draft_rows() } else { 0 };
        assert_eq!(output.num_prefilled_tokens, num_prefilled_tokens);
        let mut num_used_rows = 0;
        for sampled in &output.sampled {
            assert_eq!((finish_reason, taken.next().as_ref()), (None, Some(sampled)));
            finish_reason = client.append(sampled.token, &self.config);
            num_used_rows += 1;
        }
        if finish_reason.is_none() {
            assert_eq!(taken.next(), None, "nothing sampled is lost but what comes after an end");
            finish_reason = result.end;
            num_used_rows += usize::from(result.end.is_some());
        }
        assert_eq!(output.finish_reason, finish_reason);
        let num_rejected_rows = scheduled.num_sample_rows - num_used_rows;
        client.num_computed_tokens += num_rows - num_rejected_rows;
        self.counts.rows -= num_rejected_rows;
        self.counts.rejected += num_rejected_rows;
        self.counts.accepted += num_used_rows.saturating_sub(1);
        if scheduled.num_sample_rows > 0 {
            (client.is_prefill, client.draft) = (false, Vec::new());
        }
        assert_eq!(Some(output.num_cached_tokens), client.num_cached_tokens);
        let prompt_is_complete = client.num_computed_tokens >= client.num_prompt_tokens;
        assert_eq!(output.prompt_logprobs.is_some(), prompt_is_complete && client.wants_prompt_logprobs());
        client.has_prompt_logprobs |= output.prompt_logprobs.is_some();
        if let Some(prompt_logprobs) = output.prompt_logprobs {
            let following = client.tokens[1..client.num_prompt_tokens].iter().map(|&token| Some(logprobs_of(token)));
            assert!(prompt_logprobs.into_iter().eq(std::iter::once(None).chain(following)));
            self.counts.prompt_logprobs += 1;
        }
        client.expert_ids.extend(output.expert_ids);
        client.num_ever_computed_tokens = client.num_ever_computed_tokens.max(client.num_computed_tokens);
        let num_known = if client.params.return_expert_ids { client.num_ever_computed_tokens } else { 0 };
        assert_eq!(client.expert_ids, places(0..num_known), "nothing twice, nothing left out");
        if let Some(reason) = finish_reason {
            self.finish(output.id, reason);
        }
    }

    /// A sequence has ended as it would have done alone.
    fn finish(&mut self, id: SeqId, reason: FinishReason) {
        match reason {
            FinishReason::Stop => self.counts.stop += 1,
            FinishReason::Length => self.counts.length += 1,
            FinishReason::NoFiniteLogit => self.counts.failed += 1,
            FinishReason::Cancelled | FinishReason::GrammarFailed => {
                panic!("nobody cancelled, and there is no grammar")
            }
        }
        let client = self.clients.remove(&id).expect("it is there");
        assert_eq!((client.tokens.clone(), reason), client.expected(&self.config));
        self.counts.expert_ids += usize::from(client.params.return_expert_ids);
        self.num_kept_tokens += client.num_computed_tokens;
    }
}
