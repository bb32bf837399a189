//! What a client knows about its sequence.

use moge_engine::{FinishReason, SamplingParams, SchedulerConfig};
use moge_model::{BLOCK_SIZE, TokenId};

use crate::script::{EOS, scripted};

/// What a client knows about its sequence.
pub(crate) struct Client {
    pub(crate) params: SamplingParams,
    pub(crate) num_prompt_tokens: usize,
    /// Prompt and what was sampled.
    pub(crate) tokens: Vec<TokenId>,
    /// What was proposed to follow `tokens`.
    pub(crate) draft: Vec<TokenId>,
    pub(crate) num_computed_tokens: usize,
    /// It was never sampled, or not since its last preemption.
    pub(crate) is_prefill: bool,
    pub(crate) has_prompt_logprobs: bool,
    /// One number for each token, which says where it stands.
    pub(crate) expert_ids: Vec<u8>,
    pub(crate) num_ever_computed_tokens: usize,
    pub(crate) was_preempted: bool,
    /// How much of its prompt was in the cache when it began.
    pub(crate) num_cached_tokens: Option<usize>,
    /// The step before which it must have ended.
    pub(crate) deadline: usize,
}

impl Client {
    pub(crate) fn new(params: SamplingParams, prompt: Vec<TokenId>, deadline: usize) -> Client {
        Client {
            params,
            num_prompt_tokens: prompt.len(),
            tokens: prompt,
            draft: Vec::new(),
            num_computed_tokens: 0,
            is_prefill: true,
            has_prompt_logprobs: false,
            expert_ids: Vec::new(),
            num_ever_computed_tokens: 0,
            was_preempted: false,
            num_cached_tokens: None,
            deadline,
        }
    }

    pub(crate) fn wants_prompt_logprobs(&self) -> bool {
        self.params.prompt_logprobs.is_some() && !self.has_prompt_logprobs
    }

    /// Take a token; whether and why it must be the last one.
    pub(crate) fn append(&mut self, token: TokenId, config: &SchedulerConfig) -> Option<FinishReason> {
        self.tokens.push(token);
        self.end_of(&self.tokens, config)
    }

    /// The whole sequence and why it ends, had it been alone and without drafts.
    pub(crate) fn expected(&self, config: &SchedulerConfig) -> (Vec<TokenId>, FinishReason) {
        let mut tokens = self.tokens[..self.num_prompt_tokens].to_vec();
        loop {
            match scripted(&tokens) {
                Err(reason) => return (tokens, reason),
                Ok(token) => tokens.push(token),
            }
            if let Some(reason) = self.end_of(&tokens, config) {
                return (tokens, reason);
            }
        }
    }

    /// Why the last of `tokens` must be the last one, if it must.
    fn end_of(&self, tokens: &[TokenId], config: &SchedulerConfig) -> Option<FinishReason> {
        let num_output_tokens = tokens.len() - self.num_prompt_tokens;
        let last = tokens.last()?;
        let is_eos = *last == EOS && !self.params.ignore_eos;
        if num_output_tokens > self.params.min_tokens && (is_eos || self.params.stop_token_ids.contains(last)) {
            return Some(FinishReason::Stop);
        }
        let context = config.max_sequence_tokens;
        let is_full = match self.params.max_tokens {
            Some(max_tokens) => num_output_tokens == max_tokens || tokens.len() == context,
            None => tokens.len() == context.min(config.num_blocks * BLOCK_SIZE),
        };
        is_full.then_some(FinishReason::Length)
    }
}
