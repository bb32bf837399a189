//! `moge chat` and `moge tokenize` of the real binary: messages, templates and tokens.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod command;

use command::{Synthetic, assert_refused, json_of, moge, moge_with_input, stdout};
use serde_json::Value;

#[test]
fn chat_answers_once_or_converses_over_a_pipe() {
    for arch in ["pangu-pro-moe", "qwen3", "glm4"] {
        let model = Synthetic::new(arch);
        let args = ["chat", "-m", &model.arg(), "-n", "8", "--temperature", "0"];
        stdout(moge(&[&args[..], &["hello"]].concat()));
        let script =
            "hello\n/stats\nand\\\nmore\n/think off\n/system be kind\nagain\n/reset\n/nonsense\n/exit\nnever\n";
        let output = moge_with_input(&args, script.as_bytes());
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arch}: {stderr}");
        assert!(stderr.contains("tokens/s") && stderr.contains("/nonsense is unknown"), "{arch}: {stderr}");
        assert!(!stderr.contains("error"), "{arch}: {stderr}");
    }
}

#[test]
fn a_script_of_messages_ends_at_its_first_error_and_its_last_message_needs_no_line_end() {
    let model = Synthetic::new("qwen3");
    let chat = ["chat", "-m", &model.arg(), "-n", "3", "--context", "60", "--temperature", "0"];
    let answers = |script: &str| stdout(moge_with_input(&chat, script.as_bytes())).lines().count();
    assert_eq!(answers("hello"), 1);
    assert_eq!(answers("hello\\"), 1);
    let output = moge_with_input(&chat, format!("{}\nhello\n", "long ".repeat(40)).as_bytes());
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no room for an answer"));
}

#[test]
fn over_a_pipe_thinking_is_lines_of_standard_error() {
    let model = Synthetic::new("qwen3");
    let chat = ["chat", "-m", &model.arg(), "-n", "12", "--ignore-eos", "--temperature", "0", "hi"];
    std::fs::write(model.path().join("chat_template.jinja"), "{{ messages[0].content }}<think>").unwrap();
    let output = moge(&chat);
    let thinking = String::from_utf8(output.stderr).unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "\n");
    assert!(thinking.trim().len() > 4 && thinking.ends_with('\n') && !thinking.contains('\x1b'), "{thinking:?}");
    std::fs::write(model.path().join("chat_template.jinja"), "{{ messages[0].content }}<think></think>").unwrap();
    let output = moge(&chat);
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert!(output.stdout.len() > 4);
}

#[test]
fn a_full_context_is_said() {
    let model = Synthetic::new("qwen3");
    let chat = ["chat", "-m", &model.arg(), "--ignore-eos", "--context", "40"];
    let output = moge(&[&chat[..], &["hi"]].concat());
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("the context of 40 tokens is full"));
    assert_refused(&[&chat[..], &[&"long ".repeat(40)]].concat(), &["the context 40", "no room for an answer"]);
}

#[test]
fn a_chat_file_is_written_in_the_built_in_pangu_format_with_one_bos() {
    let model = Synthetic::new("pangu-embedded");
    let file = model.path().join("messages.json");
    std::fs::write(&file, r#"[{"role": "user", "content": "hi"}]"#).unwrap();
    let tokenized = json_of(moge(&["tokenize", "-m", &model.arg(), "--chat", file.to_str().unwrap()]));
    let pieces: Vec<&str> = tokenized["pieces"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
    assert_eq!(pieces.iter().filter(|&&piece| piece == "<s>").count(), 1);
    assert_eq!(pieces[..2], ["<s>", "[unused9]"]);
    let ids: Vec<String> = tokenized["ids"].as_array().unwrap()[1..].iter().map(Value::to_string).collect();
    let text = json_of(moge(&["tokenize", "-m", &model.arg(), "--decode", &ids.join(",")]))["text"].clone();
    assert_eq!(text, "[unused9]系统：[unused10][unused9]用户：hi[unused10][unused9]助手：");
}

#[test]
fn tokenize_adds_one_bos_reads_standard_input_and_goes_back() {
    let model = Synthetic::new("pangu-pro-moe");
    let text = "hello\n 系统：\u{1F600}\t ";
    let tokenized = json_of(moge_with_input(&["tokenize", "-m", &model.arg()], text.as_bytes()));
    assert_eq!(tokenized["ids"][0], 1);
    let bare = json_of(moge(&["tokenize", "-m", &model.arg(), "--no-bos", text]));
    let (ids, bare_ids) = (tokenized["ids"].as_array().unwrap(), bare["ids"].as_array().unwrap());
    assert_eq!(ids[1..], bare_ids[..]);
    assert_eq!(bare["pieces"].as_array().unwrap().len(), bare_ids.len());
    let list: Vec<String> = bare_ids.iter().map(Value::to_string).collect();
    assert_eq!(json_of(moge(&["tokenize", "-m", &model.arg(), "--decode", &list.join(",")]))["text"], text);
    let output = moge_with_input(&["tokenize", "-m", &model.arg()], b"ab\xffc");
    assert!(String::from_utf8_lossy(&output.stderr).contains("not UTF-8 at byte 2"));
}
