//! One token stream and how far it is computed.

use std::fmt;

use moge_model::{BlockId, TokenId};

use crate::sampler::History;
use crate::text::TextStream;
use crate::{
    AdmitError, FinishReason, NoFiniteLogit, RowLogprobs, Sampled, SamplingParams, SequenceOutput, SequenceResult,
};

/// A sequence of one engine; never used twice, and later requests have greater ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a client asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The tokens to continue, taken literally; at least one.
    pub prompt: Vec<TokenId>,
    /// How to continue them.
    pub sampling: SamplingParams,
}

impl Request {
    /// Check everything that does not depend on an engine's size: what a server can refuse before it queues anything.
    ///
    /// # Errors
    /// If a sampling parameter is out of its range, or the prompt is empty, too long for a context of
    /// `max_sequence_tokens`, or holds a token outside the vocabulary.
    pub fn validate(&self, vocab_size: usize, max_sequence_tokens: usize) -> Result<(), AdmitError> {
        self.sampling.validate(vocab_size)?;
        let num_tokens = self.prompt.len();
        if num_tokens == 0 {
            return Err(AdmitError::EmptyPrompt);
        }
        if num_tokens >= max_sequence_tokens {
            return Err(AdmitError::PromptTooLong { num_tokens, max_tokens: max_sequence_tokens.saturating_sub(1) });
        }
        match self.prompt.iter().position(|token| token.0 as usize >= vocab_size) {
            Some(index) => Err(AdmitError::TokenOutOfVocabulary { index, token: self.prompt[index].0, vocab_size }),
            None => Ok(()),
        }
    }
}

/// One token stream. It waits while it has no blocks, and runs once it has all that it can ever need.
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    pub(crate) sampling: SamplingParams,
    /// Prompt, then sampled tokens.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) num_prompt_tokens: usize,
    /// Tokens, from the first on, whose keys and values are in the KV cache.
    pub(crate) num_computed_tokens: usize,
    /// Tokens that may be sampled in all.
    pub(crate) max_tokens: usize,
    /// Tokens that end the sequence: those of the request and, unless ignored, the model's.
    pub(crate) stop_token_ids: Vec<TokenId>,
    pub(crate) block_table: Vec<BlockId>,
    /// `None` without a tokenizer; all text is empty then.
    pub(crate) text: Option<TextStream>,
    /// Of the rows computed so far, if asked for.
    pub(crate) prompt_logprobs: Vec<Option<RowLogprobs>>,
}

impl Sequence {
    /// Tokens that the sequence can have in the end.
    pub(crate) fn max_total_tokens(&self) -> usize {
        self.num_prompt_tokens + self.max_tokens
    }

    /// Tokens that the next steps have to compute: the rest of the prompt, or the token sampled last.
    pub(crate) fn num_uncomputed_tokens(&self) -> usize {
        self.tokens.len() - self.num_computed_tokens
    }

    pub(crate) fn is_prefill(&self) -> bool {
        self.num_computed_tokens < self.num_prompt_tokens
    }

    /// True if every row of the next chunk has to give logits, not only the last row of the prompt.
    pub(crate) fn wants_prompt_logits(&self) -> bool {
        self.is_prefill() && self.sampling.prompt_logprobs.is_some()
    }

    /// What sampling the next token needs to know.
    pub(crate) fn history(&self) -> History<'_> {
        let (prompt, output) = self.tokens.split_at(self.num_prompt_tokens);
        History { prompt, output, banned: if self.may_stop() { &[] } else { &self.stop_token_ids } }
    }

    /// Take in the results of a step that computed `num_rows` tokens.
    pub(crate) fn advance(&mut self, num_rows: usize, result: SequenceResult) -> SequenceOutput {
        let num_prefilled_tokens = num_rows.min(self.num_prompt_tokens.saturating_sub(self.num_computed_tokens));
        self.num_computed_tokens += num_rows;
        self.prompt_logprobs.extend(result.prompt_logprobs.into_iter().map(Some));
        let prompt_is_complete = num_prefilled_tokens > 0 && !self.is_prefill();
        let wants_prompt_logprobs = self.sampling.prompt_logprobs.is_some();
        let prompt_logprobs =
            (prompt_is_complete && wants_prompt_logprobs).then(|| std::mem::take(&mut self.prompt_logprobs));
        let mut output = SequenceOutput {
            id: self.id,
            num_prefilled_tokens,
            sampled: None,
            text: String::new(),
            finish_reason: None,
            prompt_logprobs,
        };
        match result.sampled {
            None => {}
            Some(Err(NoFiniteLogit)) => self.finish(FinishReason::NoFiniteLogit, &mut output),
            Some(Ok(sampled)) => self.append(sampled, &mut output),
        }
        output
    }

    /// End the sequence before its time.
    pub(crate) fn cancel(mut self) -> SequenceOutput {
        let mut output = SequenceOutput {
            id: self.id,
            num_prefilled_tokens: 0,
            sampled: None,
            text: String::new(),
            finish_reason: None,
            prompt_logprobs: None,
        };
        self.finish(FinishReason::Cancelled, &mut output);
        output
    }

    fn append(&mut self, sampled: Sampled, output: &mut SequenceOutput) {
        let token = sampled.token;
        output.sampled = Some(sampled);
        let may_stop = self.may_stop();
        self.tokens.push(token);
        if may_stop && self.stop_token_ids.contains(&token) {
            return self.finish(FinishReason::Stop, output);
        }
        if let Some(text) = &mut self.text {
            output.text = text.push(token, may_stop);
            if text.hit_stop_string() {
                return self.finish(FinishReason::Stop, output);
            }
        }
        if self.tokens.len() == self.max_total_tokens() {
            self.finish(FinishReason::Length, output);
        }
    }

    fn finish(&mut self, finish_reason: FinishReason, output: &mut SequenceOutput) {
        output.finish_reason = Some(finish_reason);
        if let Some(text) = &mut self.text {
            output.text += &text.finish();
        }
    }

    /// True if the next token may end the sequence otherwise than by `max_tokens`.
    fn may_stop(&self) -> bool {
        self.tokens.len() - self.num_prompt_tokens >= self.sampling.min_tokens
    }
}
