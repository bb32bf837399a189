//! Patterns to files.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::error::{DataError, read_error};

/// The files that fit any of the patterns of the source `name`, each once, in the order of their paths. As in a shell, `*`
/// fits no name that begins with a dot.
pub(super) fn list_files(name: &str, patterns: &[PathBuf]) -> Result<Vec<PathBuf>, DataError> {
    let mut files = BTreeSet::new();
    for pattern in patterns {
        let file_name = pattern.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !file_name.contains('*') {
            if !pattern.try_exists().map_err(read_error(pattern))? {
                return Err(DataError::NoFiles { name: name.to_owned(), pattern: pattern.display().to_string() });
            }
            files.insert(pattern.clone());
            continue;
        }
        let dir = match pattern.parent() {
            Some(dir) if dir != Path::new("") => dir,
            _ => Path::new("."),
        };
        let mut is_any = false;
        for entry in fs::read_dir(dir).map_err(read_error(dir))? {
            let entry = entry.map_err(read_error(dir))?.file_name();
            let entry_name = entry.to_string_lossy();
            let is_hidden = entry_name.starts_with('.') && !file_name.starts_with('.');
            if !is_hidden && fits(entry_name.as_bytes(), file_name.as_bytes()) {
                is_any = true;
                files.insert(pattern.with_file_name(entry));
            }
        }
        if !is_any {
            return Err(DataError::NoFiles { name: name.to_owned(), pattern: pattern.display().to_string() });
        }
    }
    Ok(files.into_iter().collect())
}

/// Whether `name` is `pattern` with something, or nothing, in place of each `*`.
fn fits(name: &[u8], pattern: &[u8]) -> bool {
    let (mut n, mut p) = (0, 0);
    // The last `*` and where in the name what it stands for ends. It need never be longer than that of an earlier one.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        if pattern.get(p) == Some(&b'*') {
            star = Some((p, n));
            p += 1;
        } else if pattern.get(p) == Some(&name[n]) {
            (n, p) = (n + 1, p + 1);
        } else if let Some((star_p, star_n)) = star {
            star = Some((star_p, star_n + 1));
            (n, p) = (star_n + 1, star_p + 1);
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything_and_for_nothing() {
        for (name, pattern, expected) in [
            ("a.txt", "*.txt", true),
            (".txt", "*.txt", true),
            ("a.txt.gz", "*.txt", false),
            ("abcbcd", "a*bcd", true),
            ("abcbce", "a*bcd", false),
            ("part-07-of-12.jsonl", "part-*-of-*.jsonl", true),
            ("part-07.jsonl", "part-*-of-*.jsonl", false),
            ("anything", "**", true),
            ("", "", true),
            ("a", "", false),
        ] {
            assert_eq!(fits(name.as_bytes(), pattern.as_bytes()), expected, "{name} {pattern}");
        }
    }

    #[test]
    fn files_come_once_each_in_the_order_of_their_paths_and_hidden_ones_only_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.txt", "a.txt", ".c.txt", "d.md"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let list = |patterns: &[&str]| {
            let patterns: Vec<PathBuf> = patterns.iter().map(|pattern| dir.path().join(pattern)).collect();
            let files = list_files("web", &patterns)?;
            Ok::<_, DataError>(
                files.iter().map(|file| file.file_name().unwrap().to_str().unwrap().to_owned()).collect(),
            )
        };
        let names: Vec<String> = list(&["*.txt", "a.txt", ".*"]).unwrap();
        assert_eq!(names, [".c.txt", "a.txt", "b.txt"]);
        let error = list(&["*.txt", "*.csv"]).unwrap_err().to_string();
        assert!(error.contains("*.csv: there is no such file (files of data.web)"), "{error}");
        let error = list(&["*.txt", "e.txt"]).unwrap_err().to_string();
        assert!(error.contains("e.txt: there is no such file (files of data.web)"), "{error}");
        let error = list(&["absent/*.txt"]).unwrap_err().to_string();
        assert!(error.contains("absent: "), "{error}");
    }
}
