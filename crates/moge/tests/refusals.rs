//! What the real binary refuses, and the words in which it does.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod cli;

use std::path::Path;

use cli::{Synthetic, assert_refused, golden, json_of, moge, stdout};
use serde_json::{Value, json};

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

#[cfg(unix)]
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
