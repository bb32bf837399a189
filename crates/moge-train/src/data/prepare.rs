//! The files of a source to token files that training can read. Text and JSONL are tokenised into one token file in the run's
//! output directory, which a later start finds again.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufReader, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use moge_model::{GenerationDefaults, Prefix, TokenId, Tokenizer, eos_token_ids, io_error, open_file, read_file};

use super::error::{DataError, read_error};
use super::list::list_files;
use super::source::Source;
use super::text::{Line, Parts, TextError, read_line, text_of_line};
use super::token_file::TokenFile;
use super::token_writer::{CHECKSUM, TokenWriter};
use super::{Contents, DataProgress, Watch};
use crate::config::{RunConfig, RunModel, SourceConfig, SourceFormat};

/// Changes when other tokens come from the same files.
const VERSION: u32 = 1;

/// Longest line of a JSONL file; one that is longer is read no further.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// What a token file says of its origin in its header.
const FINGERPRINT: &str = "fingerprint";
const NUM_BAD_LINES: &str = "num_bad_lines";

/// Files that decide which tokens a text has; any may be absent.
const TOKENIZER_FILES: [&str; 5] =
    ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];

/// Makes sources ready one by one.
pub(super) struct Preparer<'a> {
    run: &'a RunConfig,
    /// Loaded for the first source that needs it: a model without one can be trained on token files.
    encoder: Option<Encoder>,
}

/// Text to the tokens of a document.
struct Encoder {
    tokenizer: Tokenizer,
    /// The token after each document.
    eos: Option<TokenId>,
    /// Of all that decides the tokens of a text.
    fingerprint: u64,
}

impl<'a> Preparer<'a> {
    pub(super) fn new(run: &'a RunConfig) -> Preparer<'a> {
        Preparer { run, encoder: None }
    }

    /// Open the token files of a source, making them where needed.
    pub(super) fn source(
        &mut self,
        name: &str,
        progress: &mut dyn FnMut(DataProgress<'_>) -> ControlFlow<()>,
    ) -> Result<Source, DataError> {
        let config = &self.run.sources[name];
        let paths = list_files(name, &config.patterns)?;
        let mut watch =
            Watch { progress, now: DataProgress { source: name, done_bytes: 0, total_bytes: 0 }, reported_bytes: 0 };
        match &config.format {
            SourceFormat::Tokens => self.check_token_files(name, &paths, &mut watch),
            _ => self.tokenize(name, config, &paths, &mut watch),
        }
    }

    fn check_token_files(&self, name: &str, paths: &[PathBuf], watch: &mut Watch<'_>) -> Result<Source, DataError> {
        let vocab_size = self.run.model.config.vocab_size;
        let files: Vec<TokenFile> =
            paths.iter().map(|path| TokenFile::open(path, vocab_size)).collect::<Result<_, _>>()?;
        watch.now.total_bytes = files.iter().map(TokenFile::num_bytes).sum();
        watch.report()?;
        let checked = files.into_iter().map(|file| {
            let contents = file.check(watch)?;
            Ok((file, contents))
        });
        let checked = checked.collect::<Result<_, DataError>>()?;
        watch.report()?;
        Source::new(name, checked, 0)
    }

    fn tokenize(
        &mut self,
        name: &str,
        config: &SourceConfig,
        paths: &[PathBuf],
        watch: &mut Watch<'_>,
    ) -> Result<Source, DataError> {
        let vocab_size = self.run.model.config.vocab_size;
        if self.encoder.is_none() {
            self.encoder = Some(Encoder::load(&self.run.model)?);
        }
        let encoder = self.encoder.as_ref().expect("it was loaded");
        let (fingerprint, total_bytes) = self.fingerprint(encoder, config, paths)?;
        let dir = self.run.output.dir.join("data");
        let path = dir.join(format!("{name}.safetensors"));
        if let Some(source) = find_source(name, &path, &fingerprint, vocab_size) {
            return Ok(source);
        }
        fs::create_dir_all(&dir).map_err(|source| io_error(&dir, source))?;
        watch.now.total_bytes = total_bytes;
        watch.report()?;
        let writer = TokenWriter::create(&path, vocab_size)?;
        let mut tokenizing = Tokenizing { encoder, writer, watch, num_bad_lines: 0 };
        for path in paths {
            match &config.format {
                SourceFormat::Jsonl { field, skip_bad_lines } => {
                    tokenizing.lines(path, field, *skip_bad_lines)?;
                }
                _ => tokenizing.text_file(path)?,
            }
        }
        let Tokenizing { writer, num_bad_lines, .. } = tokenizing;
        watch.report()?;
        let about = [(FINGERPRINT, fingerprint), (NUM_BAD_LINES, num_bad_lines.to_string())];
        let contents = writer.finish(&about)?;
        Source::new(name, vec![(TokenFile::open(&path, vocab_size)?, contents)], num_bad_lines)
    }

    /// A word that tells these files, read in this way, from others; and their bytes.
    fn fingerprint(
        &self,
        encoder: &Encoder,
        config: &SourceConfig,
        paths: &[PathBuf],
    ) -> Result<(String, u64), DataError> {
        // Should another version of the standard library hash in another way, the files are tokenised again.
        let mut hasher = DefaultHasher::new();
        (VERSION, encoder.fingerprint, &config.format).hash(&mut hasher);
        let mut total_bytes = 0;
        for path in paths {
            let read = |path: &Path| {
                let metadata = open_file(path)?.metadata()?;
                Ok((metadata.len(), metadata.modified()?))
            };
            let (num_bytes, modified) = read(path).map_err(read_error(path))?;
            total_bytes += num_bytes;
            // From where the run file lies, so that the current directory does not matter.
            (path.strip_prefix(self.run.dir()).unwrap_or(path), num_bytes, modified).hash(&mut hasher);
        }
        Ok((format!("{:016x}", hasher.finish()), total_bytes))
    }
}

/// The source as an earlier start tokenised it, if it did and nothing has changed. What is damaged is made again.
fn find_source(name: &str, path: &Path, fingerprint: &str, vocab_size: usize) -> Option<Source> {
    let file = TokenFile::open(path, vocab_size).ok()?;
    if file.about(FINGERPRINT) != Some(fingerprint) {
        return None;
    }
    let number = |key: &str| file.about(key)?.parse::<u64>().ok();
    let (checksum, num_bad_lines) = (number(CHECKSUM)?, number(NUM_BAD_LINES)?);
    let contents = Contents { num_documents: file.num_documents(), num_tokens: file.num_tokens(), checksum };
    Source::new(name, vec![(file, contents)], num_bad_lines).ok()
}

impl Encoder {
    fn load(model: &RunModel) -> Result<Encoder, DataError> {
        let tokenizer = Tokenizer::load(&model.dir)?;
        tokenizer.check_vocab(model.config.vocab_size)?;
        let generation = GenerationDefaults::load(&model.dir)?;
        let mut ends = eos_token_ids(&model.config.eos_token_ids, &generation, Some(&tokenizer)).into_iter();
        let eos = ends.find(|id| (id.0 as usize) < model.config.vocab_size);
        let mut hasher = DefaultHasher::new();
        (eos, model.config.vocab_size).hash(&mut hasher);
        for name in TOKENIZER_FILES {
            let path = model.dir.join(name);
            if path.exists() {
                (name, read_file(&path).map_err(read_error(&path))?).hash(&mut hasher);
            }
        }
        Ok(Encoder { tokenizer, eos, fingerprint: hasher.finish() })
    }
}

/// A source on its way to its token file.
struct Tokenizing<'a, 'b> {
    encoder: &'a Encoder,
    writer: TokenWriter,
    watch: &'a mut Watch<'b>,
    num_bad_lines: u64,
}

impl Tokenizing<'_, '_> {
    /// A file is a document.
    fn text_file(&mut self, path: &Path) -> Result<(), DataError> {
        let file = open_file(path).map_err(read_error(path))?;
        self.document(path, None, Parts::new(file))
    }

    /// A line is a document.
    fn lines(&mut self, path: &Path, field: &str, skip_bad_lines: bool) -> Result<(), DataError> {
        let mut reader = BufReader::new(open_file(path).map_err(read_error(path))?);
        let mut line = Vec::new();
        for number in 1.. {
            let (kind, num_bytes) = read_line(&mut reader, MAX_LINE_BYTES, &mut line).map_err(read_error(path))?;
            let text = match kind {
                Line::End => break,
                Line::Whole if line.trim_ascii().is_empty() => Ok(String::new()),
                Line::Whole => text_of_line(&line, field),
                Line::TooLong => Err(format!("longer than {MAX_LINE_BYTES} bytes, the most that is allowed")),
            };
            match text {
                Ok(text) => self.document(path, Some(number), Parts::new(text.as_bytes()))?,
                Err(_) if skip_bad_lines => self.num_bad_lines += 1,
                Err(problem) => {
                    return Err(DataError::BadLine { file: path.display().to_string(), line: number, problem });
                }
            }
            self.watch.advance(num_bytes)?;
        }
        Ok(())
    }

    /// Write a document, a file or a line of it, as a prompt begins and an answer ends: the tokens that the tokenizer puts before
    /// a text, the text, and an end-of-sequence token. An empty text is no document.
    fn document<R: Read>(&mut self, path: &Path, line: Option<u64>, mut parts: Parts<R>) -> Result<(), DataError> {
        let file = || path.display().to_string();
        let mut prefix = Prefix::Add;
        let mut tokens: Vec<u32> = Vec::new();
        while let Some(part) = parts.next().map_err(|error| match error {
            TextError::Read(source) => read_error(path)(source),
            TextError::NotUtf8 { position } => DataError::NotUtf8 { file: file(), position },
        })? {
            let ids = self.encoder.tokenizer.encode(part, prefix);
            let ids = ids.map_err(|error| DataError::Encode { file: file(), line, problem: error.to_string() })?;
            tokens.clear();
            tokens.extend(ids.into_iter().map(|id| id.0));
            self.writer.push(&tokens)?;
            prefix = Prefix::Omit;
            if line.is_none() {
                self.watch.advance(part.len() as u64)?;
            }
        }
        if prefix == Prefix::Add {
            return Ok(());
        }
        if let Some(eos) = self.encoder.eos {
            self.writer.push(&[eos.0])?;
        }
        Ok(self.writer.end_document()?)
    }
}

#[cfg(test)]
mod tests;
