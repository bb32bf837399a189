//! `moge tokenize`: text to token ids, and back.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use moge_model::{ChatTemplate, ModelConfig, Prefix, TokenId, Tokenizer};
use serde_json::json;

use crate::args::parse_token_id;
use crate::conversation::Conversation;
use crate::input::read_standard_input;
use crate::output;

/// Turn text into token ids, or ids into text; prints JSON
#[derive(Debug, Args)]
pub(crate) struct TokenizeArgs {
    /// Directory of the checkpoint
    #[arg(short, long, value_name = "DIR")]
    model: PathBuf,
    /// Text to tokenise [default: standard input, byte for byte]
    #[arg(conflicts_with_all = ["chat", "decode"])]
    text: Option<String>,
    /// File with messages as a JSON list, or {"messages": [..], "tools": [..]}: written with the chat template
    #[arg(long, value_name = "FILE", conflicts_with = "decode")]
    chat: Option<PathBuf>,
    /// Leave out the tokens that every prompt starts with
    #[arg(long, conflicts_with = "decode")]
    no_bos: bool,
    /// Token ids to turn into text
    #[arg(long, value_name = "ID,ID", value_delimiter = ',', value_parser = parse_token_id)]
    decode: Option<Vec<TokenId>>,
}

/// Run `moge tokenize`.
pub(crate) fn run(args: &TokenizeArgs) -> Result<()> {
    if let Some(ids) = &args.decode {
        return output::print_line(json!({ "text": decode(&args.model, ids)? }));
    }
    let prefix = if args.no_bos { Prefix::Omit } else { Prefix::Add };
    let text = match &args.chat {
        Some(file) => {
            let template = ChatTemplate::load(&args.model, ModelConfig::load(&args.model)?.architecture)?;
            Conversation::from_file(file)?.prompt(&template).with_context(|| file.display().to_string())?
        }
        None => args.text.clone().map_or_else(read_standard_input, Ok)?,
    };
    let tokenizer = Tokenizer::load(&args.model)?;
    let ids = tokenizer.encode(&text, prefix)?;
    let pieces: Vec<String> = ids.iter().map(|&id| tokenizer.piece(id)).collect();
    output::print_line(json!({ "ids": ids, "pieces": pieces }))
}

fn decode(dir: &Path, ids: &[TokenId]) -> Result<String> {
    let tokenizer = Tokenizer::load(dir)?;
    // A model may have ids to which its tokenizer gives no text. Where there is no model, the tokenizer decides.
    let vocab_size = ModelConfig::load(dir).map_or(0, |config| config.vocab_size).max(tokenizer.vocab_size());
    if let Some(id) = ids.iter().find(|id| id.0 as usize >= vocab_size) {
        bail!("--decode: {} is no token id of this model; allowed: below {vocab_size}", id.0);
    }
    Ok(tokenizer.decode(ids))
}
