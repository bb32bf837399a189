//! `moge train` through the real binary: what a user types, and what kills, full disks and damaged files leave.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![cfg(unix)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Steps of a run that is not told otherwise.
const NUM_STEPS: u64 = 40;
/// Steps from one checkpoint to the next.
const CHECKPOINT_EVERY: u64 = 4;
/// The last checkpoint.
const FINAL: &str = "out/step-00000040";

/// Longest time that a test waits for something to happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// Names of files to what they hold.
type Files = BTreeMap<String, Vec<u8>>;

/// A folder with a tiny model, a text, and the run file.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        succeed(Command::new(env!("CARGO_BIN_EXE_moge")).args([
            "synth",
            &folder.arg("model"),
            "--arch",
            "pangu-pro-moe",
        ]));
        let line = |i: usize| format!("{i} grouped experts share the work evenly; {} do not.\n", i * i);
        fs::write(folder.path("a.txt"), (0..100).map(line).collect::<String>()).unwrap();
        folder.write_run(&[]);
        folder
    }

    /// The run file with parts of its text replaced.
    fn write_run(&self, changes: &[(&str, &str)]) {
        let mut text = format!(
            "[model]\nconfig = 'model'\ninit = 'random'\nseed = 1\n[output]\ndir = 'out'\n\
             checkpoint_every = {CHECKPOINT_EVERY}\n[compute]\nmicro_batch_tokens = 128\n[optimizer]\n\
             [data.web]\nfiles = ['a.txt']\nformat = 'text'\n[[phases]]\nname = 'general'\n\
             tokens = {}\nsequence_length = 64\nbatch_tokens = 256\nlearning_rate = [3e-3, 1e-3]\n\
             mixture = {{ web = 1 }}\n",
            NUM_STEPS * 256
        );
        for (from, to) in changes {
            assert!(text.contains(from), "{from} is not in the run file");
            text = text.replace(from, to);
        }
        fs::write(self.path("run.toml"), text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn arg(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moge"));
        command.args(["train", &self.arg("run.toml")]);
        command
    }

    /// Train to the end, and give what is said on standard error.
    fn train(&self) -> String {
        String::from_utf8(succeed(&mut self.command()).stderr).unwrap()
    }

    /// Start to train with a number of threads that differs from the usual one: it must not change the numbers.
    fn start(&self) -> Child {
        self.command().args(["--threads", "3"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Train until `happened`, then kill; false if the training ended before.
    fn kill_when(&self, mut happened: impl FnMut() -> bool) -> bool {
        let mut child = self.start();
        let start = Instant::now();
        while !happened() {
            assert!(start.elapsed() < PATIENCE, "nothing happens");
            if child.try_wait().unwrap().is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        true
    }

    /// The training must fail with one line that holds all `parts`, and must not panic.
    #[track_caller]
    fn assert_refused(&self, parts: &[&str]) {
        assert_fails(&self.command().output().unwrap(), parts);
    }

    /// Names in the output directory, sorted.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("out")).into_iter().flatten();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn is_writing(&self) -> bool {
        self.names().iter().any(|name| name.ends_with(".tmp"))
    }

    /// `[step, loss]` of all lines of metrics.
    fn losses(&self) -> Vec<(u64, f64)> {
        let text = fs::read_to_string(self.path("out/metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|line| (line["step"].as_u64().unwrap(), line["loss"].as_f64().unwrap())).collect()
    }

    /// All that a run leaves that must not depend on how often it was stopped.
    fn result(&self) -> (Files, Files, Vec<(u64, f64)>) {
        let dir = self.path(FINAL);
        (files_in(&dir), files_in(&dir.join("trainer")), self.losses())
    }
}

fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

#[track_caller]
fn assert_fails(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && !stderr.contains("panicked"), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{part:?} is not in: {stderr}");
    }
}

fn files_in(dir: &Path) -> Files {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn a_run_killed_at_any_moment_goes_on_and_ends_with_the_same_bits() {
    let whole = Folder::new();
    let start = Instant::now();
    whole.train();
    let duration = start.elapsed();
    let folder = Folder::new();
    let (mut num_kills, mut random) = (0, 0x9e37_79b9_u32);
    for _ in 0..8 {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let delay = duration.mul_f64(0.4 * f64::from(random >> 8) / f64::from(1 << 24));
        let start = Instant::now();
        num_kills += u32::from(folder.kill_when(|| start.elapsed() >= delay));
    }
    folder.train();
    assert!(num_kills >= 2, "{num_kills}");
    assert!(folder.result() == whole.result());
}

#[test]
fn a_run_killed_while_a_checkpoint_is_written_goes_on_and_ends_with_the_same_bits() {
    let whole = Folder::new();
    whole.train();
    let folder = Folder::new();
    let (mut num_half_written, mut num_kills) = (0, 0);
    while num_kills < 6 && folder.kill_when(|| folder.is_writing()) {
        num_kills += 1;
        num_half_written += u32::from(folder.is_writing());
    }
    folder.train();
    assert!(num_half_written > 0, "{num_kills}");
    assert!(folder.result() == whole.result());
    assert!(!folder.is_writing(), "{:?}", folder.names());
}

#[test]
fn after_ctrl_c_the_step_is_finished_and_a_checkpoint_written() {
    let whole = Folder::new();
    whole.train();
    let folder = Folder::new();
    // Long enough to be stopped, and no checkpoint before.
    folder.write_run(&[("checkpoint_every = 4", "checkpoint_every = 1000")]);
    let mut child = folder.start();
    let start = Instant::now();
    while fs::metadata(folder.path("out/metrics.jsonl")).map_or(0, |file| file.len()) == 0 {
        assert!(start.elapsed() < PATIENCE && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_micros(100));
    }
    succeed(Command::new("kill").args(["-INT", &child.id().to_string()]));
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    if output.status.code() == Some(130) {
        assert!(stderr.contains("stopped after ") && stderr.contains("of 40 steps; the same command"), "{stderr}");
        assert!(folder.names().iter().any(|name| name.starts_with("step-")), "{:?}", folder.names());
    }
    folder.train();
    assert!(folder.result() == whole.result());
}

#[test]
fn a_full_disk_is_said_leaves_nothing_torn_and_the_run_goes_on() {
    let whole = Folder::new();
    whole.train();
    let folder = Folder::new();
    assert!(folder.kill_when(|| folder.path("out/step-00000008").exists()));
    let last = folder.names().into_iter().rfind(|name| name.starts_with("step-") && !name.ends_with(".tmp"));
    // The system refuses files of more than 3000 blocks of 512 bytes, which the moments need, as a full disk would.
    let script = "trap '' XFSZ; ulimit -f 3000; exec \"$0\" train \"$1\"";
    let mut shell = Command::new("sh");
    let output = shell.args(["-c", script, env!("CARGO_BIN_EXE_moge"), &folder.arg("run.toml")]).output().unwrap();
    let full = "trainer/model.safetensors.partial: the disk is full";
    let last = format!("the last good checkpoint is {}", folder.path("out").join(last.unwrap()).display());
    assert_fails(&output, &[full, &last, "the same command, run again, goes on\n"]);
    assert!(!folder.is_writing(), "{:?}", folder.names());
    folder.train();
    assert!(folder.result() == whole.result());
}

#[test]
fn a_torn_checkpoint_is_named_and_the_one_before_is_used() {
    let whole = Folder::new();
    whole.train();
    let folder = Folder::new();
    folder.train();
    let torn = folder.path(FINAL).join("trainer/model.safetensors");
    let bytes = fs::read(&torn).unwrap();
    fs::write(&torn, &bytes[..bytes.len() / 2]).unwrap();
    let said = folder.train();
    for part in ["step-00000040/trainer/model.safetensors: it has ", "step-00000036: going on after step 36"] {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
    assert!(folder.result() == whole.result());
    for step in ["32", "36", "40"] {
        fs::write(folder.path(&format!("out/step-000000{step}/config.json")), "{").unwrap();
    }
    folder.assert_refused(&["no checkpoint is whole", "step-00000032/config.json: it has 1 bytes"]);
}

#[test]
fn a_bad_line_of_data_is_named_and_left_out_only_if_asked() {
    let folder = Folder::new();
    let good = "{\"text\": \"evenly shared work\"}\n".repeat(30);
    fs::write(folder.path("b.jsonl"), format!("{good}{{\"text\": 7}}\n{good}")).unwrap();
    let data = ("files = ['a.txt']\nformat = 'text'", "files = ['b.jsonl']\nformat = 'jsonl'");
    folder.write_run(&[data]);
    folder.assert_refused(&["b.jsonl: line 31: ", "on_bad_line = \"skip\""]);
    folder.write_run(&[data, ("format = 'jsonl'", "format = 'jsonl'\non_bad_line = 'skip'")]);
    let said = folder.train();
    assert!(said.contains("data.web: 1 lines hold no document"), "{said}");
}

#[test]
fn weights_and_checkpoints_of_other_shapes_are_refused_by_tensor() {
    let folder = Folder::new();
    let wide = folder.arg("wide");
    let args = ["synth", &wide, "--arch", "pangu-pro-moe", "--hidden", "64"];
    succeed(Command::new(env!("CARGO_BIN_EXE_moge")).args(args));
    folder.write_run(&[("init = 'random'", "init = 'wide'")]);
    folder.assert_refused(&["wide: ", "model.embed_tokens.weight: shape is [512, 64], should be [512, 48]"]);
    folder.write_run(&[("tokens = 10240", "tokens = 512")]);
    folder.train();
    folder.write_run(&[("config = 'model'", "config = 'wide'")]);
    folder.assert_refused(&["step-00000002: lm_head.weight is [512, 48], the run's model has [512, 64]"]);
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_names_the_last_checkpoint() {
    let folder = Folder::new();
    folder.write_run(&[("tokens = 10240", "tokens = 1024")]);
    folder.train();
    folder.write_run(&[("[3e-3, 1e-3]", "[1e30, 1e30]")]);
    let last = format!("the last good checkpoint is {}", folder.path("out/step-00000004").display());
    folder.assert_refused(&["changed since that checkpoint: phases[0].learning_rate", "error: step ", &last]);
    assert!(folder.losses().iter().all(|(_, loss)| loss.is_finite()));
}

#[test]
fn the_loss_of_a_tiny_network_falls_and_the_engine_runs_what_was_trained() {
    let folder = Folder::new();
    folder.write_run(&[("tokens = 10240", "tokens = 15360"), ("dir = 'out'", "dir = 'out'\ndtype = 'bf16'")]);
    folder.train();
    let losses = folder.losses();
    // A network that knows nothing: the logarithm of its vocabulary's 512 entries.
    assert!((losses[0].1 - 512f64.ln()).abs() < 0.5, "{losses:?}");
    assert!(losses.last().unwrap().1 < 2.5, "{losses:?}");
    let model = folder.arg("out/step-00000060");
    let args = ["generate", "--model", &model, "-p", "grouped", "-n", "4", "--temperature", "0"];
    succeed(Command::new(env!("CARGO_BIN_EXE_moge")).args(args));
    succeed(Command::new(env!("CARGO_BIN_EXE_moge")).args(["inspect", &model, "--deep"]));
}

#[test]
fn the_report_can_be_made_again_for_other_devices() {
    let folder = Folder::new();
    folder.write_run(&[("tokens = 10240", "tokens = 512")]);
    folder.train();
    let report = folder.path("out/report.html");
    fs::remove_file(&report).unwrap();
    succeed(folder.command().args(["--report-only", "--devices", "6"]));
    assert!(fs::read_to_string(&report).unwrap().contains("Balance between 6 devices"));
    let output = folder.command().args(["--report-only", "--devices", "5"]).output().unwrap();
    assert_fails(&output, &["5 devices: they must be a divisor of the 12 experts"]);
}
