use std::path::Path;

use tempfile::TempDir;

use super::super::token_file::TokenFile;
use super::super::token_writer::TokenWriter;
use super::*;

/// Numbers that look random, from a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

const VOCAB_SIZE: usize = 1000;

/// Documents of a source; tokens of different sources differ.
fn documents(num_documents: u64, max_length: u64, first_token: u32, random: &mut Random) -> Vec<Vec<u32>> {
    let mut next = first_token;
    let mut token = || {
        next = first_token + (next + 1 - first_token) % 300;
        next
    };
    (0..num_documents).map(|_| (0..random.below(max_length + 1)).map(|_| token()).collect()).collect()
}

/// A source whose documents are spread over files.
fn source(dir: &Path, name: &str, files: &[&[Vec<u32>]]) -> Source {
    let files = files.iter().enumerate().map(|(index, documents)| {
        let path = dir.join(format!("{name}-{index}.safetensors"));
        let mut writer = TokenWriter::create(&path, VOCAB_SIZE).unwrap();
        for document in *documents {
            writer.push(document).unwrap();
            writer.end_document().unwrap();
        }
        let contents = writer.finish(&[]).unwrap();
        (TokenFile::open(&path, VOCAB_SIZE).unwrap(), contents)
    });
    Source::new(name, files.collect(), 0).unwrap()
}

/// Three sources, of many short documents, of one long one, and of some in two files; an empty file between them.
fn three_sources(dir: &TempDir, seed: u64) -> DataLoader {
    let mut random = Random(5);
    let web = documents(31, 9, 0, &mut random);
    let book = vec![(0..157).map(|i| 300 + i % 300).collect::<Vec<u32>>()];
    let code = documents(12, 40, 600, &mut random);
    let sources = vec![
        source(dir.path(), "book", &[&book]),
        source(dir.path(), "code", &[&code[..5], &[], &code[5..]]),
        source(dir.path(), "web", &[&web]),
    ];
    DataLoader::new(sources, seed)
}

fn mixture(weights: &[(&str, f64)]) -> BTreeMap<String, f64> {
    weights.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect()
}

#[test]
fn an_epoch_holds_every_document_once_with_the_next_token_of_the_document_as_target() {
    let dir = tempfile::tempdir().unwrap();
    let documents = documents(31, 40, 0, &mut Random(9));
    let mut loader = DataLoader::new(vec![source(dir.path(), "web", &[&documents[..7], &documents[7..]])], 1);
    let num_tokens = documents.iter().map(Vec::len).sum::<usize>();
    let (mut found, mut document) = (Vec::new(), Vec::new());
    let mut last_target = IGNORED_TARGET;
    let mut num_rows = 0;
    // Sequences of 13 rows, some of them with a cut document at both ends.
    while num_rows < num_tokens {
        let batch = loader.next_batch(&mixture(&[("web", 0.1)]), 3, 13).unwrap();
        assert_eq!((batch.num_rows(), batch.targets.len()), (39, 39));
        for sequence_end in [13, 26, 39] {
            assert!(batch.offsets.contains(&sequence_end), "{:?}", batch.offsets);
        }
        for row in batch.pieces().flatten().take(num_tokens - num_rows) {
            if last_target != IGNORED_TARGET {
                assert_eq!(batch.tokens[row], last_target);
            }
            last_target = batch.targets[row];
            document.push(batch.tokens[row]);
            if last_target == IGNORED_TARGET {
                found.push(std::mem::take(&mut document));
            }
        }
        num_rows += 39;
    }
    assert!(document.is_empty());
    let mut expected: Vec<Vec<u32>> = documents.into_iter().filter(|document| !document.is_empty()).collect();
    assert_ne!(found, expected, "not shuffled");
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}

#[test]
fn pieces_end_where_documents_or_sequences_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut loader = three_sources(&dir, 1);
    let batch = loader.next_batch(&mixture(&[("web", 2.0), ("book", 1.0)]), 11, 32).unwrap();
    assert_eq!(batch.offsets.last(), Some(&(11 * 32)));
    for rows in batch.pieces() {
        assert!(!rows.is_empty() && rows.start / 32 == (rows.end - 1) / 32);
        let last = rows.end - 1;
        assert!(batch.targets[last] == IGNORED_TARGET || rows.end % 32 == 0, "a document was cut within a sequence");
        assert!(rows.clone().take(rows.len() - 1).all(|row| batch.targets[row] == batch.tokens[row + 1]));
    }
}

#[test]
fn shares_are_exact_to_a_sequence_and_counted_anew_for_another_mixture() {
    let dir = tempfile::tempdir().unwrap();
    let mut loader = three_sources(&dir, 3);
    for weights in [[0.2, 0.3, 0.5], [7.0, 1.0, 0.25]] {
        let mixture = mixture(&[("book", weights[0]), ("code", weights[1]), ("web", weights[2])]);
        let mut counts = [0.0; 3];
        for _ in 0..50 {
            let batch = loader.next_batch(&mixture, 2, 24).unwrap();
            batch.tokens.iter().for_each(|token| counts[[1, 0, 2][(token / 300) as usize].min(2)] += 1.0);
            // Tokens 0 to 299 are the web's, 300 to 599 the book's, the others code.
            let total: f64 = counts.iter().sum();
            for (count, weight) in [counts[0], counts[2], counts[1]].iter().zip(weights) {
                let share = total * weight / weights.iter().sum::<f64>();
                assert!((count - share).abs() <= 24.0, "{counts:?} for {weights:?}");
            }
        }
    }
    let only_code = loader.next_batch(&mixture(&[("code", 1e-3)]), 4, 24).unwrap();
    assert!(only_code.tokens.iter().all(|token| *token >= 600));
}

#[test]
fn a_restored_loader_yields_what_one_that_never_stopped_yields() {
    let dir = tempfile::tempdir().unwrap();
    let mixtures = [
        mixture(&[("web", 3.0), ("code", 1.0)]),
        mixture(&[("web", 0.1), ("book", 0.7), ("code", 0.3)]),
        mixture(&[("book", 1.0)]),
    ];
    let [mut whole, mut resumed, mut other] = [0; 3].map(|seed| three_sources(&dir, seed));
    let first = whole.state.clone();
    for seed in 0..50 {
        for loader in [&mut whole, &mut resumed, &mut other] {
            loader.state = DataState { seed, ..first.clone() };
        }
        let mut random = Random(seed);
        for step in 0..40 {
            let mixture = &mixtures[random.below(3) as usize];
            let (num_sequences, sequence_length) = (1 + random.below(4) as usize, 1 + random.below(50) as usize);
            let expected = whole.next_batch(mixture, num_sequences, sequence_length).unwrap();
            let found = resumed.next_batch(mixture, num_sequences, sequence_length).unwrap();
            assert_eq!(found, expected, "seed {seed}, step {step}");
            if random.below(3) == 0 {
                let saved = serde_json::to_string(resumed.state()).unwrap();
                other.restore(serde_json::from_str(&saved).unwrap()).unwrap();
                assert_eq!(other.state(), whole.state());
                std::mem::swap(&mut resumed, &mut other);
            }
        }
        assert!(whole.state.sources.iter().all(|source| source.epoch > 0), "no epoch ended");
    }
}

#[test]
fn sequences_are_the_same_however_many_are_asked_for_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (mut one, mut many) = (three_sources(&dir, 4), three_sources(&dir, 4));
    let mixture = mixture(&[("web", 1.0), ("book", 2.0)]);
    let expected = many.next_batch(&mixture, 9, 21).unwrap();
    let mut found = TokenBatch::default();
    for _ in 0..9 {
        let batch = one.next_batch(&mixture, 1, 21).unwrap();
        found.tokens.extend(batch.tokens);
        found.targets.extend(batch.targets);
    }
    assert_eq!((found.tokens, found.targets), (expected.tokens, expected.targets));
    assert_eq!(one.state(), many.state());
}

#[test]
fn seeds_give_other_orders() {
    let dir = tempfile::tempdir().unwrap();
    let batch = |seed| three_sources(&dir, seed).next_batch(&mixture(&[("web", 1.0)]), 4, 16).unwrap();
    assert_eq!(batch(1), batch(1));
    assert_ne!(batch(1), batch(2));
}

#[test]
fn a_state_of_other_data_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let state = |change: &dyn Fn(&mut DataState)| {
        let mut state = three_sources(&dir, 1).state().clone();
        change(&mut state);
        state
    };
    let mut loader = three_sources(&dir, 1);
    loader.restore(state(&|_| ())).unwrap();
    for (state, message) in [
        (state(&|state| state.seed = 2), "model.seed is 1; the run that would go on had 2"),
        (
            state(&|state| drop(state.sources.remove(1))),
            "the sources that phases use is book, code, web; the run that would go on had book, web",
        ),
        (state(&|state| state.sources[0].contents.checksum ^= 1), "the data of data.book is 1 documents of 157 tokens"),
        (state(&|state| state.sources[2].index = 31), "the saved place in data.web cannot be: SourceState"),
        (state(&|state| state.sources[1].weight = 1 << 33), "the saved place in data.code cannot be"),
        (state(&|state| state.sources[0].num_taken = u64::MAX), "the saved place in data.book cannot be"),
    ] {
        let error = loader.restore(state).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    assert_eq!(loader.state(), three_sources(&dir, 1).state());
}

#[test]
fn a_file_that_is_cut_while_it_is_read_is_an_error_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut loader = three_sources(&dir, 1);
    let before = loader.state().clone();
    let path = dir.path().join("book-0.safetensors");
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1100).unwrap();
    let error = loader.next_batch(&mixture(&[("book", 1.0), ("web", 1.0)]), 9, 33).unwrap_err().to_string();
    assert!(error.contains("book-0.safetensors: "), "{error}");
    assert_eq!(*loader.state(), before);
}

#[test]
fn a_source_without_a_token_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("empty.safetensors");
    let mut writer = TokenWriter::create(&path, VOCAB_SIZE).unwrap();
    writer.end_document().unwrap();
    let contents = writer.finish(&[]).unwrap();
    let file = TokenFile::open(&path, VOCAB_SIZE).unwrap();
    let error = Source::new("empty", vec![(file, contents)], 0).unwrap_err().to_string();
    assert!(error.contains("data.empty: there is no token"), "{error}");
}

#[test]
#[should_panic(expected = "a mixture of other sources")]
fn a_mixture_of_unknown_sources_is_a_bug() {
    let dir = tempfile::tempdir().unwrap();
    let _ = three_sources(&dir, 1).next_batch(&mixture(&[("webs", 1.0)]), 1, 2);
}
