//! Token files: safetensors with the tensors `tokens`, `[num_tokens]`, and `document_offsets`, `[num_documents + 1]`. Document
//! `i` has the tokens `document_offsets[i]..document_offsets[i + 1]`. They are read by position, never whole.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use moge_model::open_file;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::error::{DataError, read_error};
use super::{Contents, Watch};

/// Names of the two tensors.
pub(super) const TOKENS: &str = "tokens";
pub(super) const DOCUMENT_OFFSETS: &str = "document_offsets";

/// Longest header that is parsed: that of a file with two tensors and a word about it is far shorter.
const MAX_HEADER_BYTES: u64 = 1 << 20;

/// Bytes that are read at once where all are.
const CHUNK_BYTES: u64 = 1 << 20;

/// Bytes of a document offset.
const OFFSET_BYTES: u64 = 8;

/// An open token file. Its header is checked, what it holds is when it is read.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    file: File,
    /// Bytes of a token: 2 or 4.
    token_bytes: u64,
    /// Where the first token is in the file.
    tokens_start: u64,
    /// Where the first offset is in the file.
    offsets_start: u64,
    num_tokens: u64,
    num_documents: u64,
    /// What the header says of the file in words.
    about: HashMap<String, String>,
    /// What every token is below.
    vocab_size: usize,
}

impl TokenFile {
    /// Open a file and check its header. Tokens that are not below `vocab_size` will be refused.
    ///
    /// # Errors
    /// If it cannot be read or is no token file.
    pub fn open(path: &Path, vocab_size: usize) -> Result<TokenFile, DataError> {
        let bad = |problem: String| DataError::TokenFile { file: path.display().to_string(), problem };
        let file = open_file(path).map_err(read_error(path))?;
        let file_bytes = file.metadata().map_err(read_error(path))?.len();
        let (data_start, metadata) = read_header(&file, file_bytes).map_err(|error| match error {
            HeaderError::Read(source) => read_error(path)(source),
            HeaderError::Wrong(problem) => bad(format!("{problem} ({file_bytes} bytes)")),
        })?;
        let tensor = |name: &str| metadata.info(name).ok_or_else(|| bad(format!("there is no tensor {name}")));
        let (tokens, offsets) = (tensor(TOKENS)?, tensor(DOCUMENT_OFFSETS)?);
        let describe = |info: &TensorInfo| format!("{:?} {:?}", info.dtype, info.shape);
        let (token_bytes, num_tokens) = match (tokens.dtype, tokens.shape.as_slice()) {
            (Dtype::U16, &[num_tokens]) => (2, num_tokens),
            (Dtype::U32, &[num_tokens]) => (4, num_tokens),
            _ => return Err(bad(format!("tokens is {}; allowed: U16 or U32 [num_tokens]", describe(tokens)))),
        };
        let num_documents = match (offsets.dtype, offsets.shape.as_slice()) {
            (Dtype::U64 | Dtype::I64, &[length]) if length > 0 => length - 1,
            _ => {
                let allowed = "U64 or I64 [num_documents + 1]";
                return Err(bad(format!("document_offsets is {}; allowed: {allowed}", describe(offsets))));
            }
        };
        Ok(TokenFile {
            path: path.to_owned(),
            token_bytes,
            tokens_start: data_start + tokens.data_offsets.0 as u64,
            offsets_start: data_start + offsets.data_offsets.0 as u64,
            num_tokens: num_tokens as u64,
            num_documents: num_documents as u64,
            about: metadata.metadata().clone().unwrap_or_default(),
            file,
            vocab_size,
        })
    }

    pub(super) fn num_tokens(&self) -> u64 {
        self.num_tokens
    }

    /// Its documents.
    pub fn num_documents(&self) -> u64 {
        self.num_documents
    }

    /// An entry of the header's `__metadata__`.
    pub(super) fn about(&self, key: &str) -> Option<&str> {
        self.about.get(key).map(String::as_str)
    }

    /// Bytes that [`TokenFile::check`] reads.
    pub(super) fn num_bytes(&self) -> u64 {
        self.num_tokens * self.token_bytes + (self.num_documents + 1) * OFFSET_BYTES
    }

    /// The tokens of a document below [`TokenFile::num_documents`], by their places.
    ///
    /// # Errors
    /// If the file cannot be read, or the places are not in it.
    pub fn document(&self, index: u64) -> Result<Range<u64>, DataError> {
        let mut bytes = [0; 2 * OFFSET_BYTES as usize];
        let start = self.offsets_start + index * OFFSET_BYTES;
        self.file.read_exact_at(&mut bytes, start).map_err(read_error(&self.path))?;
        let [start, end] = [0, 1].map(|i| offset_at(&bytes, i));
        self.check_offset(index + 1, start, end)?;
        Ok(start..end)
    }

    /// Append the tokens at some places to `out`.
    ///
    /// # Errors
    /// If the file cannot be read, or a token is not below the vocabulary's size.
    pub fn read(&self, places: Range<u64>, out: &mut Vec<u32>) -> Result<(), DataError> {
        let mut bytes = vec![0; ((places.end - places.start) * self.token_bytes) as usize];
        let start = self.tokens_start + places.start * self.token_bytes;
        self.file.read_exact_at(&mut bytes, start).map_err(read_error(&self.path))?;
        let first = out.len();
        match self.token_bytes {
            2 => out.extend(bytes.as_chunks().0.iter().map(|&token| u32::from(u16::from_le_bytes(token)))),
            _ => out.extend(bytes.as_chunks().0.iter().map(|&token| u32::from_le_bytes(token))),
        }
        match out[first..].iter().position(|&token| token as usize >= self.vocab_size) {
            None => Ok(()),
            Some(index) => Err(DataError::TokenOutOfRange {
                file: self.path.display().to_string(),
                position: places.start + index as u64,
                token: out[first + index],
                vocab_size: self.vocab_size,
            }),
        }
    }

    /// Read the whole file and check all that is in it.
    pub(super) fn check(&self, watch: &mut Watch<'_>) -> Result<Contents, DataError> {
        let mut checksums = Checksums::default();
        let mut last = 0;
        let mut offsets = Vec::new();
        for places in chunks(self.num_documents + 1, CHUNK_BYTES / OFFSET_BYTES) {
            offsets.resize(((places.end - places.start) * OFFSET_BYTES) as usize, 0);
            let start = self.offsets_start + places.start * OFFSET_BYTES;
            self.file.read_exact_at(&mut offsets, start).map_err(read_error(&self.path))?;
            for (i, index) in places.enumerate() {
                let offset = offset_at(&offsets, i);
                self.check_offset(index, last, offset)?;
                checksums.add_offset(offset);
                last = offset;
            }
            watch.advance(offsets.len() as u64)?;
        }
        if last != self.num_tokens {
            let index = self.num_documents;
            return Err(self.wrong_offset(index, last, format_args!("{}, the number of tokens", self.num_tokens)));
        }
        let mut tokens = Vec::new();
        for places in chunks(self.num_tokens, CHUNK_BYTES / self.token_bytes) {
            tokens.clear();
            let num_bytes = (places.end - places.start) * self.token_bytes;
            self.read(places, &mut tokens)?;
            checksums.add_tokens(&tokens);
            watch.advance(num_bytes)?;
        }
        let (num_documents, num_tokens) = (self.num_documents, self.num_tokens);
        Ok(Contents { num_documents, num_tokens, checksum: checksums.finish() })
    }

    /// Check an offset after the one before it, which for the first is 0.
    fn check_offset(&self, index: u64, before: u64, offset: u64) -> Result<(), DataError> {
        if index == 0 && offset != 0 {
            return Err(self.wrong_offset(index, offset, format_args!("0")));
        }
        if offset < before || offset > self.num_tokens {
            return Err(self.wrong_offset(index, offset, format_args!("{before} to {}", self.num_tokens)));
        }
        Ok(())
    }

    fn wrong_offset(&self, index: u64, offset: u64, allowed: std::fmt::Arguments<'_>) -> DataError {
        // What is negative in a file of I64 reads best as such.
        let problem = format!("document_offsets[{index}] is {}; allowed: {allowed}", offset.cast_signed());
        DataError::TokenFile { file: self.path.display().to_string(), problem }
    }
}

/// The checksum of a file's contents, whatever types it stores them in.
#[derive(Clone, Default)]
pub(super) struct Checksums {
    tokens: crc32fast::Hasher,
    offsets: crc32fast::Hasher,
}

impl Checksums {
    pub(super) fn add_tokens(&mut self, tokens: &[u32]) {
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        self.tokens.update(&bytes);
    }

    pub(super) fn add_offset(&mut self, offset: u64) {
        self.offsets.update(&offset.to_le_bytes());
    }

    pub(super) fn finish(self) -> u64 {
        u64::from(self.tokens.finalize()) << 32 | u64::from(self.offsets.finalize())
    }
}

enum HeaderError {
    Read(std::io::Error),
    Wrong(String),
}

/// Where the data begins, and the header: tensors that follow one another and fill the rest of the file.
fn read_header(file: &File, file_bytes: u64) -> Result<(u64, Metadata), HeaderError> {
    let mut length = [0; 8];
    let Some(rest) = file_bytes.checked_sub(length.len() as u64) else {
        return Err(HeaderError::Wrong("it is shorter than the length of a header".to_owned()));
    };
    file.read_exact_at(&mut length, 0).map_err(HeaderError::Read)?;
    let length = u64::from_le_bytes(length);
    let allowed = rest.min(MAX_HEADER_BYTES);
    if length > allowed {
        return Err(HeaderError::Wrong(format!("it states a header of {length} bytes, it can have {allowed}")));
    }
    let mut header = vec![0; length as usize];
    file.read_exact_at(&mut header, 8).map_err(HeaderError::Read)?;
    // Parsing checks each tensor against its shape, and that the first begins at 0 and each where the last one ends.
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|error| HeaderError::Wrong(format!("its header: {error}")))?;
    let (described, found) = (metadata.data_len() as u64, rest - length);
    if described != found {
        return Err(HeaderError::Wrong(format!("its header describes {described} bytes of data, it has {found}")));
    }
    Ok((8 + length, metadata))
}

/// `0..length` in ranges of at most `chunk`.
fn chunks(length: u64, chunk: u64) -> impl Iterator<Item = Range<u64>> {
    (0..length.div_ceil(chunk)).map(move |i| i * chunk..length.min((i + 1) * chunk))
}

fn offset_at(bytes: &[u8], index: usize) -> u64 {
    u64::from_le_bytes(bytes.as_chunks().0[index])
}

#[cfg(test)]
mod tests;
