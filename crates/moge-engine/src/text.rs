//! Incremental detokenisation of one sequence, up to the first stop string.

use std::sync::Arc;

use moge_model::{Detokenizer, StopStrings, TokenId, Tokenizer};

/// Tokens in, text out up to the first stop string.
pub(crate) struct TextStream {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stop_strings: StopStrings,
}

impl TextStream {
    /// For the text that follows `prompt`.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, prompt: &[TokenId], stop: &[String]) -> TextStream {
        let detokenizer = Detokenizer::after(&tokenizer, prompt);
        TextStream { tokenizer, detokenizer, stop_strings: StopStrings::new(stop) }
    }

    /// Take the next token; returns the text that is now certain. Text of a token that may not stop the sequence is
    /// not searched for stop strings.
    pub(crate) fn push(&mut self, token: TokenId, may_stop: bool) -> String {
        let text = self.detokenizer.push(&self.tokenizer, token);
        if may_stop { self.stop_strings.push(&text) } else { text }
    }

    /// True if a stop string was found.
    pub(crate) fn hit_stop_string(&self) -> bool {
        self.stop_strings.hit()
    }

    /// End the text; returns what was held back. Nothing after a stop string.
    pub(crate) fn finish(&mut self) -> String {
        let rest = self.detokenizer.finish(&self.tokenizer);
        self.stop_strings.push(&rest) + &self.stop_strings.finish()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use moge_model::Prefix;

    use super::*;
    use crate::{
        AdmitError, FinishReason, Request, Sampled, SamplingParams, Scheduler, SchedulerConfig, SequenceResult,
    };

    /// Beyond what the tokenizer knows, as nothing it encodes may end a sequence here.
    const EOS: TokenId = TokenId(1 << 19);

    fn tokenizer() -> Arc<Tokenizer> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/tokenizer_json/qwen3");
        Arc::new(Tokenizer::load(&dir).unwrap())
    }

    fn scheduler(tokenizer: Option<Arc<Tokenizer>>) -> Scheduler {
        let config = SchedulerConfig {
            vocab_size: 1 << 20,
            max_sequence_tokens: 400,
            num_blocks: 13,
            max_batched_tokens: 17,
            max_running: 2,
            max_waiting: 3,
            eos_token_ids: vec![EOS],
            max_draft_tokens: 0,
        };
        Scheduler::new(config, tokenizer)
    }

    fn request(sampling: SamplingParams) -> Request {
        Request { prompt: vec![TokenId(1); 5], sampling, grammar: None }
    }

    /// Let a model say `tokens`, one per step; the text pieces, how many tokens were taken, and why it ended. Cancelled
    /// if the tokens do not suffice.
    fn say(tokens: &[TokenId], sampling: SamplingParams) -> (Vec<String>, usize, Option<FinishReason>) {
        let mut scheduler = scheduler(Some(tokenizer()));
        let id = scheduler.add_request(request(sampling)).unwrap();
        let mut pieces = Vec::new();
        for (number, &token) in (1..).zip(tokens) {
            let step = scheduler.schedule().unwrap();
            let sampled = vec![Sampled { token, logprobs: None }];
            let output = scheduler.postprocess(&step, vec![SequenceResult { sampled, ..Default::default() }]).remove(0);
            pieces.push(output.text);
            if output.finish_reason.is_some() {
                return (pieces, number, output.finish_reason);
            }
        }
        let output = scheduler.cancel(id).unwrap();
        pieces.push(output.text);
        (pieces, tokens.len(), output.finish_reason)
    }

    fn encode(text: &str) -> Vec<TokenId> {
        tokenizer().encode(text, Prefix::Omit).unwrap()
    }

    /// A token for each byte or so, so that characters and stop strings arrive in parts.
    fn spell(text: &str) -> Vec<TokenId> {
        text.chars().flat_map(|character| encode(&character.to_string())).collect()
    }

    #[test]
    fn text_streams_and_is_whole_at_the_end() {
        let text = "Grüße, 世界 🦀!";
        let tokens = spell(text);
        let params = SamplingParams { max_tokens: Some(tokens.len()), ..SamplingParams::default() };
        let (pieces, num_tokens, finish_reason) = say(&tokens, params);
        assert_eq!((pieces.concat(), num_tokens), (text.to_owned(), tokens.len()));
        assert_eq!(finish_reason, Some(FinishReason::Length));
        assert_eq!(pieces[0], "G", "it comes at once");
    }

    #[test]
    fn text_ends_before_a_stop_string_and_is_held_back_no_longer_than_needed() {
        let tokens = spell("one two ENX END more");
        let params = SamplingParams { stop: vec!["END".into(), "nothing".into()], ..SamplingParams::default() };
        let (pieces, num_tokens, finish_reason) = say(&tokens, params);
        assert_eq!(pieces.concat(), "one two ENX ");
        assert_eq!((num_tokens, finish_reason), (15, Some(FinishReason::Stop)));
        assert_eq!(pieces[8..11], ["", "", "ENX"].map(str::to_owned));
    }

    #[test]
    fn text_ends_before_a_stop_token_and_what_was_held_back_comes_out() {
        let mut tokens = spell("say EN");
        tokens.push(EOS);
        let params = SamplingParams { stop: vec!["END".into()], ..SamplingParams::default() };
        let (pieces, num_tokens, finish_reason) = say(&tokens, params);
        assert_eq!((pieces.concat(), num_tokens), ("say EN".to_owned(), 7));
        assert_eq!((pieces[6].as_str(), finish_reason), ("EN", Some(FinishReason::Stop)));
    }

    #[test]
    fn a_cancelled_sequence_gives_out_what_was_held_back() {
        let params = SamplingParams { stop: vec!["END".into()], ..SamplingParams::default() };
        let (pieces, _, finish_reason) = say(&spell("say EN"), params);
        assert_eq!((pieces.concat(), finish_reason), ("say EN".to_owned(), Some(FinishReason::Cancelled)));
    }

    #[test]
    fn stop_strings_count_only_after_min_tokens() {
        let params = SamplingParams { stop: vec!["b".into()], min_tokens: 3, ..SamplingParams::default() };
        let (pieces, num_tokens, finish_reason) = say(&spell("abcabc"), params);
        assert_eq!((pieces.concat(), num_tokens), ("abca".to_owned(), 5));
        assert_eq!(finish_reason, Some(FinishReason::Stop));
    }

    #[test]
    fn without_a_tokenizer_stop_strings_are_refused_and_text_is_empty() {
        let mut scheduler = scheduler(None);
        let params = SamplingParams { stop: vec!["END".into()], ..SamplingParams::default() };
        let error = scheduler.add_request(request(params)).unwrap_err();
        assert!(matches!(error, AdmitError::InvalidParameter { field: "stop", .. }));
        assert_eq!(error.to_string(), r#"stop: ["END"] is not allowed, must be empty, as the model has no tokenizer"#);
        scheduler.add_request(request(SamplingParams::default())).unwrap();
        let step = scheduler.schedule().unwrap();
        let sampled = vec![Sampled { token: TokenId(70), logprobs: None }];
        let outputs = scheduler.postprocess(&step, vec![SequenceResult { sampled, ..Default::default() }]);
        assert_eq!(outputs[0].text, "");
    }
}
