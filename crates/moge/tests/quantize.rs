//! `moge quantize` and `moge perplexity` through the real binary: what a user types, what a kill and a full disk leave.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn moge(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moge")).args(args).output().unwrap()
}

#[track_caller]
fn stdout(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The command must fail with one line that holds all `parts`, and must not panic.
#[track_caller]
fn assert_refused(args: &[&str], parts: &[&str]) {
    let output = moge(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && !stderr.contains("panicked"), "{args:?}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{part:?} is not in: {stderr}");
    }
}

/// A folder with the synthetic checkpoint `m`; 32 divides its widths.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new(options: &[&str]) -> Folder {
        Folder::with_expert_width("32", options)
    }

    fn with_expert_width(width: &str, options: &[&str]) -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        let sizes = ["--arch", "pangu-pro-moe", "--hidden", "96", "--expert-intermediate", width];
        let sizes = [&sizes[..], &["--shared-intermediate", "64", "--head-dim", "16"]].concat();
        stdout(moge(&[&["synth", &folder.arg("m")], &sizes[..], options].concat()));
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn arg(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn quantize(&self, out: &str, scheme: &str, options: &[&str]) -> String {
        let (model, out) = (self.arg("m"), self.arg(out));
        stdout(moge(&[&["quantize", "--model", &model, "--out", &out, "--scheme", scheme], options].concat()))
    }

    fn tokens(&self, name: &str, options: &[&str]) -> Value {
        let model = self.arg(name);
        let args = ["generate", "--model", &model, "-p", "once", "-n", "12", "--ignore-eos", "--format", "json"];
        let answer = stdout(moge(&[&args[..], &["--temperature", "0"], options].concat()));
        serde_json::from_str::<Value>(&answer).unwrap()["tokens"].clone()
    }
}

fn files_in(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn a_quantised_checkpoint_generates_what_quantising_in_memory_does() {
    let folder = Folder::new(&[]);
    for scheme in ["w4a8", "w8a8"] {
        let printed = folder.quantize(scheme, scheme, &["--report", &folder.arg("report.json")]);
        assert!(printed.contains("lm_head") && printed.contains("worst tensor"), "{printed}");
        assert_eq!(folder.tokens(scheme, &[]), folder.tokens("m", &["--quantize", scheme]));
        let report: Value = serde_json::from_slice(&std::fs::read(folder.path("report.json")).unwrap()).unwrap();
        assert_eq!(report["roles"].as_array().unwrap().len(), 4);
        assert_eq!(report["tensors"].as_array().unwrap().len(), 5 * (4 + 3 * 13) + 1);
        stdout(moge(&["inspect", &folder.arg(scheme), "--deep"]));
    }
}

#[test]
fn each_role_has_a_format_of_its_own() {
    let folder = Folder::new(&[]);
    folder.quantize("q", "w4a8", &["--attention", "w8a8", "--shared-expert", "none", "--lm-head", "none"]);
    let config: Value = serde_json::from_slice(&std::fs::read(folder.path("q/config.json")).unwrap()).unwrap();
    let quant = &config["quantization_config"];
    let fields = ["quant_method", "mlp", "shared_expert", "attention", "lm_head"].map(|field| quant[field].clone());
    assert_eq!(fields, ["moge", "w4a8", "none", "w8a8", "none"].map(Value::from));
    assert_eq!(folder.tokens("q", &[]).as_array().unwrap().len(), 12);
}

#[test]
fn perplexity_beside_the_baseline_is_that_of_no_change_or_a_small_one() {
    let folder = Folder::new(&[]);
    folder.quantize("q", "w8a8", &[]);
    std::fs::write(folder.path("text"), "hello world, hello 系统. ".repeat(20)).unwrap();
    let run = |name: &str, options: &[&str]| -> Value {
        let (model, baseline) = (folder.arg(name), folder.arg("m"));
        let args = ["perplexity", "--model", &model, "--baseline", &baseline, "--format", "json"];
        serde_json::from_str(&stdout(moge(&[&args[..], options].concat()))).unwrap()
    };
    let text = folder.arg("text");
    let same = run("m", &["--file", &text, "--context", "90"]);
    let baseline = &same["baseline"];
    assert_eq!((&baseline["perplexity"], &baseline["kl_max"]), (&same["perplexity"], &Value::from(0.0)));
    assert_eq!((&baseline["same_top_share"], &baseline["changed_expert_share"]), (&1.0.into(), &0.0.into()));
    let quantised = run("q", &["--file", &text, "--context", "90"]);
    assert_eq!(quantised["num_tokens"], same["num_tokens"]);
    let kl = quantised["baseline"]["kl_mean"].as_f64().unwrap();
    assert!(kl > 0.0 && kl < 0.05, "{quantised}");
    assert!(quantised["baseline"]["changed_expert_share"].as_f64().unwrap() < 0.2, "{quantised}");
    assert_eq!(run("q", &["--tokens", "5,6,7,8"])["num_tokens"], 3);
    let model = folder.arg("m");
    assert_refused(&["perplexity", "--model", &model, "--tokens", "5"], &["1 tokens; at least 2"]);
    assert_refused(&["perplexity", "--model", &model, "--tokens", "5,99999"], &["99999 is no token id"]);
    assert_refused(&["perplexity", "--model", &model, "--file", &text, "--context", "1"], &["--context 1: allowed: 2"]);
}

#[test]
fn a_killed_run_is_no_checkpoint_and_the_next_run_finishes_it() {
    let folder = Folder::new(&["--vocab", "60000", "--layers", "6"]);
    folder.quantize("whole", "w4a8", &[]);
    let (model, out) = (folder.arg("m"), folder.arg("killed"));
    let args = ["quantize", "--model", &model, "--out", &out, "--scheme", "w4a8", "--threads", "1"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_moge"))
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while !folder.path("killed/model.safetensors.partial").exists() && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_micros(200));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    if !folder.path("killed/config.json").exists() {
        assert_refused(&["inspect", &out], &["killed: not finished", "run again"]);
        assert_refused(&["generate", "-m", &out, "-p", "x"], &["not finished"]);
    }
    if folder.path("killed/unfinished.jsonl").exists() {
        let other = [&args[..6], &["w8a8"]].concat();
        assert_refused(&other, &["begun with another scheme"]);
        stdout(moge(&args));
    }
    assert!(files_in(&folder.path("killed")) == files_in(&folder.path("whole")));
}

#[cfg(unix)]
#[test]
fn a_disk_that_fills_up_is_said_and_leaves_work_that_can_be_finished() {
    let folder = Folder::new(&[]);
    folder.quantize("whole", "w8a8", &[]);
    // The system refuses files of more than 200 blocks of 512 bytes, as a full disk would refuse what is too much.
    let script = "trap '' XFSZ; ulimit -f 200; exec \"$0\" quantize --model \"$1\" --out \"$2\" --scheme w8a8";
    let mut shell = Command::new("sh");
    let output = shell.args(["-c", script, env!("CARGO_BIN_EXE_moge"), &folder.arg("m"), &folder.arg("q")]).output();
    let stderr = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(stderr.contains("model.safetensors.partial: the disk is full"), "{stderr}");
    assert_refused(&["inspect", &folder.arg("q")], &["not finished"]);
    folder.quantize("q", "w8a8", &[]);
    assert!(files_in(&folder.path("q")) == files_in(&folder.path("whole")));
}

#[test]
fn what_cannot_be_quantised_is_refused_by_name() {
    let folder = Folder::with_expert_width("40", &[]);
    let (model, out) = (folder.arg("m"), folder.arg("q"));
    let args = |scheme| ["quantize", "--model", &model, "--out", &out, "--scheme", scheme];
    assert_refused(&args("w3a8"), &["w3a8", "w8a8", "w4a8"]);
    assert_refused(&args("w4a8"), &["down_proj.weight: 40 columns cannot be w4a8", "multiple of 32"]);
    assert!(!folder.path("q").exists(), "nothing is written for what is refused");
    let report = folder.arg("absent/report.json");
    assert_refused(&[&args("w8a8")[..], &["--report", &report]].concat(), &[&report]);
    assert_eq!(files_in(&folder.path("q")).len(), 0, "the report is checked before the work");
    let dense = folder.arg("dense");
    stdout(moge(&["synth", &dense, "--arch", "qwen3"]));
    let options = ["--scheme", "w8a8", "--shared-expert", "w8a8"];
    assert_refused(
        &[&["quantize", "--model", &dense, "--out", &out], &options[..]].concat(),
        &["--shared-expert: this network has none"],
    );
    folder.quantize("q", "w8a8", &[]);
    assert_refused(&args("w8a8"), &["q: not empty"]);
    let again = folder.arg("again");
    assert_refused(&["quantize", "--model", &out, "--out", &again, "--scheme", "w8a8"], &["quantised already"]);
}

#[test]
fn a_checkpoint_of_another_layout_or_without_its_bytes_is_refused() {
    let folder = Folder::new(&[]);
    folder.quantize("q", "w8a8", &[]);
    let path = folder.path("q/config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let version = "\"layout_version\": 1";
    std::fs::write(&path, config.replace(version, "\"layout_version\": 2")).unwrap();
    assert_refused(&["inspect", &folder.arg("q")], &["quantization_config.layout_version: 2", "quantise"]);
    std::fs::write(&path, config.replace("\"mlp\": \"w8a8\"", "\"mlp\": \"w4a8\"")).unwrap();
    assert_refused(&["generate", "-m", &folder.arg("q"), "-p", "x"], &["down_proj.weight: shape is"]);
    std::fs::write(&path, config).unwrap();
    let weights = std::fs::read(folder.path("q/model.safetensors")).unwrap();
    std::fs::write(folder.path("q/model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    assert_refused(&["generate", "-m", &folder.arg("q"), "-p", "x"], &["not a valid safetensors file"]);
}
