//! The files of a checkpoint, and the index that lists which of them holds which tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::files;

/// Name of a checkpoint that fits in one shard.
pub(crate) const SINGLE_SHARD_NAME: &str = "model.safetensors";

/// Name of the index.
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";

/// File names and the tensors that the index lists for each; `None` without an index.
pub(crate) type Files = BTreeMap<String, Option<BTreeSet<String>>>;

pub(crate) fn list_files(dir: &Path) -> Result<Files, CheckpointError> {
    let index = dir.join(INDEX_NAME);
    if files::is_there(&index) {
        return read_index(&index);
    }
    if !files::is_there(&dir.join(SINGLE_SHARD_NAME)) {
        let mut entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let is_int8 = entries.any(|entry| entry.file_name().to_string_lossy().starts_with("quant_model_weight"));
        let advice = if is_int8 { "; `moge quantize` makes what is there one that runs" } else { "" };
        return Err(CheckpointError::NoWeights { dir: dir.display().to_string(), advice });
    }
    Ok(BTreeMap::from([(SINGLE_SHARD_NAME.to_owned(), None)]))
}

/// Bytes of `files`; a file whose size cannot be read counts as 0, and opening it reports the error.
pub(crate) fn bytes_of(dir: &Path, files: &Files) -> u64 {
    files.keys().map(|file| dir.join(file).metadata().map_or(0, |m| m.len())).sum()
}

pub(crate) fn read_index(path: &Path) -> Result<Files, CheckpointError> {
    let file = path.display().to_string();
    let bad =
        |field: &str, problem: String| CheckpointError::Index { file: file.clone(), field: field.into(), problem };
    let text = files::read_file(path).map_err(|source| CheckpointError::Read { file: file.clone(), source })?;
    let index: Value = serde_json::from_slice(&text).map_err(|e| bad("(whole file)", format!("not JSON: {e}")))?;
    let Some(map) = index.get("weight_map").and_then(Value::as_object) else {
        return Err(bad("weight_map", "missing, or not an object of tensor name to file name".to_owned()));
    };
    let mut files = Files::new();
    for (name, shard) in map {
        let plain = shard.as_str().filter(|s| !s.is_empty() && !s.contains(['/', '\\', '\0']) && !s.starts_with('.'));
        let Some(shard) = plain else {
            return Err(bad(name, format!("{shard} is not a plain file name")));
        };
        files.entry(shard.to_owned()).or_default().get_or_insert_default().insert(name.clone());
    }
    let dir = path.parent().unwrap_or(Path::new("."));
    for (shard, listed) in &files {
        if !dir.join(shard).is_file() {
            let first = listed.iter().flatten().next().map_or("", String::as_str);
            return Err(bad(first, format!("names {shard}, which is not in {}", dir.display())));
        }
    }
    if files.is_empty() {
        return Err(bad("weight_map", "is empty".to_owned()));
    }
    Ok(files)
}
