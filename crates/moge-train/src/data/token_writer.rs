//! Writes a token file while its documents arrive: their number and length need not be known.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use moge_model::{WriteError, io_error};
use safetensors::Dtype;
use serde_json::json;

use super::Contents;
use super::token_file::{Checksums, DOCUMENT_OFFSETS, TOKENS};

/// Bytes before the data. The header is written last, when it is known; spaces fill it up.
const HEADER_BYTES: usize = 1024;

/// A token file that is being written. It has its name only when it is whole; one that is dropped before leaves nothing.
pub(super) struct TokenWriter {
    path: PathBuf,
    /// The file while it is not whole: the space for the header, then tokens.
    tokens_path: PathBuf,
    tokens: BufWriter<File>,
    /// Where offsets wait for the last token.
    offsets_path: PathBuf,
    offsets: BufWriter<File>,
    dtype: Dtype,
    contents: Contents,
    checksums: Checksums,
}

impl TokenWriter {
    /// Begin the file `path`, whose tokens will be below `vocab_size`.
    pub(super) fn create(path: &Path, vocab_size: usize) -> Result<TokenWriter, WriteError> {
        let (tokens_path, offsets_path) =
            (path.with_extension("tokens.partial"), path.with_extension("offsets.partial"));
        // A writer that was killed may have left both.
        let create = |path: &Path| File::create(path).map(BufWriter::new).map_err(|source| io_error(path, source));
        let mut writer = TokenWriter {
            path: path.to_owned(),
            tokens: create(&tokens_path)?,
            offsets: create(&offsets_path)?,
            tokens_path,
            offsets_path,
            dtype: if vocab_size <= 1 << 16 { Dtype::U16 } else { Dtype::U32 },
            contents: Contents::default(),
            checksums: Checksums::default(),
        };
        writer.tokens.write_all(&[b' '; HEADER_BYTES]).map_err(|source| io_error(&writer.tokens_path, source))?;
        writer.write_offset()?;
        Ok(writer)
    }

    /// More tokens of the current document.
    pub(super) fn push(&mut self, tokens: &[u32]) -> Result<(), WriteError> {
        self.contents.num_tokens += tokens.len() as u64;
        self.checksums.add_tokens(tokens);
        let bytes: Vec<u8> = match self.dtype {
            Dtype::U16 => tokens.iter().flat_map(|&token| (token as u16).to_le_bytes()).collect(),
            _ => tokens.iter().flat_map(|token| token.to_le_bytes()).collect(),
        };
        self.tokens.write_all(&bytes).map_err(|source| io_error(&self.tokens_path, source))
    }

    /// The current document has no more tokens.
    pub(super) fn end_document(&mut self) -> Result<(), WriteError> {
        self.contents.num_documents += 1;
        self.write_offset()
    }

    /// Give the file its name. `about` is what it says of itself in words, short ones.
    pub(super) fn finish(mut self, about: &[(&str, String)]) -> Result<Contents, WriteError> {
        self.contents.checksum = std::mem::take(&mut self.checksums).finish();
        let header = self.header(about);
        self.offsets.flush().map_err(|source| io_error(&self.offsets_path, source))?;
        let mut finish = || {
            let mut offsets = File::open(&self.offsets_path)?;
            io::copy(&mut offsets, &mut self.tokens)?;
            self.tokens.seek(SeekFrom::Start(0))?;
            self.tokens.write_all(&header)?;
            self.tokens.flush()?;
            self.tokens.get_ref().sync_all()?;
            fs::rename(&self.tokens_path, &self.path)
        };
        finish().map_err(|source| io_error(&self.path, source))?;
        Ok(self.contents)
    }

    fn write_offset(&mut self) -> Result<(), WriteError> {
        self.checksums.add_offset(self.contents.num_tokens);
        let bytes = self.contents.num_tokens.to_le_bytes();
        self.offsets.write_all(&bytes).map_err(|source| io_error(&self.offsets_path, source))
    }

    /// The first [`HEADER_BYTES`] of the file.
    fn header(&self, about: &[(&str, String)]) -> Vec<u8> {
        let Contents { num_documents, num_tokens, checksum } = self.contents;
        let mut end = 0;
        let mut tensor = |dtype: Dtype, length: u64| {
            let start = end;
            end += length * dtype.bitsize() as u64 / 8;
            json!({ "dtype": dtype, "shape": [length], "data_offsets": [start, end] })
        };
        let mut header = json!({
            "__metadata__": { CHECKSUM: checksum.to_string() },
            TOKENS: tensor(self.dtype, num_tokens),
            DOCUMENT_OFFSETS: tensor(Dtype::U64, num_documents + 1),
        });
        for (key, value) in about {
            header["__metadata__"][*key] = value.as_str().into();
        }
        let mut bytes = (HEADER_BYTES as u64 - 8).to_le_bytes().to_vec();
        bytes.extend(header.to_string().into_bytes());
        assert!(bytes.len() <= HEADER_BYTES, "a header of {} bytes", bytes.len());
        bytes.resize(HEADER_BYTES, b' ');
        bytes
    }
}

/// Where the header says what [`Contents::checksum`] is.
pub(super) const CHECKSUM: &str = "checksum";

impl Drop for TokenWriter {
    fn drop(&mut self) {
        // There is nobody to tell, and the next writer of the file writes over what stays.
        let _ = fs::remove_file(&self.tokens_path);
        let _ = fs::remove_file(&self.offsets_path);
    }
}
