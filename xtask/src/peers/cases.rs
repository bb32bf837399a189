//! What is measured: the cases, and for each what both engines are told to run and what they answer.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::llama_cpp::LlamaCpp;
use super::model::{Mix, Model, PANGU_PRO_MOE_4L, QWEN3_0_6B};

/// One line of the comparison.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Case {
    pub(crate) model: &'static Model,
    pub(crate) scheme: Scheme,
    pub(crate) work: Work,
}

/// Our weight format, which says what it is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    W4A8,
    W8A8,
}

/// What one measurement computes. Both engines take random tokens, other ones in every sequence and step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// A prompt of so many tokens.
    Prefill { tokens: u32 },
    /// Steps of one token in each of `batch` sequences that hold `context` tokens when they begin.
    Decode { batch: u32, context: u32 },
}

/// A way to run llama.cpp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PeerConfig {
    pub(crate) mix: Mix,
    /// Rearrange weights while loading, where llama.cpp knows how; its default.
    repack: bool,
}

/// All cases, of which the command line may choose.
pub(crate) fn all_cases() -> Vec<Case> {
    let prefill = |tokens| Work::Prefill { tokens };
    let decode = |batch, context| Work::Decode { batch, context };
    let (short, batched) = ([prefill(512), decode(1, 128)], [decode(8, 128), decode(32, 128)]);
    let long = [prefill(2048), decode(1, 2048), decode(1, 4096)];
    let of = |model, scheme, works: &[Work]| -> Vec<Case> {
        works.iter().map(|&work| Case { model, scheme, work }).collect()
    };
    let usual = [short, batched].concat();
    [
        of(&PANGU_PRO_MOE_4L, Scheme::W4A8, &[&usual[..], &long].concat()),
        of(&PANGU_PRO_MOE_4L, Scheme::W8A8, &usual),
        of(&QWEN3_0_6B, Scheme::W4A8, &usual),
    ]
    .concat()
}

impl Case {
    /// What the command line and the reports call it.
    pub(crate) fn name(&self) -> String {
        let work = match self.work {
            Work::Prefill { tokens } => format!("prefill-{tokens}"),
            Work::Decode { batch, context } => format!("decode-b{batch}-c{context}"),
        };
        format!("{}/{}/{work}", self.model.preset, self.scheme.name())
    }

    /// The ways to run llama.cpp of which the best counts.
    pub(crate) fn peer_configs(&self) -> Vec<PeerConfig> {
        let mixes = match self.scheme {
            Scheme::W4A8 => &[Mix::Q4_0, Mix::Q4KM][..],
            Scheme::W8A8 => &[Mix::Q8_0],
        };
        mixes.iter().flat_map(|&mix| [true, false].map(|repack| PeerConfig { mix, repack })).collect()
    }
}

impl Scheme {
    /// What `moge quantize` calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Scheme::W4A8 => "w4a8",
            Scheme::W8A8 => "w8a8",
        }
    }
}

impl PeerConfig {
    pub(crate) fn name(self) -> String {
        format!("{}{}", self.mix.name(), if self.repack { "" } else { ", not repacked" })
    }
}

impl Work {
    /// Longest sequence while `num_steps` tokens are decoded.
    pub(crate) fn max_position(self, num_steps: u32) -> u32 {
        match self {
            Work::Prefill { tokens } => tokens,
            Work::Decode { context, .. } => context + num_steps,
        }
    }

    /// llama.cpp's program for this work. It warms up by itself, and its KV cache is f16.
    pub(crate) fn peer_command(
        self,
        engine: &LlamaCpp,
        config: PeerConfig,
        model: &Path,
        settings: Settings,
    ) -> Command {
        let Settings { num_threads, num_steps } = settings;
        let program = match self {
            Work::Decode { batch, .. } if batch > 1 => &engine.batched_bench,
            _ => &engine.bench,
        };
        let mut command = Command::new(program);
        command.arg("--model").arg(model).args(["--threads", &num_threads.to_string()]);
        match self {
            Work::Decode { batch, context } if batch > 1 => {
                let room = batch * self.max_position(num_steps);
                command.args(["-c", &room.to_string(), "-npl", &batch.to_string(), "-npp", &context.to_string()]);
                // The prompt is computed once and copied to every sequence; the tokens decoded after it differ.
                command.args(["-pps", "-ntg", &num_steps.to_string(), "--output-format", "jsonl"]);
                command.args(if config.repack { &["--repack"][..] } else { &["--no-repack"] });
            }
            Work::Decode { context, .. } => {
                command.args(["-p", "0", "-n", &num_steps.to_string(), "-d", &context.to_string()]);
            }
            Work::Prefill { tokens } => {
                command.args(["-n", "0", "-p", &tokens.to_string()]);
            }
        }
        if *program == engine.bench {
            command.args(["--repack", if config.repack { "1" } else { "0" }, "-r", "1", "-o", "jsonl"]);
        }
        command
    }

    /// Tokens per second in what `peer_command` printed.
    pub(crate) fn read_peer(self, output: &str) -> Result<f64> {
        let results = output.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let rates: Vec<f64> = results
            .filter_map(|result| match self {
                Work::Decode { batch, .. } if batch > 1 && result["pl"] == batch => result["speed_tg"].as_f64(),
                Work::Decode { batch: 1, context } if result["n_depth"] == context => result["avg_ts"].as_f64(),
                Work::Prefill { tokens } if result["n_prompt"] == tokens => result["avg_ts"].as_f64(),
                _ => None,
            })
            .collect();
        only_rate(&rates).with_context(|| format!("llama.cpp printed:\n{output}"))
    }

    /// `moge bench` for this work, with a bf16 KV cache.
    pub(crate) fn our_command(self, moge: &Path, model: &Path, settings: Settings) -> Command {
        let Settings { num_threads, num_steps } = settings;
        let mut command = Command::new(moge);
        command.arg("bench").arg("--model").arg(model).args(["--threads", &num_threads.to_string()]);
        // The first repetition still touches pages of the mapped file for the first time; the median leaves it out.
        command.args(["--repetitions", "3", "--format", "json", "--kv", "bf16"]);
        match self {
            Work::Prefill { tokens } => command.args(["--prefill", &tokens.to_string()]),
            Work::Decode { batch, context } => {
                command.args(["--decode", &num_steps.to_string(), "--batch", &batch.to_string()]);
                command.args(["--context", &context.to_string()])
            }
        };
        command
    }

    /// Tokens per second in what `our_command` printed.
    pub(crate) fn read_ours(self, output: &str) -> Result<f64> {
        let report: Value = serde_json::from_str(output).context("moge bench printed no JSON")?;
        let cases = report["cases"].as_array().context("moge bench printed no `cases`")?;
        let is_ours = |case: &&Value| match self {
            Work::Prefill { tokens } => case["kind"] == "prefill" && case["tokens"] == tokens,
            Work::Decode { batch, context } => {
                case["kind"] == "decode" && case["batch"] == batch && case["context"] == context
            }
        };
        let rates: Vec<f64> = cases.iter().filter(is_ours).filter_map(|case| case["tokens_per_s"].as_f64()).collect();
        only_rate(&rates).with_context(|| format!("moge bench printed:\n{output}"))
    }
}

/// What holds for every measurement of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) num_threads: usize,
    /// Tokens that each sequence decodes.
    pub(crate) num_steps: u32,
}

fn only_rate(rates: &[f64]) -> Result<f64> {
    match rates {
        [rate] if rate.is_finite() && *rate > 0.0 => Ok(*rate),
        _ => bail!("one positive rate was expected, not {rates:?}"),
    }
}

#[cfg(test)]
mod tests;
