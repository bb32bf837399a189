//! Batches of documents, drawn from sources by a mixture.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use moge_kernels::IGNORED_TARGET;
use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::order::{document_at, epoch_key};
use super::prepare::Preparer;
use super::source::Source;
use super::{Contents, DataProgress, SourceSummary};
use crate::batch::TokenBatch;
use crate::config::RunConfig;

/// What the weights of a mixture are multiples of. Whole numbers make the choice of a source exact, and a state that is
/// written as text the same when it is read again.
const WEIGHT_UNITS: u64 = 1 << 32;

/// No count of a state comes near it; keeps sums and products of them inside their types.
const MAX_COUNT: u64 = 1 << 60;

/// Yields the batches of a run, in an order that depends on the seed, the data and what was asked for before.
///
/// The documents of a source come in a new order in each epoch. The next piece of a sequence is of the source whose tokens
/// are furthest behind its share. A document that does not fit into a sequence is cut; its rest begins a piece of its own when
/// the turn comes to its source again.
#[derive(Debug)]
pub struct DataLoader {
    /// In the order of their names.
    sources: Vec<Source>,
    state: DataState,
}

/// All that says which batches come next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataState {
    seed: u64,
    /// In the order of [`DataLoader::sources`].
    sources: Vec<SourceState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SourceState {
    name: String,
    contents: Contents,
    /// Times that all documents were taken.
    epoch: u64,
    /// Place of the current document in the order of this epoch.
    index: u64,
    /// Tokens of it that were taken.
    start: u64,
    /// Share of the current mixture, in units of 1 / 2^32.
    weight: u64,
    /// Tokens taken since the mixture changed.
    num_taken: u64,
}

impl DataLoader {
    /// Open the sources that phases use. Text and JSONL files are tokenised first, unless an earlier start did it; token files
    /// are read once to check them. `progress` is told of both; if it breaks, the work stops.
    ///
    /// # Errors
    /// If files are missing, cannot be read or written, or hold what is no document, or `progress` broke.
    pub fn open(
        run: &RunConfig,
        progress: &mut dyn FnMut(DataProgress<'_>) -> ControlFlow<()>,
    ) -> Result<DataLoader, DataError> {
        let mut preparer = Preparer::new(run);
        let is_used = |name: &&String| run.phases.iter().any(|phase| phase.mixture.contains_key(*name));
        let names = run.sources.keys().filter(is_used);
        let sources = names.map(|name| preparer.source(name, progress)).collect::<Result<_, _>>()?;
        Ok(DataLoader::new(sources, run.model.seed))
    }

    fn new(sources: Vec<Source>, seed: u64) -> DataLoader {
        let first = |source: &Source| SourceState {
            name: source.name.clone(),
            contents: source.contents,
            epoch: 0,
            index: 0,
            start: 0,
            weight: 0,
            num_taken: 0,
        };
        let state = DataState { seed, sources: sources.iter().map(first).collect() };
        DataLoader { sources, state }
    }

    /// The sources, in the order of their names.
    pub fn sources(&self) -> impl Iterator<Item = SourceSummary<'_>> {
        self.sources.iter().map(|source| SourceSummary {
            name: &source.name,
            num_documents: source.contents.num_documents,
            num_tokens: source.contents.num_tokens,
            num_bad_lines: source.num_bad_lines,
        })
    }

    /// What says which batch is next; [`DataLoader::restore`] takes it.
    pub fn state(&self) -> &DataState {
        &self.state
    }

    /// Go on where the loader was whose state this is.
    ///
    /// # Errors
    /// If that loader had other data or another seed.
    pub fn restore(&mut self, state: DataState) -> Result<(), DataError> {
        let differ = |what: &str, found: String, expected: String| {
            Err(DataError::OtherData { what: what.to_owned(), found, expected })
        };
        if state.seed != self.state.seed {
            return differ("model.seed", self.state.seed.to_string(), state.seed.to_string());
        }
        let names = |state: &DataState| {
            let names: Vec<&str> = state.sources.iter().map(|source| source.name.as_str()).collect();
            names.join(", ")
        };
        if names(&self.state) != names(&state) {
            return differ("the sources that phases use", names(&self.state), names(&state));
        }
        for (now, then) in self.state.sources.iter().zip(&state.sources) {
            if now.contents != then.contents {
                let what = format!("the data of data.{}", now.name);
                return differ(&what, now.contents.describe(), then.contents.describe());
            }
            if !then.is_possible() {
                return Err(DataError::DamagedState { name: then.name.clone(), state: format!("{then:?}") });
            }
        }
        self.state = state;
        Ok(())
    }

    /// The next `num_sequences` sequences, each of `sequence_length` rows and so made of whole pieces. `mixture` gives the
    /// weight of each source that takes part; shares are counted anew when it changes. After an error the state is as before.
    ///
    /// # Errors
    /// If a token file cannot be read, or was changed and holds what it must not.
    ///
    /// # Panics
    /// If the mixture is not one of the run's.
    pub fn next_batch(
        &mut self,
        mixture: &BTreeMap<String, f64>,
        num_sequences: usize,
        sequence_length: usize,
    ) -> Result<TokenBatch, DataError> {
        let mut state = self.state.clone();
        state.set_mixture(mixture);
        let mut batch = TokenBatch { tokens: Vec::new(), targets: Vec::new(), offsets: vec![0] };
        for end in (1..=num_sequences).map(|i| i * sequence_length) {
            while batch.num_rows() < end {
                let room = end - batch.num_rows();
                self.append_piece(&mut state, room, &mut batch)?;
            }
        }
        self.state = state;
        Ok(batch)
    }

    /// Append what is left of a document, or as much of it as there is room for.
    fn append_piece(&self, state: &mut DataState, room: usize, batch: &mut TokenBatch) -> Result<(), DataError> {
        let place = state.next_source();
        let source = &self.sources[place];
        let seed = state.seed;
        let state = &mut state.sources[place];
        loop {
            let key = epoch_key(seed, &source.name, state.epoch);
            let document = document_at(state.index, source.contents.num_documents, key);
            let (file, places) = source.document(document)?;
            let left = (places.end - places.start).saturating_sub(state.start);
            if left == 0 {
                // An empty document; there is at least one that is not.
                state.next_document();
                continue;
            }
            let num_rows = left.min(room as u64);
            let start = places.start + state.start;
            // The token after the last row, where the document has one, is that row's target.
            let mut tokens = Vec::with_capacity(num_rows as usize + 1);
            file.read(start..places.end.min(start + num_rows + 1), &mut tokens)?;
            batch.targets.extend_from_slice(&tokens[1..]);
            if left == num_rows {
                batch.targets.push(IGNORED_TARGET);
            }
            batch.tokens.extend_from_slice(&tokens[..num_rows as usize]);
            batch.offsets.push(batch.tokens.len());
            state.num_taken += num_rows;
            state.start += num_rows;
            if left == num_rows {
                state.next_document();
            }
            return Ok(());
        }
    }
}

impl DataState {
    /// Count shares anew if the mixture is not the one that they were counted for.
    fn set_mixture(&mut self, mixture: &BTreeMap<String, f64>) {
        let sum: f64 = mixture.values().sum();
        let known = mixture.keys().all(|name| self.sources.iter().any(|source| source.name == *name));
        assert!(known && sum > 0.0, "a mixture of other sources: {mixture:?}");
        // A share that is too small to be counted still is one.
        let weight =
            |name: &str| mixture.get(name).map_or(0, |weight| ((weight / sum * WEIGHT_UNITS as f64) as u64).max(1));
        let weights: Vec<u64> = self.sources.iter().map(|source| weight(&source.name)).collect();
        if self.sources.iter().zip(&weights).all(|(source, &weight)| source.weight == weight) {
            return;
        }
        for (source, weight) in self.sources.iter_mut().zip(weights) {
            (source.weight, source.num_taken) = (weight, 0);
        }
    }

    /// The source that is furthest behind its share; of several the one with the largest share, then the first.
    fn next_source(&self) -> usize {
        let total_taken: u64 = self.sources.iter().map(|source| source.num_taken).sum();
        let total_weight: u64 = self.sources.iter().map(|source| source.weight).sum();
        let behind = |source: &SourceState| {
            let share = i128::from(source.weight) * i128::from(total_taken);
            share - i128::from(source.num_taken) * i128::from(total_weight)
        };
        let candidates = self.sources.iter().enumerate().filter(|(_, source)| source.weight > 0);
        let best = candidates.max_by_key(|(place, source)| (behind(source), source.weight, std::cmp::Reverse(*place)));
        best.expect("a mixture has a source").0
    }
}

impl SourceState {
    /// Whether a loader can have had it.
    fn is_possible(&self) -> bool {
        let counts = [self.epoch, self.start, self.num_taken];
        let are_counts = counts.iter().all(|&count| count <= MAX_COUNT);
        are_counts && self.index < self.contents.num_documents && self.weight <= WEIGHT_UNITS
    }

    fn next_document(&mut self) {
        (self.index, self.start) = (self.index + 1, 0);
        if self.index == self.contents.num_documents {
            (self.epoch, self.index) = (self.epoch + 1, 0);
        }
    }
}

impl Contents {
    fn describe(self) -> String {
        let Contents { num_documents, num_tokens, checksum } = self;
        format!("{num_documents} documents of {num_tokens} tokens, checksum {checksum:016x}")
    }
}

#[cfg(test)]
mod tests;
