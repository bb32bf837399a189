//! Runs the binary, and makes small checkpoints for it.
#![allow(dead_code, reason = "each file of tests uses its part")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

pub(crate) fn golden(case: &str) -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens").join(case);
    dir.canonicalize().unwrap().to_str().unwrap().to_owned()
}

pub(crate) fn moge_with_input(args: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_moge"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The command may refuse its arguments before it reads anything.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

pub(crate) fn moge(args: &[&str]) -> Output {
    moge_with_input(args, b"")
}

#[track_caller]
pub(crate) fn stdout(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
pub(crate) fn json_of(output: Output) -> Value {
    serde_json::from_str(&stdout(output)).unwrap()
}

/// The command must fail with one error line that holds all `parts`, and must not panic.
#[track_caller]
pub(crate) fn assert_refused(args: &[&str], parts: &[&str]) {
    let output = moge(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{args:?} should be refused");
    assert!(!stderr.contains("panicked"), "{stderr}");
    // Status 2 is that of the command line parser, which adds how to call the command.
    assert!(output.status.code() == Some(2) || stderr.lines().count() == 1, "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{part:?} is not in: {stderr}");
    }
}

pub(crate) struct Synthetic(tempfile::TempDir);

impl Synthetic {
    pub(crate) fn new(arch: &str) -> Synthetic {
        let dir = tempfile::tempdir().unwrap();
        stdout(moge(&["synth", dir.path().join("m").to_str().unwrap(), "--arch", arch]));
        Synthetic(dir)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join("m")
    }

    pub(crate) fn arg(&self) -> String {
        self.path().to_str().unwrap().to_owned()
    }
}
