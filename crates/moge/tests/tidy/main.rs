//! Rules of the repository that the compiler does not check. Each test is one rule, and what it prints says where the
//! rule is broken and what to do.
// The helpers are tests too, which the lint does not see.
#![allow(clippy::unwrap_used)]

mod circles;
mod source;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use source::{code_only, words};

/// Which of our crates a crate may import, in its code and in its tests alike; the binary, `moge`, may import any. A
/// crate that is not here has no place yet: add it when it is born, with the reason in the commit.
const ARROWS: [(&str, &[&str]); 10] = [
    ("moge-kernels", &[]),
    ("moge-dist", &[]),
    ("moge-model", &["moge-kernels", "moge-dist"]),
    ("moge-engine", &["moge-model", "moge-kernels"]),
    ("moge-server", &["moge-engine", "moge-model"]),
    ("moge-quant", &["moge-model", "moge-kernels"]),
    ("moge-train", &["moge-engine", "moge-model", "moge-kernels", "moge-dist"]),
    ("moge-plan", &["moge-engine", "moge-model"]),
    ("moge-fuzz", &["moge-server", "moge-model"]),
    ("xtask", &[]),
];

/// The files and folders where `unsafe` may stand: SIMD and threads, the memory map, the loaded MPI library.
const UNSAFE_PLACES: [&str; 3] =
    ["crates/moge-kernels/", "crates/moge-model/src/checkpoint/storage.rs", "crates/moge-dist/src/mpi_abi.rs"];

const MAX_FILE_LINES: usize = 500;
const MAX_ARCHITECTURE_LINES: usize = 200;
const MAX_GOLDEN_BYTES: u64 = 13 << 19; // 6.5 MiB

#[test]
fn a_crate_imports_only_the_crates_it_may() {
    let mut broken = Vec::new();
    for package in workspace_packages().iter().filter(|package| package.name != "moge") {
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == package.name) else {
            broken.push(format!(
                "{}:1: say in ARROWS of tests/tidy/main.rs what `{}` may import",
                package.manifest, package.name
            ));
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
fn a_rust_file_has_at_most_500_lines() {
    let mut broken = Vec::new();
    for path in files_ending_in(".rs").iter() {
        let num_lines = read(path).lines().count();
        if num_lines > MAX_FILE_LINES {
            broken.push(format!(
                "{path}:{MAX_FILE_LINES}: {num_lines} lines, at most {MAX_FILE_LINES}; split the file by what its parts do"
            ));
        }
    }
    assert_holds(&broken);
}

#[test]
fn modules_of_a_crate_do_not_import_in_circles() {
    let mut broken = Vec::new();
    for package in workspace_packages() {
        let folder = package.manifest.replace("Cargo.toml", "src/");
        let files = files_ending_in(".rs").into_iter().filter(|path| path.starts_with(&folder));
        let sources: Vec<(String, String)> = files.map(|path| (path[folder.len()..].to_owned(), read(&path))).collect();
        for circle in circles::import_circles(&sources) {
            broken.push(format!(
                "{folder}: {} import one another; move what they share to a module below them",
                circle.join(", ")
            ));
        }
    }
    assert_holds(&broken);
}

#[test]
fn goldens_stay_small() {
    let bytes: u64 =
        files_ending_in("").iter().filter(|path| path.starts_with("goldens/")).map(|path| size(path)).sum();
    assert!(bytes > 0 && bytes <= MAX_GOLDEN_BYTES, "goldens/: {bytes} bytes, at most {MAX_GOLDEN_BYTES}");
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
    let num_lines = read("ARCHITECTURE.md").lines().count();
    assert!(
        num_lines <= MAX_ARCHITECTURE_LINES,
        "ARCHITECTURE.md: {num_lines} lines, at most {MAX_ARCHITECTURE_LINES}; move details to docs/ or to module docs"
    );
}

#[test]
fn every_path_that_the_architecture_page_names_exists() {
    // A name may leave out the folders that its neighbours on the page have said.
    let files: Vec<String> = files_ending_in("").iter().map(|path| format!("/{path}")).collect();
    let exists = |path: &str| match path.strip_suffix('/') {
        Some(folder) => files.iter().any(|file| file.contains(&format!("/{folder}/"))),
        None => root().join(path).exists() || files.iter().any(|file| file.ends_with(&format!("/{path}"))),
    };
    let page = read("ARCHITECTURE.md");
    let paths = paths_in(&page);
    assert!(paths.len() > 50, "only {} paths were found", paths.len());
    let missing = paths.iter().filter(|(_, path)| !exists(path));
    let broken: Vec<String> =
        missing.map(|(line, path)| format!("ARCHITECTURE.md:{line}: there is no `{path}`; correct the path")).collect();
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

/// Bytes of a file, given by its path from the root.
fn size(path: &str) -> u64 {
    fs::metadata(root().join(path)).unwrap().len()
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

/// Line numbers and words of a page that are paths of sources, pages or folders; NAME stands for any name.
fn paths_in(page: &str) -> Vec<(usize, &str)> {
    let is_path = |word: &&str| {
        word.starts_with("crates/")
            || [".rs", ".md", ".py", "/"].iter().any(|end| word.len() > end.len() && word.ends_with(end))
    };
    page.lines()
        .enumerate()
        .flat_map(|(index, line)| {
            let words = line.split(|c: char| c.is_whitespace() || "`()[],;:".contains(c));
            words.filter(is_path).filter(|word| !word.contains("NAME")).map(move |word| (index + 1, word))
        })
        .collect()
}
