use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;

use super::engine::MAX_TIME;
use super::rewrite::rewrite_tags;
use super::*;
use crate::Prefix;

fn goldens() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../goldens")
}

fn golden(name: &str) -> String {
    std::fs::read_to_string(goldens().join("chat").join(name)).unwrap()
}

fn cases() -> Value {
    serde_json::from_str(&golden("cases.json")).unwrap()
}

/// A template in a checkpoint directory of its own.
fn template(source: &str) -> Result<ChatTemplate, ChatTemplateError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), source).unwrap();
    ChatTemplate::load(dir.path(), Architecture::Qwen3)
}

fn pangu() -> ChatTemplate {
    ChatTemplate::load(tempfile::tempdir().unwrap().path(), Architecture::PanguProMoe).unwrap()
}

fn render(source: &str) -> Result<String, ChatTemplateError> {
    template(source)?.render(&ChatRequest::default())
}

/// FNV-1a with 32 bits, as the goldens are hashed.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)).into()
}

/// Compare every render of one template with what Jinja2 made of it.
fn assert_renders_as_jinja2(template: &ChatTemplate, name: &str) {
    let cases = cases();
    let all_tools = cases["tools"].as_array().unwrap();
    for case in cases[name].as_array().unwrap() {
        let indices = case[0].as_array().unwrap().iter().map(|index| index.as_u64().unwrap() as usize);
        let messages: Vec<Value> = indices.map(|index| cases["messages"][index].clone()).collect();
        let mut results = case[1].as_array().unwrap().iter();
        for tools in [&[], all_tools.as_slice()] {
            for add_generation_prompt in [false, true] {
                for thinking in [Thinking::Default, Thinking::On, Thinking::Off] {
                    let kwargs = Map::new();
                    let request = ChatRequest { messages: &messages, tools, add_generation_prompt, thinking, kwargs };
                    let rendered = template.render(&request);
                    let expected = results.next().unwrap();
                    let equal = match (&rendered, expected) {
                        (Ok(text), Value::String(expected)) => text == expected,
                        (Ok(text), Value::Number(hash)) => Some(fnv1a(text)) == hash.as_u64(),
                        (rendered, _) => rendered.is_err() && expected.is_null(),
                    };
                    assert!(equal, "{name} {request:#?}\n{rendered:?}\nexpected: {expected}");
                }
            }
        }
    }
}

#[test]
fn every_combination_of_roles_in_a_template_like_qwen3_renders_as_in_jinja2() {
    assert_renders_as_jinja2(&template(&golden("qwen3_like.jinja")).unwrap(), "qwen3_like");
}

#[test]
fn every_combination_of_roles_in_a_template_like_glm4_renders_as_in_jinja2() {
    assert_renders_as_jinja2(&template(&golden("glm4_like.jinja")).unwrap(), "glm4_like");
}

#[test]
fn a_template_like_smollm2s_renders_as_in_jinja2() {
    assert_renders_as_jinja2(&template(&golden("smollm2_like.jinja")).unwrap(), "smollm2_like");
}

#[test]
fn a_template_like_llama_3s_renders_as_in_jinja2() {
    assert_renders_as_jinja2(&template(&golden("llama3_like.jinja")).unwrap(), "llama3_like");
}

#[test]
fn every_combination_of_roles_in_the_built_in_template_renders_as_in_jinja2() {
    assert_renders_as_jinja2(&pangu(), "pangu");
}

#[test]
fn expressions_mean_what_they_mean_in_jinja2() {
    let cases = cases();
    let kwargs = cases["context"].as_object().unwrap();
    let mut differences = String::new();
    for case in cases["expressions"].as_array().unwrap() {
        let request = ChatRequest { kwargs: kwargs.clone(), ..ChatRequest::default() };
        let rendered = template(case[0].as_str().unwrap()).and_then(|template| template.render(&request));
        let found = rendered.as_ref().map_or(Value::Null, |text| Value::String(text.clone()));
        if found != case[1] {
            differences += &format!("{}\n  here   {rendered:?}\n  jinja2 {}\n", case[0], case[1]);
        }
    }
    assert!(differences.is_empty(), "{differences}");
}

#[test]
fn the_built_in_template_writes_the_documented_format() {
    let render = |messages: Value, thinking| {
        let messages = messages.as_array().unwrap();
        let request = ChatRequest { messages, add_generation_prompt: true, thinking, ..ChatRequest::default() };
        pangu().render(&request).unwrap()
    };
    let question = json!([{"role": "user", "content": "Hi"}]);
    let expected = "[unused9]系统：[unused10][unused9]用户：Hi[unused10][unused9]助手：";
    assert_eq!(render(question.clone(), Thinking::Default), expected);
    let expected = "[unused9]系统：[unused10][unused9]用户：Hi /no_think[unused10][unused9]助手：";
    assert_eq!(render(question, Thinking::Off), expected);
    let talk = json!([
        {"role": "system", "content": "S"}, {"role": "function", "content": "[]"}, {"role": "user", "content": "U"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "文"}}}]},
        {"role": "tool", "content": "T"}, {"role": "assistant", "content": "A"},
    ]);
    let expected = "[unused9]系统：S[unused10][unused9]方法：[][unused10][unused9]用户：U[unused10]\
        [unused9]助手：[unused11][{\"name\": \"f\", \"arguments\": {\"x\": \"文\"}}][unused12][unused10]\
        [unused9]工具：T[unused10][unused9]助手：A[unused10][unused9]助手：";
    assert_eq!(render(talk, Thinking::Default), expected);
}

#[test]
fn no_think_goes_once_to_the_last_user_text() {
    for (before, after) in [
        (json!([{"role": "user", "content": "a"}]), json!("a /no_think")),
        (json!([{"role": "user", "content": "a /no_think"}]), json!("a /no_think")),
        (json!([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]), json!("a /no_think")),
        (json!([{"role": "user", "content": null}]), json!(null)),
        (
            json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]),
            json!([{"type": "text", "text": "a /no_think"}, {"type": "image"}]),
        ),
    ] {
        let mut messages = before.as_array().unwrap().clone();
        append_no_think(&mut messages);
        assert_eq!(messages[0]["content"], after);
    }
    append_no_think(&mut []);
}

#[test]
fn the_jinja_file_goes_before_the_config_and_that_before_the_built_in_template() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &str| std::fs::write(dir.path().join(name), content).unwrap();
    let tools = [json!({})];
    let both = |architecture| {
        let template = ChatTemplate::load(dir.path(), architecture).unwrap();
        let request = ChatRequest::default();
        let with_tools = ChatRequest { tools: &tools, ..ChatRequest::default() };
        [template.render(&request).unwrap(), template.render(&with_tools).unwrap()]
    };
    let error = ChatTemplate::load(dir.path(), Architecture::Glm4).map(drop).unwrap_err().to_string();
    assert!(error.ends_with("in tokenizer_config.json, and Glm4 has no built-in one"), "{error}");
    assert!(both(Architecture::PanguEmbedded)[0].starts_with("[unused9]"));
    let named = json!({"chat_template": [
        {"name": "default", "template": "plain{{ bos_token }}"}, {"name": "tool_use", "template": "tools"}
    ], "bos_token": {"content": "<s>"}});
    write("tokenizer_config.json", &named.to_string());
    assert_eq!(both(Architecture::PanguEmbedded), ["plain<s>", "tools"]);
    write("tokenizer_config.json", r#"{"chat_template": "one"}"#);
    assert_eq!(both(Architecture::Qwen3), ["one", "one"]);
    write("chat_template.jinja", "file");
    assert_eq!(both(Architecture::Qwen3), ["file", "file"]);
}

#[test]
fn damaged_templates_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (config, message) in [
        (json!({"chat_template": 3}), "chat_template: must be a string, or a list of objects"),
        (json!({"chat_template": [{"name": "a"}]}), "chat_template: [0] must be an object with the strings"),
        (
            json!({"chat_template": [{"name": "rag", "template": ""}]}),
            "chat_template: no template is named \"default\"; found: [\"rag\"]",
        ),
        (json!({"chat_template": "\n{% if %}"}), "tokenizer_config.json: line 2: syntax error: "),
        (json!({"chat_template": "x".repeat(200_000)}), "200000 bytes; allowed: at most 131072"),
    ] {
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let error = ChatTemplate::load(dir.path(), Architecture::Qwen3).map(drop).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    std::fs::write(dir.path().join("chat_template.jinja"), b"\xff").unwrap();
    let error = ChatTemplate::load(dir.path(), Architecture::Qwen3).map(drop).unwrap_err().to_string();
    assert!(error.ends_with("chat_template.jinja: chat_template: not UTF-8"), "{error}");
}

#[test]
fn messages_without_a_role_are_refused_by_place() {
    for (messages, message) in [
        (json!([{"role": "user"}, "text"]), "messages[1]: must be an object"),
        (json!([{"content": "text"}]), "messages[0]: `role` is missing"),
        (json!([{"role": 3}]), "messages[0]: `role` must be a string"),
        (json!([{"role": "user", "content": 3}]), "messages[0]: `content` must be a string, a list of parts, or null"),
    ] {
        let messages = messages.as_array().unwrap();
        let error = pangu().render(&ChatRequest { messages, ..ChatRequest::default() }).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn a_template_that_raises_says_why() {
    for source in
        ["{{ raise_exception('no ' ~ 1) }}", "{% macro m() %}{{ raise_exception('no 1') }}{% endmacro %}{{ m() }}"]
    {
        let error = render(source).unwrap_err();
        assert!(matches!(&error, ChatTemplateError::Raised { message, .. } if message == "no 1"), "{error}");
    }
    let messages = [json!({"role": "narrator", "content": ""})];
    let error = pangu().render(&ChatRequest { messages: &messages, ..ChatRequest::default() }).unwrap_err();
    assert!(error.to_string().contains("role \"narrator\" is not one of system, user, assistant"), "{error}");
    let error = render("\n\n{{ 1 + 'a' }}").unwrap_err();
    assert!(matches!(&error, ChatTemplateError::Render { line: 3, .. }), "{error}");
}

#[test]
fn a_template_that_does_too_much_work_fails_soon() {
    let doubling = |step: &str| {
        format!(
            "{{% set ns = namespace(x='ab') %}}{{% for i in range(99) %}}{{% set ns.x = {step} %}}{{% endfor %}}{{{{ ns.x }}}}"
        )
    };
    for source in [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 'a' * 10**8 }}",
        "{{ ['a'] * 10**8 }}",
        "{% for i in range(90000) %}{{ 'a' * 9999 }}{% endfor %}",
        "{% set x %}{% for i in range(90000) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:.999999999f}'.format(1.5) }}",
        "{{ '{:>{}}'.format(1, 999999999) }}",
        "{{ '%*d' | format(999999999, 1) }}",
        "{{ 1.5 | round(999999999) }}{{ [1] | batch(999999999, 1) }}",
        "{{ 'a' | indent(10**9, true) }}",
        "{{ 1 | tojson(indent=10**9) }}",
        "{{ ''.join([('a' * 10**6)] * 9999) }}",
        "{{ ([('a' * 10**6)] * 9999) | join }}",
        "{{ ('a' * 10**6).replace('a', 'a' * 10**6) }}",
        "{{ ('a' * 10**6) | replace('a', 'a' * 10**6) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% include 'default' %}",
        &("{% set x = [1] %}".to_owned() + &"{% set x = [x, x] %}".repeat(40) + "{{ x }}"),
        &("{% set x = [1] %}".to_owned() + &"{% set x = {'a': x, 'b': x} %}".repeat(40) + "{{ x | string }}"),
        &("{% set x = [1] %}".to_owned() + &"{% set x = [x, x] %}".repeat(40) + "{{ x | tojson }}"),
        &doubling("ns.x ~ ns.x"),
        &doubling("ns.x + ns.x"),
        &doubling("[ns.x, ns.x]"),
        &doubling("ns.x.replace('a', 'aa')"),
        &doubling("ns"),
    ] {
        let start = Instant::now();
        let error = render(source).unwrap_err();
        let expected = matches!(error, ChatTemplateError::TooMuchWork { .. } | ChatTemplateError::Render { .. });
        // Within its own limit of time, that is: not stopped by it.
        assert!(expected && start.elapsed() < MAX_TIME, "{source}: {error}");
    }
}

#[test]
fn deep_nesting_does_not_overflow_the_stack() {
    let many = |text: &str| text.repeat(100_000 / text.len());
    let nested = "{% set x = [] %}".to_owned() + &many("{% set x = [x] %}");
    for source in [
        format!("{{{{ {}1 }}}}", many("-")),
        format!("{{{{ x{} }}}}", many(".a")),
        format!("{{{{ x{} }}}}", many("|e")),
        format!("{{{{ 1{} }}}}", many("+1")),
        format!("{{{{ {} }}}}", many("(")),
        format!("{{{{ {} }}}}", many("[")),
        format!("{{% if 1 %}}{}{{% endif %}}", many("{% elif 1 %}")),
        many("{% if 1 %}"),
        format!("{nested}{{{{ x }}}}"),
        format!("{nested}{{{{ x == [x] }}}}"),
        format!("{nested}{{{{ x | tojson }}}}"),
        "{% set ns = namespace() %}{% for i in range(50000) %}{% set ns.x = [ns.x] %}{% endfor %}".into(),
        "{% set ns = namespace() %}{% for i in range(50000) %}{% set ns.x = ns.x|map('string') %}{% endfor %}".into(),
        "{% set ns = namespace() %}{% for i in range(50000) %}{% for j in [ns.x] %}{% set ns.x = loop %}{% endfor %}{% endfor %}".into(),
    ] {
        let rendered = render(&source);
        assert!(!matches!(rendered, Err(ChatTemplateError::Panicked { .. } | ChatTemplateError::TooSlow { .. })));
    }
}

#[test]
fn long_conversations_have_enough_fuel() {
    let template = template(&golden("qwen3_like.jinja")).unwrap();
    let turn = [json!({"role": "user", "content": "a"}), json!({"role": "assistant", "content": "b"})];
    let messages: Vec<Value> = turn.into_iter().cycle().take(3_000).collect();
    template.render(&ChatRequest { messages: &messages, ..ChatRequest::default() }).unwrap();
    let long = [json!({"role": "user", "content": "long text ".repeat(300_000)})];
    template.render(&ChatRequest { messages: &long, ..ChatRequest::default() }).unwrap();
}

#[test]
fn the_prefix_of_the_tokenizer_stands_once_before_a_rendered_prompt() {
    let tokenizer = Tokenizer::load(&goldens().join("tokenizer_json/glm4")).unwrap();
    let messages = [json!({"role": "user", "content": "a"})];
    let request = ChatRequest { messages: &messages, ..ChatRequest::default() };
    let prompt = template(&golden("glm4_like.jinja")).unwrap().render(&request).unwrap();
    let ids = tokenizer.encode(&prompt, Prefix::Add).unwrap();
    assert!(prompt.starts_with("[gMASK]<sop>"));
    assert!(ids.starts_with(tokenizer.prefix()) && !ids[2..].starts_with(tokenizer.prefix()));
}

#[test]
fn tags_that_the_engine_does_not_know_are_rewritten() {
    for (source, expected) in [
        ("{%- generation -%}a{% endgeneration +%}", "{%- with -%}a{% endwith +%}"),
        ("{% generation_x %} generation", "{% generation_x %} generation"),
        ("{%-set ns.x=a['%}'] -%}b", "{%- set __ = __assign(ns, 'x', (a['%}'] )) -%}b"),
        ("{% set ns.a.b = 1, 2 %}", "{% set __ = __assign(ns.a, 'b', ( 1, 2 )) %}"),
        ("{% set x = a.b %}{% set a.b %}", "{% set x = a.b %}{% set a.b %}"),
        ("{% set a.b = 'never ends %}", "{% set a.b = 'never ends %}"),
    ] {
        assert_eq!(rewrite_tags(source), expected);
    }
}

#[test]
fn mutated_templates_never_crash_the_engine() {
    // A linear congruential generator (Knuth's MMIX): the same mutations every time.
    let mut state = 7u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let sources = [
        golden("qwen3_like.jinja"),
        golden("glm4_like.jinja"),
        Architecture::PanguProMoe.spec().text.chat_template.unwrap().to_owned(),
    ];
    let cases = cases();
    let tools = cases["tools"].as_array().unwrap();
    let messages = cases["messages"].as_array().unwrap();
    let fragments =
        ["{%", "%}", "{{", "}}", "'", "\"", "-", "(", ")", "[", "]", "|", "{#", "\\", "not ", "loop", "\u{0}", "**9"];
    for _ in 0..300 {
        let mut bytes = sources[random(sources.len())].clone().into_bytes();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            match random(4) {
                0 => bytes[at] = random(256) as u8,
                1 => drop(bytes.splice(at..at, fragments[random(fragments.len())].bytes())),
                2 => drop(bytes.drain(at..(at + random(40)).min(bytes.len()))),
                _ => bytes.truncate(at + 1),
            }
        }
        let Ok(template) = template(&String::from_utf8_lossy(&bytes)) else { continue };
        let request = ChatRequest { messages, tools, add_generation_prompt: true, ..ChatRequest::default() };
        let rendered = template.render(&request);
        let crashed = matches!(rendered, Err(ChatTemplateError::Panicked { .. } | ChatTemplateError::TooSlow { .. }));
        assert!(!crashed, "{}", String::from_utf8_lossy(&bytes));
    }
}
