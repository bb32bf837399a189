//! `moge inspect`: what a checkpoint is, what it needs, and what is wrong with it.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use indicatif::{DecimalBytes, HumanCount};
use moge_kernels::Dtype;
use moge_model::cost::{NetworkCost, kv_token_elements};
use moge_model::{Checkpoint, CheckpointError, LoadMode, MlpConfig, ModelConfig, count_non_finite, tensor_problems};
use serde::Serialize;

use crate::{output, progress};

/// Tokens for which the memory of the KV cache is given.
const KV_TOKENS: u64 = 1024;

/// Tell what a checkpoint is, what memory it needs, and what is missing in its files
///
/// Reads config.json and the headers of the weights, not the weights. Works with config.json alone. Fails if the
/// weights do not fit the config.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Directory of the checkpoint
    dir: PathBuf,
    /// Read all weights and report NaN and infinity; fail if any are found or weights are missing
    #[arg(long)]
    deep: bool,
    /// How to print
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Print the report, then fail if it names a defect.
pub(crate) fn run(args: &InspectArgs) -> Result<()> {
    let config = ModelConfig::load(&args.dir)?;
    let checkpoint = open(&args.dir)?;
    let mut report = Report::new(&config);
    if let Some(checkpoint) = &checkpoint {
        report.stored_bytes = Some(checkpoint.total_bytes());
        report.tensor_problems = tensor_problems(&config, checkpoint).iter().map(ToString::to_string).collect();
        if args.deep {
            report.non_finite = Some(scan(checkpoint));
        }
    }
    match args.format {
        Format::Text => output::print(&report)?,
        Format::Json => output::print_line(serde_json::to_string_pretty(&report)?)?,
    }
    if args.deep && checkpoint.is_none() {
        bail!("{}: no weights to read", args.dir.display());
    }
    match (report.tensor_problems.len(), report.non_finite.map_or(0, |found| found.len())) {
        (0, 0) => Ok(()),
        (0, found) => bail!("{}: {found} tensors hold NaN or infinity", args.dir.display()),
        (found, _) => bail!("{}: {found} tensors do not fit config.json", args.dir.display()),
    }
}

/// The headers of the weights; `None` if there are no weights at all.
fn open(dir: &Path) -> Result<Option<Checkpoint>> {
    match Checkpoint::open(dir, LoadMode::Mmap, &|_, _| ()) {
        Ok(checkpoint) => Ok(Some(checkpoint)),
        Err(CheckpointError::NoWeights { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Read all data and list the tensors that hold NaN or infinity.
fn scan(checkpoint: &Checkpoint) -> Vec<NonFiniteTensor> {
    let bar = progress::bytes("reading");
    let mut done = 0;
    let mut found = Vec::new();
    for (name, tensor) in checkpoint.tensors() {
        let count = count_non_finite(tensor);
        if count.num_nan + count.num_infinite > 0 {
            let (num_nan, num_infinite) = (count.num_nan, count.num_infinite);
            found.push(NonFiniteTensor { name: name.to_string(), num_nan, num_infinite });
        }
        done += tensor.bytes().len() as u64;
        progress::set(&bar, done, checkpoint.total_bytes());
    }
    bar.finish_and_clear();
    found
}

/// All that is printed, in either format.
#[derive(Debug, Serialize)]
struct Report {
    architecture: &'static str,
    num_layers: usize,
    hidden_size: usize,
    num_q_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    mlp: Mlp,
    vocab_size: usize,
    tie_word_embeddings: bool,
    max_position_embeddings: usize,
    dtype: &'static str,
    parameters: Parameters,
    /// If all weights were stored in this type.
    weight_bytes: PerDtype,
    kv_bytes_per_1024_tokens: PerDtype,
    /// Size of the weight files; null if there are none.
    stored_bytes: Option<u64>,
    tensor_problems: Vec<String>,
    /// Null if the data was not read.
    non_finite: Option<Vec<NonFiniteTensor>>,
}

#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Mlp {
    Dense {
        intermediate_size: usize,
    },
    #[serde(rename = "grouped_experts")]
    Experts {
        num_routed_layers: usize,
        num_experts: usize,
        num_expert_groups: usize,
        experts_per_token: usize,
        expert_intermediate_size: usize,
        shared_intermediate_size: Option<usize>,
        /// Of the layers without experts, if there are some.
        dense_intermediate_size: Option<usize>,
    },
}

/// Numbers of parameters, the embedding table counted. A config may describe more than 64 bits can count; sums stop
/// there.
#[derive(Debug, Serialize)]
struct Parameters {
    total: u64,
    active_per_token: u64,
}

#[derive(Debug, Serialize)]
struct PerDtype {
    f32: u64,
    bf16: u64,
}

#[derive(Debug, Serialize)]
struct NonFiniteTensor {
    name: String,
    num_nan: u64,
    num_infinite: u64,
}

impl Report {
    /// What config.json alone tells.
    fn new(config: &ModelConfig) -> Report {
        let parameters = Parameters::of(config);
        let kv_elements = KV_TOKENS.saturating_mul(kv_token_elements(config));
        Report {
            architecture: config.architecture.hf_name(),
            num_layers: config.num_layers(),
            hidden_size: config.hidden_size,
            num_q_heads: config.num_q_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            mlp: Mlp::of(config),
            vocab_size: config.vocab_size,
            tie_word_embeddings: config.tie_word_embeddings,
            max_position_embeddings: config.max_position_embeddings,
            dtype: match config.dtype {
                Dtype::F32 => "f32",
                Dtype::F16 => "f16",
                Dtype::Bf16 => "bf16",
            },
            weight_bytes: PerDtype::of(parameters.total),
            kv_bytes_per_1024_tokens: PerDtype::of(kv_elements),
            parameters,
            stored_bytes: None,
            tensor_problems: Vec::new(),
            non_finite: None,
        }
    }
}

impl Mlp {
    fn of(config: &ModelConfig) -> Mlp {
        let dense = config.layers.iter().find_map(|layer| match layer.mlp {
            MlpConfig::Dense { intermediate_size } => Some(intermediate_size),
            MlpConfig::Experts(_) => None,
        });
        match config.moe() {
            None => Mlp::Dense { intermediate_size: dense.unwrap_or(0) },
            Some(moe) => Mlp::Experts {
                num_routed_layers: config.num_routed_layers(),
                num_experts: moe.num_experts,
                num_expert_groups: moe.num_expert_groups(),
                experts_per_token: moe.experts_per_token(),
                expert_intermediate_size: moe.expert_intermediate_size,
                shared_intermediate_size: moe.shared_intermediate_size,
                dense_intermediate_size: dense,
            },
        }
    }
}

impl Parameters {
    fn of(config: &ModelConfig) -> Parameters {
        let cost = NetworkCost::of(config);
        Parameters { total: cost.total.num_weights, active_per_token: cost.active_per_token() }
    }
}

impl PerDtype {
    fn of(num_elements: u64) -> PerDtype {
        PerDtype { f32: num_elements.saturating_mul(4), bf16: num_elements.saturating_mul(2) }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tied = if self.tie_word_embeddings { ", embedding and head tied" } else { "" };
        let (q, kv, width) = (self.num_q_heads, self.num_kv_heads, self.head_dim);
        writeln!(f, "architecture  {}", self.architecture)?;
        writeln!(f, "layers        {}", self.num_layers)?;
        writeln!(f, "hidden size   {}", self.hidden_size)?;
        writeln!(f, "heads         {q} query, {kv} key/value, width {width}")?;
        writeln!(f, "mlp           {}", self.mlp)?;
        writeln!(f, "vocabulary    {}{tied}", self.vocab_size)?;
        writeln!(f, "positions     {}", self.max_position_embeddings)?;
        writeln!(f, "parameters    {}", self.parameters)?;
        writeln!(f, "weights       {}, config.json says {}", self.weight_bytes, self.dtype)?;
        writeln!(f, "KV cache      {}, for {KV_TOKENS} tokens", self.kv_bytes_per_1024_tokens)?;
        match self.stored_bytes {
            None => writeln!(f, "files         no weights")?,
            Some(bytes) => writeln!(f, "files         {} of weights", DecimalBytes(bytes))?,
        }
        for problem in &self.tensor_problems {
            writeln!(f, "  {}", output::plain(problem))?;
        }
        if self.non_finite.as_ref().is_some_and(Vec::is_empty) {
            writeln!(f, "data          no NaN, no infinity")?;
        }
        for NonFiniteTensor { name, num_nan, num_infinite } in self.non_finite.iter().flatten() {
            writeln!(f, "  {}: {num_nan} NaN, {num_infinite} infinite", output::plain(name))?;
        }
        Ok(())
    }
}

impl fmt::Display for Mlp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mlp::Dense { intermediate_size } => write!(f, "dense, width {intermediate_size}"),
            Mlp::Experts {
                num_routed_layers,
                num_experts,
                num_expert_groups,
                experts_per_token,
                expert_intermediate_size,
                shared_intermediate_size,
                dense_intermediate_size,
            } => {
                write!(f, "{num_experts} experts")?;
                if *num_expert_groups > 1 {
                    write!(f, " in {num_expert_groups} expert groups")?;
                }
                write!(f, ", width {expert_intermediate_size}, {experts_per_token} per token")?;
                if let Some(width) = shared_intermediate_size {
                    write!(f, "; shared expert, width {width}")?;
                }
                match dense_intermediate_size {
                    Some(width) => write!(f, "; in {num_routed_layers} layers, the others dense, width {width}"),
                    None => Ok(()),
                }
            }
        }
    }
}

impl fmt::Display for Parameters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (total, active) = (self.total, self.active_per_token);
        write!(f, "{} ({}), ", HumanCount(total), Rounded(total))?;
        write!(f, "active per token {} ({})", HumanCount(active), Rounded(active))
    }
}

/// A count in thousands, millions or billions, as model names have it.
struct Rounded(u64);

impl fmt::Display for Rounded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = match self.0 {
            0..1_000_000 => (1e3, "K"),
            1_000_000..1_000_000_000 => (1e6, "M"),
            _ => (1e9, "B"),
        };
        write!(f, "{:.2} {name}", self.0 as f64 / unit)
    }
}

impl fmt::Display for PerDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in bf16, {} in f32", DecimalBytes(self.bf16), DecimalBytes(self.f32))
    }
}
