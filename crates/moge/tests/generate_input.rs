//! `moge generate --input` on a small checkpoint.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::Write;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

/// The tokens of each answer.
fn generate(args: &[&str]) -> Vec<Value> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/qwen3");
    let output = Command::new(env!("CARGO_BIN_EXE_moge"))
        .args(["generate", "-n", "12", "--ignore-eos", "--temperature", "1", "--format", "json", "--model"])
        .arg(model)
        .args(args)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["tokens"].clone()).collect()
}

#[test]
fn equal_lines_differ_and_each_line_is_its_prompt_alone_with_the_next_seed() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    // An empty line is no prompt and takes no seed.
    writeln!(file, "{line}\n\n{line}\n{line}", line = json!({ "tokens": [5, 6, 7] })).unwrap();
    let answers = generate(&["--seed", "40", "--input", file.path().to_str().unwrap()]);
    assert_eq!(answers.len(), 3);
    assert!(answers[0] != answers[1] && answers[1] != answers[2] && answers[0] != answers[2], "{answers:?}");
    for (answer, seed) in answers.iter().zip(["40", "41", "42"]) {
        assert_eq!(generate(&["--seed", seed, "--tokens", "5,6,7"]), std::slice::from_ref(answer));
    }
}
