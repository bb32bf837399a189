//! Rules of the repository that the compiler does not check. Each test is one rule, and what it prints says where the
//! rule is broken and what to do.
// The helpers are tests too, which the lint does not see.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Which of our crates a crate may import, in its code and in its tests alike; the binary, `moge`, may import any. A
/// crate that is not here has no place yet: add it when it is born, with the reason in the commit.
const ARROWS: [(&str, &[&str]); 9] = [
    ("moge-kernels", &[]),
    ("moge-dist", &[]),
    ("moge-model", &["moge-kernels", "moge-dist"]),
    ("moge-engine", &["moge-model", "moge-kernels"]),
    ("moge-server", &["moge-engine", "moge-model"]),
    ("moge-quant", &["moge-model", "moge-kernels"]),
    ("moge-train", &["moge-engine", "moge-model", "moge-kernels", "moge-dist"]),
    ("moge-plan", &["moge-engine", "moge-model"]),
    ("xtask", &[]),
];

/// The files and folders where `unsafe` may stand: SIMD and threads, the memory map, the loaded MPI library.
const UNSAFE_PLACES: [&str; 3] =
    ["crates/moge-kernels/", "crates/moge-model/src/checkpoint/storage.rs", "crates/moge-dist/src/mpi_abi.rs"];

const MAX_SOURCE_LINES: usize = 800;
const MAX_ARCHITECTURE_LINES: usize = 200;

#[test]
fn a_crate_imports_only_the_crates_it_may() {
    let mut broken = Vec::new();
    for package in workspace_packages().iter().filter(|package| package.name != "moge") {
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == package.name) else {
            broken.push(format!("{}:1: say in ARROWS of tidy.rs what `{}` may import", package.manifest, package.name));
            continue;
        };
        for dependency in &package.dependencies {
            if ARROWS.iter().any(|(name, _)| name == dependency) && !allowed.contains(&dependency.as_str()) {
                let line = line_that(&read(&package.manifest), |line| line.starts_with(dependency.as_str()));
                broken.push(format!(
                    "{}:{line}: `{}` must not import `{dependency}` (it may import {allowed:?}); move the code to where both may use it",
                    package.manifest, package.name
                ));
            }
        }
    }
    assert_holds(&broken);
}

#[test]
fn unsafe_code_stands_only_where_it_may() {
    let mut broken = Vec::new();
    for path in files_ending_in(".rs") {
        if UNSAFE_PLACES.iter().any(|place| path.starts_with(place)) {
            continue;
        }
        for (index, line) in code_only(&read(&path)).lines().enumerate() {
            // `unsafe_code` is the lint: to allow it is the first step.
            if words(line).any(|word| word == "unsafe" || word == "unsafe_code") {
                broken.push(format!(
                    "{path}:{}: `unsafe` may stand only in {UNSAFE_PLACES:?}; offer a safe function there",
                    index + 1
                ));
            }
        }
    }
    assert_holds(&broken);
}

#[test]
fn a_source_file_has_at_most_800_lines_without_its_tests() {
    let mut broken = Vec::new();
    for path in files_ending_in(".rs").iter().filter(|path| !is_test_file(path)) {
        let num_lines = num_lines_without_tests(&read(path));
        if num_lines > MAX_SOURCE_LINES {
            broken.push(format!(
                "{path}:{MAX_SOURCE_LINES}: {num_lines} lines without tests, at most {MAX_SOURCE_LINES}; split the file by what its parts do"
            ));
        }
    }
    assert_holds(&broken);
}

#[test]
fn nothing_is_left_to_do_or_to_debug_in_the_sources() {
    let mut broken = Vec::new();
    for path in files_ending_in(".rs").iter().filter(|path| path.contains("src/")) {
        for (index, line) in code_only(&read(path)).lines().enumerate() {
            for leftover in ["todo", "unimplemented", "dbg"] {
                if line.contains(&format!("{leftover}!")) && words(line).any(|word| word == leftover) {
                    broken.push(format!(
                        "{path}:{}: finish what `{leftover}!` stands for, or refuse it with a typed error",
                        index + 1
                    ));
                }
            }
        }
    }
    assert_holds(&broken);
}

#[test]
fn every_folder_of_crates_is_a_package_of_its_name_under_the_shared_lints() {
    let packages = workspace_packages();
    let mut broken = Vec::new();
    let entries = fs::read_dir(root().join("crates")).unwrap().map(Result::unwrap);
    for entry in entries.filter(|entry| entry.path().is_dir()) {
        let folder = entry.file_name().into_string().unwrap();
        let manifest = format!("crates/{folder}/Cargo.toml");
        match packages.iter().find(|package| package.manifest == manifest) {
            None => broken
                .push(format!("{manifest}:1: crates/{folder} is no package of the workspace; make it one or move it")),
            Some(package) if package.name != folder => {
                let line = line_that(&read(&manifest), |line| line.starts_with("name"));
                broken.push(format!(
                    "{manifest}:{line}: the package is called `{}`; call it as its folder",
                    package.name
                ));
            }
            Some(_) => {}
        }
    }
    for package in &packages {
        if !read(&package.manifest).contains("[lints]\nworkspace = true\n") {
            broken.push(format!("{}:1: write `[lints]` and `workspace = true` below it", package.manifest));
        }
    }
    assert_holds(&broken);
}

#[test]
fn the_architecture_page_stays_a_page_one_reads_whole() {
    if !root().join("ARCHITECTURE.md").exists() {
        return;
    }
    let num_lines = read("ARCHITECTURE.md").lines().count();
    let mut broken = Vec::new();
    if num_lines > MAX_ARCHITECTURE_LINES {
        broken.push(format!(
            "ARCHITECTURE.md:{MAX_ARCHITECTURE_LINES}: {num_lines} lines, at most {MAX_ARCHITECTURE_LINES}; move details to docs/ or to module docs"
        ));
    }
    assert_holds(&broken);
}

#[test]
fn relative_links_in_markdown_point_to_what_exists() {
    let mut broken = Vec::new();
    for path in files_ending_in(".md") {
        let folder = root().join(&path).parent().unwrap().to_path_buf();
        for (line_number, target) in links(&read(&path)) {
            let file = target.split('#').next().unwrap();
            let is_elsewhere = target.contains("://") || target.starts_with("mailto:");
            if !is_elsewhere && !file.is_empty() && !folder.join(file).exists() {
                broken.push(format!("{path}:{line_number}: there is no `{file}` beside this page; correct the link"));
            }
        }
    }
    assert_holds(&broken);
}

#[test]
fn comments_strings_and_characters_are_no_code() {
    let source = r####"
let a = b"unsafe \" unsafe"; // unsafe
/*/ unsafe /* nested */ unsafe */ let b = r#"unsafe " unsafe"#;
let c: &'static str = "\\"; let d = ['"', '\'', '\u{22}']; unsafe { e }
"####;
    let code = code_only(source);
    assert_eq!(code.lines().count(), source.lines().count());
    assert_eq!(words(&code).filter(|word| *word == "unsafe").count(), 1);
    assert!(code.lines().nth(2).unwrap().contains("let b ="));
    assert!(code.lines().nth(3).unwrap().ends_with("unsafe { e }"));
}

#[test]
fn lines_of_an_inline_test_module_do_not_count() {
    let source = "fn a() {}\n\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\n#[cfg(test)]\nfn c() {}\n";
    assert_eq!(num_lines_without_tests(source), 4);
}

#[test]
fn links_are_found_outside_code_only() {
    let page = "[a](b.md#c) `[d](e)` ![f](g.svg \"h\")\n```\n[i](j)\n```\n[k]: l.md\n";
    let expected = [(1, "b.md#c"), (1, "g.svg"), (5, "l.md")];
    assert_eq!(links(page), expected.map(|(line, target)| (line, target.to_string())));
}

#[track_caller]
fn assert_holds(broken: &[String]) {
    assert!(broken.is_empty(), "the rule is broken in {} places:\n{}", broken.len(), broken.join("\n"));
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The text of a file, given by its path from the root.
fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Paths from the root, with `/`, sorted. Hidden folders, links and the build's output are left out.
fn files_ending_in(suffix: &str) -> Vec<String> {
    let root = root();
    let mut folders = vec![root.clone()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() && !name.starts_with('.') && name != "target" {
                folders.push(entry.path());
            } else if kind.is_file() && name.ends_with(suffix) {
                let path = entry.path().strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
                files.push(path);
            }
        }
    }
    assert!(!files.is_empty(), "no file ends in {suffix}: a rule would hold of nothing");
    files.sort();
    files
}

struct Package {
    name: String,
    /// Path of its Cargo.toml from the root.
    manifest: String,
    /// Names of the packages it builds or tests with.
    dependencies: Vec<String>,
}

/// The packages of the workspace as cargo itself reads them, however their manifests are spelled.
fn workspace_packages() -> Vec<Package> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_string();
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .map(|package| Package {
            name: text(&package["name"]),
            manifest: Path::new(&text(&package["manifest_path"]))
                .strip_prefix(root())
                .unwrap()
                .to_str()
                .unwrap()
                .replace('\\', "/"),
            dependencies: package["dependencies"].as_array().unwrap().iter().map(|d| text(&d["name"])).collect(),
        })
        .collect()
}

/// Number of the first line that fits, from 1; 1 if none does.
fn line_that(text: &str, fits: impl Fn(&str) -> bool) -> usize {
    text.lines().position(fits).map_or(1, |index| index + 1)
}

fn is_test_file(path: &str) -> bool {
    path.contains("/tests/") || path.ends_with("/tests.rs")
}

/// Lines outside `#[cfg(..test..)] mod name { .. }` at the left margin.
fn num_lines_without_tests(source: &str) -> usize {
    let lines: Vec<&str> = source.lines().collect();
    let mut num_lines = 0;
    let mut index = 0;
    while index < lines.len() {
        let opens = lines.get(index + 1).is_some_and(|next| next.starts_with("mod ") && next.ends_with('{'));
        if lines[index].starts_with("#[cfg(") && lines[index].contains("test") && opens {
            // The formatter puts the module's closing brace at the margin, and no other one before it.
            index += lines[index..].iter().take_while(|line| **line != "}").count();
        } else {
            num_lines += 1;
        }
        index += 1;
    }
    num_lines
}

/// Identifiers and numbers.
fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// Rust source with spaces for comments, strings and characters; lines stay where they are.
fn code_only(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let len = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment_len(rest),
            '"' => escaped_len(rest, '"'),
            'r' => raw_string_len(rest),
            '\'' => character_len(rest),
            _ => 0,
        };
        if len == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..len].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[len..];
        }
    }
    code
}

/// Bytes of the block comment that `rest` begins with; they nest.
fn block_comment_len(rest: &str) -> usize {
    let mut depth = 0;
    let mut index = 0;
    while index < rest.len() {
        match &rest.as_bytes()[index..] {
            [b'/', b'*', ..] => (depth, index) = (depth + 1, index + 2),
            [b'*', b'/', ..] => (depth, index) = (depth - 1, index + 2),
            _ => index += 1,
        }
        if depth == 0 {
            return index;
        }
    }
    rest.len()
}

/// Bytes of what `rest` begins with, from `quote` to `quote`, where a backslash hides the next character.
fn escaped_len(rest: &str, quote: char) -> usize {
    let mut is_hidden = false;
    for (index, c) in rest.char_indices().skip(1) {
        if c == quote && !is_hidden {
            return index + 1;
        }
        is_hidden = c == '\\' && !is_hidden;
    }
    rest.len()
}

/// Bytes of the raw string that `rest` begins with; 0 if its `r` begins something else.
fn raw_string_len(rest: &str) -> usize {
    let hashes = &rest[1..1 + rest[1..].len() - rest[1..].trim_start_matches('#').len()];
    let Some(body) = rest[1 + hashes.len()..].strip_prefix('"') else { return 0 };
    let end = format!("\"{hashes}");
    body.find(&end).map_or(rest.len(), |index| rest.len() - body.len() + index + end.len())
}

/// Bytes of the character that `rest` begins with; 0 if it is a lifetime.
fn character_len(rest: &str) -> usize {
    let mut inside = rest.chars().skip(1);
    match (inside.next(), inside.next()) {
        (Some('\\'), _) => escaped_len(rest, '\''),
        (Some(c), Some('\'')) => c.len_utf8() + 2,
        _ => 0,
    }
}

/// Line numbers and targets of a page's links, those in code left out.
fn links(page: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut is_code = false;
    for (index, line) in page.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            is_code = !is_code;
        } else if !is_code {
            // Every second piece between backticks is code.
            let text: String = line.split('`').step_by(2).collect::<Vec<_>>().join("code");
            let inline = text.match_indices("](").map(|(at, opening)| &text[at + opening.len()..]);
            let reference = text.strip_prefix('[').and_then(|rest| rest.split_once("]: ")).map(|(_, target)| target);
            for target in inline.chain(reference) {
                let end = target.find([')', ' ']).unwrap_or(target.len());
                found.push((index + 1, target[..end].to_string()));
            }
        }
    }
    found
}
