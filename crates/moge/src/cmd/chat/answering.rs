//! One answer of an engine, with its statistics.

use std::time::{Duration, Instant};

use anyhow::Result;
use moge_engine::{Engine, FinishReason, Request, SeqId};
use moge_model::{Cpu, TokenId};

/// Tokens and times of an answer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stats {
    pub(super) prompt_tokens: usize,
    /// Tokens of the prompt that were not in the KV cache.
    pub(super) computed_tokens: usize,
    pub(super) prefill_time: Duration,
    pub(super) answer_tokens: usize,
    pub(super) decode_time: Duration,
}

/// A sequence of an engine that answers nothing else. Dropping it ends the sequence.
pub(super) struct Answering<'a> {
    engine: &'a mut Engine,
    id: SeqId,
    pub(super) stats: Stats,
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        // Without effect if the sequence has ended: it has, unless there was an error or an interruption.
        self.engine.cancel(self.id);
    }
}

impl<'a> Answering<'a> {
    /// Submit `request`.
    pub(super) fn start(engine: &'a mut Engine, request: Request) -> Result<Answering<'a>> {
        let stats = Stats { prompt_tokens: request.prompt.len(), ..Stats::default() };
        let id = engine.add_request(request)?;
        Ok(Answering { engine, id, stats })
    }

    /// Compute the answer and give its tokens to `take`, without the one that stops it.
    ///
    /// # Errors
    /// Those of `take`.
    pub(super) fn run(
        &mut self,
        cpu: &Cpu,
        is_interrupted: &dyn Fn() -> bool,
        take: &mut dyn FnMut(TokenId) -> Result<()>,
    ) -> Result<FinishReason> {
        while !is_interrupted() {
            let start = Instant::now();
            let outputs = self.engine.step(cpu);
            let time = start.elapsed();
            for output in outputs.into_iter().filter(|output| output.id == self.id) {
                let is_prefill = output.num_prefilled_tokens > 0;
                *(if is_prefill { &mut self.stats.prefill_time } else { &mut self.stats.decode_time }) += time;
                self.stats.computed_tokens += output.num_prefilled_tokens;
                self.stats.answer_tokens += output.sampled.len();
                let num_stops = usize::from(output.finish_reason == Some(FinishReason::Stop));
                let num_tokens = output.sampled.len().saturating_sub(num_stops);
                output.sampled[..num_tokens].iter().try_for_each(|sampled| take(sampled.token))?;
                if let Some(reason) = output.finish_reason {
                    return Ok(reason);
                }
            }
        }
        Ok(FinishReason::Cancelled)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use anyhow::bail;
    use moge_engine::{EngineConfig, SamplingParams};
    use moge_model::{BLOCK_SIZE, Isa, KvType, LoadMode, Model, Precision};

    use super::*;

    fn engine() -> (Engine, Cpu) {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/qwen3");
        let model = Model::load(&dir, LoadMode::Mmap, &|_, _| ()).unwrap();
        let config = EngineConfig {
            activation: Precision::F32,
            kv: KvType::F32,
            num_blocks: 9,
            max_sequence_tokens: usize::MAX,
            max_batched_tokens: 40,
            max_running: 2,
            max_waiting: 3,
            eos_token_ids: Vec::new(),
            max_draft_tokens: 0,
        };
        let cpu = Cpu::new(Isa::select().unwrap(), 1);
        (Engine::new(model, &cpu, None, &config), cpu)
    }

    fn request(first: u32, num_tokens: u32) -> Request {
        let prompt = (first..first + num_tokens).map(TokenId).collect();
        Request { prompt, sampling: SamplingParams { max_tokens: Some(7), ..SamplingParams::default() }, grammar: None }
    }

    fn answer((engine, cpu): &mut (Engine, Cpu), request: Request) -> (Vec<TokenId>, Stats) {
        let mut tokens = Vec::new();
        let mut answering = Answering::start(engine, request).unwrap();
        let take = &mut |token| {
            tokens.push(token);
            Ok(())
        };
        assert_eq!(answering.run(cpu, &|| false, take).unwrap(), FinishReason::Length);
        let stats = answering.stats;
        drop(answering);
        (tokens, stats)
    }

    #[test]
    fn an_answer_after_one_that_could_not_be_written_is_that_of_a_fresh_engine() {
        let (expected, _) = answer(&mut engine(), request(50, 20));
        let mut used = engine();
        let mut answering = Answering::start(&mut used.0, request(3, 30)).unwrap();
        let mut num_written = 0;
        let mut fails_once = |_| {
            num_written += 1;
            if num_written == 3 { bail!("the disk is full") } else { Ok(()) }
        };
        let error = answering.run(&used.1, &|| false, &mut fails_once).unwrap_err();
        assert_eq!(error.to_string(), "the disk is full");
        drop(answering);
        assert!(!used.0.has_unfinished());
        assert_eq!(answer(&mut used, request(50, 20)).0, expected);
    }

    #[test]
    fn an_interrupted_answer_leaves_nothing_in_the_engine() {
        let (mut engine, cpu) = engine();
        let mut answering = Answering::start(&mut engine, request(3, 30)).unwrap();
        let reason = answering.run(&cpu, &|| true, &mut |_| Ok(())).unwrap();
        drop(answering);
        assert_eq!((reason, engine.has_unfinished()), (FinishReason::Cancelled, false));
    }

    #[test]
    fn tokens_found_in_the_cache_do_not_count_as_computed() {
        let mut used = engine();
        let (_, first) = answer(&mut used, request(3, 70));
        assert_eq!((first.prompt_tokens, first.computed_tokens, first.answer_tokens), (70, 70, 7));
        let (_, again) = answer(&mut used, request(3, 70));
        assert_eq!((again.prompt_tokens, again.computed_tokens), (70, 70 - 2 * BLOCK_SIZE));
    }
}
