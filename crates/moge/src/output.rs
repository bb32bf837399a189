//! Standard output and standard error. Either may be closed at any time, for example by `head`, which must not cause a
//! panic as `println!` does.

use std::fmt::Display;
use std::io::{ErrorKind, Write};

use anyhow::{Context, Result};

/// Write to standard output at once.
pub(crate) fn print(text: impl Display) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    write!(stdout, "{text}").and_then(|()| stdout.flush()).context("standard output")
}

/// Write a line to standard output.
pub(crate) fn print_line(line: impl Display) -> Result<()> {
    print(format_args!("{line}\n"))
}

/// Write to standard error; errors are ignored.
pub(crate) fn say(text: impl Display) {
    let _ = write!(std::io::stderr().lock(), "{text}");
}

/// Write a line to standard error.
pub(crate) fn say_line(line: impl Display) {
    say(format_args!("{line}\n"));
}

/// True if the reader of our output has gone away, having read what it wanted.
pub(crate) fn is_reader_gone(error: &anyhow::Error) -> bool {
    let is_broken_pipe = |error: &std::io::Error| error.kind() == ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref().is_some_and(is_broken_pipe))
}

/// An error and its causes in one line. Many of our errors tell their cause themselves; it is not said twice.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string).filter(|cause| !cause.is_empty()) {
        if !text.ends_with(&cause) {
            text += if text.is_empty() { "" } else { ": " };
            text += &cause;
        }
    }
    plain(&text)
}

/// A text with its control characters spelled out: what comes from a checkpoint may hold line breaks and worse, which a
/// terminal must not see.
pub(crate) fn plain(text: &str) -> String {
    let plain = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once_and_control_characters_are_spelled_out() {
        let cause = std::io::Error::other("no\u{1b}[2J disk\n");
        let error = anyhow::Error::new(cause).context("x.bin: no\u{1b}[2J disk\n").context("prompt 3");
        assert_eq!(one_line(&error), "prompt 3: x.bin: no\\u{1b}[2J disk\\n");
    }

    #[test]
    fn a_closed_pipe_is_found_among_the_causes() {
        let broken = std::io::Error::from(ErrorKind::BrokenPipe);
        assert!(is_reader_gone(&anyhow::Error::new(broken).context("standard output")));
        assert!(!is_reader_gone(&anyhow::anyhow!("another")));
    }
}
