//! How a server ends: by signals, with streams that are still open, while it loads.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod serving;

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use serving::{Connection, Response, Server, serve, signal, wait_for};

const COMPLETIONS: &str = "/v1/completions";

/// What takes seconds: 16 answers as long as the context allows.
fn long(is_streamed: bool) -> Value {
    json!({ "prompt": "once", "max_tokens": 1000, "ignore_eos": true, "n": 16, "stream": is_streamed })
}

fn send(connection: &mut Connection, body: &Value) {
    connection.send_post(COMPLETIONS, body.to_string().as_bytes()).unwrap();
}

/// Streams that have begun.
fn streams(server: &Server, number: usize, body: &Value) -> Vec<Connection> {
    let begin = |_| {
        let mut connection = server.connect();
        send(&mut connection, body);
        assert_eq!(connection.receive_head().unwrap().status, 200);
        connection
    };
    (0..number).map(begin).collect()
}

/// The events until the stream's proper end.
fn rest(mut stream: Connection) -> Vec<String> {
    let mut rest = Response::default();
    while let Some(part) = stream.receive_part().unwrap() {
        rest.body.extend(part);
    }
    rest.events()
}

#[test]
fn a_server_told_to_stop_lets_streams_end_and_takes_nothing_new() {
    let mut server = Server::start(&["--drain-time", "60"]);
    let body = json!({ "prompt": "a", "max_tokens": 900, "ignore_eos": true, "n": 4, "stream": true });
    let streams = streams(&server, 6, &body);
    let mut idle = server.connect();
    server.signal("TERM");
    wait_for("the port to close", || Connection::open(server.address).is_err().then_some(()));
    assert!(idle.is_closed());
    for stream in streams {
        let events = rest(stream);
        assert_eq!(events.iter().filter(|event| event.contains("\"finish_reason\":\"length\"")).count(), 4);
        assert_eq!(events.last().unwrap(), "[DONE]");
    }
    assert!(server.end().success());
}

#[test]
fn a_server_cuts_streams_that_outlast_the_time_to_drain_and_says_so() {
    for (drain_time, num_signals) in [("1", 1), ("60", 2)] {
        let mut server = Server::start(&["--drain-time", drain_time]);
        let streams = streams(&server, 20, &long(true));
        // None of these keeps it from ending.
        let mut half_body = server.connect();
        half_body.send_head(COMPLETIONS, 100, "").unwrap();
        let mut half_head = server.connect();
        half_head.send(b"GET /hea").unwrap();
        let start = Instant::now();
        for _ in 0..num_signals {
            server.signal("TERM");
            thread::sleep(Duration::from_millis(50));
        }
        for stream in streams {
            let events = rest(stream);
            let error: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
            assert_eq!(error["error"]["message"], "the server is shutting down");
            assert_eq!(events.last().unwrap(), "[DONE]");
        }
        assert!(server.end().success());
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
}

#[test]
fn a_killed_server_can_start_again_at_its_port() {
    let mut server = Server::start(&[]);
    let streams = streams(&server, 3, &long(true));
    server.signal("KILL");
    assert!(!server.end().success());
    let again = Server::spawn(serve(&server.address.port().to_string()));
    assert_eq!(again.address, server.address);
    again.check_serves();
    drop(streams);
}

#[test]
fn ctrl_c_while_loading_leaves_no_temporary_folder() {
    for delay_ms in [0, 5, 20, 80, 300] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_moge"));
        command.args(["serve", "--synthetic", "small", "--port", "0", "--drain-time", "0"]);
        let mut child = command.env("TMPDIR", folder.path()).stderr(Stdio::null()).spawn().unwrap();
        wait_for("a folder", || fs::read_dir(folder.path()).unwrap().next().map(drop));
        thread::sleep(Duration::from_millis(delay_ms));
        signal(child.id(), "INT");
        let status = wait_for("the end", || child.try_wait().unwrap());
        assert!(status.code() == Some(130) || status.success(), "{status} after {delay_ms} ms");
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert!(left.is_empty(), "{left:?} after {delay_ms} ms");
    }
}
