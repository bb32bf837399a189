use super::*;
use crate::checkpoint::shards::LINE_BYTES;
use safetensors::Dtype;
use safetensors::SafeTensors;
use std::io;

fn planned(name: &str, dtype: Dtype, shape: &[usize]) -> PlannedTensor {
    PlannedTensor { name: name.to_string(), dtype, shape: shape.to_vec() }
}

/// Eight tensors of all the types in use; one is empty, one is three cache lines, and the names are not in order.
fn plan() -> Vec<PlannedTensor> {
    vec![
        planned("layers.1.w", Dtype::BF16, &[3, 5]),
        planned("layers.0.q", Dtype::I8, &[7]),
        planned("layers.0.scale", Dtype::F32, &[2]),
        planned("layers.0.packed", Dtype::U8, &[13]),
        planned("layers.0.bias", Dtype::I32, &[4]),
        planned("empty", Dtype::F16, &[0, 6]),
        planned("norm", Dtype::F16, &[11]),
        planned("lines", Dtype::U8, &[2, 96]),
    ]
}

/// Data that names its tensor, so that a swap shows.
fn data_of(tensor: &PlannedTensor) -> Vec<u8> {
    let seed = tensor.name.bytes().map(usize::from).sum::<usize>();
    (0..num_bytes(tensor) as usize).map(|i| (seed + 31 * i) as u8).collect()
}

fn write_all(dir: &Path, max_shard_bytes: u64, piece: usize) {
    let mut writer = CheckpointWriter::create(dir, plan(), max_shard_bytes).unwrap();
    let tensors = writer.tensors().to_vec();
    for data in tensors.iter().map(data_of) {
        data.chunks(piece).for_each(|bytes| writer.append(bytes).unwrap());
    }
    writer.finish().unwrap();
}

fn file_names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn one_shard_reads_back_with_every_type_aligned() {
    let dir = tempfile::tempdir().unwrap();
    write_all(dir.path(), DEFAULT_MAX_SHARD_BYTES, 4);
    assert_eq!(file_names(dir.path()), [SINGLE_SHARD_NAME]);
    let bytes = fs::read(dir.path().join(SINGLE_SHARD_NAME)).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.len(), plan().len());
    for tensor in plan() {
        let view = read.tensor(&tensor.name).unwrap();
        assert_eq!((view.dtype(), view.shape()), (tensor.dtype, &tensor.shape[..]));
        assert_eq!(view.data(), data_of(&tensor), "{}", tensor.name);
        let offset = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert!(offset.is_multiple_of(tensor.dtype.bitsize() / 8), "{} at {offset}", tensor.name);
        let is_whole_lines = num_bytes(&tensor).is_multiple_of(LINE_BYTES);
        assert!(!is_whole_lines || offset.is_multiple_of(64), "{} at {offset}", tensor.name);
    }
}

#[test]
fn shards_split_by_name_and_the_index_names_every_tensor() {
    let dir = tempfile::tempdir().unwrap();
    write_all(dir.path(), 200, 1000);
    let index: serde_json::Value = serde_json::from_slice(&fs::read(dir.path().join(INDEX_NAME)).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 7 + 8 + 13 + 16 + 22 + 30 + 192);
    let weight_map = index["weight_map"].as_object().unwrap();
    let names: Vec<&str> = weight_map.keys().map(String::as_str).collect();
    assert!(names.is_sorted() && names.len() == plan().len(), "{names:?}");
    let shards: Vec<&str> = weight_map.values().map(|name| name.as_str().unwrap()).collect();
    assert!(shards.is_sorted(), "consecutive names share a shard: {shards:?}");
    for tensor in plan() {
        let bytes = fs::read(dir.path().join(weight_map[&tensor.name].as_str().unwrap())).unwrap();
        let read = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.tensor(&tensor.name).unwrap().data(), data_of(&tensor));
        assert!(read.iter().map(|(_, view)| view.data().len()).sum::<usize>() <= 200);
    }
    let num_shards = file_names(dir.path()).len() - 1;
    assert_eq!(shards[0], format!("model-00001-of-{num_shards:05}.safetensors"));
}

#[test]
fn a_tensor_larger_than_a_shard_has_its_own() {
    let dir = tempfile::tempdir().unwrap();
    write_all(dir.path(), 1, 9);
    // Every tensor is larger than one byte; the empty one rides along with the next.
    assert_eq!(file_names(dir.path()).len(), plan().len() + 1);
}

#[test]
fn an_interrupted_write_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = CheckpointWriter::create(dir.path(), plan(), 30).unwrap();
    for data in writer.tensors().to_vec()[..5].iter().map(data_of) {
        writer.append(&data).unwrap();
    }
    assert!(file_names(dir.path()).iter().all(|name| name.ends_with(".partial")));
    drop(writer);
    assert!(file_names(dir.path()).is_empty());
}

#[test]
fn existing_files_are_refused_by_name_and_kept() {
    for name in [SINGLE_SHARD_NAME, INDEX_NAME] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(name), "mine").unwrap();
        let error = CheckpointWriter::create(dir.path(), plan(), 1000).unwrap_err();
        assert!(matches!(&error, WriteError::TargetExists { path } if path.ends_with(name)), "{error}");
        assert_eq!(fs::read(dir.path().join(name)).unwrap(), b"mine");
    }
}

#[test]
fn the_temporary_file_of_another_writer_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let _first = CheckpointWriter::create(dir.path(), plan(), 1000).unwrap();
    let error = CheckpointWriter::create(dir.path(), plan(), 1000).unwrap_err();
    assert!(matches!(error, WriteError::TargetExists { .. }), "{error}");
    assert_eq!(file_names(dir.path()).len(), 1);
}

#[test]
fn file_system_errors_are_told_apart_and_name_the_path() {
    let path = Path::new("/checkpoint/model.safetensors");
    let full = io_error(path, io::ErrorKind::StorageFull.into());
    assert_eq!(full.to_string(), "/checkpoint/model.safetensors: the disk is full");
    let denied = io_error(path, io::ErrorKind::PermissionDenied.into());
    assert!(matches!(denied, WriteError::NotWritable { .. }), "{denied}");
    let missing = CheckpointWriter::create(Path::new("/no/such/directory"), plan(), 1000).unwrap_err();
    assert!(missing.to_string().starts_with("/no/such/directory"), "{missing}");
}

#[test]
fn a_plan_that_cannot_be_written_is_refused_by_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let twice = vec![planned("a", Dtype::U8, &[3]), planned("a", Dtype::U8, &[2])];
    let huge = vec![planned("b", Dtype::F32, &[usize::MAX, 5])];
    let half_bytes = vec![planned("c", Dtype::F4, &[4])];
    for (plan, name) in [(twice, "a"), (huge, "b"), (half_bytes, "c")] {
        let error = CheckpointWriter::create(dir.path(), plan, 1000).unwrap_err();
        assert!(matches!(&error, WriteError::Plan { name: found, .. } if found == name), "{error}");
    }
    assert!(file_names(dir.path()).is_empty());
}

#[test]
#[should_panic(expected = "bytes given")]
fn data_past_the_end_of_a_tensor_panics() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = CheckpointWriter::create(dir.path(), vec![planned("a", Dtype::F32, &[3])], 1000).unwrap();
    let _ = writer.append(&[0; 13]);
}

/// Append the data of the tensors from `first` on; stop after `num_bytes`, as a kill would.
fn append_from(writer: &mut CheckpointWriter, first: usize, mut num_bytes: usize) {
    for data in writer.tensors().to_vec()[first..].iter().map(data_of) {
        let part = &data[..data.len().min(num_bytes)];
        if !part.is_empty() {
            writer.append(part).unwrap();
        }
        num_bytes -= part.len();
    }
}

#[test]
fn a_writer_that_stops_anywhere_is_resumed_to_the_same_files() {
    let whole = tempfile::tempdir().unwrap();
    write_all(whole.path(), 60, 1000);
    let total = plan().iter().map(num_bytes).sum::<u64>() as usize;
    for stop in (0..=total).step_by(7) {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = CheckpointWriter::resume(dir.path(), plan(), 60, 0).unwrap();
        append_from(&mut writer, 0, stop);
        writer.sync().unwrap();
        // The journal may know of fewer tensors than are there.
        let num_complete = writer.current_tensor - usize::from(stop % 2 == 1 && writer.current_tensor > 0);
        drop(writer);
        let mut writer = CheckpointWriter::resume(dir.path(), plan(), 60, num_complete).unwrap();
        append_from(&mut writer, num_complete, usize::MAX);
        writer.finish().unwrap();
        assert_eq!(file_names(dir.path()), file_names(whole.path()));
        for name in file_names(dir.path()) {
            assert_eq!(fs::read(dir.path().join(&name)).unwrap(), fs::read(whole.path().join(&name)).unwrap());
        }
    }
}

#[test]
fn a_writer_that_stops_while_it_names_its_files_is_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = CheckpointWriter::resume(dir.path(), plan(), 60, 0).unwrap();
    append_from(&mut writer, 0, usize::MAX);
    let first = writer.final_path(0);
    fs::rename(writer.temporary_path(0), &first).unwrap();
    fs::write(temporary_path(&dir.path().join(INDEX_NAME)), "{").unwrap();
    drop(writer);
    CheckpointWriter::resume(dir.path(), plan(), 60, plan().len()).unwrap().finish().unwrap();
    assert!(file_names(dir.path()).iter().all(|name| !name.ends_with(".partial")));
}

#[test]
fn files_that_are_not_as_they_were_left_are_not_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = CheckpointWriter::resume(dir.path(), plan(), 250, 0).unwrap();
    append_from(&mut writer, 0, 74 + 200);
    let (num_complete, path) = (writer.current_tensor, writer.temporary_path(writer.num_opened - 1));
    let whole = writer.temporary_path(0);
    drop(writer);
    let refused = |problem: &str| {
        let error = CheckpointWriter::resume(dir.path(), plan(), 250, num_complete).unwrap_err().to_string();
        assert!(error.contains(problem) && error.contains(".partial"), "{error}");
    };
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
    refused("were written");
    fs::write(&path, [b"other", &bytes[5..]].concat()).unwrap();
    refused("other tensors");
    fs::write(&path, bytes).unwrap();
    fs::write(&whole, "short").unwrap();
    refused("were written");
    fs::remove_file(&whole).unwrap();
    let error = CheckpointWriter::resume(dir.path(), plan(), 250, num_complete).unwrap_err();
    assert!(matches!(&error, WriteError::Damaged { problem, .. } if problem == "it is missing"), "{error}");
}
