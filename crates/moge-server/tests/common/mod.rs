//! A server in this process with a small random model, and a client that shows every byte.
#![allow(dead_code, reason = "each test program uses a part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moge_engine::{Engine, EngineConfig, GrammarCompiler};
use moge_model::synth::{SynthConfig, presets, write_checkpoint};
use moge_model::{
    Architecture, BLOCK_SIZE, ChatTemplate, Cpu, GenerationDefaults, Isa, KvType, LoadMode, Model, Precision,
    Tokenizer, eos_token_ids,
};
use moge_server::{ServeError, ServedModel, Server, ServerConfig};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The name of the model that is served.
pub(crate) const MODEL: &str = "tiny";

/// Tokens of the longest sequence: more than any test waits for.
pub(crate) const CONTEXT: usize = 1 << 15;

/// Prompts whose characters take from one to four bytes.
pub(crate) const PROMPTS: [&str; 4] = ["Hello, world", "多字节：汉字とカナ", "naïve café 🙂🚀", "a"];

/// What a test may set before a server starts.
pub(crate) struct Setup {
    pub(crate) server: ServerConfig,
    pub(crate) engine: EngineConfig,
}

/// A server that runs until the process ends or is told to stop.
pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    pub(crate) thread: JoinHandle<Result<(), ServeError>>,
    _folder: TempDir,
}

/// What a server answered.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    /// Names in small letters.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The data of a stream's events, without `[DONE]`, which is last if `with_done`.
    pub(crate) fn events(&self, with_done: bool) -> Vec<Value> {
        let mut data: Vec<&str> = self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        if with_done {
            assert_eq!(data.pop(), Some("[DONE]"), "{}", self.body);
        }
        data.into_iter().map(|text| serde_json::from_str(text).unwrap()).collect()
    }
}

impl TestServer {
    pub(crate) fn start(architecture: Architecture) -> TestServer {
        TestServer::start_with(architecture, |_| ())
    }

    pub(crate) fn start_with(architecture: Architecture, change: impl FnOnce(&mut Setup)) -> TestServer {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join(MODEL);
        let is_tiny = |config: &SynthConfig| config.architecture == architecture;
        let preset = presets().find(|preset| preset.name == "tiny" && is_tiny(&preset.config)).unwrap();
        let synth = SynthConfig { max_position_embeddings: CONTEXT, ..preset.config };
        write_checkpoint(&dir, &synth, &mut |_, _| ()).unwrap();

        let model = Model::load(&dir, LoadMode::Mmap, &|_, _| ()).unwrap();
        let config = model.config().clone();
        let tokenizer = Arc::new(Tokenizer::load(&dir).unwrap());
        let defaults = GenerationDefaults::load(&dir).unwrap();
        let eos_token_ids = eos_token_ids(&config.eos_token_ids, &defaults, Some(&tokenizer));
        let grammars = GrammarCompiler::new(&tokenizer, config.vocab_size, &eos_token_ids).unwrap();
        let engine = EngineConfig {
            activation: Precision::F32,
            kv: KvType::F32,
            num_blocks: 2 * CONTEXT / BLOCK_SIZE,
            max_sequence_tokens: CONTEXT,
            max_batched_tokens: 64,
            max_running: 16,
            max_waiting: 64,
            eos_token_ids,
            max_draft_tokens: 0,
        };
        let mut setup = Setup { server: server_config(), engine };
        change(&mut setup);
        let served = ServedModel {
            name: MODEL.to_owned(),
            tokenizer: Arc::clone(&tokenizer),
            chat_template: ChatTemplate::load(&dir, architecture),
            defaults,
            config,
            max_model_len: CONTEXT,
            grammars,
        };
        let cpu = Cpu::new(Isa::select().unwrap(), 1);
        let engine = Engine::new(model, &cpu, Some(tokenizer), &setup.engine);
        let server = Server::start(setup.server, || ()).unwrap();
        let address = server.address();
        let thread = std::thread::spawn(move || server.run(engine, cpu, served, || ()));
        let server = TestServer { address, thread, _folder: folder };
        eventually("the model is served", || server.get("/ready").status == 200);
        server
    }

    /// Send a request and read the answer to its end.
    pub(crate) fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        self.open(method, path, headers, body).reply()
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Reply {
        self.send("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes())
    }

    /// The answer to a request that must succeed.
    pub(crate) fn whole(&self, path: &str, body: &Value) -> Value {
        let reply = self.post(path, body);
        assert_eq!(reply.status, 200, "{body}: {}", reply.body);
        reply.json()
    }

    /// The events of the same request's stream, with usage.
    pub(crate) fn streamed(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        body["stream_options"] = json!({ "include_usage": true });
        let reply = self.post(path, &body);
        assert_eq!(reply.status, 200, "{body}: {}", reply.body);
        assert_eq!(reply.header("content-type"), Some("text/event-stream"));
        reply.events(!path.ends_with("responses"))
    }

    /// Send a request, and leave the answer on the way.
    pub(crate) fn open(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Opened {
        open_at(self.address, method, path, headers, body)
    }

    /// A request that goes on until it is ended.
    pub(crate) fn open_long(&self, is_streamed: bool) -> Opened {
        let body = json!({ "prompt": "long", "max_tokens": CONTEXT - 100, "ignore_eos": true, "stream": is_streamed });
        self.open("POST", "/v1/completions", &[("content-type", "application/json")], body.to_string().as_bytes())
    }

    /// A number that the server gives to Prometheus.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find(|line| line.starts_with(&format!("{name}{{"))).unwrap_or("0");
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// The one token that `text` is, if it is one.
    pub(crate) fn token(&self, text: &str) -> Option<u64> {
        let body = self.whole("/tokenize", &json!({ "prompt": text, "add_special_tokens": false }));
        body["tokens"][0].as_u64().filter(|_| body["count"] == 1)
    }
}

/// Send a request to a server of which nothing but the address is known.
pub(crate) fn open_at(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Opened {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("content-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    // A server may refuse before it has read everything.
    let _ = stream.write_all(body);
    Opened(BufReader::new(stream))
}

/// A server that allows what most tests need.
pub(crate) fn server_config() -> ServerConfig {
    ServerConfig {
        address: ([127, 0, 0, 1], 0).into(),
        api_keys: Vec::new(),
        cors_origins: Vec::new(),
        max_body_bytes: 100_000,
        max_connections: 100,
        max_answers: 12,
        max_request_time: Duration::from_secs(60),
        drain_time: Duration::from_secs(30),
    }
}

/// An answer on its way.
pub(crate) struct Opened(BufReader<TcpStream>);

impl Opened {
    /// The next line, without its end.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Wait for the first event's data.
    pub(crate) fn first_data(&mut self) -> String {
        loop {
            let line = self.line();
            if let Some(data) = line.strip_prefix("data: ") {
                return data.to_owned();
            }
        }
    }

    /// The rest of the answer as it came.
    pub(crate) fn rest(mut self) -> String {
        let mut bytes = Vec::new();
        let _ = self.0.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The whole answer.
    pub(crate) fn reply(mut self) -> Reply {
        let status = self.line();
        let status = status.split(' ').nth(1).unwrap_or_else(|| panic!("no answer: {status:?}")).parse().unwrap();
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.push((name.to_lowercase(), value.to_owned()));
        }
        let is_chunked = headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        let mut bytes = Vec::new();
        if is_chunked {
            while let Ok(length @ 1..) = usize::from_str_radix(&self.line(), 16) {
                let start = bytes.len();
                bytes.resize(start + length, 0);
                self.0.read_exact(&mut bytes[start..]).unwrap();
                self.line();
            }
        } else {
            // A connection that is refused early may be reset after the answer.
            let _ = self.0.read_to_end(&mut bytes);
        }
        Reply { status, headers, body: String::from_utf8(bytes).unwrap() }
    }
}

/// Wait until `what` is so.
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(20), "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An answer without what differs from request to request: ids, times, and what the prefix cache held.
pub(crate) fn without_ids(mut answer: Value) -> Value {
    for field in ["created", "created_at"] {
        answer.as_object_mut().unwrap().shift_remove(field);
    }
    for details in ["prompt_tokens_details", "input_tokens_details"] {
        if answer["usage"][details].is_object() {
            answer["usage"][details]["cached_tokens"] = 0.into();
        }
    }
    let id = answer["id"].as_str().unwrap();
    let (_, digits) = id.split_once(['-', '_']).unwrap();
    serde_json::from_str(&answer.to_string().replace(digits, "ID")).unwrap()
}
