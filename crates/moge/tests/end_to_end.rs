//! The real binary on small checkpoints: what a user types, and what comes out.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod command;

use std::path::Path;
use std::process::{Command, Stdio};

use command::{Synthetic, assert_refused, golden, json_of, moge, stdout};
use serde_json::{Value, json};

fn recorded(case: &str, name: &str) -> Vec<u32> {
    let bytes = std::fs::read(Path::new(&golden(case)).join("expected.safetensors")).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
    let offsets = &header[name]["data_offsets"];
    let place = |i: usize| 8 + header_len + offsets[i].as_u64().unwrap() as usize;
    bytes[place(0)..place(1)].chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

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
fn bad_prompts_and_parameters_are_refused_by_name() {
    let model = Synthetic::new("pangu-pro-moe");
    let generate = |more: &[&'static str], parts: &[&str]| {
        assert_refused(&[&["generate", "-m", &model.arg()], more].concat(), parts);
    };
    generate(&[], &["--prompt"]);
    generate(&["--tokens", "1,99999"], &["token 99999 at index 1", "vocabulary size 512"]);
    generate(&["--tokens", ""], &["invalid value", "a token id is a whole number from 0 to 4294967295"]);
    assert_refused(&["chat", "-m", &model.arg(), "-n", "0"], &["max_tokens: 0"]);
    assert_refused(&["tokenize", "-m", &model.arg(), "--decode", "5,512"], &["--decode: 512", "below 512"]);
    generate(&["--tokens", "-1"], &["invalid value '-1' for '--tokens"]);
    generate(&["-p", "x", "--temperature", "-1"], &["temperature: -1"]);
    generate(&["-p", "x", "--top-p", "1.5"], &["top_p: 1.5"]);
    generate(&["-p", "x", "--logit-bias", "7"], &["ID=VALUE"]);
    generate(&["-p", "x", "--logprobs", "3"], &["--format json"]);
    generate(&["-p", "x", "--prompt-file", "y"], &["cannot be used with"]);
    generate(&["--prompt-file", "no-such-file"], &["no-such-file", "No such file"]);
    generate(&["-p", "x", "--max-tokens", "0"], &["max_tokens: 0"]);
    let long = vec!["5"; 1024].join(",");
    assert_refused(&["generate", "-m", &model.arg(), "--tokens", &long], &["1024 tokens", "at most 1023"]);
    let empty = Synthetic::new("qwen3");
    assert_refused(&["generate", "-m", &empty.arg(), "-p", ""], &["prompt: it has no token"]);
}

#[test]
fn spaces_between_token_ids_do_not_matter() {
    let model = Synthetic::new("glm4");
    let answer = json_of(moge(&["generate", "-m", &model.arg(), "--tokens", "5, 6 ,7", "-n", "1", "--format", "json"]));
    assert_eq!(answer["prompt_tokens"], json!([5, 6, 7]));
    let decode = |ids: &str| stdout(moge(&["tokenize", "-m", &model.arg(), "--decode", ids]));
    assert_eq!(decode("65, 66"), decode("65,66"));
}

#[test]
fn files_from_other_systems_are_read_or_refused_with_the_place() {
    let model = Synthetic::new("qwen3");
    let file = model.path().join("file");
    let name = file.to_str().unwrap();
    let generate = ["generate", "-m", &model.arg(), "-n", "1", "--format", "json"];
    std::fs::write(&file, b"ab\r\n").unwrap();
    let prompt = json_of(moge(&[&generate[..], &["--prompt-file", name]].concat()))["prompt_tokens"].clone();
    assert_eq!(prompt, json_of(moge(&[&generate[..], &["-p", "ab\r\n"]].concat()))["prompt_tokens"]);
    std::fs::write(&file, b"ab\xffc").unwrap();
    assert_refused(&[&generate[..], &["--prompt-file", name]].concat(), &["file: not UTF-8 at byte 2"]);
    std::fs::write(&file, "\u{feff}{\"tokens\": [7]}\r\n").unwrap();
    assert_eq!(json_of(moge(&[&generate[..], &["--input", name]].concat()))["prompt_tokens"], json!([7]));
    let tokenize = ["tokenize", "-m", &model.arg(), "--chat", name];
    std::fs::write(&file, "\u{feff}[{\"role\": \"user\", \"content\": \"x\"}]").unwrap();
    stdout(moge(&tokenize));
    std::fs::write(&file, "[{\"role\": \"user\", \"content\": 5}]").unwrap();
    assert_refused(&tokenize, &["file: messages[0]: `content` must be a string"]);
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

#[cfg(unix)]
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
fn bad_lines_of_an_input_file_are_refused_with_their_number() {
    let model = Synthetic::new("pangu-pro-moe");
    let file = model.path().join("prompts.jsonl");
    for (line, parts) in [
        ("{\"prompt\": \"a\"", "prompts.jsonl:2"),
        ("{\"prompt\": \"a\", \"tokens\": [1]}", "prompts.jsonl:2: exactly one"),
        ("{\"promt\": \"a\"}", "unknown field `promt`"),
        ("{\"tokens\": [-1]}", "prompts.jsonl:2"),
        ("{\"tokens\": [5000]}", "prompts.jsonl:2: prompt: token 5000"),
        ("{\"tokens\": [5], \"max_tokens\": 0}", "prompts.jsonl:2: max_tokens: 0"),
    ] {
        std::fs::write(&file, format!("{{\"prompt\": \"fine\"}}\n{line}\n")).unwrap();
        assert_refused(&["generate", "-m", &model.arg(), "--input", file.to_str().unwrap()], &[parts]);
    }
    std::fs::write(&file, "\n").unwrap();
    assert_refused(&["generate", "-m", &model.arg(), "--input", file.to_str().unwrap()], &["no prompts"]);
}

#[test]
fn damaged_checkpoints_are_refused_with_file_and_field() {
    let model = Synthetic::new("pangu-pro-moe");
    let generate = ["generate", "-m", &model.arg(), "-p", "x"];
    let config = model.path().join("config.json");
    let good = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, "{").unwrap();
    assert_refused(&generate, &["config.json", "not a JSON object"]);
    std::fs::write(&config, good.replace("\"silu\"", "\"gelu\"")).unwrap();
    assert_refused(&generate, &["config.json: hidden_act", "gelu"]);
    std::fs::write(&config, good.replace("PanguProMoEForCausalLM", "GPT2LMHeadModel")).unwrap();
    assert_refused(&generate, &["architectures", "supported: PanguProMoEForCausalLM"]);
    let mut small: Value = serde_json::from_str(&good).unwrap();
    small["vocab_size"] = json!(300);
    std::fs::write(&config, small.to_string()).unwrap();
    assert_refused(&generate, &["tokenizer.model", "vocab_size 300"]);
    std::fs::write(&config, &good).unwrap();
    std::fs::write(model.path().join("tokenizer.model"), b"\x0a\xff\xff").unwrap();
    assert_refused(&generate, &["tokenizer.model"]);
    std::fs::remove_file(model.path().join("tokenizer.model")).unwrap();
    assert_refused(&generate, &["neither tokenizer.json nor tokenizer.model", "--tokens"]);
    let tokens_only = ["generate", "-m", &model.arg(), "--tokens", "5", "-n", "2"];
    stdout(moge(&tokens_only));
    assert_refused(&["generate", "-m", "/no/such/dir", "-p", "x"], &["/no/such/dir/config.json"]);
}

#[test]
fn nan_weights_end_with_an_error_that_says_where_to_look() {
    let model = Synthetic::new("qwen3");
    let file = model.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let end = bytes.len();
    bytes[end - 20_000..].fill(0xff);
    std::fs::write(&file, bytes).unwrap();
    assert_refused(&["generate", "-m", &model.arg(), "-p", "x"], &["inspect --deep"]);
}

#[test]
fn too_little_memory_is_said_before_anything_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m");
    let arg = model.to_str().unwrap();
    // 64 KiB of keys and values a token: 1 900 000 tokens need more than 100 GB.
    let sizes = "--layers 1 --hidden 8 --q-heads 64 --kv-heads 64 --head-dim 128 --max-position 2000000";
    stdout(moge(&[&["synth", arg, "--arch", "pangu-embedded"], &sizes.split(' ').collect::<Vec<_>>()[..]].concat()));
    let generate = ["generate", "-m", arg, "-p", "x", "--dtype", "f32", "-n"];
    assert_refused(&[&generate[..], &["1900000"]].concat(), &["not enough memory", "KV cache 12", "would be left"]);
    let bench = ["bench", "-m", arg, "--dtype", "f32", "--decode", "1", "--batch", "1", "--context", "1900000"];
    assert_refused(&bench, &["not enough memory", "KV cache 12"]);
    stdout(moge(&[&generate[..], &["3"]].concat()));
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_refused_by_name_and_not_waited_for() {
    let model = Synthetic::new("qwen3");
    let names =
        ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"];
    for name in names {
        let (file, kept) = (model.path().join(name), model.path().join("kept"));
        std::fs::rename(&file, &kept).unwrap();
        for (target, problem) in [("/dev/zero", "not a regular file"), ("absent", "a link that leads nowhere")] {
            std::os::unix::fs::symlink(target, &file).unwrap();
            assert_refused(&["generate", "-m", &model.arg(), "-p", "x"], &[&format!("{name}: {problem}")]);
            std::fs::remove_file(&file).unwrap();
        }
        std::fs::write(&file, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n").unwrap();
        assert_refused(&["generate", "-m", &model.arg(), "-p", "x"], &[name, "git lfs pull"]);
        std::fs::rename(&kept, &file).unwrap();
    }
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

#[test]
fn more_threads_than_can_be_and_a_config_of_the_largest_sizes_are_refused() {
    for threads in ["0", "4097", "18446744073709551615"] {
        let output = moge(&["generate", "-m", &golden("qwen3"), "--tokens", "5", "--threads", threads]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains(&format!("{threads} is not in 1..=4096")), "{stderr}");
    }
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Path::new(&golden("qwen3")).join("model.safetensors");
    std::fs::copy(checkpoint, dir.path().join("model.safetensors")).unwrap();
    let config = std::fs::read(Path::new(&golden("qwen3")).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    let sizes = ["vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"];
    for size in sizes {
        config[size] = json!(1 << 21);
    }
    for (field, value) in [
        ("num_hidden_layers", 4096),
        ("head_dim", 2),
        ("num_attention_heads", 1 << 20),
        ("num_key_value_heads", 1 << 20),
    ] {
        config[field] = json!(value);
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let dir = dir.path().to_str().unwrap();
    assert_refused(&["generate", "-m", dir, "--tokens", "5", "-n", "3000000", "--threads", "4096"], &[dir]);
}
