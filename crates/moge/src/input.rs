//! Reading what a user hands us: text in UTF-8, perhaps with the mark that some editors put before it.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow};

/// The mark at the start of some files in UTF-8. JSON must not begin with it, and readers may skip it.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// A file, byte for byte.
pub(crate) fn read_text_file(file: &Path) -> Result<String> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    text_of(bytes).with_context(|| file.display().to_string())
}

/// Standard input to its end, byte for byte.
pub(crate) fn read_standard_input() -> Result<String> {
    let mut bytes = Vec::new();
    let read = std::io::stdin().lock().read_to_end(&mut bytes).map_err(anyhow::Error::from);
    read.and_then(|_| text_of(bytes)).context("standard input")
}

/// JSON without the mark before it.
pub(crate) fn without_byte_order_mark(json: &str) -> &str {
    json.strip_prefix(BYTE_ORDER_MARK).unwrap_or(json)
}

fn text_of(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|error| anyhow!("not UTF-8 at byte {}", error.utf8_error().valid_up_to()))
}
