use std::path::PathBuf;
use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::detokenizer::Detokenizer;
use super::sentencepiece::{ModelProto, NormalizerSpec, Piece, TrainerSpec};
use super::*;
use crate::{Architecture, thinking_tokens};

fn golden_dir(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../goldens/tokenizer_json").join(name)
}

fn golden_tokenizer(name: &str) -> Tokenizer {
    Tokenizer::load(&golden_dir(name)).unwrap()
}

fn ids(value: &Value) -> Vec<TokenId> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Pieces of the little model: `<unk>`, BOS, EOS, all bytes, then these.
const FIRST_PIECE: u32 = 3 + 256;
const PIECES: [(&str, PieceKind); 13] = [
    ("\u{2581}", PieceKind::Normal),
    ("a", PieceKind::Normal),
    ("\u{2581}a", PieceKind::Normal),
    ("b", PieceKind::Normal),
    ("用户", PieceKind::Normal),
    ("用", PieceKind::Normal),
    ("户", PieceKind::Normal),
    ("\u{fffd}", PieceKind::Normal),
    ("[unused9]", PieceKind::UserDefined),
    ("[unused10]", PieceKind::UserDefined),
    ("[unused16]", PieceKind::UserDefined),
    ("[unused17]", PieceKind::UserDefined),
    ("<hidden>", PieceKind::Control),
];

/// A model with byte pieces that, as the flag says, puts a space before every run.
fn sentencepiece_model(add_dummy_prefix: bool) -> Vec<u8> {
    let piece = |piece: &str, kind| Piece { piece: piece.into(), score: 0.0, kind };
    let mut pieces =
        vec![piece("<unk>", PieceKind::Unknown), piece("<s>", PieceKind::Control), piece("</s>", PieceKind::Control)];
    pieces.extend((0..=255).map(|byte| piece(&format!("<0x{byte:02X}>"), PieceKind::Byte(byte))));
    pieces.extend(PIECES.map(|(text, kind)| piece(text, kind)));
    let normalizer_spec =
        NormalizerSpec { add_dummy_prefix, remove_extra_whitespaces: false, ..NormalizerSpec::default() };
    let trainer_spec = TrainerSpec { byte_fallback: true, ..TrainerSpec::default() };
    ModelProto { pieces, trainer_spec, normalizer_spec }.to_bytes()
}

/// A checkpoint directory with a SentencePiece model and this `tokenizer_config.json`.
fn sentencepiece_dir(config: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.model"), sentencepiece_model(true)).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

fn pangu_config() -> Value {
    json!({
        "bos_token": "<s>", "eos_token": {"content": "[unused10]"}, "unk_token": "<unk>", "pad_token": null,
        "additional_special_tokens": ["[unused9]", "[unused10]", "[unused16]", "[unused17]", "<nowhere>"],
        "added_tokens_decoder": {"290": {"content": "<beyond>", "special": true}},
    })
}

fn load_pangu() -> Tokenizer {
    Tokenizer::load(sentencepiece_dir(&pangu_config()).path()).unwrap()
}

fn id(tokenizer: &Tokenizer, piece: &str) -> TokenId {
    tokenizer.id_of(piece).unwrap()
}

fn stream(tokenizer: &Tokenizer, ids: &[TokenId]) -> String {
    let mut detokenizer = Detokenizer::default();
    let mut text: String = ids.iter().map(|&id| detokenizer.push(tokenizer, id)).collect();
    text += &detokenizer.finish(tokenizer);
    text
}

#[test]
fn tokenizer_json_encodes_and_decodes_as_its_library_does() {
    for name in ["qwen3", "glm4", "smollm2", "llama2"] {
        let tokenizer = golden_tokenizer(name);
        let cases: Value =
            serde_json::from_slice(&std::fs::read(golden_dir(name).join("cases.json")).unwrap()).unwrap();
        assert_eq!(tokenizer.prefix(), ids(&cases["prefix"]));
        for case in cases["encode"].as_array().unwrap() {
            let text = case[0].as_str().unwrap();
            let expected = ids(&case[1]);
            assert_eq!(tokenizer.encode(text, Prefix::Omit).unwrap(), expected, "{name} {text:?}");
            assert_eq!(tokenizer.decode(&expected), case[2].as_str().unwrap(), "{name} {text:?}");
        }
        for case in cases["decode"].as_array().unwrap() {
            let expected = case[1].as_str().unwrap();
            assert_eq!(tokenizer.decode(&ids(&case[0])), expected, "{name} {}", case[0]);
        }
    }
}

#[test]
fn a_converted_sentencepiece_vocabulary_spells_spaces_and_bytes() {
    let llama2 = golden_tokenizer("llama2");
    assert_eq!(llama2.prefix(), [llama2.bos_id().unwrap()]);
    assert_eq!(llama2.token_bytes(id(&llama2, "\u{2581}")), b" ");
    assert_eq!(llama2.token_bytes(id(&llama2, "<0xFE>")), [0xfe]);
    assert!(llama2.is_special(id(&llama2, "</s>")) && !llama2.is_special(id(&llama2, "<0xFE>")));
    let byte = |byte: u8| id(&llama2, &format!("<0x{byte:02X}>"));
    let ids = [byte(0xe4), byte(0xbd), byte(0xa0), byte(b' '), byte(0xe4), byte(0xbd)];
    assert_eq!(stream(&llama2, &ids), "\u{4f60} \u{fffd}\u{fffd}");
    assert_eq!(stream(&llama2, &ids[3..4]), "", "the space before a text");
}

#[test]
fn special_tokens_stand_for_themselves_and_others_for_bytes_of_a_text() {
    let qwen3 = golden_tokenizer("qwen3");
    assert!(["<|im_end|>", "<think>", "</think>"].iter().all(|piece| qwen3.is_special(id(&qwen3, piece))));
    assert!(!qwen3.is_special(id(&qwen3, "a")) && !qwen3.is_special(id(&qwen3, "<")));
    assert_eq!(qwen3.token_bytes(id(&qwen3, "Ġ")), b" ");
    // Without the files beside the model its own kinds of pieces decide.
    for pangu in [load_pangu(), Tokenizer::load(sentencepiece_dir(&json!({})).path()).unwrap()] {
        assert!(["<unk>", "<s>", "[unused16]", "<hidden>"].iter().all(|piece| pangu.is_special(id(&pangu, piece))));
        assert!(["<0x0A>", "\u{2581}a", "用户"].iter().all(|piece| !pangu.is_special(id(&pangu, piece))));
        assert_eq!(pangu.token_bytes(id(&pangu, "\u{2581}a")), b" a");
        assert_eq!(pangu.token_bytes(id(&pangu, "<0xFE>")), [0xfe]);
        assert!(pangu.token_bytes(TokenId(999)).is_empty());
    }
}

#[test]
fn the_prefix_is_added_once_and_decided_by_ids() {
    let (qwen3, glm4) = (golden_tokenizer("qwen3"), golden_tokenizer("glm4"));
    let with_prefix = |tokenizer: &Tokenizer, text| tokenizer.encode(text, Prefix::Add).unwrap();
    assert_eq!(with_prefix(&qwen3, "a"), qwen3.encode("a", Prefix::Omit).unwrap());
    assert_eq!(with_prefix(&glm4, "a"), with_prefix(&glm4, "[gMASK]<sop>a"));
    assert_eq!(with_prefix(&glm4, ""), ["[gMASK]", "<sop>"].map(|piece| id(&glm4, piece)));
    let half = ["[gMASK]", "<sop>", "[gMASK]"].map(|piece| id(&glm4, piece));
    assert_eq!(with_prefix(&glm4, "[gMASK]"), half);

    let pangu = load_pangu();
    assert_eq!(pangu.prefix(), [TokenId(1)]);
    assert_eq!(with_prefix(&pangu, "<s>a"), with_prefix(&pangu, "a"));
    assert_eq!(pangu.encode("", Prefix::Add).unwrap(), [TokenId(1)]);
    assert_eq!(pangu.encode("", Prefix::Omit).unwrap(), []);
}

#[test]
fn each_run_between_special_tokens_goes_to_sentencepiece_by_itself() {
    let tokenizer = load_pangu();
    let pieces = |text: &str| -> Vec<String> {
        tokenizer.encode(text, Prefix::Omit).unwrap().into_iter().map(|id| tokenizer.piece(id)).collect()
    };
    assert_eq!(
        pieces("[unused9]a[unused10]<s><beyond>b a"),
        ["[unused9]", "\u{2581}a", "[unused10]", "<s>", "<beyond>", "\u{2581}", "b", "\u{2581}a"]
    );
    // A control piece that no file lists is ordinary text.
    assert!(!tokenizer.encode("<hidden>", Prefix::Omit).unwrap().contains(&id(&tokenizer, "<hidden>")));
    for text in ["[unused9]a b[unused10] a", "<beyond>用户<unk>é", " a", "<nowhere>", "[unused16]\u{fffd}[unused17]"]
    {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, Prefix::Omit).unwrap()), text);
    }
}

#[test]
fn a_run_of_ordinary_pieces_decodes_as_sentencepiece_decodes_it() {
    let tokenizer = load_pangu();
    let model = SentencePiece::from_bytes(&sentencepiece_model(true), "tokenizer.model").unwrap();
    let run: Vec<TokenId> =
        [FIRST_PIECE + 2, 3 + 0xe4, 3 + 0xb8, FIRST_PIECE, 3 + 0xff, FIRST_PIECE + 2].map(TokenId).into();
    let special = id(&tokenizer, "[unused9]");
    let ids = [run.as_slice(), &[special], &run].concat();
    let decoded = model.decode(&run);
    assert_eq!(decoded, "a\u{fffd}\u{fffd} \u{fffd} a");
    assert_eq!(tokenizer.decode(&ids), format!("{decoded}[unused9]{decoded}"));
}

#[test]
fn bos_follows_the_flag_of_the_config() {
    for (config, expected) in [
        (json!({}), vec![TokenId(1)]),
        (json!({"add_bos_token": true}), vec![TokenId(1)]),
        (json!({"add_bos_token": false}), vec![]),
        (json!({"bos_token": "[unused9]"}), vec![TokenId(FIRST_PIECE + 8)]),
    ] {
        let tokenizer = Tokenizer::load(sentencepiece_dir(&config).path()).unwrap();
        assert_eq!(tokenizer.prefix(), expected, "{config}");
    }
}

#[test]
fn end_of_sequence_is_the_union_of_all_files() {
    let generation = GenerationDefaults { eos_token_ids: vec![TokenId(5), TokenId(7)], ..Default::default() };
    let tokenizer = load_pangu();
    let unused10 = id(&tokenizer, "[unused10]");
    let expected = [TokenId(7), TokenId(9), TokenId(5), unused10];
    assert_eq!(eos_token_ids(&[7, 9], &generation, Some(&tokenizer)), expected);
    let glm4 = golden_tokenizer("glm4");
    let user = id(&glm4, "<|user|>");
    assert_eq!(eos_token_ids(&[user.0], &GenerationDefaults::default(), Some(&glm4)), [user]);
    let nothing_stated = Tokenizer::load(sentencepiece_dir(&json!({})).path()).unwrap();
    assert_eq!(eos_token_ids(&[], &GenerationDefaults::default(), Some(&nothing_stated)), [TokenId(2)]);
}

#[test]
fn thinking_is_marked_by_single_tokens_where_the_vocabulary_has_them() {
    let (qwen3, glm4) = (golden_tokenizer("qwen3"), golden_tokenizer("glm4"));
    let pangu = load_pangu();
    let expected = Some((id(&qwen3, "<think>"), id(&qwen3, "</think>")));
    assert_eq!(thinking_tokens(&qwen3, Architecture::Qwen3), expected);
    assert_eq!(thinking_tokens(&glm4, Architecture::Glm4), None);
    let expected = Some((id(&pangu, "[unused16]"), id(&pangu, "[unused17]")));
    assert_eq!(thinking_tokens(&pangu, Architecture::PanguProMoe), expected);
}

#[test]
fn a_tokenizer_that_does_not_fit_the_vocabulary_is_refused_by_name() {
    let tokenizer = load_pangu();
    assert_eq!(tokenizer.vocab_size(), 291);
    assert!(tokenizer.check_vocab(291).is_ok());
    assert!(tokenizer.check_vocab(300).is_ok());
    let error = tokenizer.check_vocab(290).unwrap_err().to_string();
    assert!(error.ends_with("token \"<beyond>\" has id 290; allowed: below the model's vocab_size 290"), "{error}");
    let qwen3 = golden_tokenizer("qwen3");
    let error = qwen3.check_vocab(600).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: token \"<|endoftext|>\" has id 600;"), "{error}");
}

#[test]
fn every_id_decodes_and_ids_beyond_the_vocabulary_decode_to_nothing() {
    let (qwen3, glm4) = (golden_tokenizer("qwen3"), golden_tokenizer("glm4"));
    for tokenizer in [qwen3, glm4, golden_tokenizer("llama2"), load_pangu()] {
        for id in (0..tokenizer.vocab_size() as u32 + 9).chain([u32::MAX]).map(TokenId) {
            let text = tokenizer.decode(&[id]);
            assert_eq!(text, stream(&tokenizer, &[id]));
            if id.0 as usize >= tokenizer.vocab_size() {
                assert_eq!((text, tokenizer.piece(id)), (String::new(), String::new()));
            }
        }
    }
}

#[test]
fn a_replacement_character_in_the_text_is_not_held_back() {
    let tokenizer = load_pangu();
    let mut detokenizer = Detokenizer::default();
    let pushed = [0xef, 0xbf, 0xbd, 0xe4, 0xb8].map(|byte| detokenizer.push(&tokenizer, TokenId(3 + byte)));
    assert_eq!(pushed, ["", "", "\u{fffd}", "", ""]);
    assert_eq!(detokenizer.push(&tokenizer, id(&tokenizer, "b")), "\u{fffd}\u{fffd}b");
    assert_eq!(detokenizer.push(&tokenizer, TokenId(3 + 0xf0)), "");
    assert_eq!(detokenizer.finish(&tokenizer), "\u{fffd}");
}

#[test]
fn damaged_and_unsupported_files_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let load_error = || Tokenizer::load(dir.path()).map(drop).unwrap_err().to_string();
    let write = |name: &str, content: &str| std::fs::write(dir.path().join(name), content).unwrap();
    assert!(load_error().ends_with("there is neither tokenizer.json nor tokenizer.model"));

    let good: Value =
        serde_json::from_slice(&std::fs::read(golden_dir("glm4").join("tokenizer.json")).unwrap()).unwrap();
    let changed = |path: &str, value: Value| {
        let mut json = good.clone();
        *json.pointer_mut(path).unwrap() = value;
        json.to_string()
    };
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let mut other_strip: Value =
        serde_json::from_slice(&std::fs::read(golden_dir("llama2").join("tokenizer.json")).unwrap()).unwrap();
    other_strip = other_strip["decoder"].take();
    other_strip["decoders"][3]["stop"] = json!(1);
    let eos_after = json!([{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<sop>", "type_id": 0}}]);
    for (json, message) in [
        ("{".to_owned(), "tokenizer.json: not JSON: "),
        (changed("/model/vocab", json!({"a": 4_000_000_000u32})), "tokenizer.json: "),
        (changed("/model", json!({"type": "BPE", "vocab": 3})), "tokenizer.json: model: not understood: "),
        (changed("/pre_tokenizer", json!({"type": "Other"})), "tokenizer.json: pre_tokenizer: not understood: "),
        (changed("/post_processor", json!(7)), "tokenizer.json: post_processor: not understood: "),
        (changed("/decoder", Value::Null), "decoder: decoder \"none\" is not supported; allowed: \"ByteLevel\", or"),
        (changed("/decoder", metaspace), "decoder: decoder \"Metaspace\" is not supported"),
        (changed("/decoder", other_strip), "decoder: decoder \"Sequence\" is not supported"),
        (changed("/post_processor/processors/1/single", eos_after), "post_processor: it adds tokens after the text"),
    ] {
        write("tokenizer.json", &json);
        let error = load_error();
        assert!(error.contains(message), "{error}");
    }
    write("tokenizer.json", &good.to_string());
    for (config, message) in [
        ("[]", "tokenizer_config.json: not a JSON object: "),
        (r#"{"eos_token": "<none>"}"#, "tokenizer_config.json: eos_token: the vocabulary has no token \"<none>\""),
        (r#"{"eos_token": 3}"#, "eos_token: 3 is neither a string nor an object"),
        (r#"{"add_bos_token": "yes"}"#, "add_bos_token: \"yes\" is neither true nor false"),
        (r#"{"added_tokens_decoder": {"x": {"content": "y"}}}"#, "added_tokens_decoder.x: the key is not a token id"),
        (r#"{"added_tokens_decoder": {"9": {}}}"#, "added_tokens_decoder.9: `content` must be a string"),
        (r#"{"additional_special_tokens": [""]}"#, "additional_special_tokens[0]: a token must not be empty"),
    ] {
        write("tokenizer_config.json", config);
        let error = load_error();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn sentencepiece_settings_that_are_not_supported_are_refused_by_name() {
    for (config, message) in [
        (json!({"add_eos_token": true}), "tokenizer_config.json: add_eos_token: true is not supported"),
        (json!({"added_tokens_decoder": {"9": {"content": "a", "single_word": true}}}), "`single_word`: true"),
        (json!({"added_tokens_decoder": {"4000000000": {"content": "a"}}}), "id 4000000000; allowed: at most"),
    ] {
        let error = Tokenizer::load(sentencepiece_dir(&config).path()).map(drop).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn mutated_tokenizer_files_are_refused_or_work() {
    // A linear congruential generator (Knuth's MMIX): the same mutations every time.
    let mut state = 11u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let fragments = ["0", "9", "-", "\"", "null", "[]", "{}", ",", "}", "4294967295", "\u{fffd}"];
    let mut mutate = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        for _ in 0..=random(3) {
            let at = random(bytes.len());
            match random(4) {
                0 => bytes[at] = random(256) as u8,
                1 => drop(bytes.splice(at..at, fragments[random(fragments.len())].bytes())),
                2 => drop(bytes.drain(at..(at + random(9)).min(bytes.len()))),
                _ => drop(bytes.splice(at..(at + 1), fragments[random(fragments.len())].bytes())),
            }
        }
        bytes
    };
    let good = std::fs::read(golden_dir("glm4").join("tokenizer.json")).unwrap();
    // Most of the file is vocabulary and merges; what stands around them is mutated as often.
    let compact: Value = serde_json::from_slice(&good).unwrap();
    let mut small = compact.clone();
    small["model"]["merges"] = json!([]);
    small["model"]["vocab"] = json!({"a": 0, "b": 1});
    let small = small.to_string().into_bytes();
    let config = pangu_config().to_string().into_bytes();
    for _ in 0..300 {
        for bytes in [mutate(&good), mutate(&small)] {
            if let Ok(bpe) = JsonBpe::from_bytes(&bytes, "tokenizer.json") {
                let ids = bpe.encode("a [gMASK] 文").unwrap_or_default();
                assert!(ids.len() < 99);
            }
        }
        let dir = sentencepiece_dir(&json!({}));
        std::fs::write(dir.path().join("tokenizer_config.json"), mutate(&config)).unwrap();
        if let Ok(tokenizer) = Tokenizer::load(dir.path()) {
            tokenizer.encode("a [unused9] <s>", Prefix::Add).unwrap();
        }
    }
}

/// The tokenizers of the property test, which loads nothing itself: it runs many times.
static TOKENIZERS: LazyLock<[Tokenizer; 4]> = LazyLock::new(|| {
    let (qwen3, glm4) = (golden_tokenizer("qwen3"), golden_tokenizer("glm4"));
    [qwen3, glm4, golden_tokenizer("llama2"), load_pangu()]
});

proptest! {
    #[test]
    fn streamed_pieces_together_equal_the_whole_decode(
        which in 0usize..4,
        parts in prop::collection::vec((0u32..620, "[ a文é😀\u{fffd}]{0,3}", 0usize..3), 0..20),
    ) {
        let tokenizer = &TOKENIZERS[which];
        let mut ids = Vec::new();
        for (id, text, num_cut) in parts {
            // Characters that lose their last byte or two meet whatever follows.
            let mut part = tokenizer.encode(&text, Prefix::Omit).unwrap();
            part.truncate(part.len().saturating_sub(num_cut));
            ids.extend(part);
            ids.push(TokenId(id));
        }
        prop_assert_eq!(stream(tokenizer, &ids), tokenizer.decode(&ids));
    }
}

#[test]
fn text_that_continues_a_prompt_keeps_its_first_space() {
    let tokenizer = load_pangu();
    let word = id(&tokenizer, "\u{2581}a");
    let mut detokenizer = Detokenizer::after(&tokenizer, &[word]);
    assert_eq!(detokenizer.push(&tokenizer, word), " a");
    assert_eq!(Detokenizer::default().push(&tokenizer, word), "a");
    assert_eq!(tokenizer.token_text(word), " a");
}
