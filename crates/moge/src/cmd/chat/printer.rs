//! Output of thinking and answer.

use std::io::IsTerminal;

use anyhow::Result;
use moge_model::TokenId;

use crate::output::{print, print_line, say};
use crate::thinking::{Part, ThinkingSplitter};

/// Terminal sequences that start and end dimmed text.
const DIM: &str = "\x1b[2m";
const UNDIM: &str = "\x1b[0m";

/// Writes thinking and answer where each belongs: both to a terminal, the thinking dimmed; else the thinking to
/// standard error and the answer to standard output.
pub(super) struct Printer<'a> {
    splitter: ThinkingSplitter<'a>,
    answer: String,
    terminal: bool,
    /// Thinking has been written and its line has not ended.
    in_thinking: bool,
}

impl<'a> Printer<'a> {
    pub(super) fn new(splitter: ThinkingSplitter<'a>) -> Printer<'a> {
        Printer { splitter, answer: String::new(), terminal: std::io::stdout().is_terminal(), in_thinking: false }
    }

    pub(super) fn push(&mut self, token: TokenId) -> Result<()> {
        let (part, text) = self.splitter.push(token);
        self.print(part, &text)
    }

    fn print(&mut self, part: Part, text: &str) -> Result<()> {
        match part {
            Part::Answer => {
                // Whitespace between thinking and answer belongs to neither.
                let text = if self.answer.is_empty() { text.trim_start() } else { text };
                if !text.is_empty() {
                    self.end_thinking()?;
                }
                self.answer += text;
                print(text)?;
            }
            Part::Thinking if text.is_empty() => {}
            Part::Thinking if self.terminal => {
                print(format_args!("{}{text}", if self.in_thinking { "" } else { DIM }))?;
                self.in_thinking = true;
            }
            Part::Thinking => {
                say(text);
                self.in_thinking = true;
            }
        }
        Ok(())
    }

    /// The answer begins on a line of its own.
    fn end_thinking(&mut self) -> Result<()> {
        if std::mem::take(&mut self.in_thinking) {
            if self.terminal {
                print(format_args!("{UNDIM}\n"))?;
            } else {
                say("\n");
            }
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<String> {
        let (part, text) = self.splitter.finish();
        self.print(part, &text)?;
        let in_line = !(self.terminal && self.in_thinking);
        self.end_thinking()?;
        if in_line {
            print_line("")?;
        }
        Ok(self.answer)
    }
}
