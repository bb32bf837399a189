//! What clients get does not depend on how many tokens came with each step.

use std::sync::Arc;
use std::time::Instant;

use moge_engine::{Engine, EngineConfig, GrammarCompiler, Request, SamplingParams, SequenceOutput};
use moge_model::synth::{presets, write_checkpoint};
use moge_model::{
    Architecture, ChatTemplate, Cpu, GenerationDefaults, Isa, KvType, LoadMode, Model, Precision, TokenId, Tokenizer,
    thinking_tokens,
};
use serde_json::{Value, json};

use crate::answer::Usage;
use crate::app::{ServedModel, Serving};
use crate::conversation::{Conversation, Turn, TurnDelta};
use crate::engine_thread::EngineHandle;
use crate::metrics::{Metrics, RequestTimes};
use crate::output::Delta;
use crate::structured::markers::GrammarMarkers;

struct Setup {
    serving: Arc<Serving>,
    engine: Engine,
    cpu: Cpu,
}

fn setup() -> Setup {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("tiny");
    let architecture = Architecture::Qwen3;
    let preset = presets().find(|preset| preset.name == "tiny" && preset.config.architecture == architecture).unwrap();
    write_checkpoint(&dir, &preset.config, &mut |_, _| ()).unwrap();
    let tokenizer = Arc::new(Tokenizer::load(&dir).unwrap());
    let config = EngineConfig {
        activation: Precision::F32,
        kv: KvType::F32,
        num_blocks: 20,
        max_sequence_tokens: 300,
        max_batched_tokens: 64,
        max_running: 2,
        max_waiting: 3,
        eos_token_ids: Vec::new(),
        max_draft_tokens: 3,
    };
    let cpu = || Cpu::new(Isa::select().unwrap(), 1);
    let engine = || {
        let model = Model::load(&dir, LoadMode::Mmap, &|_, _| ()).unwrap();
        Engine::new(model, &cpu(), Some(tokenizer.clone()), &config)
    };
    let (idle, engine) = (engine(), engine());
    let metrics = Arc::new(Metrics::new("tiny"));
    let (handle, _) = EngineHandle::start(idle, cpu(), metrics.clone()).unwrap();
    let config = engine.model().config().clone();
    let model = ServedModel {
        name: "tiny".to_owned(),
        chat_template: ChatTemplate::load(&dir, architecture),
        defaults: GenerationDefaults::default(),
        grammars: GrammarCompiler::new(&tokenizer, config.vocab_size, &[]).unwrap(),
        max_model_len: 300,
        config,
        tokenizer,
    };
    let markers = GrammarMarkers::new(architecture, |text| model.tokenizer.id_of(text));
    Setup { serving: Arc::new(Serving { model, markers, engine: handle, metrics }), engine, cpu: cpu() }
}

/// The outputs of one request, which gets its next tokens of `draft` proposed.
fn outputs(setup: &mut Setup, request: Request, draft: &[TokenId]) -> Vec<SequenceOutput> {
    let id = setup.engine.add_request(request).unwrap();
    let mut outputs: Vec<SequenceOutput> = Vec::new();
    while setup.engine.has_unfinished() {
        let num_tokens: usize = outputs.iter().map(|output| output.sampled.len()).sum();
        setup.engine.set_draft(id, draft.iter().skip(num_tokens).copied().collect());
        outputs.extend(setup.engine.step(&setup.cpu));
    }
    outputs
}

/// A turn as a client has it in the end, with the counts that are told beside it.
#[derive(Debug, Default, PartialEq)]
struct Told {
    reasoning: String,
    content: String,
    logprobs: Vec<Value>,
    usage: Usage,
}

fn told(setup: &Setup, mut turn: Turn, outputs: &[SequenceOutput]) -> Told {
    let mut told = Told::default();
    let mut times = RequestTimes::new(Instant::now(), 1);
    for output in outputs {
        told.usage.add(output, true);
        setup.serving.metrics.output(&mut times, output, Instant::now());
        let TurnDelta { deltas, num_reasoning_tokens, logprobs, .. } = turn.take(output).unwrap();
        told.usage.reasoning_tokens += num_reasoning_tokens;
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => told.reasoning += &text,
                Delta::Content(text) => told.content += &text,
                other => panic!("{other:?} without tools"),
            }
        }
        told.logprobs.extend(logprobs);
    }
    told
}

#[test]
fn a_turn_and_its_counts_are_the_same_whether_tokens_come_alone_or_together() {
    let mut setup = setup();
    let (open, close) = thinking_tokens(&setup.serving.model.tokenizer, Architecture::Qwen3).unwrap();
    let conversation = Conversation {
        messages: vec![json!({ "role": "user", "content": "hello" })],
        add_generation_prompt: true,
        ..Conversation::default()
    };
    let mut num_reasoning_tokens = 0;
    for seed in 0..12 {
        let params = SamplingParams {
            max_tokens: Some(40),
            temperature: 1.0,
            seed,
            logit_bias: [(open, 7.5), (close, 6.0)].into(),
            logprobs: Some(1),
            ..SamplingParams::default()
        };
        let prepare = || {
            let mut prepared = conversation.prepare(&setup.serving, &params, 1).unwrap();
            (prepared.requests.remove(0), prepared.turns.remove(0))
        };
        let ((request, turn), (again, other_turn)) = (prepare(), prepare());
        let alone = outputs(&mut setup, request, &[]);
        let draft: Vec<TokenId> = alone.iter().flat_map(|output| &output.sampled).map(|s| s.token).collect();
        let together = outputs(&mut setup, again, &draft);
        assert!(together.len() < alone.len() / 2, "several tokens come with an output");
        let expected = told(&setup, turn, &alone);
        assert_eq!(told(&setup, other_turn, &together), expected);
        assert_eq!((expected.usage.completion_tokens, expected.logprobs.len()), (40, 40));
        num_reasoning_tokens += expected.usage.reasoning_tokens;
    }
    assert!(num_reasoning_tokens > 12 && num_reasoning_tokens < 12 * 40);
    let metrics = setup.serving.metrics.render();
    let tokens = metrics.lines().find(|line| line.starts_with("vllm:generation_tokens_total")).unwrap();
    assert!(tokens.ends_with(" 960"), "{tokens}");
    let gaps = metrics.lines().find(|line| line.starts_with("vllm:inter_token_latency_seconds_count")).unwrap();
    assert!(gaps.ends_with(" 936"), "a gap for each token after the first: {gaps}");
}
