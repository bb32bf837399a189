//! Documents to batches. Text is tokenised once, before the first step, into token files ([`prepare`]); training reads
//! nothing but token files, by position, so that all it must remember of the data is a [`DataState`].

mod error;
mod list;
mod loader;
mod order;
mod prepare;
mod source;
mod text;
mod token_file;
mod token_writer;

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

pub use error::DataError;
pub use loader::{DataLoader, DataState};
pub use token_file::TokenFile;

/// How far the preparation of one source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataProgress<'a> {
    /// The source's name.
    pub source: &'a str,
    /// Bytes of its files read so far.
    pub done_bytes: u64,
    /// Bytes of all its files.
    pub total_bytes: u64,
}

/// A source as training sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceSummary<'a> {
    /// Its name.
    pub name: &'a str,
    /// Documents, empty ones too.
    pub num_documents: u64,
    /// Tokens of all documents.
    pub num_tokens: u64,
    /// Lines of its files that were left out because they held no document.
    pub num_bad_lines: u64,
}

/// What tells the documents of a source from others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    num_documents: u64,
    num_tokens: u64,
    /// Two CRC-32, of the tokens and of where documents begin.
    checksum: u64,
}

/// Reports how far the work on one source is, and stops it if asked.
struct Watch<'a> {
    progress: &'a mut dyn FnMut(DataProgress<'_>) -> ControlFlow<()>,
    now: DataProgress<'a>,
    reported_bytes: u64,
}

/// Bytes between two reports.
const REPORT_BYTES: u64 = 1 << 20;

impl Watch<'_> {
    /// `num_bytes` more are done.
    fn advance(&mut self, num_bytes: u64) -> Result<(), DataError> {
        self.now.done_bytes += num_bytes;
        if self.now.done_bytes - self.reported_bytes < REPORT_BYTES {
            return Ok(());
        }
        self.report()
    }

    fn report(&mut self) -> Result<(), DataError> {
        self.reported_bytes = self.now.done_bytes;
        match (self.progress)(self.now) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(DataError::Stopped { name: self.now.source.to_owned() }),
        }
    }
}
