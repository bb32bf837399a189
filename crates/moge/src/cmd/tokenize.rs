//! `moge tokenize`: text to token ids, and back.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use moge_model::{Prefix, TokenId, Tokenizer};
use serde_json::json;

use crate::conversation::Conversation;
use crate::output;
use crate::session::Frontend;

/// Turn text into token ids, or ids into text; prints JSON
#[derive(Debug, Args)]
pub(crate) struct TokenizeArgs {
    /// Directory of the checkpoint
    #[arg(short, long, value_name = "DIR")]
    model: PathBuf,
    /// Text to tokenise [default: standard input, byte for byte]
    #[arg(conflicts_with_all = ["chat", "decode"])]
    text: Option<String>,
    /// Messages as a JSON list, written with the checkpoint's chat template
    #[arg(long, value_name = "FILE", conflicts_with = "decode")]
    chat: Option<PathBuf>,
    /// Leave out the tokens that every prompt starts with
    #[arg(long, conflicts_with = "decode")]
    no_bos: bool,
    /// Token ids to turn into text
    #[arg(long, value_name = "ID,ID", value_delimiter = ',')]
    decode: Option<Vec<u32>>,
}

/// Run `moge tokenize`.
pub(crate) fn run(args: &TokenizeArgs) -> Result<()> {
    if let Some(ids) = &args.decode {
        let tokenizer = Tokenizer::load(&args.model)?;
        let ids: Vec<TokenId> = ids.iter().copied().map(TokenId).collect();
        return output::print_line(json!({ "text": tokenizer.decode(&ids) }));
    }
    let prefix = if args.no_bos { Prefix::Omit } else { Prefix::Add };
    let (tokenizer, text) = match &args.chat {
        Some(file) => {
            let frontend = Frontend::open(&args.model)?;
            let text = Conversation::from_file(file)?.prompt(&frontend.chat_template()?)?;
            (Tokenizer::load(&args.model)?, text)
        }
        None => {
            let text = args.text.clone().map_or_else(read_stdin, Ok)?;
            (Tokenizer::load(&args.model)?, text)
        }
    };
    let ids = tokenizer.encode(&text, prefix)?;
    let pieces: Vec<String> = ids.iter().map(|&id| tokenizer.piece(id)).collect();
    output::print_line(json!({ "ids": ids, "pieces": pieces }))
}

fn read_stdin() -> Result<String> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes).context("standard input")?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!("standard input: not UTF-8 at byte {at}")
    })
}
