use std::path::Path;

use moge_model::{Cpu, Isa, Prefix};
use serde_json::Value;
use tempfile::TempDir;

use super::*;
use crate::logprobs::row_logprobs;
use crate::masks::Masks;
use crate::sample::sample;
use crate::sampler::Samplers;
use crate::{FinishReason, Request, Sampled, SamplingParams, Scheduler, SchedulerConfig};

/// Entries of the model's vocabulary that have no token.
const NUM_PADDING: usize = 37;

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens").join(name)
}

/// A byte-level tokenizer and a SentencePiece one, and what ends their answers.
fn tokenizers() -> [(Arc<Tokenizer>, &'static str); 2] {
    let dir = TempDir::new().unwrap();
    std::fs::copy(golden("sentencepiece/pangu_like.model"), dir.path().join("tokenizer.model")).unwrap();
    let [bpe, pieces] = [&*golden("tokenizer_json/qwen3"), dir.path()].map(|dir| Tokenizer::load(dir).unwrap());
    [(Arc::new(bpe), "<|im_end|>"), (Arc::new(pieces), "[unused10]")]
}

/// A tokenizer, a compiler for it, and requests that random logits answer.
struct Bench {
    tokenizer: Arc<Tokenizer>,
    compiler: GrammarCompiler,
    eos_token_ids: Vec<TokenId>,
}

/// What random logits made of a request.
#[derive(Debug)]
struct Answer {
    tokens: Vec<TokenId>,
    text: String,
    finish_reason: Option<FinishReason>,
}

impl Bench {
    fn new(tokenizer: &Arc<Tokenizer>, eos: Option<&str>) -> Bench {
        let eos_token_ids: Vec<TokenId> = eos.map(|eos| tokenizer.id_of(eos).unwrap()).into_iter().collect();
        let compiler = GrammarCompiler::new(tokenizer, tokenizer.vocab_size() + NUM_PADDING, &eos_token_ids).unwrap();
        Bench { tokenizer: tokenizer.clone(), compiler, eos_token_ids }
    }

    fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size() + NUM_PADDING
    }

    fn answer(&self, lark: &str, sampling: SamplingParams) -> Answer {
        let mut scheduler = Scheduler::new(
            SchedulerConfig {
                vocab_size: self.vocab_size(),
                max_sequence_tokens: 1500,
                num_blocks: 50,
                max_batched_tokens: 3, // chunked: the prompt has more tokens
                max_running: 2,
                max_waiting: 5,
                eos_token_ids: self.eos_token_ids.clone(),
                max_draft_tokens: 0,
            },
            Some(self.tokenizer.clone()),
        );
        let seed = sampling.seed;
        let prompt = self.tokenizer.encode("Say:", Prefix::Omit).unwrap();
        let num_prompt_tokens = prompt.len();
        let grammar = Some(self.compiler.compile(lark).unwrap());
        scheduler.add_request(Request { prompt, sampling, grammar }).unwrap();
        let (mut masks, samplers) = (Masks::default(), Samplers::default());
        let cpu = Cpu::new(Isa::select().unwrap(), 1);
        let mut answer = Answer { tokens: Vec::new(), text: String::new(), finish_reason: None };
        while let Some(step) = scheduler.schedule() {
            masks.start(scheduler.take_grammars(&step));
            let logits = match step.batch.logit_rows.len() {
                0 => Vec::new(),
                _ => random_logits(seed, num_prompt_tokens + answer.tokens.len(), self.vocab_size()),
            };
            let masks = scheduler.return_grammars(masks.finish());
            let rows = scheduler.logit_rows(&step, masks);
            let results = sample(&cpu, &samplers, &rows, &logits, self.vocab_size());
            let output = scheduler.postprocess(&step, results).remove(0);
            for Sampled { token, logprobs } in output.sampled {
                assert_eq!(logprobs, Some(row_logprobs(&logits, token, 2)), "they are the model's");
                answer.tokens.push(token);
            }
            answer.text += &output.text;
            answer.finish_reason = output.finish_reason;
        }
        answer
    }

    /// The texts of those answers to 30 seeds that came to their end.
    fn finished(&self, lark: &str) -> Vec<String> {
        let answers = (0..30).map(|seed| self.answer(lark, random(seed)));
        let finished = answers.filter(|answer| answer.finish_reason == Some(FinishReason::Stop));
        let texts: Vec<String> = finished.map(|answer| answer.text).collect();
        assert!(texts.len() >= 15, "only {} of 30 answers ended", texts.len());
        texts
    }
}

fn random(seed: u64) -> SamplingParams {
    SamplingParams { seed, temperature: 1.0, max_tokens: Some(400), logprobs: Some(2), ..SamplingParams::default() }
}

fn random_logits(seed: u64, position: usize, vocab_size: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) ^ (position as u64) << 40;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 22) as f32
    };
    (0..vocab_size).map(|_| next()).collect()
}

const PERSON: &str = r#"{
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 7, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["世界", "b"]}, "minItems": 1, "maxItems": 3},
        "ok": {"type": "boolean"}
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": false,
    "x-guidance": {"whitespace_flexible": false}
}"#;

fn assert_is_a_person(text: &str) {
    let person: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    let keys: Vec<&String> = person.as_object().unwrap().keys().collect();
    assert!(keys == ["name", "age", "tags"] || keys == ["name", "age", "tags", "ok"], "{text}");
    assert!(person["name"].as_str().unwrap().chars().count() <= 9, "{text}");
    assert!((7..=130).contains(&person["age"].as_i64().unwrap()), "{text}");
    let tags = person["tags"].as_array().unwrap();
    assert!((1..=3).contains(&tags.len()) && tags.iter().all(|tag| tag == "世界" || tag == "b"), "{text}");
}

#[test]
fn answers_follow_a_json_schema() {
    for (tokenizer, eos) in tokenizers() {
        for text in Bench::new(&tokenizer, Some(eos)).finished(&format!("start: %json {PERSON}")) {
            assert_is_a_person(&text);
        }
    }
}

#[test]
fn answers_are_any_json_object() {
    for (tokenizer, eos) in tokenizers() {
        for text in Bench::new(&tokenizer, Some(eos)).finished(r#"start: %json {"type": "object"}"#) {
            // Numbers may be larger than what a program can hold.
            serde_json::from_str::<serde::de::IgnoredAny>(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
            assert!(text.starts_with('{'), "{text}");
        }
    }
}

#[test]
fn answers_follow_a_regex_with_and_without_a_token_to_end_them() {
    for (tokenizer, eos) in tokenizers() {
        for eos in [Some(eos), None] {
            let bench = Bench::new(&tokenizer, eos);
            for text in bench.finished("start: /[A-Z][a-z]{2,8}-[0-9]{3}/") {
                let (word, number) = text.split_once('-').unwrap();
                assert!((3..=9).contains(&word.len()) && word.starts_with(|c: char| c.is_ascii_uppercase()), "{text}");
                assert!(word[1..].chars().all(|c| c.is_ascii_lowercase()), "{text}");
                assert!(number.len() == 3 && number.chars().all(|c| c.is_ascii_digit()), "{text}");
            }
        }
    }
}

#[test]
fn characters_of_several_bytes_are_whole() {
    for (tokenizer, eos) in tokenizers() {
        for text in Bench::new(&tokenizer, Some(eos)).finished("start: /[世界é🦀]{5,9}/") {
            assert!((5..=9).contains(&text.chars().count()) && text.chars().all(|c| "世界é🦀".contains(c)), "{text}");
        }
    }
}

#[test]
fn thoughts_of_free_text_between_special_tokens_come_before_json() {
    for ((tokenizer, eos), [open, close]) in
        tokenizers().into_iter().zip([["<think>", "</think>"], ["[unused16]", "[unused17]"]])
    {
        let [open_id, close_id] = [open, close].map(|piece| tokenizer.id_of(piece).unwrap());
        // The thought is short so that random tokens come to an end.
        let lark = format!(
            "start: <[{}]> THOUGHT <[{}]> answer\nTHOUGHT: /(.|\\n){{0,40}}/\nanswer: %json {PERSON}",
            open_id.0, close_id.0
        );
        let bench = Bench::new(&tokenizer, Some(eos));
        for seed in 0..20 {
            let Answer { tokens, text, finish_reason } = bench.answer(&lark, random(seed));
            assert_eq!(finish_reason, Some(FinishReason::Stop));
            let is_special = |token: &TokenId| tokenizer.is_special(*token);
            let special: Vec<TokenId> = tokens.iter().copied().filter(is_special).collect();
            assert_eq!(special[..2], [open_id, close_id], "no thought holds a special token");
            assert_is_a_person(text.strip_prefix(open).unwrap().split_once(close).unwrap().1);
        }
    }
}

#[test]
fn thoughts_of_any_tokens_but_the_one_that_closes_them_come_before_json() {
    for ((tokenizer, eos), close) in tokenizers().into_iter().zip(["</think>", "[unused17]"]) {
        let close_id = tokenizer.id_of(close).unwrap();
        let TokenId(id) = close_id;
        let bench = Bench::new(&tokenizer, Some(eos));
        let lark = format!("start: <[^{id}]>* <[{id}]> \"\\n\"? answer\nanswer: %json {PERSON}");
        for seed in 0..20 {
            // Random tokens rarely include the one that closes.
            let sampling = SamplingParams { logit_bias: [(close_id, 4.0)].into(), ..random(seed) };
            let Answer { tokens, text, finish_reason } = bench.answer(&lark, sampling);
            assert_eq!(finish_reason, Some(FinishReason::Stop));
            let thought = tokens.split(|&token| token == close_id).next().unwrap();
            assert!(!thought.contains(&bench.eos_token_ids[0]), "a thought is no place to end");
            assert!(thought.iter().all(|&token| !tokenizer.piece(token).is_empty()), "padding is no token");
            assert_is_a_person(text.split_once(close).unwrap().1.trim_start_matches('\n'));
        }
    }
}

#[test]
fn special_tokens_in_angle_brackets_have_names() {
    let [(tokenizer, eos), _] = tokenizers();
    let answer = Bench::new(&tokenizer, Some(eos)).answer("start: <think> \"a\" </think>", random(3));
    assert_eq!((&*answer.text, answer.finish_reason), ("<think>a</think>", Some(FinishReason::Stop)));
}

#[test]
fn a_tool_is_called_with_its_own_arguments() {
    let lark = r#"
        start: weather | add
        weather: "{\"name\": \"weather\", \"arguments\": " weather_arguments "}"
        weather_arguments: %json {"type": "object", "properties": {"city": {"enum": ["Rom", "Köln"]}},
            "required": ["city"], "additionalProperties": false, "x-guidance": {"whitespace_flexible": false}}
        add: "{\"name\": \"add\", \"arguments\": " add_arguments "}"
        add_arguments: %json {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"const": 7}},
            "required": ["a", "b"], "additionalProperties": false, "x-guidance": {"whitespace_flexible": false}}
    "#;
    for (tokenizer, eos) in tokenizers() {
        let mut names = Vec::new();
        for text in Bench::new(&tokenizer, Some(eos)).finished(lark) {
            let call: Value = serde_json::from_str(&text).unwrap();
            let arguments = &call["arguments"];
            match call["name"].as_str().unwrap() {
                "weather" => assert!(arguments["city"] == "Rom" || arguments["city"] == "Köln", "{text}"),
                "add" => assert!(arguments["a"].is_boolean() && arguments["b"] == 7, "{text}"),
                other => panic!("{other}"),
            }
            names.push(call["name"].clone());
        }
        assert!(names.iter().any(|name| name == "add") && names.iter().any(|name| name == "weather"));
    }
}

#[test]
fn an_answer_may_stop_exactly_where_the_grammar_accepts() {
    let [(tokenizer, eos), _] = tokenizers();
    let bench = Bench::new(&tokenizer, Some(eos));
    let eos = bench.eos_token_ids[0];
    let x = tokenizer.id_of("x").unwrap();
    let eager = |sampling: SamplingParams| {
        let logit_bias = [(eos, 100.0), (x, 90.0)].into();
        bench.answer("start: /[0-9]{4}[0-9]*/", SamplingParams { logit_bias, max_tokens: Some(30), ..sampling })
    };
    let answer = eager(random(1));
    assert_eq!((answer.finish_reason, answer.tokens.last()), (Some(FinishReason::Stop), Some(&eos)));
    assert!(answer.text.len() >= 4 && answer.text.bytes().all(|byte| byte.is_ascii_digit()), "{answer:?}");
    assert!(answer.tokens.len() <= 5, "{answer:?}");
    let answer = eager(SamplingParams { min_tokens: 9, ..random(1) });
    assert_eq!((answer.finish_reason, answer.tokens.len()), (Some(FinishReason::Stop), 10));
    let answer = eager(SamplingParams { ignore_eos: true, ..random(1) });
    assert_eq!((answer.finish_reason, answer.tokens.len()), (Some(FinishReason::Length), 30));
    let own = SamplingParams { ignore_eos: true, stop_token_ids: vec![x], ..random(1) };
    let answer = eager(own);
    assert_eq!((answer.finish_reason, answer.tokens.last()), (Some(FinishReason::Stop), Some(&x)));
}

#[test]
fn a_complete_answer_ends_whatever_forbids_to_stop() {
    let [(tokenizer, eos), _] = tokenizers();
    let bench = Bench::new(&tokenizer, Some(eos));
    for sampling in [
        random(2),
        SamplingParams { min_tokens: 90, ..random(2) },
        SamplingParams { ignore_eos: true, ..random(2) },
        SamplingParams { logit_bias: [(bench.eos_token_ids[0], -100.0)].into(), ..random(2) },
    ] {
        let answer = bench.answer("start: \"yes\" | \"no\"", sampling);
        assert!(answer.text == "yes" || answer.text == "no", "{answer:?}");
        assert_eq!(answer.finish_reason, Some(FinishReason::Stop));
    }
}

#[test]
fn stop_strings_end_an_answer_that_follows_a_grammar() {
    let [(tokenizer, eos), _] = tokenizers();
    let bench = Bench::new(&tokenizer, Some(eos));
    let sampling = SamplingParams { stop: vec!["-".into()], ..random(4) };
    let answer = bench.answer("start: /[a-z]{3}-[0-9]{3}/", sampling);
    assert_eq!((answer.text.len(), answer.finish_reason), (3, Some(FinishReason::Stop)));
}

#[test]
fn a_grammar_that_cannot_go_on_ends_its_answer_and_says_so() {
    let [(tokenizer, eos), _] = tokenizers();
    let bench = Bench::new(&tokenizer, Some(eos));
    let no_token = bench.vocab_size() - 1;
    for dead_end in [format!("<[{no_token}]>"), format!("<[{}]> \"a\"", bench.eos_token_ids[0].0)] {
        let answer = bench.answer(&format!("start: \"ab\" {dead_end}"), random(5));
        assert_eq!((&*answer.text, answer.finish_reason), ("ab", Some(FinishReason::GrammarFailed)));
    }
    let mut grammar = bench.compiler.compile("start: /(a|b)*c/").unwrap();
    grammar.cancellation().unwrap().cancel();
    assert_eq!(grammar.next_mask(), Err(GrammarFailed));
    assert_eq!(grammar.next_mask(), Err(GrammarFailed));
}

#[test]
fn a_clone_goes_its_own_way() {
    let [(tokenizer, eos), _] = tokenizers();
    let bench = Bench::new(&tokenizer, Some(eos));
    let mut grammar = bench.compiler.compile("start: \"a\" \"b\"").unwrap();
    let fresh = grammar.clone();
    let first = grammar.next_mask().unwrap();
    grammar.push(tokenizer.id_of("a").unwrap());
    assert_ne!(grammar.next_mask().unwrap(), first);
    assert_eq!(fresh.clone().next_mask().unwrap(), first);
}

#[test]
fn a_grammar_for_another_vocabulary_is_refused() {
    let [(tokenizer, _), _] = tokenizers();
    let grammar = GrammarCompiler::new(&tokenizer, 300, &[]).unwrap().compile("start: \"a\"").unwrap();
    let config = SchedulerConfig {
        vocab_size: 299,
        max_sequence_tokens: 50,
        num_blocks: 2,
        max_batched_tokens: 3,
        max_running: 4,
        max_waiting: 5,
        eos_token_ids: Vec::new(),
        max_draft_tokens: 0,
    };
    let request = Request { prompt: vec![TokenId(1)], sampling: random(0), grammar: Some(grammar) };
    let error = Scheduler::new(config, None).add_request(request).unwrap_err().to_string();
    assert_eq!(error, "grammar: made for 300 tokens is not allowed, must be made for the model's 299");
}

#[test]
fn what_is_no_grammar_is_refused_with_its_place() {
    let [(tokenizer, eos), _] = tokenizers();
    let bench = Bench::new(&tokenizer, Some(eos));
    for (lark, expected) in [
        ("", "no start rule found"),
        ("start: \"a\"\nb: (((\n", "2("),
        ("start: <no_such_token>", "unknown special token"),
        ("start: <[700]>", "Token range end too large"),
        ("start: %json {\"type\": \"integer\", \"multipleOf\": 1e-300}", "multipleOf"),
        ("start: %json {\"type\": \"strange\"}", "strange"),
    ] {
        let error = bench.compiler.compile(lark).unwrap_err().to_string();
        assert!(error.starts_with("grammar: ") && error.contains(expected), "{error}");
    }
}

/// A chain of `link`, in which `%` and `@` are the names of one thing and the next, as long as a grammar may be.
fn chain(before: &str, link: &str, after: &str) -> String {
    let mut text = before.to_owned();
    for index in 0.. {
        let link = link.replace('%', &letters(index)).replace('@', &letters(index + 1));
        let after = after.replace('%', &letters(index));
        if text.len() + link.len() + after.len() > MAX_GRAMMAR_BYTES {
            return text + &after;
        }
        text += &link;
    }
    unreachable!("no link is empty")
}

/// A name of its own for each number, of the letters a to z.
fn letters(mut number: usize) -> String {
    let mut name = String::new();
    loop {
        name.push(char::from(b'a' + (number % 26) as u8));
        number /= 26;
        if number == 0 {
            return name;
        }
    }
}

#[test]
fn hostile_grammars_end_in_time_and_leave_the_stack_whole() {
    let [(tokenizer, eos), _] = tokenizers();
    let bench = Bench::new(&tokenizer, Some(eos));
    let json = |schema: &str| format!("start: %json {schema}");
    let words = |n: usize| (0..n).map(|i| format!("\"w{i}\"")).collect::<Vec<_>>();
    let nested = |n: usize, open: &str, close: &str| format!("{}{{}}{}", open.repeat(n), close.repeat(n));
    for lark in [
        "a".repeat(MAX_GRAMMAR_BYTES + 1),
        json(&nested(100, "{\"items\":", "}")),
        json(&nested(9000, "{\"items\":", "}")),
        json(&format!("{{\"enum\":[{}]}}", words(9000).join(","))),
        json("{\"type\":\"array\",\"minItems\":1000000000}"),
        json("{\"type\":\"string\",\"minLength\":1000000000}"),
        json("{\"$ref\":\"#\"}"),
        json("{\"$ref\":\"#/a\",\"a\":{\"$ref\":\"#/b\"},\"b\":{\"$ref\":\"#/a\"}}"),
        json(
            "{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#\"},\"b\":{\"$ref\":\"#\"}},\"required\":[\"a\"]}",
        ),
        json("{\"type\":\"string\",\"pattern\":\"^((a{1,1000}){1,1000}){1,1000}$\"}"),
        chain("start: %json {\"$ref\":\"#/a\",", "\"%\":{\"allOf\":[{\"$ref\":\"#/@\"},{}]},", "\"%\":{}}"),
        "start: /(a|b)*a(a|b){900}/".into(),
        "start: /(a+)+b(.*x){40}/".into(),
        format!("start: /{}a{}/", "(".repeat(60_000), ")".repeat(60_000)),
        format!("start: {}", words(9000).join("|")),
        "start: a{1000000000}\na: \"x\"".into(),
        "start: start start | \"a\" | \"\"".into(),
        chain("start: Za\n", "Z%: Z@ | \"a\"\n", "Z%: \"b\"").to_uppercase().replacen("START", "start", 1),
    ] {
        // Whatever it is refused for: that this comes back at all is what counts.
        let Ok(mut grammar) = bench.compiler.compile(&lark) else { continue };
        for _ in 0..30 {
            let Ok(TokenMask { words, .. }) = grammar.next_mask() else { break };
            let Some(word) = words.iter().position(|&word| word != 0) else { break };
            grammar.push(TokenId(word as u32 * 32 + words[word].trailing_zeros()));
        }
    }
}
