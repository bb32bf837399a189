//! The real binary on small checkpoints: what a user types, and what comes out.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod cli;

use std::path::Path;
use std::process::{Command, Stdio};

use cli::{Synthetic, assert_refused, golden, json_of, moge, moge_with_input, recorded, stdout};
use serde_json::{Value, json};

#[test]
fn generate_continues_tokens_as_pytorch_does() {
    for case in ["pangu-pro-moe-v1", "pangu-pro-moe-k2", "pangu-embedded", "qwen3-tied", "glm4-rope-parameters"] {
        let prompt = recorded(case, "greedy_prompt");
        let prompt_arg: Vec<String> = prompt.iter().map(u32::to_string).collect();
        let args = ["generate", "--model", &golden(case), "--tokens", &prompt_arg.join(","), "--format", "json"];
        let args =
            [&args[..], &["--dtype", "f32", "--max-tokens", "64", "--ignore-eos", "--temperature", "0"]].concat();
        let answer = json_of(moge(&args));
        assert_eq!(answer["prompt_tokens"], json!(prompt), "--tokens are taken literally");
        assert_eq!(answer["tokens"], json!(recorded(case, "greedy_tokens")), "{case}");
        assert_eq!(answer["finish_reason"], "length");
        assert_eq!(answer["usage"]["total_tokens"], json!(prompt.len() + 64));
        assert_eq!(answer["text"], "", "no tokenizer, no text");
    }
}

#[test]
fn every_kind_of_kv_cache_goes_with_every_precision() {
    for dtype in ["f32", "bf16"] {
        for kv in ["auto", "f32", "bf16", "int8"] {
            let args = ["generate", "-m", &golden("qwen3"), "--tokens", "5,6,7", "-n", "3", "--ignore-eos"];
            let precision = ["--dtype", dtype, "--kv", kv, "--format", "json"];
            let answer = json_of(moge(&[&args[..], &precision].concat()));
            assert_eq!(answer["tokens"].as_array().unwrap().len(), 3, "{dtype} {kv}");
        }
    }
    assert_refused(&["generate", "--synthetic", "tiny", "-p", "x", "--kv", "int4"], &["int4", "int8"]);
}

#[test]
fn a_synthetic_model_needs_no_checkpoint() {
    let run = || stdout(moge(&["generate", "--synthetic", "tiny", "-p", "once", "-n", "5", "--ignore-eos"]));
    assert!(!run().trim().is_empty());
    assert_eq!(run(), run());
    assert_refused(&["generate", "--synthetic", "huge", "-p", "x"], &["huge", "moge synth --help"]);
    assert_refused(&["generate", "-p", "x"], &["--model"]);
}

#[test]
fn without_a_tokenizer_the_end_tokens_of_generation_config_still_end_a_sequence() {
    // 103 stands in both configs of this checkpoint, 101 in generation_config.json only.
    for end in ["103", "101"] {
        let bias = format!("{end}=100");
        let args = ["generate", "-m", &golden("qwen3"), "--tokens", "5,6", "-n", "4", "--logit-bias", &bias];
        let answer = json_of(moge(&[&args[..], &["--format", "json", "--temperature", "0"]].concat()));
        assert_eq!(
            (&answer["finish_reason"], &answer["tokens"]),
            (&json!("stop"), &json!([end.parse::<u32>().unwrap()]))
        );
    }
}

#[test]
fn reading_the_weights_gives_the_same_tokens_as_mapping_them() {
    let model = golden("pangu-pro-moe-v1");
    let run = |load: &str, threads: &str| {
        let args = ["generate", "-m", &model, "--tokens", "5,6,7", "--format", "json", "--logprobs", "2", "-n", "9"];
        let mut answer = json_of(moge(&[&args[..], &["--load", load, "--threads", threads]].concat()));
        answer.as_object_mut().unwrap().remove("timings");
        answer
    };
    assert_eq!(run("mmap", "1"), run("read", "3"));
}

#[test]
fn json_has_every_field_with_logprobs_that_fit_one_another() {
    let model = Synthetic::new("pangu-pro-moe");
    let args = ["generate", "-m", &model.arg(), "-p", "hello 系统", "-n", "6", "--format", "json"];
    let answer =
        json_of(moge(&[&args[..], &["--logprobs", "3", "--prompt-logprobs", "2", "--temperature", "0"]].concat()));
    let keys: Vec<&String> = answer.as_object().unwrap().keys().collect();
    let expected = [
        "model",
        "prompt_tokens",
        "tokens",
        "text",
        "finish_reason",
        "logprobs",
        "prompt_logprobs",
        "usage",
        "timings",
    ];
    assert_eq!(keys, expected);
    let prompt_tokens = answer["prompt_tokens"].as_array().unwrap();
    assert_eq!(prompt_tokens[0], 1, "BOS comes first");
    let prompt_logprobs = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!((prompt_logprobs.len(), &prompt_logprobs[0]), (prompt_tokens.len(), &Value::Null));
    for (place, entry) in answer["logprobs"].as_array().unwrap().iter().enumerate() {
        assert_eq!(entry["token"], answer["tokens"][place]);
        let top = entry["top"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert_eq!(top[0]["token"], entry["token"], "greedy takes the likeliest");
        assert_eq!(top[0]["logprob"], entry["logprob"]);
        assert!(entry["logprob"].as_f64().unwrap() < 0.0 && entry["text"].is_string());
    }
    for timing in ["load_ms", "prefill_ms", "decode_ms", "prefill_tokens_per_s", "decode_tokens_per_s"] {
        assert!(answer["timings"][timing].as_f64().unwrap() > 0.0, "{timing}");
    }
}

#[test]
fn streamed_text_equals_the_text_in_json_and_the_decoded_tokens() {
    for arch in ["pangu-pro-moe", "qwen3", "glm4"] {
        let model = Synthetic::new(arch);
        let args = ["generate", "-m", &model.arg(), "-p", "a 助手 b", "-n", "40", "--temperature", "1", "--seed", "3"];
        let streamed = stdout(moge(&args));
        let answer = json_of(moge(&[&args[..], &["--format", "json"]].concat()));
        assert_eq!(streamed, format!("{}\n", answer["text"].as_str().unwrap()), "{arch}");
        let ids: Vec<String> = answer["tokens"].as_array().unwrap().iter().map(Value::to_string).collect();
        let decoded = json_of(moge(&["tokenize", "-m", &model.arg(), "--decode", &ids.join(",")]));
        if answer["finish_reason"] == "length" {
            // Pangu's decoder drops the space in front of a text; a continuation keeps it.
            let text = answer["text"].as_str().unwrap();
            let (text, decoded) = (text, decoded["text"].as_str().unwrap());
            assert!(text == decoded || text.strip_prefix(' ') == Some(decoded), "{arch}: {text:?} {decoded:?}");
        }
    }
}

#[test]
fn a_stop_string_ends_the_text_before_it_and_a_stop_token_is_in_tokens_only() {
    let model = Synthetic::new("pangu-pro-moe");
    let args = ["generate", "-m", &model.arg(), "-p", "x", "-n", "30", "--temperature", "0", "--format", "json"];
    let free = json_of(moge(&args));
    let text = free["text"].as_str().unwrap();
    let stop: String = text.chars().skip(3).take(2).collect();
    let stopped = json_of(moge(&[&args[..], &["--stop", &stop]].concat()));
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"].as_str().unwrap(), text.split(&stop).next().unwrap());
    let token = free["tokens"][4].to_string();
    let stopped = json_of(moge(&[&args[..], &["--stop-token-ids", &token]].concat()));
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["tokens"].as_array().unwrap().last().unwrap().to_string(), token);
    assert!(text.starts_with(stopped["text"].as_str().unwrap()));
}

#[test]
fn a_file_of_prompts_gives_the_same_answers_in_order_as_each_alone_with_its_seed() {
    let model = Synthetic::new("qwen3");
    let file = model.path().join("prompts.jsonl");
    std::fs::write(
        &file,
        "{\"prompt\": \"one\"}\n\n{\"tokens\": [300, 301, 302]}\n{\"prompt\": \"three 3\", \"max_tokens\": 3}\n",
    )
    .unwrap();
    let sampling = ["-n", "7", "--temperature", "1.5", "--ignore-eos"];
    let args = ["generate", "-m", &model.arg(), "--input", file.to_str().unwrap(), "--seed", "9"];
    let lines = stdout(moge(&[&args[..], &sampling].concat()));
    let together: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(together.len(), 3);
    let prompts = [["-p", "one"], ["--tokens", "300,301,302"], ["-p", "three 3"]];
    for ((answer, prompt), seed) in together.iter().zip(prompts).zip(["9", "10", "11"]) {
        let args = ["generate", "-m", &model.arg(), "--format", "json", "--seed", seed];
        let alone = json_of(moge(&[&args[..], &prompt, &sampling].concat()));
        let num_tokens = answer["tokens"].as_array().unwrap().len();
        assert_eq!(answer["prompt_tokens"], alone["prompt_tokens"]);
        assert_eq!(answer["tokens"].as_array().unwrap()[..], alone["tokens"].as_array().unwrap()[..num_tokens]);
    }
    assert_eq!(together[2]["tokens"].as_array().unwrap().len(), 3);
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
fn spaces_between_token_ids_do_not_matter() {
    let model = Synthetic::new("glm4");
    let answer = json_of(moge(&["generate", "-m", &model.arg(), "--tokens", "5, 6 ,7", "-n", "1", "--format", "json"]));
    assert_eq!(answer["prompt_tokens"], json!([5, 6, 7]));
    let decode = |ids: &str| stdout(moge(&["tokenize", "-m", &model.arg(), "--decode", ids]));
    assert_eq!(decode("65, 66"), decode("65,66"));
}

/// Start a command that writes a large checkpoint, and press Ctrl-C once `begun` says that it writes.
#[cfg(unix)]
fn interrupt_once(mut command: Command, begun: impl Fn() -> bool) {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !begun() {
        assert!(child.try_wait().unwrap().is_none(), "the command ended before it could be interrupted");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn ctrl_c_leaves_no_half_of_a_synthetic_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let num_entries = |path: &Path| std::fs::read_dir(path).map_or(0, Iterator::count);
    let target = dir.path().join("m");
    let mut synth = Command::new(env!("CARGO_BIN_EXE_moge"));
    synth.args(["synth", target.to_str().unwrap(), "--preset", "qwen3-0.6b"]);
    interrupt_once(synth, || num_entries(&target) > 0);
    assert_eq!(num_entries(dir.path()), 0);
    let mut generate = Command::new(env!("CARGO_BIN_EXE_moge"));
    generate.args(["generate", "--synthetic", "small", "-p", "x", "-n", "100000", "--ignore-eos"]);
    generate.env("TMPDIR", dir.path());
    let folder = || std::fs::read_dir(dir.path()).unwrap().next().map(|entry| entry.unwrap().path());
    interrupt_once(generate, || folder().is_some_and(|folder| num_entries(&folder) > 0));
    assert_eq!(num_entries(dir.path()), 0);
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
fn a_reader_that_goes_away_ends_the_program_without_a_word() {
    let model = Synthetic::new("pangu-pro-moe");
    let arg = model.arg();
    let commands: [&[&str]; 6] = [
        &["inspect", &arg],
        &["tokenize", "-m", &arg, "x"],
        &["completions", "bash"],
        &["generate", "-m", &arg, "-p", "x", "--ignore-eos"],
        &["generate", "-m", &arg, "-p", "x", "--format", "json"],
        &["chat", "-m", &arg, "-n", "50", "x"],
    ];
    for args in commands {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output =
            Command::new(env!("CARGO_BIN_EXE_moge")).args(args).stdin(Stdio::null()).stdout(writer).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success() && !stderr.contains("error") && !stderr.contains("panicked"),
            "{args:?} {stderr}"
        );
    }
}

#[test]
fn messages_have_colors_on_a_terminal_only() {
    let model = Synthetic::new("qwen3");
    let output = moge(&["-v", "generate", "-m", &model.arg(), "-p", "x", "-n", "1"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("threads") && !stderr.contains('\x1b'), "{stderr:?}");
}

#[test]
fn completions_are_written_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(stdout(moge(&["completions", shell])).contains("generate"));
    }
}
