//! What comes in parts is, put together, what comes whole.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use common::{PROMPTS, TestServer, without_ids};
use moge_model::Architecture;
use serde_json::{Value, json};

/// Sampling parameters of every kind, greedy ones among them.
fn sampling(seed: usize) -> Value {
    let temperature = [0.0, 0.8, 1.0, 1.7][seed % 4];
    json!({ "seed": seed, "temperature": temperature, "top_p": 0.99, "max_tokens": 20 + seed % 5 })
}

fn merged(mut body: Value, more: Value) -> Value {
    if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
        body.extend(more);
    }
    body
}

/// A text to stop at that lies inside `text` and is longer than most tokens.
fn stop_inside(text: &str, seed: usize) -> Option<String> {
    let chars: Vec<char> = text.chars().collect();
    let start = chars.len() / 3 + seed % 3;
    Some(chars.get(start..start + 4)?.iter().collect())
}

/// Put a list's entries at the end of another one.
fn extend(list: &mut Value, more: &Value) {
    if let Value::Array(more) = more {
        match list {
            Value::Array(list) => list.extend(more.iter().cloned()),
            other => *other = more.clone().into(),
        }
    }
}

fn append(text: &mut Value, more: &Value) {
    if let Some(more) = more.as_str() {
        *text = (text.as_str().unwrap_or_default().to_owned() + more).into();
    }
}

/// The body that the chunks of a stream make.
fn fold(chunks: &[Value], object: &str, add: fn(&mut Value, &Value)) -> Value {
    let mut whole = chunks[0].clone();
    whole["object"] = object.into();
    whole["choices"] = json!([]);
    for (index, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk["id"], whole["id"]);
        assert_eq!(chunk["usage"].is_null(), index + 1 < chunks.len());
        whole["usage"] = chunk["usage"].clone();
        for choice in chunk["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            let choices = whole["choices"].as_array_mut().unwrap();
            while choices.len() <= index {
                choices.push(json!({ "index": choices.len(), "finish_reason": null }));
            }
            let target = &mut choices[index];
            assert!(target["finish_reason"].is_null(), "something after the end");
            target["finish_reason"] = choice["finish_reason"].clone();
            add(target, choice);
        }
    }
    whole
}

fn add_text(target: &mut Value, choice: &Value) {
    append(&mut target["text"], &choice["text"]);
    for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        if choice["logprobs"].is_object() {
            extend(&mut target["logprobs"][field], &choice["logprobs"][field]);
        }
    }
}

fn add_delta(target: &mut Value, choice: &Value) {
    let delta = &choice["delta"];
    let message = &mut target["message"];
    for field in ["content", "reasoning_content"] {
        if !delta[field].is_null() {
            append(&mut message[field], &delta[field]);
        }
    }
    for part in delta["tool_calls"].as_array().into_iter().flatten() {
        if part["id"].is_string() {
            let mut call = part.clone();
            call.as_object_mut().unwrap().shift_remove("index");
            extend(&mut message["tool_calls"], &json!([call]));
        } else {
            let call = &mut message["tool_calls"][part["index"].as_u64().unwrap() as usize];
            append(&mut call["function"]["arguments"], &part["function"]["arguments"]);
        }
    }
    if choice["logprobs"].is_object() {
        extend(&mut target["logprobs"]["content"], &choice["logprobs"]["content"]);
    }
}

/// A field that is missing and one that is null are the same; chat has no content beside calls, a stream an empty one.
fn comparable(body: Value) -> Value {
    let mut body = without_ids(body);
    for choice in body["choices"].as_array_mut().unwrap() {
        let empty = choice["logprobs"].is_null() || choice["logprobs"] == json!({ "content": [] });
        if empty {
            choice.as_object_mut().unwrap().shift_remove("logprobs");
        }
        if let Some(message) = choice.get_mut("message").and_then(Value::as_object_mut) {
            message.retain(|name, value| !value.is_null() && name != "role");
            message.entry("content").or_insert("".into());
        }
    }
    body
}

fn check_completions(server: &TestServer, body: &Value) -> Value {
    let whole = server.whole("/v1/completions", body);
    let folded = fold(&server.streamed("/v1/completions", body), "text_completion", add_text);
    assert_eq!(comparable(folded), comparable(whole.clone()), "{body}");
    whole
}

fn check_chat(server: &TestServer, body: &Value) -> Value {
    let whole = server.whole("/v1/chat/completions", body);
    let folded = fold(&server.streamed("/v1/chat/completions", body), "chat.completion", add_delta);
    assert_eq!(comparable(folded), comparable(whole.clone()), "{body}");
    whole
}

#[test]
fn a_streamed_completion_is_the_whole_one() {
    for architecture in [Architecture::PanguProMoe, Architecture::Qwen3] {
        let server = TestServer::start(architecture);
        for seed in 0..16 {
            let prompt = PROMPTS[seed % PROMPTS.len()];
            let fields = json!({
                "prompt": [prompt, "x"], "n": 1 + seed % 3, "echo": seed % 2 == 0,
                "logprobs": ([None, Some(2), Some(0)][seed % 3]),
            });
            let body = merged(sampling(seed), fields);
            let whole = check_completions(&server, &body);
            assert_eq!(whole["choices"].as_array().unwrap().len(), 2 * (1 + seed % 3));
        }
    }
}

#[test]
fn tokens_of_an_echoed_text_stand_where_their_offsets_say() {
    let server = TestServer::start(Architecture::PanguProMoe);
    let prompt = "Once upon a time";
    let body =
        json!({ "prompt": prompt, "echo": true, "logprobs": 0, "max_tokens": 3, "temperature": 0, "ignore_eos": true });
    let choice = &server.whole("/v1/completions", &body)["choices"][0];
    let text = choice["text"].as_str().unwrap();
    let logprobs = &choice["logprobs"];
    let places = logprobs["tokens"].as_array().unwrap().iter().zip(logprobs["text_offset"].as_array().unwrap());
    // The first token is the tokenizer's own.
    for (token, offset) in places.skip(1).take(prompt.len() / 4) {
        let (token, offset) = (token.as_str().unwrap(), offset.as_u64().unwrap() as usize);
        assert!(text[offset..].starts_with(token), "{token:?} at {offset} of {text:?}");
    }
    assert_eq!(logprobs["text_offset"][1], 0);
}

#[test]
fn a_stop_string_cuts_the_text_where_it_begins_whole_or_streamed() {
    let server = TestServer::start(Architecture::Qwen3);
    let mut num_stopped = 0;
    for seed in 0..24 {
        let body = merged(sampling(seed), json!({ "prompt": PROMPTS[seed % 4], "ignore_eos": true }));
        let free = server.whole("/v1/completions", &body)["choices"][0]["text"].as_str().unwrap().to_owned();
        let Some(stop) = stop_inside(&free, seed) else { continue };
        let stopped = check_completions(&server, &merged(body, json!({ "stop": [stop, "never said"] })));
        let choice = &stopped["choices"][0];
        assert_eq!(choice["text"], free[..free.find(&stop).unwrap()], "{stop:?} in {free:?}");
        assert_eq!(choice["finish_reason"], "stop");
        num_stopped += 1;
    }
    assert!(num_stopped > 12, "{num_stopped}");
}

#[test]
fn each_of_several_answers_is_the_one_that_its_own_seed_gives() {
    let server = TestServer::start(Architecture::PanguProMoe);
    let body = json!({ "prompt": PROMPTS[2], "seed": 40, "temperature": 1.2, "max_tokens": 15 });
    let three = server.whole("/v1/completions", &merged(body.clone(), json!({ "n": 3 })));
    for (index, choice) in three["choices"].as_array().unwrap().iter().enumerate() {
        let alone = server.whole("/v1/completions", &merged(body.clone(), json!({ "seed": 40 + index })));
        assert_eq!(choice["text"], alone["choices"][0]["text"]);
    }
}

/// What makes a random model think and call: the marks of thinking are made likely, and grammar asks for calls.
fn chat_fields(server: &TestServer, architecture: Architecture, seed: usize) -> Value {
    let (open, close) = moge_model::thinking_delimiters(architecture);
    let marks = [open, close].into_iter().filter_map(|mark| server.token(mark));
    let bias: Value = marks.map(|token| (token.to_string(), 4.0.into())).collect::<serde_json::Map<_, Value>>().into();
    let parameters = json!({
        "type": "object", "additionalProperties": false, "required": ["city", "days"],
        "properties": { "city": { "enum": ["東京", "Zürich"] }, "days": { "enum": [7, 15] } },
    });
    let function = json!({ "name": "weather", "description": "The weather 🌦", "parameters": parameters });
    let choice = ["none", "auto", "required"][seed % 3];
    let max_tokens = if choice == "required" { 160 } else { 30 };
    json!({
        "logit_bias": bias, "tools": [{ "type": "function", "function": function }], "tool_choice": choice,
        "max_tokens": max_tokens,
    })
}

#[test]
fn a_streamed_chat_is_the_whole_one() {
    let (mut num_thoughts, mut num_calls) = (0, 0);
    for architecture in [Architecture::PanguProMoe, Architecture::Qwen3Moe, Architecture::Glm4, Architecture::Llama] {
        let server = TestServer::start(architecture);
        for seed in 0..15 {
            let fields = json!({
                "messages": [{ "role": "user", "content": PROMPTS[seed % 4] }], "n": 1 + seed % 2,
                "logprobs": seed % 2 == 0, "top_logprobs": (seed % 2 == 0).then_some(seed % 4),
            });
            let body = merged(merged(sampling(seed), chat_fields(&server, architecture, seed)), fields);
            let whole = check_chat(&server, &body);
            for choice in whole["choices"].as_array().unwrap() {
                num_thoughts += usize::from(choice["message"]["reasoning_content"].is_string());
                for call in choice["message"]["tool_calls"].as_array().into_iter().flatten() {
                    num_calls += 1;
                    if choice["finish_reason"] == "tool_calls" {
                        let arguments = call["function"]["arguments"].as_str().unwrap();
                        let arguments: Value = serde_json::from_str(arguments).unwrap();
                        assert!(arguments["city"].is_string() && arguments["days"].is_u64(), "{arguments}");
                    }
                }
            }
        }
    }
    assert!(num_thoughts > 5 && num_calls > 5, "{num_thoughts} thoughts, {num_calls} calls");
}

#[test]
fn stop_strings_cut_a_chat_where_they_begin_whole_or_streamed() {
    let server = TestServer::start(Architecture::PanguProMoe);
    let mut num_stopped = 0;
    for seed in 0..24 {
        let messages = json!([{ "role": "user", "content": PROMPTS[seed % 4] }]);
        let body = merged(sampling(seed), json!({ "messages": messages, "ignore_eos": true }));
        let free = server.whole("/v1/chat/completions", &body);
        let free = free["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        let Some(stop) = stop_inside(&free, seed) else { continue };
        let stopped = check_chat(&server, &merged(body, json!({ "stop": stop })));
        assert_eq!(stopped["choices"][0]["message"]["content"], free[..free.find(&stop).unwrap()]);
        num_stopped += 1;
    }
    assert!(num_stopped > 12, "{num_stopped}");
}

/// The response that the events of a stream make; checks their order on the way.
fn fold_events(events: &[Value]) -> Value {
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    assert_eq!((events[0]["type"].as_str(), events[1]["type"].as_str()), {
        (Some("response.created"), Some("response.in_progress"))
    });
    let mut items: Vec<Value> = Vec::new();
    for event in &events[2..events.len() - 1] {
        let kind = event["type"].as_str().unwrap();
        let index = event["output_index"].as_u64().unwrap() as usize;
        if kind == "response.output_item.added" {
            assert_eq!(index, items.len());
            assert!(items.iter().all(|item| item["status"] != "in_progress"), "two items at a time");
            items.push(event["item"].clone());
            continue;
        }
        assert_eq!(index + 1, items.len(), "something after the end of an item");
        let item = &mut items[index];
        assert_eq!(item["status"], "in_progress");
        assert!(event["item_id"] == item["id"] || event["item"]["id"] == item["id"]);
        match kind {
            "response.content_part.added" => extend(&mut item["content"], &json!([event["part"]])),
            "response.output_text.delta" | "response.reasoning_text.delta" => {
                append(&mut item["content"][0]["text"], &event["delta"]);
            }
            "response.output_text.done" | "response.reasoning_text.done" => {
                assert_eq!(item["content"][0]["text"], event["text"]);
            }
            "response.content_part.done" => assert_eq!(item["content"][0], event["part"]),
            "response.function_call_arguments.delta" => append(&mut item["arguments"], &event["delta"]),
            "response.function_call_arguments.done" => assert_eq!(item["arguments"], event["arguments"]),
            "response.output_item.done" => {
                item["status"] = event["item"]["status"].clone();
                assert_eq!(*item, event["item"]);
            }
            other => panic!("{other}"),
        }
    }
    let last = &events[events.len() - 1];
    let response = last["response"].clone();
    assert_eq!(last["type"], format!("response.{}", response["status"].as_str().unwrap()));
    assert_eq!(response["output"], Value::from(items));
    response
}

#[test]
fn a_streamed_response_is_the_whole_one() {
    let mut kinds = std::collections::BTreeMap::new();
    for architecture in [Architecture::PanguProMoe, Architecture::Qwen3Moe, Architecture::Glm4, Architecture::Llama] {
        let server = TestServer::start(architecture);
        for seed in 0..15 {
            let mut body = merged(sampling(seed), chat_fields(&server, architecture, seed));
            let mut tool = body["tools"][0]["function"].clone();
            tool["type"] = "function".into();
            body["tools"] = json!([tool]);
            body = merged(body, json!({ "input": PROMPTS[seed % 4], "instructions": "Be brief." }));
            let whole = server.whole("/v1/responses", &body);
            let folded = fold_events(&server.streamed("/v1/responses", &body));
            assert_eq!(without_ids(folded), without_ids(whole.clone()), "{body}");
            for item in whole["output"].as_array().unwrap() {
                *kinds.entry(item["type"].as_str().unwrap().to_owned()).or_insert(0) += 1;
            }
            *kinds.entry(whole["status"].as_str().unwrap().to_owned()).or_insert(0) += 1;
        }
    }
    for kind in ["reasoning", "message", "function_call", "completed", "incomplete"] {
        assert!(kinds.get(kind).is_some_and(|&count| count > 3), "{kinds:?}");
    }
}

#[test]
fn chat_and_responses_say_the_same() {
    let architecture = Architecture::Qwen3;
    let server = TestServer::start(architecture);
    for seed in 0..12 {
        let fields = chat_fields(&server, architecture, 0);
        let shared = merged(sampling(seed), json!({ "logit_bias": fields["logit_bias"] }));
        let messages = json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "content": PROMPTS[2] }]);
        let chat = server.whole("/v1/chat/completions", &merged(shared.clone(), json!({ "messages": messages })));
        let own = json!({ "instructions": "Be brief.", "input": [{ "role": "user", "content": PROMPTS[2] }] });
        let response = server.whole("/v1/responses", &merged(shared, own));
        let message = &chat["choices"][0]["message"];
        let text_of = |kind: &str| {
            let items = response["output"].as_array().unwrap().iter();
            items.filter(|item| item["type"] == kind).map(|item| item["content"][0]["text"].as_str().unwrap()).collect()
        };
        let (content, reasoning): (String, String) = (text_of("message"), text_of("reasoning"));
        assert_eq!(message["content"], content);
        assert_eq!(message["reasoning_content"].as_str().unwrap_or_default(), reasoning);
        let (usage, chat_usage) = (&response["usage"], &chat["usage"]);
        assert_eq!(usage["input_tokens"], chat_usage["prompt_tokens"]);
        assert_eq!(usage["output_tokens"], chat_usage["completion_tokens"]);
        assert_eq!(
            usage["output_tokens_details"]["reasoning_tokens"],
            chat_usage["completion_tokens_details"]["reasoning_tokens"]
        );
        assert!(reasoning.is_empty() || usage["output_tokens_details"]["reasoning_tokens"] != 0);
    }
}
