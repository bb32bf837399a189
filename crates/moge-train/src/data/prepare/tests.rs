use std::fs::File;
use std::io::Write;
use std::time::{Duration, SystemTime};

use moge_model::Architecture;
use moge_model::synth::{presets, write_checkpoint};
use tempfile::TempDir;

use super::*;
use crate::DataLoader;

/// A directory with a tiny model and a run file whose source `web` has the format and the files given.
fn directory(architecture: Architecture, source: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let preset = presets().find(|preset| preset.config.architecture == architecture && preset.name == "tiny");
    fs::create_dir(dir.path().join("model")).unwrap();
    write_checkpoint(&dir.path().join("model"), &preset.unwrap().config, &mut |_, _| ()).unwrap();
    let run = format!(
        "[model]\nconfig = \"model\"\n[output]\ndir = \"out\"\n[data.web]\n{source}\n[data.unused]\n\
         files = [\"absent\"]\nformat = \"text\"\n[[phases]]\nname = \"all\"\ntokens = 64\nsequence_length = 16\n\
         batch_tokens = 64\nlearning_rate = [1e-3, 1e-4]\nmixture = {{ web = 1 }}\n"
    );
    fs::write(dir.path().join("run.toml"), run).unwrap();
    dir
}

fn text_directory() -> TempDir {
    let dir = directory(Architecture::PanguProMoe, "files = [\"*.txt\"]\nformat = \"text\"");
    fs::write(dir.path().join("a.txt"), "A first text.\n").unwrap();
    dir
}

fn jsonl_directory(on_bad_line: &str) -> TempDir {
    let source = format!("files = [\"a.jsonl\"]\nformat = \"jsonl\"\non_bad_line = \"{on_bad_line}\"");
    directory(Architecture::PanguProMoe, &source)
}

/// The source `web`, and how often its progress was told of.
fn prepare(dir: &TempDir) -> Result<(Source, u32), DataError> {
    let run = RunConfig::load(&dir.path().join("run.toml")).unwrap();
    let mut num_reports = 0;
    let source = Preparer::new(&run).source("web", &mut |progress| {
        assert!(progress.source == "web" && progress.done_bytes <= progress.total_bytes, "{progress:?}");
        num_reports += 1;
        ControlFlow::Continue(())
    })?;
    Ok((source, num_reports))
}

fn refusal(dir: &TempDir) -> String {
    prepare(dir).unwrap_err().to_string()
}

fn documents(source: &Source) -> Vec<Vec<TokenId>> {
    let read = |index| {
        let (file, places) = source.document(index).unwrap();
        let mut tokens = Vec::new();
        file.read(places, &mut tokens).unwrap();
        tokens.into_iter().map(TokenId).collect()
    };
    (0..source.contents.num_documents).map(read).collect()
}

fn output_files(dir: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(dir.path().join("out/data")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_document_begins_as_a_prompt_and_ends_with_an_end_of_sequence_token() {
    for (architecture, eos) in [
        (Architecture::PanguProMoe, "[unused10]"),
        (Architecture::Qwen3, "<|im_end|>"),
        (Architecture::Glm4, "<|endoftext|>"),
    ] {
        let dir = directory(architecture, "files = [\"*.txt\"]\nformat = \"text\"");
        let texts = ["A first text.\nIt has two lines.\n", "第二篇"];
        fs::write(dir.path().join("a.txt"), texts[0]).unwrap();
        fs::write(dir.path().join("b.txt"), "").unwrap();
        fs::write(dir.path().join("c.txt"), texts[1]).unwrap();
        let tokenizer = Tokenizer::load(&dir.path().join("model")).unwrap();
        let (source, _) = prepare(&dir).unwrap();
        let found = documents(&source);
        assert_eq!(found.len(), texts.len(), "{architecture:?}");
        for (found, text) in found.iter().zip(texts) {
            let (last, rest) = found.split_last().unwrap();
            assert_eq!(rest, tokenizer.encode(text, Prefix::Add).unwrap(), "{architecture:?}");
            assert_eq!(tokenizer.piece(*last), eos, "{architecture:?}");
        }
    }
}

#[test]
fn a_text_has_the_same_tokens_in_a_file_and_in_a_line_however_long_it_is() {
    let text = "Some words, and a line's end.\n".repeat(45_000);
    let dir = text_directory();
    fs::write(dir.path().join("a.txt"), &text).unwrap();
    let in_file = documents(&prepare(&dir).unwrap().0);
    let dir = jsonl_directory("stop");
    fs::write(dir.path().join("a.jsonl"), serde_json::json!({ "id": 3, "text": text }).to_string()).unwrap();
    let (source, num_reports) = prepare(&dir).unwrap();
    assert_eq!(documents(&source), in_file);
    assert!(num_reports >= 2, "{num_reports}");
    let tokenizer = Tokenizer::load(&dir.path().join("model")).unwrap();
    let num_special = tokenizer.prefix().len() + 1;
    let tokens = &in_file[0][num_special - 1..in_file[0].len() - 1];
    // The tokenizer takes a space for granted before each part.
    assert_eq!(tokenizer.decode(tokens).replace("\n Some", "\nSome"), text);
}

#[test]
fn a_later_start_uses_what_an_earlier_one_made_until_something_changes() {
    let dir = text_directory();
    let first = prepare(&dir).unwrap().0.contents;
    let (source, num_reports) = prepare(&dir).unwrap();
    assert_eq!((source.contents, num_reports), (first, 0));
    // A text of the same length at another time.
    let file = File::options().write(true).open(dir.path().join("a.txt")).unwrap();
    (&file).write_all(b"B").unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
    let (source, num_reports) = prepare(&dir).unwrap();
    assert_ne!(source.contents, first);
    assert!(num_reports > 0);
    let second = source.contents;
    // Another tokenizer.
    let path = dir.path().join("model/tokenizer_config.json");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(&path, config + " ").unwrap();
    let (source, num_reports) = prepare(&dir).unwrap();
    assert_eq!(source.contents, second);
    assert!(num_reports > 0);
}

#[test]
fn what_a_killed_or_damaged_start_left_is_made_again() {
    let dir = text_directory();
    let first = prepare(&dir).unwrap().0.contents;
    let path = dir.path().join("out/data/web.safetensors");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    fs::write(dir.path().join("out/data/web.tokens.partial"), "torn").unwrap();
    fs::write(dir.path().join("out/data/web.offsets.partial"), "torn").unwrap();
    assert_eq!(prepare(&dir).unwrap().0.contents, first);
    assert_eq!(fs::read(&path).unwrap(), whole);
    assert_eq!(output_files(&dir), ["web.safetensors"]);
}

#[test]
fn work_that_is_stopped_leaves_nothing_and_can_begin_again() {
    let dir = text_directory();
    let run = RunConfig::load(&dir.path().join("run.toml")).unwrap();
    let error = Preparer::new(&run).source("web", &mut |progress| match progress.done_bytes {
        0 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    });
    assert!(error.unwrap_err().to_string().contains("data.web: stopped"));
    assert!(output_files(&dir).is_empty());
    prepare(&dir).unwrap();
}

#[test]
fn a_bad_line_is_an_error_with_file_and_line_or_counted() {
    let lines = b"{\"text\": \"one\"}\n\n{\"text\": \"two\"}\r\n{\"text\": 2}\nnonsense\n{\"text\": \"\"}\n\xff\n{\"text\": \"x\"}";
    let dir = jsonl_directory("stop");
    fs::write(dir.path().join("a.jsonl"), lines).unwrap();
    let error = refusal(&dir);
    assert!(error.contains("a.jsonl: line 4: not a document: invalid type: integer `2`"), "{error}");
    assert!(output_files(&dir).is_empty());
    let dir = jsonl_directory("skip");
    fs::write(dir.path().join("a.jsonl"), lines).unwrap();
    for _ in 0..2 {
        let (source, _) = prepare(&dir).unwrap();
        assert_eq!((source.contents.num_documents, source.num_bad_lines), (3, 3));
    }
}

#[test]
fn a_line_of_a_hundred_megabytes_is_a_bad_line() {
    let dir = jsonl_directory("stop");
    let mut file = File::create(dir.path().join("a.jsonl")).unwrap();
    file.write_all(b"{\"text\": \"one\"}\n").unwrap();
    file.set_len(100 << 20).unwrap();
    let error = refusal(&dir);
    assert!(error.contains("a.jsonl: line 2: longer than 67108864 bytes"), "{error}");
}

#[test]
fn files_that_are_no_text_and_sources_without_any_are_refused() {
    let dir = text_directory();
    fs::write(dir.path().join("b.txt"), b"good\nb\xe4d").unwrap();
    let error = refusal(&dir);
    assert!(error.contains("b.txt: not UTF-8 at byte 6"), "{error}");
    fs::remove_file(dir.path().join("b.txt")).unwrap();
    fs::create_dir(dir.path().join("b.txt")).unwrap();
    let error = refusal(&dir);
    assert!(error.contains("b.txt: not a regular file"), "{error}");
    fs::remove_dir(dir.path().join("b.txt")).unwrap();
    fs::write(dir.path().join("a.txt"), "").unwrap();
    let error = refusal(&dir);
    assert!(error.contains("data.web: there is no token in its files"), "{error}");
    fs::remove_file(dir.path().join("a.txt")).unwrap();
    let error = refusal(&dir);
    assert!(error.contains("*.txt: there is no such file (files of data.web)"), "{error}");
}

#[test]
fn a_model_without_a_tokenizer_can_be_trained_on_token_files_alone() {
    let dir = directory(Architecture::PanguProMoe, "files = [\"*.safetensors\"]\nformat = \"tokens\"");
    for name in TOKENIZER_FILES {
        let _ = fs::remove_file(dir.path().join("model").join(name));
    }
    for (name, last) in [("b", 511), ("a", 2)] {
        let mut writer = TokenWriter::create(&dir.path().join(format!("{name}.safetensors")), 512).unwrap();
        writer.push(&[0, 1, last]).unwrap();
        writer.end_document().unwrap();
        writer.finish(&[]).unwrap();
    }
    let run = RunConfig::load(&dir.path().join("run.toml")).unwrap();
    let loader = DataLoader::open(&run, &mut |_| ControlFlow::Continue(())).unwrap();
    let sources: Vec<_> =
        loader.sources().map(|source| (source.name, source.num_documents, source.num_tokens)).collect();
    assert_eq!(sources, [("web", 2, 6)]);
    let mut writer = TokenWriter::create(&dir.path().join("c.safetensors"), 513).unwrap();
    writer.push(&[512]).unwrap();
    writer.end_document().unwrap();
    writer.finish(&[]).unwrap();
    let error = refusal(&dir);
    assert!(error.contains("c.safetensors: tokens[0] is 512; allowed: below the model's vocab_size 512"), "{error}");
}

#[test]
fn a_tokenizer_of_another_vocabulary_is_refused() {
    let dir = text_directory();
    let path = dir.path().join("model/config.json");
    let config = fs::read_to_string(&path).unwrap();
    assert!(config.contains("\"vocab_size\": 512"), "{config}");
    fs::write(&path, config.replace("\"vocab_size\": 512", "\"vocab_size\": 300")).unwrap();
    let error = refusal(&dir);
    assert!(error.contains("below the model's vocab_size 300"), "{error}");
}
