//! The documents of one source, over all its token files.

use std::ops::Range;

use super::Contents;
use super::error::DataError;
use super::token_file::TokenFile;

/// The documents of one source, counted over all its files.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) name: String,
    /// Each with the number of documents up to its end.
    files: Vec<(TokenFile, u64)>,
    pub(super) contents: Contents,
    pub(super) num_bad_lines: u64,
}

impl Source {
    /// # Errors
    /// If there is no token in the files.
    pub(super) fn new(name: &str, files: Vec<(TokenFile, Contents)>, num_bad_lines: u64) -> Result<Source, DataError> {
        let mut contents = Contents::default();
        let add = |(file, of_file): (TokenFile, Contents)| {
            contents.num_documents += of_file.num_documents;
            contents.num_tokens += of_file.num_tokens;
            // The order of the files matters too.
            contents.checksum = contents.checksum.rotate_left(1) ^ of_file.checksum;
            (file, contents.num_documents)
        };
        let files = files.into_iter().map(add).collect();
        if contents.num_tokens == 0 {
            return Err(DataError::Empty { name: name.to_owned(), num_bad_lines });
        }
        Ok(Source { name: name.to_owned(), files, contents, num_bad_lines })
    }

    /// The file of a document and the places of its tokens there.
    pub(super) fn document(&self, index: u64) -> Result<(&TokenFile, Range<u64>), DataError> {
        let place = self.files.partition_point(|(_, end)| *end <= index);
        let (file, end) = &self.files[place];
        let places = file.document(index - (end - file.num_documents()))?;
        Ok((file, places))
    }
}
