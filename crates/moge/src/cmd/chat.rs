//! `moge chat`: one answer, or a conversation.

mod answering;
mod printer;

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use moge_engine::{Engine, FinishReason, Request, SamplingParams};
use moge_model::{ChatTemplate, Cpu, Prefix, Thinking, TokenId, Tokenizer, thinking_tokens};
use rustyline::error::ReadlineError;

use answering::{Answering, Stats};
use printer::Printer;

use crate::args::{ModelArgs, SamplingArgs};
use crate::conversation::Conversation;
use crate::interrupt::Interrupt;
use crate::model_files::{Loaded, ModelFiles};
use crate::output::{is_reader_gone, one_line, say_line};
use crate::thinking::ThinkingSplitter;

const HELP: &str = "/reset          forget the conversation, keep the system message
/system TEXT    set the system message (no TEXT: remove it)
/think on|off   ask the model to think before it answers, or not to
/stats          speed of the last answer, use of the context
/exit           leave (so does Ctrl-D)
A line that ends in \\ goes on in the next. Ctrl-C stops an answer.";

/// Talk with the model
///
/// On a terminal the model's thinking is dimmed; else it goes to standard error, the answer to standard output.
#[derive(Debug, Args)]
#[command(after_help = format!("In a conversation:\n{HELP}"))]
pub(crate) struct ChatArgs {
    /// Answer this and leave [default: a conversation]
    message: Option<String>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Ask the model to think before it answers, or not to [default: as its template does]
    #[arg(long, value_enum)]
    think: Option<Switch>,
    /// Tokens of an answer at the most [default: as many as fit]
    #[arg(short = 'n', long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Tokens of the whole conversation at the most: the KV cache has this size
    #[arg(long, value_name = "N", default_value_t = 8192)]
    context: usize,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

impl From<Switch> for Thinking {
    fn from(switch: Switch) -> Thinking {
        match switch {
            Switch::On => Thinking::On,
            Switch::Off => Thinking::Off,
        }
    }
}

/// Run `moge chat`.
pub(crate) fn run(args: &ChatArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let files = ModelFiles::of(&args.model, Some(&interrupt))?;
    let tokenizer = Arc::clone(files.tokenizer()?);
    let template = files.chat_template()?;
    let params = SamplingParams { max_tokens: args.max_tokens, ..args.sampling.params(&files.defaults) };
    params.validate(files.config.vocab_size)?;
    let context = args.context.min(files.config.max_position_embeddings);
    let Loaded { engine, cpu, .. } = files.load(&args.model, &[context])?;
    let mut conversation = Conversation::default();
    conversation.thinking = args.think.map_or(Thinking::Default, Thinking::from);
    conversation.set_system(args.system.as_deref().unwrap_or_default());
    let max_tokens = args.max_tokens.unwrap_or(usize::MAX);
    let seed_is_given = args.sampling.seed_is_given();
    let mut chat = Chat {
        engine,
        cpu,
        tokenizer: &tokenizer,
        thinking_tokens: thinking_tokens(&tokenizer, files.config.architecture),
        template,
        conversation,
        params,
        seed_is_given,
        max_tokens,
        context,
        interrupt,
        stats: None,
    };
    match &args.message {
        Some(message) => {
            let finish_reason = chat.answer(message)?;
            if finish_reason == FinishReason::Cancelled {
                chat.interrupt.leave();
            }
            Ok(())
        }
        None => chat.converse(),
    }
}

struct Chat<'a> {
    engine: Engine,
    cpu: Cpu,
    tokenizer: &'a Tokenizer,
    thinking_tokens: Option<(TokenId, TokenId)>,
    template: ChatTemplate,
    conversation: Conversation,
    params: SamplingParams,
    seed_is_given: bool,
    max_tokens: usize,
    context: usize,
    interrupt: Interrupt,
    stats: Option<Stats>,
}

impl Chat<'_> {
    fn converse(&mut self) -> Result<()> {
        let mut editor = rustyline::DefaultEditor::new().context("terminal")?;
        if std::io::stdout().is_terminal() {
            say_line("/help lists the commands.");
        }
        while let Some(text) = read_message(&mut editor)? {
            let text = text.trim();
            if text.is_empty() {
                continue;
            }
            // A line missing from the history is not an error.
            let _ = editor.add_history_entry(text);
            if text == "/exit" || text == "/quit" {
                break;
            }
            if let Some(command) = text.strip_prefix('/') {
                self.command(command);
            } else if let Err(error) = self.answer(text) {
                // A user at a terminal can continue after an error; a script would not notice it.
                if is_reader_gone(&error) || !std::io::stdin().is_terminal() {
                    return Err(error);
                }
                say_line(format_args!("error: {}", one_line(&error)));
            }
        }
        Ok(())
    }

    fn command(&mut self, command: &str) {
        let (name, argument) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        match (name, argument.trim()) {
            ("help", _) => say_line(HELP),
            ("reset", _) => self.conversation.reset(),
            ("system", text) => self.conversation.set_system(text),
            ("think", "on") => self.conversation.thinking = Thinking::On,
            ("think", "off") => self.conversation.thinking = Thinking::Off,
            ("think", _) => say_line("/think on, or /think off"),
            ("stats", _) => self.print_stats(),
            _ => say_line(format_args!("/{name} is unknown; /help lists the commands")),
        }
    }

    /// Answer `text` and keep both in the conversation. On an error the conversation is as it was.
    fn answer(&mut self, text: &str) -> Result<FinishReason> {
        self.conversation.push("user", text);
        let result = self.generate();
        match &result {
            Ok((answer, _)) => self.conversation.push("assistant", answer),
            Err(_) => self.conversation.pop(),
        }
        result.map(|(_, finish_reason)| finish_reason)
    }

    fn generate(&mut self) -> Result<(String, FinishReason)> {
        let prompt = self.tokenizer.encode(&self.conversation.prompt(&self.template)?, Prefix::Add)?;
        if prompt.len() >= self.context {
            let (used, context) = (prompt.len(), self.context);
            bail!(
                "the conversation has {used} tokens and the context {context} (--context, at most what the model \
                 allows): no room for an answer; /reset forgets the conversation"
            );
        }
        let max_tokens = self.max_tokens.min(self.context - prompt.len());
        let mut sampling = SamplingParams { max_tokens: Some(max_tokens), ..self.params.clone() };
        if !self.seed_is_given {
            // Every answer is drawn anew unless the user wants it repeated.
            sampling.seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
        }
        let mut printer = Printer::new(ThinkingSplitter::new(self.tokenizer, self.thinking_tokens, &prompt));
        let request = Request { prompt, sampling, grammar: None };
        let _answering = self.interrupt.answering();
        let is_interrupted = || self.interrupt.requested();
        let mut job = Answering::start(&mut self.engine, request)?;
        let finish_reason = job.run(&self.cpu, &is_interrupted, &mut |token| printer.push(token))?;
        self.stats = Some(job.stats);
        let answer = printer.finish()?;
        match finish_reason {
            FinishReason::NoFiniteLogit => bail!("the model's logits are not numbers"),
            FinishReason::Length if max_tokens < self.max_tokens => {
                tracing::warn!("the answer stops where the context of {} tokens is full", self.context);
                Ok((answer, FinishReason::Length))
            }
            reason => Ok((answer, reason)),
        }
    }

    fn print_stats(&self) {
        let Some(stats) = &self.stats else {
            say_line("no answer yet");
            return;
        };
        let Stats { prompt_tokens, computed_tokens, prefill_time, answer_tokens, decode_time } = *stats;
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        // The first token of the answer comes out of the prefill.
        let decoded = answer_tokens.saturating_sub(1);
        say_line(format_args!(
            "prompt  {prompt_tokens} tokens, {computed_tokens} of them computed, {:.1} tokens/s",
            rate(computed_tokens, prefill_time)
        ));
        say_line(format_args!("answer  {answer_tokens} tokens, {:.1} tokens/s", rate(decoded, decode_time)));
        say_line(format_args!("context {} of {} tokens", prompt_tokens + answer_tokens, self.context));
    }
}

/// A message, perhaps of several lines; `None` at the end of the input.
fn read_message(editor: &mut rustyline::DefaultEditor) -> Result<Option<String>> {
    let mut message = String::new();
    loop {
        let prompt = if message.is_empty() { "> " } else { ". " };
        match editor.readline(prompt) {
            Ok(line) => match line.strip_suffix('\\') {
                Some(start) => {
                    message += start;
                    message.push('\n');
                }
                None => return Ok(Some(message + &line)),
            },
            Err(ReadlineError::Interrupted) => {
                message.clear();
                say_line("(Ctrl-D or /exit leaves)");
            }
            Err(ReadlineError::Eof) => return Ok((!message.is_empty()).then_some(message)),
            Err(error) => return Err(error).context("standard input"),
        }
    }
}
