//! `moge generate`: continue one prompt, or a file of them in one batch.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use moge_engine::{Engine, FinishReason, Request, RowLogprobs, Sampled, SamplingParams, SeqId, SequenceOutput};
use moge_model::{Cpu, Prefix, TokenId};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::args::{ModelArgs, SamplingArgs, parse_token_id};
use crate::input::{read_text_file, without_byte_order_mark};
use crate::interrupt::Interrupt;
use crate::model_files::{Loaded, ModelFiles};
use crate::output::{print, print_line};
use crate::progress;

/// Continue a prompt
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    source: PromptSource,
    /// Tokens to generate at the most
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Report each token's log-probability and the K most likely ones, at most 128 (with --format json or --input)
    #[arg(long, value_name = "K")]
    logprobs: Option<usize>,
    /// The same for the tokens of the prompt
    #[arg(long, value_name = "K")]
    prompt_logprobs: Option<usize>,
    /// What to print; --input always prints JSON lines
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// The text as it is made.
    Text,
    /// One JSON object at the end.
    Json,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct PromptSource {
    /// Text to continue
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// File with the text to continue, taken byte for byte
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Token ids to continue, taken literally: nothing is added
    #[arg(
        long,
        value_name = "ID,ID",
        value_delimiter = ',',
        value_parser = parse_token_id,
        allow_negative_numbers = true
    )]
    tokens: Option<Vec<TokenId>>,
    /// JSON lines, each {"prompt": TEXT} or {"tokens": [ID, ..]} with an optional "max_tokens": all run in one batch, the
    /// first with --seed, each other one with the next seed
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
}

/// A line of `--input`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InputLine {
    prompt: Option<String>,
    tokens: Option<Vec<TokenId>>,
    max_tokens: Option<usize>,
}

/// A prompt as tokens, and how many may follow.
struct Prompt {
    tokens: Vec<TokenId>,
    max_tokens: usize,
    /// File and line of the prompt, if it is one of many.
    place: Option<String>,
}

/// Run `moge generate`.
pub(crate) fn run(args: &GenerateArgs) -> Result<()> {
    let many = args.source.input.is_some();
    let text_only = args.format == Format::Text && !many;
    if text_only && (args.logprobs.is_some() || args.prompt_logprobs.is_some()) {
        bail!("--logprobs and --prompt-logprobs need --format json");
    }
    // Without files to remove, Ctrl-C may end the program as it ends any other.
    let interrupt = args.model.is_synthetic().then(Interrupt::install).transpose()?;
    let files = ModelFiles::of(&args.model, interrupt.as_ref())?;
    let params = SamplingParams {
        logprobs: args.logprobs,
        prompt_logprobs: args.prompt_logprobs,
        ..args.sampling.params(&files.defaults)
    };
    let prompts = prompts(args, &files)?;
    let context = files.config.max_position_embeddings;
    let sequence_tokens: Vec<usize> =
        prompts.iter().map(|prompt| (prompt.tokens.len().saturating_add(prompt.max_tokens)).min(context)).collect();
    check_prompts(&prompts, &params, &files)?;
    let Loaded { mut engine, cpu, load_time, .. } = files.load(&args.model, &sequence_tokens)?;
    let bar = if many { progress::items("prompts", prompts.len()) } else { ProgressBar::hidden() };
    let output = if text_only { Output::Text } else { Output::Json { files: &files, load_time, bar } };
    generate(&mut engine, &cpu, prompts, &params, &output)
}

/// Refuse before the weights are loaded what the engine would refuse after.
fn check_prompts(prompts: &[Prompt], params: &SamplingParams, files: &ModelFiles) -> Result<()> {
    for Prompt { tokens, max_tokens, place } in prompts {
        let sampling = SamplingParams { max_tokens: Some(*max_tokens), ..params.clone() };
        let request = Request { prompt: tokens.clone(), sampling, grammar: None };
        let checked = request.validate(files.config.vocab_size, files.config.max_position_embeddings);
        match place {
            Some(place) => checked.with_context(|| place.clone())?,
            None => checked?,
        }
    }
    Ok(())
}

fn prompts(args: &GenerateArgs, files: &ModelFiles) -> Result<Vec<Prompt>> {
    let encode = |text: &str| Ok::<_, anyhow::Error>(files.tokenizer()?.encode(text, Prefix::Add)?);
    let source = &args.source;
    if let Some(file) = &source.input {
        return read_input(file, args.max_tokens, encode);
    }
    let tokens = match (&source.prompt, &source.prompt_file, &source.tokens) {
        (Some(text), _, _) => encode(text)?,
        (_, Some(file), _) => encode(&read_text_file(file)?)?,
        (_, _, Some(ids)) => ids.clone(),
        (None, None, None) => bail!("no prompt"),
    };
    Ok(vec![Prompt { tokens, max_tokens: args.max_tokens, place: None }])
}

fn read_input(file: &Path, max_tokens: usize, encode: impl Fn(&str) -> Result<Vec<TokenId>>) -> Result<Vec<Prompt>> {
    let reader = BufReader::new(std::fs::File::open(file).with_context(|| file.display().to_string())?);
    let mut prompts = Vec::new();
    for (index, line) in reader.lines().enumerate() {
        let place = || format!("{}:{}", file.display(), index + 1);
        let line = line.with_context(place)?;
        let line = without_byte_order_mark(&line);
        if line.trim().is_empty() {
            continue;
        }
        let line: InputLine = serde_json::from_str(line).with_context(place)?;
        let tokens = match (line.prompt, line.tokens) {
            (Some(text), None) => encode(&text).with_context(place)?,
            (None, Some(tokens)) => tokens,
            _ => bail!("{}: exactly one of \"prompt\" and \"tokens\" is needed", place()),
        };
        prompts.push(Prompt { tokens, max_tokens: line.max_tokens.unwrap_or(max_tokens), place: Some(place()) });
    }
    if prompts.is_empty() {
        bail!("{}: no prompts", file.display());
    }
    Ok(prompts)
}

/// Destination of the answers.
enum Output<'a> {
    /// Text as it is made.
    Text,
    /// A JSON line for each prompt, in order, as soon as it and those before it are answered.
    Json { files: &'a ModelFiles, load_time: Duration, bar: ProgressBar },
}

/// Tokens and times of all steps so far.
#[derive(Default)]
struct Timings {
    prefill_tokens: usize,
    prefill_time: Duration,
    decode_tokens: usize,
    decode_time: Duration,
}

impl Timings {
    /// A step counts as prefill if it computed any prompt token.
    fn add(&mut self, outputs: &[SequenceOutput], time: Duration) {
        let prefilled: usize = outputs.iter().map(|output| output.num_prefilled_tokens).sum();
        if prefilled > 0 {
            self.prefill_tokens += prefilled;
            self.prefill_time += time;
        } else {
            self.decode_tokens += outputs.iter().map(|output| output.sampled.len()).sum::<usize>();
            self.decode_time += time;
        }
    }
}

/// One prompt and its continuation.
struct Generation {
    id: SeqId,
    prompt: Vec<TokenId>,
    sampled: Vec<Sampled>,
    text: String,
    finish_reason: Option<FinishReason>,
    prompt_logprobs: Option<Vec<Option<RowLogprobs>>>,
}

fn generate(
    engine: &mut Engine,
    cpu: &Cpu,
    prompts: Vec<Prompt>,
    params: &SamplingParams,
    output: &Output,
) -> Result<()> {
    // In the order of the prompts, so by ascending id; those at the front leave when they are finished.
    let mut generations = VecDeque::with_capacity(prompts.len());
    for (index, Prompt { tokens, max_tokens, .. }) in (0..).zip(prompts) {
        // Equal prompts give answers of their own, as those to one request with `n` do.
        let seed = params.seed.wrapping_add(index);
        let sampling = SamplingParams { max_tokens: Some(max_tokens), seed, ..params.clone() };
        let id = engine.add_request(Request { prompt: tokens.clone(), sampling, grammar: None })?;
        generations.push_back(Generation {
            id,
            prompt: tokens,
            sampled: Vec::new(),
            text: String::new(),
            finish_reason: None,
            prompt_logprobs: None,
        });
    }
    let mut timings = Timings::default();
    while engine.has_unfinished() {
        let start = Instant::now();
        let step = engine.step(cpu);
        timings.add(&step, start.elapsed());
        for news in step {
            if let Output::Text = output {
                print(&news.text)?;
            }
            let index = generations.binary_search_by_key(&news.id, |generation| generation.id);
            generations[index.expect("an unfinished sequence is in the list")].add(news)?;
        }
        while generations.front().is_some_and(|generation| generation.finish_reason.is_some())
            && let Some(generation) = generations.pop_front()
        {
            match output {
                Output::Text => print_line("")?,
                Output::Json { files, load_time, bar } => {
                    let line = generation.to_json(files, &timings, *load_time);
                    bar.suspend(|| print_line(line))?;
                    bar.inc(1);
                }
            }
        }
    }
    Ok(())
}

impl Generation {
    /// Take in what a step did for this sequence.
    fn add(&mut self, news: SequenceOutput) -> Result<()> {
        self.sampled.extend(news.sampled);
        self.text += &news.text;
        self.prompt_logprobs = news.prompt_logprobs.or(self.prompt_logprobs.take());
        self.finish_reason = news.finish_reason;
        if self.finish_reason == Some(FinishReason::NoFiniteLogit) {
            let place = self.prompt.len() + self.sampled.len();
            bail!(
                "the model's logits are not numbers at position {place}; `moge inspect --deep` looks for bad weights"
            );
        }
        Ok(())
    }

    fn to_json(&self, files: &ModelFiles, timings: &Timings, load_time: Duration) -> Value {
        let piece = |token: TokenId| files.tokenizer().map(|tokenizer| tokenizer.token_text(token)).unwrap_or_default();
        let entry = |token: TokenId, row: &RowLogprobs| {
            let top: Vec<Value> =
                row.top.iter().map(|top| json!({ "token": top.token, "logprob": top.logprob })).collect();
            json!({ "token": token, "text": piece(token), "logprob": row.logprob, "top": top })
        };
        let tokens: Vec<TokenId> = self.sampled.iter().map(|sampled| sampled.token).collect();
        let (num_prompt, num_sampled) = (self.prompt.len(), tokens.len());
        let mut object = json!({
            "model": files.dir.display().to_string(),
            "prompt_tokens": self.prompt,
            "tokens": tokens,
            "text": self.text,
            "finish_reason": self.finish_reason,
        });
        let logprobs: Option<Vec<Value>> =
            self.sampled.iter().map(|sampled| Some(entry(sampled.token, sampled.logprobs.as_ref()?))).collect();
        if let Some(logprobs) = logprobs.filter(|_| num_sampled > 0) {
            object["logprobs"] = logprobs.into();
        }
        if let Some(rows) = &self.prompt_logprobs {
            let rows = self.prompt.iter().zip(rows);
            let entries: Vec<Value> =
                rows.map(|(&token, row)| row.as_ref().map_or(Value::Null, |row| entry(token, row))).collect();
            object["prompt_logprobs"] = entries.into();
        }
        object["usage"] = json!({
            "prompt_tokens": num_prompt,
            "completion_tokens": num_sampled,
            "total_tokens": num_prompt + num_sampled,
        });
        object["timings"] = json!({
            "load_ms": milliseconds(load_time),
            "prefill_ms": milliseconds(timings.prefill_time),
            "decode_ms": milliseconds(timings.decode_time),
            "prefill_tokens_per_s": rate(timings.prefill_tokens, timings.prefill_time),
            "decode_tokens_per_s": rate(timings.decode_tokens, timings.decode_time),
        });
        object
    }
}

fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// Tokens per second; null in JSON where nothing was timed.
fn rate(tokens: usize, time: Duration) -> Option<f64> {
    (tokens > 0).then(|| (tokens as f64 / time.as_secs_f64() * 1e3).round() / 1e3)
}
