//! What goes wrong around a server: clients that vanish, stall, send nonsense or come in thousands, signals, lost
//! resources. In none of it the server ends, answers with a status of 500 or more, or leaves others without an answer.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod serving;

use std::fs;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use serving::{Connection, Server, serve, wait_for};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// What takes seconds: 16 answers as long as the context allows.
fn long(is_streamed: bool) -> Value {
    json!({ "prompt": "once", "max_tokens": 1000, "ignore_eos": true, "n": 16, "stream": is_streamed })
}

fn send(connection: &mut Connection, body: &Value) {
    connection.send_post(COMPLETIONS, body.to_string().as_bytes()).unwrap();
}

#[test]
fn clients_that_vanish_give_their_blocks_back() {
    let server = Server::start(&[]);
    let mut clients: Vec<Connection> = (0..8).map(|_| server.connect()).collect();
    for (client, connection) in clients.iter_mut().enumerate() {
        send(connection, &long(client % 2 == 0));
    }
    for connection in clients.iter_mut().step_by(2) {
        connection.receive_head().unwrap();
        assert!(connection.receive_part().unwrap().is_some());
    }
    assert!(server.metric("kv_cache_usage_perc") > 0.0);
    clients.into_iter().for_each(Connection::vanish);
    let start = Instant::now();
    server.wait_until_idle();
    assert!(server.get("/metrics").text().contains("finished_reason=\"abort\"}"));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    server.check_serves();
}

#[test]
fn half_open_connections_hold_up_nobody_and_bodies_that_never_come_get_408() {
    let server = Server::start(&[]);
    let mut without_body: Vec<Connection> = (0..30).map(|_| server.connect()).collect();
    let mut without_head: Vec<Connection> = (0..30).map(|_| server.connect()).collect();
    for connection in &mut without_body {
        connection.send_head(COMPLETIONS, 100, "").unwrap();
        connection.send(b"{\"prompt\": ").unwrap();
    }
    for connection in &mut without_head {
        connection.send(b"POST /v1/comple").unwrap();
    }
    let num_refused = AtomicUsize::new(0);
    thread::scope(|scope| {
        for mut connection in without_body {
            let num_refused = &num_refused;
            scope.spawn(move || {
                let response = connection.receive().unwrap();
                num_refused.fetch_add(1, Ordering::Relaxed);
                assert_eq!(response.status, 408, "{}", response.text());
                assert!(connection.is_closed());
            });
        }
        server.check_serves();
        assert_eq!(num_refused.load(Ordering::Relaxed), 0, "others are served while these are waited for");
    });
    // It is late, but not too late.
    let late = &mut without_head[0];
    late.send(b"tions HTTP/1.1\r\nhost: test\r\ncontent-length: 0\r\n\r\n").unwrap();
    assert_eq!(late.receive().unwrap().status, 415);
}

#[test]
fn bodies_that_are_no_request_are_refused() {
    let server = Server::start(&[]);
    let deep = "[".repeat(100_000);
    let cases = [
        (413, format!("{{\"prompt\": \"{}\"}}", "a".repeat(10_000_000)).into_bytes()),
        (400, b"{\"prompt\": \"\xff\xfe\"}".to_vec()),
        (400, deep.clone().into_bytes()),
        (400, format!("{{\"prompt\": {deep}{}}}", "]".repeat(100_000)).into_bytes()),
        (400, b"{\"prompt\": \"a\", \"temperature\": NaN}".to_vec()),
        (400, b"{\"prompt\": \"a\", \"temperature\": 1e999}".to_vec()),
        (400, b"{\"prompt\": \"a\", \"stop\": \"\\ud800\"}".to_vec()),
        (400, b"prompt=a".to_vec()),
        (400, Vec::new()),
        (422, b"null".to_vec()),
        (422, b"[]".to_vec()),
        (422, b"{}".to_vec()),
        (400, b"{\"prompt\": []}".to_vec()),
        (422, b"{\"prompt\": [\"a\", 1]}".to_vec()),
        (400, b"{\"prompt\": [4294967295]}".to_vec()),
        (422, b"{\"prompt\": [4294967296]}".to_vec()),
        (400, json!({ "prompt": vec![""; 100_000] }).to_string().into_bytes()),
        (400, json!({ "prompt": vec![5; 1_000_000], "n": 128 }).to_string().into_bytes()),
        (400, json!({ "prompt": "a", "n": 128, "stop": vec!["x"; 1_000_000] }).to_string().into_bytes()),
        (400, json!({ "prompt": "a", "stop": "x".repeat(1_000_000) }).to_string().into_bytes()),
    ];
    for (status, body) in cases {
        let start = Instant::now();
        let response = server.connect().post_bytes(COMPLETIONS, &body).unwrap();
        let head = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        assert_eq!(response.status, status, "{head}: {}", response.text());
        assert!(response.json()["error"]["message"].is_string(), "{}", response.text());
        assert!(start.elapsed() < Duration::from_secs(20), "{head}: {:?}", start.elapsed());
    }
    server.check_serves();
}

#[test]
fn paths_and_methods_that_there_are_not_are_refused_in_json() {
    let server = Server::start(&[]);
    for (status, path) in [
        (404, "/v1/nothing"),
        (404, "/%ff/../.."),
        (405, COMPLETIONS),
        (404, "/v1/models/other"),
        (400, "/v1/models/%ff"),
    ] {
        let response = server.get(path);
        assert_eq!(response.status, status, "{path}");
        assert!(response.json()["error"]["message"].is_string(), "{path}");
    }
    let mut connection = server.connect();
    connection
        .send(format!("GET / HTTP/1.1\r\nhost: test\r\nx: {}\r\n\r\n", "a".repeat(2_000_000)).as_bytes())
        .unwrap_or(());
    assert!(connection.receive().is_ok_and(|response| response.status == 431));
    server.check_serves();
}

/// Structured output that would explode, and what is said to it.
fn bombs() -> Vec<(&'static [u16], Value)> {
    let schema =
        |schema: Value| json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": schema } } });
    let regex = |pattern: &str| json!({ "guided_regex": pattern });
    let lark = |grammar: String| json!({ "guided_grammar": grammar });
    let each = |number: usize, make: &dyn Fn(usize) -> (String, Value)| -> Value {
        Value::Object((0..number).map(make).collect())
    };
    let doubling = each(40, &|i| {
        let next = json!({ "$ref": format!("#/$defs/a{}", (i + 1) % 40) });
        (format!("a{i}"), json!({ "anyOf": [next, { "type": "object", "properties": { "x": next } }] }))
    });
    let patterns = each(1500, &|i| (format!("p{i}"), json!({ "type": "string", "pattern": "(a|b)*c{1,50}" })));
    let chain: String = (0..60).map(|i| format!("a{i}: a{0} a{0}\n", i + 1)).collect();
    const ANY: &[u16] = &[200, 400];
    const REFUSED: &[u16] = &[400];
    vec![
        (REFUSED, schema(json!({ "$ref": "#/$defs/missing" }))),
        (ANY, schema(json!({ "$ref": "#" }))),
        (ANY, schema(json!({ "$defs": doubling, "$ref": "#/$defs/a0" }))),
        (REFUSED, schema(json!({ "type": "object", "properties": patterns }))),
        (ANY, schema(json!({ "type": "string", "minLength": 100_000_000, "maxLength": 1_000_000_000 }))),
        (ANY, schema(json!({ "type": "array", "items": { "type": "string" }, "minItems": 1_000_000_000 }))),
        (REFUSED, schema(json!({ "type": "number", "multipleOf": 1e-300 }))),
        (REFUSED, schema(json!({ "type": 7 }))),
        (REFUSED, schema(json!("a"))),
        (ANY, regex("(((a{1,1000}){1,1000}){1,1000}){1,1000}")),
        (ANY, regex(".*a.{300}")),
        (ANY, regex("(?:a?){3000}a{3000}")),
        (REFUSED, regex("(?!a)b")),
        (REFUSED, regex("[")),
        (REFUSED, regex("a\\")),
        (REFUSED, regex("[a&&b]")),
        (REFUSED, lark("start: start".to_owned())),
        (REFUSED, lark("start: a\na: b\nb: a".to_owned())),
        (ANY, lark("start: s\ns: s s s | s s | \"a\" |".to_owned())),
        (REFUSED, lark(format!("start: {}\"a\"{}", "(".repeat(5000), ")".repeat(5000)))),
        (REFUSED, lark(format!("start: {}", "\"a\"? ".repeat(20_000)))),
        (ANY, lark(format!("start: a0\n{chain}a60: \"a\""))),
        (REFUSED, lark("x: \"a\"".to_owned())),
        (REFUSED, lark("}\n%lark {".to_owned())),
        (REFUSED, lark("start: \"a\"\n".repeat(20_000))),
        (ANY, json!({ "guided_choice": (0..10_000).map(|i| i.to_string()).collect::<Vec<String>>() })),
    ]
}

#[test]
fn grammars_that_would_explode_are_refused_in_time_while_others_are_answered() {
    let server = Server::start(&[]);
    let is_over = AtomicBool::new(false);
    let bombs = bombs();
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        let health = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !is_over.load(Ordering::Relaxed) {
                let start = Instant::now();
                assert_eq!(server.get("/health").status, 200);
                longest = longest.max(start.elapsed());
                thread::sleep(Duration::from_millis(10));
            }
            longest
        });
        let workers = [(); 2].map(|()| {
            scope.spawn(|| {
                while let Some((statuses, fields)) = bombs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut body = json!({ "prompt": "a", "max_tokens": 40 });
                    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
                    let start = Instant::now();
                    let response = server.post(COMPLETIONS, &body);
                    let shown: String = fields.to_string().chars().take(100).collect();
                    assert!(statuses.contains(&response.status), "{shown}: {} {}", response.status, response.text());
                    assert!(start.elapsed() < Duration::from_secs(20), "{shown}: {:?}", start.elapsed());
                }
            })
        });
        let failed = workers.into_iter().filter_map(|worker| worker.join().err()).count();
        is_over.store(true, Ordering::Relaxed);
        let longest = health.join().unwrap();
        assert_eq!(failed, 0);
        assert!(longest < Duration::from_secs(2), "{longest:?}");
    });
    server.wait_until_idle();
    server.check_serves();
}

#[test]
fn messages_that_the_template_does_not_take_are_refused() {
    let server = Server::start(&[]);
    for messages in [
        json!([{ "role": "nobody", "content": "hi" }]),
        json!([{ "role": 7, "content": "hi" }]),
        json!([{ "content": "hi" }]),
        json!([{ "role": "user", "content": 7 }]),
        json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "data:," } }] }]),
        json!([{ "role": "assistant", "tool_calls": "x" }]),
        json!(["hi"]),
        json!([null]),
    ] {
        let response = server.post(CHAT, &json!({ "messages": messages }));
        assert_eq!(response.status, 400, "{messages}: {}", response.text());
        let error = &response.json()["error"];
        assert!(error["param"].as_str().unwrap().starts_with("messages"), "{error}");
    }
    server.check_serves();
}

#[test]
fn hostile_values_in_any_field_are_answered_or_refused() {
    let server = Server::start(&[]);
    let shared = [
        "model",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "n",
        "best_of",
        "stream",
        "stream_options",
        "return_expert_ids",
        "response_format",
        "guided_json",
        "guided_regex",
        "guided_grammar",
        "guided_choice",
        "logprobs",
        "suffix",
        "store",
        "user",
    ];
    let of_chat = [
        "messages",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "chat_template_kwargs",
        "add_generation_prompt",
        "top_logprobs",
        "functions",
    ];
    let of_completions = ["prompt", "echo", "add_special_tokens"];
    let of_tokenize = ["model", "prompt", "add_special_tokens", "return_token_strs"];
    let of_detokenize = ["model", "tokens"];
    let chat = json!({ "messages": [{ "role": "user", "content": "a" }], "max_tokens": 2 });
    let completion = json!({ "prompt": "a", "max_tokens": 2 });
    let values = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(-0.5),
        json!(1e308),
        json!(-1e308),
        json!(1e-320),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(4_294_967_296_u64),
        json!(""),
        json!("NaN"),
        json!("\0\u{7f}\u{fffd}"),
        json!([]),
        json!([null]),
        json!([-1]),
        json!([""]),
        json!([[]]),
        json!([{}]),
        json!({}),
        json!({ "": null }),
        json!({ "type": "function" }),
        json!({ "type": "json_schema" }),
        json!({ "0": 1e308 }),
        json!({ "-1": 1 }),
    ];
    let endpoints: [(&str, Value, Vec<&str>); 4] = [
        (CHAT, chat, shared.iter().chain(&of_chat).copied().collect()),
        (COMPLETIONS, completion, shared.iter().chain(&of_completions).copied().collect()),
        ("/tokenize", json!({ "prompt": "a" }), of_tokenize.to_vec()),
        ("/detokenize", json!({ "tokens": [5] }), of_detokenize.to_vec()),
    ];
    let mut connection = server.connect();
    for (path, valid, fields) in endpoints {
        for field in fields {
            for value in &values {
                let mut body = valid.clone();
                body[field] = value.clone();
                let response = connection.post(path, &body).unwrap();
                let shown = format!("{path} {field}: {value}: {} {}", response.status, response.text());
                assert!(matches!(response.status, 200 | 400 | 404 | 422), "{shown}");
                assert!(response.status == 200 || response.json()["error"]["message"].is_string(), "{shown}");
                assert!(!response.text().contains("server_error"), "{shown}");
            }
        }
    }
    server.wait_until_idle();
    server.check_serves();
}

#[test]
fn of_ten_thousand_requests_some_are_told_to_come_again_and_all_others_answered() {
    const NUM_CLIENTS: usize = 200;
    const NUM_EACH: usize = 50;
    let server = Server::start(&["--max-waiting", "64", "--max-running", "16"]);
    let counts = Mutex::new((0, 0));
    thread::scope(|scope| {
        for client in 0..NUM_CLIENTS {
            let (server, counts) = (&server, &counts);
            scope.spawn(move || {
                let mut connection = server.connect();
                for request in 0..NUM_EACH {
                    let num_tokens = 2 + (client + request) % 5;
                    let prompt = format!("request {request} of {client}");
                    let body = json!({ "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": true });
                    let response = connection.post(COMPLETIONS, &body).unwrap();
                    let mut counts = counts.lock().unwrap();
                    match response.status {
                        200 => {
                            assert_eq!(response.json()["usage"]["completion_tokens"], num_tokens);
                            counts.0 += 1;
                        }
                        429 => {
                            assert_eq!(response.header("retry-after"), Some("1"));
                            assert_eq!(response.json()["error"]["code"], "rate_limit_exceeded");
                            counts.1 += 1;
                        }
                        status => panic!("{status}: {}", response.text()),
                    }
                }
            });
        }
    });
    let (num_answered, num_refused) = counts.into_inner().unwrap();
    assert_eq!(num_answered + num_refused, NUM_CLIENTS * NUM_EACH);
    assert!(num_answered > 0 && num_refused > 0, "{num_answered} answered, {num_refused} refused");
    server.wait_until_idle();
    server.check_serves();
}

#[test]
fn a_second_server_at_a_port_says_so_before_it_loads() {
    let server = Server::start(&[]);
    let folder = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let output = serve(&server.address.port().to_string()).env("TMPDIR", folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.starts_with(&format!("error: cannot listen at {}: ", server.address)), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    server.check_serves();
}

#[test]
fn a_key_file_without_keys_is_refused_and_other_keys_open_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    for content in [None, Some(&b""[..]), Some(b"# none yet\n\n"), Some(b"\xff\xfe\n")] {
        if let Some(content) = content {
            fs::write(&file, content).unwrap();
        }
        let output = serve("0").arg("--api-key-file").arg(&file).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{content:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.starts_with(&format!("error: {}: ", file.display())), "{stderr}");
    }
    fs::write(&file, "# ours\none\nother-key\n").unwrap();
    let server = Server::start(&["--api-key-file", file.to_str().unwrap()]);
    for (status, header) in [
        (200, "authorization: Bearer one\r\n"),
        (200, "authorization: Bearer other-key\r\n"),
        (401, "authorization: Bearer on\r\n"),
        (401, "authorization: Bearer # ours\r\n"),
        (401, "authorization: Bearer \r\n"),
        (401, "authorization: Basic one\r\n"),
        (401, "authorization: \u{ff}\r\n"),
        (401, ""),
    ] {
        let mut connection = server.connect();
        let body = b"{\"prompt\": \"a\", \"max_tokens\": 2}";
        connection.send_head(COMPLETIONS, body.len(), header).unwrap();
        connection.send(body).unwrap();
        assert_eq!(connection.receive().unwrap().status, status, "{header:?}");
    }
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/metrics").status, 401);
}

#[test]
fn a_server_without_file_descriptors_goes_on_when_there_are_some_again() {
    let command = serve("0");
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 160 && exec \"$0\" \"$@\""]).arg(command.get_program()).args(command.get_args());
    let server = Server::spawn(limited);
    let mut early = server.connect();
    early.send(b"GET /health HT").unwrap();
    // The system takes more connections than the server can have.
    let crowd: Vec<Connection> = (0..250).map(|_| server.connect()).collect();
    wait_for("descriptors to run out", || server.log().contains("no connection").then_some(()));
    early.send(b"TP/1.1\r\nhost: test\r\n\r\n").unwrap();
    assert_eq!(early.receive().unwrap().status, 200, "who is in is served");
    drop(crowd);
    // Until it has seen that they are gone, it has too many connections.
    wait_for("room", || {
        let response = server.post(COMPLETIONS, &json!({ "prompt": "a", "max_tokens": 2 }));
        (response.status == 200).then_some(())
    });
    assert_eq!(server.log().matches("no connection").count(), 1, "{}", server.log());
}
