use super::*;

/// A model of these pieces after `<unk>` (id 0), or after that and the byte pieces (ids 1 to 256), that leaves text as
/// it is.
fn model_with(pieces: &[(&str, f32, PieceKind)], byte_fallback: bool) -> ModelProto {
    let mut model = ModelProto::default();
    model.trainer_spec.byte_fallback = byte_fallback;
    model.normalizer_spec.add_dummy_prefix = false;
    model.normalizer_spec.remove_extra_whitespaces = false;
    let mut add = |piece: &str, score, kind| model.pieces.push(Piece { piece: piece.to_owned(), score, kind });
    add("<unk>", 0.0, PieceKind::Unknown);
    if byte_fallback {
        (0..=u8::MAX).for_each(|byte| add(&format!("<0x{byte:02X}>"), 0.0, PieceKind::Byte(byte)));
    }
    pieces.iter().for_each(|&(piece, score, kind)| add(piece, score, kind));
    model
}

fn load(model: &ModelProto) -> Result<SentencePiece, SentencePieceError> {
    SentencePiece::from_bytes(&model.to_bytes(), "tokenizer.model")
}

/// The pieces that `text` becomes.
fn encode(model: &ModelProto, text: &str) -> Vec<String> {
    let model = load(model).unwrap();
    model.encode(text).iter().map(|&id| model.piece(id).unwrap().to_owned()).collect()
}

#[test]
fn a_written_model_reads_as_it_was() {
    let mut model = model_with(&[("ab", -1.5, PieceKind::Normal), ("<s>", 0.0, PieceKind::Control)], true);
    model.pieces.push(Piece { piece: "语言".to_owned(), score: f32::MIN, kind: PieceKind::UserDefined });
    model.pieces.push(Piece { piece: "x".repeat(7999), score: 3.0, kind: PieceKind::Unused });
    model.trainer_spec.treat_whitespace_as_suffix = true;
    model.trainer_spec.unk_surface = "?".to_owned();
    model.trainer_spec.pad_piece = "ab".to_owned();
    model.normalizer_spec.name = "identity".to_owned();
    model.normalizer_spec.escape_whitespaces = false;
    assert_eq!(ModelProto::from_bytes(&model.to_bytes(), "tokenizer.model"), Ok(model));
}

#[test]
fn fields_that_a_message_leaves_out_have_the_values_of_the_format() {
    // pieces: one with only a name; trainer_spec: only model_type bpe.
    let bytes = [&[0x0a, 3, 0x0a, 1, b'a'][..], &[0x12, 2, 0x18, 2]].concat();
    let mut expected = ModelProto::default();
    expected.pieces.push(Piece { piece: "a".to_owned(), score: 0.0, kind: PieceKind::Normal });
    assert_eq!(ModelProto::from_bytes(&bytes, "tokenizer.model"), Ok(expected));
}

#[test]
fn special_ids_are_found_by_name_and_kind() {
    let mut model = model_with(&[("[eos]", 0.0, PieceKind::Control), ("<s>", 0.0, PieceKind::Normal)], false);
    model.trainer_spec.eos_piece = "[eos]".to_owned();
    let model = load(&model).unwrap();
    assert_eq!(model.unk_id(), Some(TokenId(0)));
    assert_eq!((model.bos_id(), model.eos_id(), model.pad_id()), (None, Some(TokenId(1)), None));
    assert_eq!(model.id_of("<s>"), Some(TokenId(2)));
    assert_eq!((model.vocab_size(), model.piece(TokenId(3)), model.kind(TokenId(3))), (3, None, None));
}

#[test]
fn of_equal_merges_the_leftmost_comes_first() {
    let pieces = [("a", -5.0, PieceKind::Normal), ("b", -5.0, PieceKind::Normal)];
    let merges = [("ab", -1.0, PieceKind::Normal), ("ba", -1.0, PieceKind::Normal)];
    let model = model_with(&[pieces, merges].concat(), false);
    assert_eq!(encode(&model, "abab"), ["ab", "ab"]);
    assert_eq!(encode(&model, "babab"), ["ba", "ba", "b"]);
}

#[test]
fn an_unused_piece_that_was_not_merged_is_unknown() {
    let pieces = [("a", -5.0, PieceKind::Unused), ("b", -6.0, PieceKind::Normal), ("ab", -1.0, PieceKind::Unused)];
    assert_eq!(encode(&model_with(&pieces, false), "abba"), ["<unk>", "b", "b", "<unk>"]);
    assert_eq!(encode(&model_with(&pieces, true), "abba"), ["<0x61>", "b", "b", "<0x61>"]);
}

#[test]
fn unused_pieces_are_taken_apart_a_hundred_deep_as_in_the_library() {
    let names: Vec<String> = (1..=300).map(|len| "a".repeat(len)).collect();
    let kind_of = |len| if len == 1 { PieceKind::Normal } else { PieceKind::Unused };
    let pieces: Vec<_> = names.iter().map(|name| (name.as_str(), name.len() as f32, kind_of(name.len()))).collect();
    let encoded = encode(&model_with(&pieces, false), &"a".repeat(300));
    let lens: Vec<usize> = encoded.iter().map(String::len).collect();
    assert_eq!(lens, [&[199][..], &[1; 101]].concat());
}

#[test]
fn text_does_not_become_control_or_byte_pieces() {
    let pieces = [("x", 0.0, PieceKind::Control), ("y", 0.0, PieceKind::Normal), ("0x", 0.0, PieceKind::Normal)];
    assert_eq!(encode(&model_with(&pieces, false), "xyx"), ["<unk>", "y", "<unk>"]);
    assert_eq!(encode(&model_with(&pieces, true), "xyx"), ["<0x78>", "y", "<0x78>"]);
    assert_eq!(encode(&model_with(&pieces, true), "<0x79>")[1..], ["0x", "<0x37>", "<0x39>", "<0x3E>"]);
}

#[test]
fn a_piece_of_one_nul_is_unused_beside_byte_pieces_and_refused_without() {
    let pieces = [("\0", 0.0, PieceKind::Normal), ("y", 0.0, PieceKind::Normal)];
    assert_eq!(encode(&model_with(&pieces, true), "\0y"), ["<0x00>", "y"]);
    let error = load(&model_with(&pieces, false)).unwrap_err();
    assert_eq!(error.to_string(), r#"tokenizer.model: pieces[1].piece: found "\0"; allowed: no NUL character"#);
}

#[test]
fn an_id_past_the_vocabulary_stands_for_nothing() {
    let model = load(&model_with(&[("y", 0.0, PieceKind::Normal)], false)).unwrap();
    assert_eq!(model.decode(&[TokenId(1), TokenId(2), TokenId(u32::MAX), TokenId(1)]), "yy");
}

#[test]
fn a_piece_between_the_bytes_of_a_character_tears_it_apart() {
    let model = load(&model_with(&[("<s>", 0.0, PieceKind::Control)], true)).unwrap();
    let [first, second] = [0xc7, 0x93].map(|byte: u32| TokenId(1 + byte));
    assert_eq!(model.decode(&[first, second]), "Ǔ");
    let torn = [first, TokenId(257), second];
    assert_eq!(model.decode(&torn), "\u{fffd}\u{fffd}");
    assert_eq!(model.decode_bytes(&torn), [0xc7, 0x93]);
}

/// A megabyte takes a quarter of a second in a release build; quadratic work would take hours.
#[test]
fn a_megabyte_without_spaces_encodes_in_bounded_time() {
    let names: Vec<String> = (0..12).map(|power| "a".repeat(1 << power)).collect();
    let pieces: Vec<_> = names.iter().map(|name| (name.as_str(), -(name.len() as f32), PieceKind::Normal)).collect();
    let model = load(&model_with(&pieces, false)).unwrap();
    let begin = std::time::Instant::now();
    assert_eq!(model.encode(&"a".repeat(1 << 20)).len(), 1 << 9);
    assert!(begin.elapsed().as_secs() < 60, "{:?}", begin.elapsed());
}

#[test]
fn contradictory_models_are_refused_by_name() {
    let normal = |name| (name, 0.0, PieceKind::Normal);
    let byte = ("<0x41>", 0.0, PieceKind::Byte(0x41));
    let unknown = ("<unk2>", 0.0, PieceKind::Unknown);
    let without = |kind: PieceKind, byte_fallback| {
        let mut model = model_with(&[normal("y")], byte_fallback);
        model.pieces.retain(|piece| piece.kind != kind);
        model
    };
    let long = "x".repeat(8000);
    let cases = [
        (model_with(&[normal("")], false), "pieces[1].piece: found an empty text; allowed: at least one character"),
        (model_with(&[normal(&long)], false), "pieces[1].piece: found 8000 bytes; allowed: at most 7999"),
        (model_with(&[normal("a\0")], true), r#"pieces[257].piece: found "a\0"; allowed: no NUL character"#),
        (model_with(&[("y", f32::NAN, PieceKind::Normal)], false), "pieces[1].score: found NaN; allowed: a number"),
        (
            model_with(&[normal("y"), ("y", 0.0, PieceKind::Control)], false),
            r#"pieces[2]: found "y" a second time; allowed: each piece once"#,
        ),
        (model_with(&[unknown], false), "pieces[1]: found a second unknown piece; allowed: one unknown piece"),
        (
            model_with(&[byte], false),
            r#"pieces[1]: found byte piece "<0x41>"; allowed: none, as trainer_spec.byte_fallback is false"#,
        ),
        (
            without(PieceKind::Byte(0x41), true),
            "pieces: found no piece <0x41>; allowed: all 256 byte pieces, as trainer_spec.byte_fallback is true",
        ),
        (
            without(PieceKind::Unknown, false),
            "pieces: found no unknown piece; allowed: one unknown piece, or byte pieces",
        ),
    ];
    for (model, expected) in cases {
        assert_eq!(load(&model).unwrap_err().to_string(), format!("tokenizer.model: {expected}"));
    }
    assert!(load(&without(PieceKind::Unknown, true)).is_ok(), "byte pieces spell everything");
}

#[test]
fn what_we_do_not_do_and_broken_messages_are_refused_by_name() {
    // Each case follows a valid model, so that its fields override that model's.
    let cases: [(&[u8], &str); 14] = [
        (&[0x12, 2, 0x18, 1], "trainer_spec.model_type: found unigram (1); allowed: bpe (2)"),
        (&[0x12, 2, 0x18, 3], "trainer_spec.model_type: found word (3); allowed: bpe (2)"),
        (&[0x12, 2, 0x18, 4], "trainer_spec.model_type: found char (4); allowed: bpe (2)"),
        (&[0x12, 2, 0x18, 9], "trainer_spec.model_type: found 9; allowed: bpe (2)"),
        (&[0x2a, 3, 0x12, 1, 0], "denormalizer_spec.precompiled_charsmap: found 1 bytes of rules; allowed: none"),
        (&[0x0a, 2, 0x18, 7], "pieces[1].type: found 7; allowed: 1 to 6"),
        (&[0x0a, 5, 0x0a, 1, b'a', 0x18, 6], "pieces[1].piece: found byte piece \"a\"; allowed: <0x00> to <0xFF>"),
        (
            &[0x0a, 3, 0x0a, 1, 0xff],
            "pieces[1].piece: found invalid utf-8 sequence of 1 bytes from index 0; allowed: UTF-8",
        ),
        (&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x7f], "length: found 34359738367; allowed: at most the 0 bytes left"),
        (&[0x0a, 3, 0x0a, 9, b'a'], "pieces[1].length: found 9; allowed: at most the 1 bytes left"),
        (&[0x0a, 2, 0x10, 1], "pieces[1].score: found a varint; allowed: four bytes"),
        (&[0x08, 1], "pieces[1].piece: found a varint; allowed: a length-delimited value"),
        (&[0x0b], "wire type: found 3; allowed: 0, 1, 2 or 5"),
        (&[0xff; 11], "varint: found more than ten bytes; allowed: at most ten bytes"),
    ];
    for (suffix, expected) in cases {
        let bytes = [&model_with(&[], false).to_bytes(), suffix].concat();
        let error = SentencePiece::from_bytes(&bytes, "tokenizer.model").unwrap_err();
        assert_eq!(error.to_string(), format!("tokenizer.model: {expected}"));
    }
    let error = SentencePiece::from_bytes(&[], "tokenizer.model").unwrap_err();
    assert_eq!(
        error.to_string(),
        "tokenizer.model: trainer_spec.model_type: found unigram (the default); allowed: bpe (2)"
    );
}

#[test]
fn fields_that_nobody_knows_are_skipped() {
    let model = model_with(&[("y", 0.0, PieceKind::Normal)], false);
    // Field 200 as varint, eight bytes, a string, and four bytes.
    let unknown = [
        &[0xc0, 0x0c, 0x96, 1][..],
        &[0xc1, 0x0c, 1, 2, 3, 4, 5, 6, 7, 8],
        &[0xc2, 0x0c, 1, b'x'],
        &[0xc5, 0x0c, 1, 2, 3, 4],
    ];
    let bytes = [&unknown.concat(), &model.to_bytes()[..], &unknown.concat()].concat();
    assert_eq!(ModelProto::from_bytes(&bytes, "tokenizer.model"), Ok(model));
}
