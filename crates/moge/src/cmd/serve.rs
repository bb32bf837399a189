//! `moge serve`: the engine behind OpenAI's HTTP API.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use moge_engine::GrammarCompiler;
use moge_model::eos_token_ids;
use moge_server::{ServedModel, Server, ServerConfig};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::args::ModelArgs;
use crate::interrupt::Interrupt;
use crate::model_files::{Loaded, MAX_BATCHED_TOKENS, ModelFiles, ServingLimits};
use crate::output::say_line;

/// Serve a model over HTTP, as OpenAI's API does
///
/// Chat page at /, API at /v1, metrics at /metrics. SIGTERM or Ctrl-C: no new requests, then those that run have
/// --drain-time to end; a second one ends them at once.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    limits: LimitArgs,
    /// Log lines for people, or JSON objects with the time
    #[arg(long, value_enum, default_value = "text", value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
}

/// Format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Text.
    Text,
    /// JSON objects.
    Json,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Server")]
struct ListenArgs {
    /// Address to listen at; 0.0.0.0 is every one of this machine
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen at; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    port: u16,
    /// File with the keys that clients may come with, one in a line; # begins a comment [default: anybody may come]
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Name of the model for clients [default: the directory's name]
    #[arg(long, value_name = "NAME")]
    served_name: Option<String>,
    /// Origin whose pages may call the server, * for all; may be given several times
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<String>,
    /// How long requests may go on after the server is told to stop
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain_time: u64,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Tokens of a sequence, prompt and answer together [default: the model's context, or what the KV cache holds]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(2..))]
    max_model_len: Option<usize>,
    /// Tokens of a step: a longer prompt takes several steps, between which others get their tokens
    #[arg(long, value_name = "N", default_value_t = MAX_BATCHED_TOKENS,
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    max_batch_tokens: usize,
    /// Sequences that run at the same time
    #[arg(long, value_name = "N", default_value_t = 64,
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 16))]
    max_running: usize,
    /// Sequences that wait; further requests get status 429
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    max_waiting: usize,
    /// Memory of the KV cache, such as 4GB or 512MiB [default: 90 % of what weights and workspace leave, but no more
    /// than --max-running sequences of --max-model-len need]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    kv_memory: Option<u64>,
    /// Longest body of a request, such as 8MB
    #[arg(long, value_name = "SIZE", default_value = "8MB", value_parser = parse_bytes)]
    max_body: u64,
    /// How long a request may take, with its time in the queue
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    request_time: u64,
    /// Connections at a time; further ones get status 503
    #[arg(long, value_name = "N", default_value_t = 4096,
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    max_connections: usize,
    /// Answers to one request, over all its prompts
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_answers: usize,
}

/// Run the command.
pub(crate) fn run(args: &ServeArgs) -> Result<()> {
    let interrupt = Interrupt::new();
    let abort = interrupt.clone();
    // First of all, so that an address that is taken is known before minutes of loading.
    let server = Server::start(args.config()?, move || abort.leave())?;
    let address = server.address();
    if !address.ip().is_loopback() && args.listen.api_key_file.is_none() {
        tracing::warn!("anybody who reaches {address} may use the model; --api-key-file asks for a key");
    }
    let files = ModelFiles::of(&args.model, Some(&interrupt))?;
    let (Loaded { engine, cpu, .. }, model) = args.load(&files)?;
    let ready = format!("{} is ready at http://{address}", model.name);
    server.run(engine, cpu, model, || say_line(format_args!("{ready}")))?;
    Ok(())
}

impl ServeArgs {
    fn config(&self) -> Result<ServerConfig> {
        let ListenArgs { host, port, api_key_file, cors_origin, drain_time, .. } = &self.listen;
        let api_keys = match api_key_file {
            Some(file) => read_keys(file)?,
            None => Vec::new(),
        };
        Ok(ServerConfig {
            address: SocketAddr::new(*host, *port),
            api_keys,
            cors_origins: cors_origin.clone(),
            max_body_bytes: usize::try_from(self.limits.max_body).unwrap_or(usize::MAX),
            max_connections: self.limits.max_connections.min(connections_allowed()),
            max_answers: self.limits.max_answers,
            max_request_time: Duration::from_secs(self.limits.request_time),
            drain_time: Duration::from_secs(*drain_time),
        })
    }

    fn load(&self, files: &ModelFiles) -> Result<(Loaded, ServedModel)> {
        let tokenizer = files.tokenizer()?.clone();
        let limits = ServingLimits {
            max_model_len: self.limits.max_model_len,
            max_batched_tokens: self.limits.max_batch_tokens,
            max_running: self.limits.max_running,
            max_waiting: self.limits.max_waiting,
            kv_bytes: self.limits.kv_memory,
        };
        let eos = eos_token_ids(&files.config.eos_token_ids, &files.defaults, Some(&tokenizer));
        let grammars = GrammarCompiler::new(&tokenizer, files.config.vocab_size, &eos)?;
        let loaded = files.load_for_serving(&self.model, &limits)?;
        let name = self.listen.served_name.clone().unwrap_or_else(|| files.name());
        let model = ServedModel {
            name,
            tokenizer,
            chat_template: files.chat_template(),
            defaults: files.defaults.clone(),
            config: loaded.engine.model().config().clone(),
            max_model_len: loaded.max_sequence_tokens,
            grammars,
        };
        Ok((loaded, model))
    }
}

/// Connections that the system allows this process: it is asked for as many as it gives.
fn connections_allowed() -> usize {
    /// Files that are open for other purposes: the model's, standard ones, those of the runtime.
    const OTHERS: u64 = 128;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // `None` means unlimited.
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_ok();
    let limit = if raised { maximum } else { current };
    limit.map_or(usize::MAX, |limit| usize::try_from(limit.saturating_sub(OTHERS).max(1)).unwrap_or(usize::MAX))
}

/// The keys in `file`, one in a line.
fn read_keys(file: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<String> = lines.map(str::to_owned).collect();
    if keys.is_empty() {
        bail!("{}: no key; allowed: one in each line", file.display());
    }
    Ok(keys)
}

/// A number of bytes, with a unit or without.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let bytes_per_unit: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("{unit:?} is not a unit; allowed: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB")),
    };
    match number.parse::<f64>() {
        Ok(number) if number * bytes_per_unit < u64::MAX as f64 => Ok((number * bytes_per_unit) as u64),
        _ => Err(format!("{text:?} is not a size such as 4GB or 512MiB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_or_none() {
        for (text, bytes) in
            [("17", 17), ("4GB", 4_000_000_000), ("1.5 MiB", 1_572_864), ("3kb", 3000), (" 2 TiB", 2 << 40)]
        {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for bad in ["", "GB", "4 bytes", "-1", "1e30TB", "1.2.3", "99999999999TB"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
