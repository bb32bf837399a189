use std::fs;
use std::ops::ControlFlow;

use safetensors::tensor::TensorView;

use super::super::DataProgress;
use super::super::token_writer::TokenWriter;
use super::*;

/// A tensor: type, shape, bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

fn write(path: &Path, tensors: &[(&str, Stored)]) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn u16s(numbers: &[u16]) -> Stored {
    (Dtype::U16, vec![numbers.len()], numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
}

fn u32s(numbers: &[u32]) -> Stored {
    (Dtype::U32, vec![numbers.len()], numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
}

fn i64s(numbers: &[i64]) -> Stored {
    (Dtype::I64, vec![numbers.len()], numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
}

fn check(file: &TokenFile) -> Result<Contents, DataError> {
    let now = DataProgress { source: "web", done_bytes: 0, total_bytes: file.num_bytes() };
    let mut watch = Watch { progress: &mut |_| ControlFlow::Continue(()), now, reported_bytes: 0 };
    file.check(&mut watch)
}

fn documents(file: &TokenFile) -> Vec<Vec<u32>> {
    let read = |index| {
        let mut tokens = Vec::new();
        file.read(file.document(index).unwrap(), &mut tokens).unwrap();
        tokens
    };
    (0..file.num_documents()).map(read).collect()
}

#[test]
fn what_is_written_is_read_again_in_both_sizes_of_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.safetensors");
    for (vocab_size, token_bytes) in [(1 << 16, 2), ((1 << 16) + 1, 4)] {
        let expected = vec![vec![3, vocab_size - 1, 5], vec![], vec![65535], vec![], vec![7; 300_001]];
        let mut writer = TokenWriter::create(&path, vocab_size as usize).unwrap();
        for document in &expected {
            for part in document.chunks(2) {
                writer.push(part).unwrap();
            }
            writer.end_document().unwrap();
        }
        let contents = writer.finish(&[("about", "tokens".to_owned())]).unwrap();
        let file = TokenFile::open(&path, vocab_size as usize).unwrap();
        assert_eq!(file.token_bytes, token_bytes);
        assert_eq!((contents.num_documents, contents.num_tokens), (5, 300_005));
        assert_eq!(check(&file).unwrap(), contents);
        assert_eq!(documents(&file), expected);
        assert_eq!((file.about("about"), file.about("absent")), (Some("tokens"), None));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "temporary files are left");
}

#[test]
fn files_of_other_programs_are_read_with_their_tensors_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens.safetensors");
    let contents = |tokens: Stored| {
        write(&path, &[("a", u16s(&[1, 2, 3])), (DOCUMENT_OFFSETS, i64s(&[0, 2, 2, 5])), (TOKENS, tokens)]);
        let file = TokenFile::open(&path, 10).unwrap();
        assert_eq!(documents(&file), [vec![9, 1], vec![], vec![2, 3, 4]]);
        check(&file).unwrap()
    };
    // The type in which they are stored makes no other data of them.
    assert_eq!(contents(u16s(&[9, 1, 2, 3, 4])), contents(u32s(&[9, 1, 2, 3, 4])));
}

#[test]
fn a_file_torn_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens.safetensors");
    write(&path, &[(TOKENS, u16s(&[1, 2, 3])), (DOCUMENT_OFFSETS, i64s(&[0, 3]))]);
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let error = TokenFile::open(&path, 10).unwrap_err().to_string();
        assert!(error.contains("tokens.safetensors: not a valid token file: "), "{length} bytes: {error}");
    }
    fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
    let error = TokenFile::open(&path, 10).unwrap_err().to_string();
    assert!(error.contains("its header describes 22 bytes of data, it has 23"), "{error}");
    fs::write(&path, [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat()).unwrap();
    let error = TokenFile::open(&path, 10).unwrap_err().to_string();
    assert!(error.contains("it states a header of 18446744073709551615 bytes"), "{error}");
}

#[test]
fn headers_of_other_tensors_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens.safetensors");
    let offsets = || i64s(&[0, 3]);
    let bytes = |dtype: Dtype, shape: &[usize]| {
        (dtype, shape.to_vec(), vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8])
    };
    for (tokens, offsets, message) in [
        (bytes(Dtype::I64, &[3]), offsets(), "tokens is I64 [3]; allowed: U16 or U32 [num_tokens]"),
        (bytes(Dtype::F32, &[3]), offsets(), "tokens is F32 [3]"),
        (bytes(Dtype::U16, &[3, 1]), offsets(), "tokens is U16 [3, 1]"),
        (bytes(Dtype::U16, &[]), offsets(), "tokens is U16 []"),
        (bytes(Dtype::U16, &[3]), bytes(Dtype::U32, &[2]), "document_offsets is U32 [2]; allowed: U64 or I64"),
        (bytes(Dtype::U16, &[3]), bytes(Dtype::U64, &[2, 1]), "document_offsets is U64 [2, 1]"),
        (bytes(Dtype::U16, &[3]), bytes(Dtype::U64, &[0]), "document_offsets is U64 [0]"),
    ] {
        write(&path, &[(TOKENS, tokens), (DOCUMENT_OFFSETS, offsets)]);
        let error = TokenFile::open(&path, 10).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    write(&path, &[(TOKENS, u16s(&[1]))]);
    let error = TokenFile::open(&path, 10).unwrap_err().to_string();
    assert!(error.contains("there is no tensor document_offsets"), "{error}");
    let error = TokenFile::open(dir.path(), 10).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
}

#[test]
fn offsets_that_fall_or_lead_elsewhere_and_tokens_out_of_range_are_refused_with_their_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens.safetensors");
    for (offsets, message) in [
        (&[0, 3, 2, 4][..], "document_offsets[2] is 2; allowed: 3 to 4"),
        (&[0, 5, 4], "document_offsets[1] is 5; allowed: 0 to 4"),
        (&[0, -1, 4], "document_offsets[1] is -1; allowed: 0 to 4"),
        (&[1, 2, 4], "document_offsets[0] is 1; allowed: 0"),
        (&[0, 3], "document_offsets[1] is 3; allowed: 4, the number of tokens"),
        (&[0], "document_offsets[0] is 0; allowed: 4, the number of tokens"),
    ] {
        write(&path, &[(TOKENS, u16s(&[1, 2, 3, 4])), (DOCUMENT_OFFSETS, i64s(offsets))]);
        let error = check(&TokenFile::open(&path, 10).unwrap()).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    // Nothing checks a file again that has changed: reading it must do.
    write(&path, &[(TOKENS, u16s(&[1, 2, 3, 4])), (DOCUMENT_OFFSETS, i64s(&[0, 3, 1, 4]))]);
    assert!(TokenFile::open(&path, 10).unwrap().document(1).is_err());
    write(&path, &[(TOKENS, u32s(&[1, 2, 300, 4])), (DOCUMENT_OFFSETS, i64s(&[0, 4]))]);
    let file = TokenFile::open(&path, 300).unwrap();
    let message = "tokens.safetensors: tokens[2] is 300; allowed: below the model's vocab_size 300";
    assert!(check(&file).unwrap_err().to_string().ends_with(message));
    assert!(file.read(1..3, &mut Vec::new()).unwrap_err().to_string().ends_with(message));
    assert!(file.read(400..500, &mut Vec::new()).is_err());
}

#[test]
fn a_writer_that_is_dropped_or_cannot_write_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.safetensors");
    let mut writer = TokenWriter::create(&path, 10).unwrap();
    writer.push(&[1, 2]).unwrap();
    drop(writer);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    // A directory that is not empty stands where the file should be.
    fs::create_dir_all(path.join("full")).unwrap();
    let error = TokenWriter::create(&path, 10).unwrap().finish(&[]).unwrap_err().to_string();
    assert!(error.contains("web.safetensors: "), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let error = TokenWriter::create(&dir.path().join("absent/web.safetensors"), 10).err().unwrap().to_string();
    assert!(error.contains("absent"), "{error}");
}
