use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use super::*;

/// What a render may take: fuel runs out within a fraction of a second, test machines are slow.
const SOON: Duration = Duration::from_secs(10);

fn golden(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../goldens/chat").join(name);
    std::fs::read_to_string(path).unwrap()
}

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

#[test]
fn every_combination_of_roles_renders_as_jinja2_renders_it() {
    let cases: Value = serde_json::from_str(&golden("cases.json")).unwrap();
    let tools = cases["tools"].as_array().unwrap();
    let [qwen3, glm4] = ["qwen3_like.jinja", "glm4_like.jinja"].map(|name| template(&golden(name)).unwrap());
    let pangu = pangu();
    for case in cases["renders"].as_array().unwrap() {
        let template = match case[0].as_str().unwrap() {
            "qwen3_like" => &qwen3,
            "glm4_like" => &glm4,
            _ => &pangu,
        };
        let indices = case[1].as_array().unwrap().iter().map(|index| index.as_u64().unwrap() as usize);
        let messages: Vec<Value> = indices.map(|index| cases["messages"][index].clone()).collect();
        let mut results = case[2].as_array().unwrap().iter();
        for tools in [&[], tools.as_slice()] {
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
                    assert!(equal, "{} {request:#?}\n{rendered:?}\nexpected: {expected}", case[0]);
                }
            }
        }
    }
}

#[test]
fn expressions_mean_what_they_mean_in_jinja2() {
    let cases: Value = serde_json::from_str(&golden("cases.json")).unwrap();
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
