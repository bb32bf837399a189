//! `moge perplexity`: what a model makes of a text, and what quantising changed in that.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use indicatif::DecimalBytes;
use moge_model::{Checkpoint, Prefix, TokenId};
use moge_quant::{EvalModel, Evaluation};

use crate::args::{ModelArgs, parse_token_id};
use crate::input::read_text_file;
use crate::interrupt::Interrupt;
use crate::model_files::ModelFiles;
use crate::{output, progress};

/// Measure how well a model predicts a text, and how far a quantised model is from its original
///
/// The text is cut into windows of --context tokens, which the model reads from their start; all tokens of a window but
/// those that every prompt starts with, or its first, are predicted. With a baseline both models read the same windows,
/// and are in memory at the same time. --dtype is that of both. --quantize and --kv are those of the model alone: the
/// baseline has its weights as they lie, and a KV cache as precise as its activations.
#[derive(Debug, Args)]
pub(crate) struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Directory of the checkpoint to compare with, as before it was quantised
    #[arg(long, value_name = "DIR")]
    baseline: Option<PathBuf>,
    #[command(flatten)]
    text: TextArgs,
    /// Tokens of a window, those that every prompt starts with counted in [default: 512, or as many as the model can]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// How to print
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

/// What is predicted.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct TextArgs {
    /// File with the text
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Instead of a text its token ids, taken literally: no tokens are put before them
    #[arg(long, value_name = "ID,ID", value_delimiter = ',', value_parser = parse_token_id)]
    tokens: Option<Vec<TokenId>>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Tokens of a window where nothing else is asked for.
const DEFAULT_CONTEXT: usize = 512;

/// Evaluate as `args` say, and print.
pub(crate) fn run(args: &PerplexityArgs) -> Result<()> {
    let interrupt = args.model.is_synthetic().then(Interrupt::install).transpose()?;
    let model = ModelFiles::of(&args.model, interrupt.as_ref())?;
    let baseline = args.baseline.as_deref().map(ModelFiles::open).transpose()?;
    let context = args.context(&model, baseline.as_ref())?;
    let (windows, num_given) = args.windows(&model, context)?;
    let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
    let baseline_args = args.model.for_baseline();
    check_memory(args, &model, baseline.as_ref(), longest)?;

    let (weights, cpu) = model.load_model(&args.model)?;
    let mut side = EvalModel::new(weights, &cpu, model.activation(&args.model), model.kv_type(&args.model), longest);
    let mut baseline_side = match &baseline {
        None => None,
        Some(baseline) => {
            let (weights, _) = baseline.load_model(&baseline_args)?;
            Some(EvalModel::new(
                weights,
                &cpu,
                baseline.activation(&baseline_args),
                baseline.kv_type(&baseline_args),
                longest,
            ))
        }
    };
    let windows: Vec<&[TokenId]> = windows.iter().map(Vec::as_slice).collect();
    let bar = progress::items("tokens", windows.iter().map(|window| window.len()).sum());
    let evaluation = Evaluation::run(&cpu, &mut side, baseline_side.as_mut(), &windows, num_given, &mut |num_tokens| {
        bar.set_position(num_tokens as u64);
    });
    bar.finish_and_clear();
    match args.format {
        Format::Text => output::print(Text(&evaluation)),
        Format::Json => output::print_line(serde_json::to_string_pretty(&evaluation)?),
    }
}

impl PerplexityArgs {
    /// Tokens of a window.
    fn context(&self, model: &ModelFiles, baseline: Option<&ModelFiles>) -> Result<usize> {
        let mut max = model.config.max_position_embeddings;
        if let Some(baseline) = baseline {
            max = max.min(baseline.config.max_position_embeddings);
            let (found, expected) = (baseline.config.vocab_size, model.config.vocab_size);
            if found != expected {
                bail!("--baseline: vocab_size is {found}, that of the model {expected}; allowed: the same");
            }
        }
        match self.context {
            Some(context) if context > max || context < 2 => bail!("--context {context}: allowed: 2 to {max}"),
            context => Ok(context.unwrap_or(DEFAULT_CONTEXT.min(max))),
        }
    }

    /// The windows, and how many tokens of each are given.
    fn windows(&self, model: &ModelFiles, context: usize) -> Result<(Vec<Vec<TokenId>>, usize)> {
        let (prefix, tokens) = match (&self.text.file, &self.text.tokens) {
            (Some(file), _) => {
                let tokenizer = model.tokenizer()?;
                let tokens = tokenizer.encode(&read_text_file(file)?, Prefix::Omit)?;
                (tokenizer.prefix(), tokens)
            }
            (None, tokens) => (&[][..], tokens.clone().unwrap_or_default()),
        };
        let vocab_size = model.config.vocab_size;
        if let Some(token) = tokens.iter().find(|token| token.0 as usize >= vocab_size) {
            bail!("--tokens: {} is no token id of this model; allowed: below {vocab_size}", token.0);
        }
        if prefix.len() >= context {
            bail!("--context {context}: every prompt starts with {} tokens; allowed: more than those", prefix.len());
        }
        let num_given = prefix.len().max(1);
        let windows = tokens.chunks(context - prefix.len()).map(|chunk| [prefix, chunk].concat());
        let windows: Vec<Vec<TokenId>> = windows.filter(|window| window.len() > num_given).collect();
        if windows.is_empty() {
            bail!("the text has {} tokens; at least {} are needed", tokens.len(), num_given + 1 - prefix.len());
        }
        Ok((windows, num_given))
    }
}

/// Refuse what does not fit into memory: both models at once.
fn check_memory(
    args: &PerplexityArgs,
    model: &ModelFiles,
    baseline: Option<&ModelFiles>,
    context: usize,
) -> Result<()> {
    let bytes = |side: &ModelFiles, args: &ModelArgs| {
        EvalModel::bytes(&side.config, side.kv_type(args), context, args.num_threads())
    };
    let (kv_bytes, workspace_bytes) = bytes(model, &args.model);
    let Some(baseline) = baseline else {
        return model.check_memory(&args.model, kv_bytes, workspace_bytes).map(|_| ());
    };
    let (other_kv_bytes, other_workspace_bytes) = bytes(baseline, &args.model.for_baseline());
    let other_weight_bytes = Checkpoint::file_bytes(&baseline.dir)?;
    let other_bytes = other_weight_bytes.saturating_add(other_kv_bytes).saturating_add(other_workspace_bytes);
    let checked = model.check_memory(&args.model, kv_bytes, workspace_bytes.saturating_add(other_bytes));
    checked.map(|_| ()).with_context(|| format!("with {} of the baseline in the workspace", DecimalBytes(other_bytes)))
}

struct Text<'a>(&'a Evaluation);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "tokens           {}", self.0.num_tokens)?;
        writeln!(f, "perplexity       {:.4}", self.0.perplexity)?;
        let Some(baseline) = &self.0.baseline else { return Ok(()) };
        writeln!(f, "of the baseline  {:.4}", baseline.perplexity)?;
        writeln!(f, "divergence       {:.6} nats, at most {:.6}", baseline.kl_mean, baseline.kl_max)?;
        writeln!(f, "logit error      {:.2} %", 100.0 * baseline.logit_error)?;
        writeln!(f, "same top token   {:.2} %", 100.0 * baseline.same_top_share)?;
        match baseline.changed_expert_share {
            Some(share) => writeln!(f, "changed experts  {:.2} %", 100.0 * share),
            None => Ok(()),
        }
    }
}
