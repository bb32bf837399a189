//! Circles of imports between the modules of a crate.
//!
//! An import is a `use` at the left margin, not under `#[cfg(test)]`. A name that a module re-exports counts for the
//! module that defines it. A module and those inside it may use one another: a folder's face and its parts are one.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::code_only;

#[test]
fn circles_are_found_behind_re_exports_and_not_between_parent_and_child_or_in_tests() {
    let source = |path: &str, text: &str| (path.to_owned(), text.to_owned());
    let sources = [
        source("lib.rs", "mod a;\nmod b;\nmod c;\npub use b::{B, d::D};\nuse c::C;\n"),
        source("a.rs", "use std::fmt;\nuse crate::{\n    B, // the letter\n    c::C as See,\n};\n"),
        source("b/mod.rs", "mod d;\npub use d::D;\nuse super::c::C;\npub struct B;\n"),
        source("b/d.rs", "use super::B;\nuse crate::a::A;\n"),
        source("c.rs", "//! use crate::a::A;\n#[cfg(test)]\nuse crate::a::A;\n\nmod tests {\n    use super::*;\n}\n"),
    ];
    assert!(import_circles(&sources).is_empty());
    let mut sources = sources.to_vec();
    sources[1].1.push_str("use crate::D;\n");
    assert_eq!(import_circles(&sources), [["a", "b::d"]]);
    sources[4].1.push_str("use crate::a::{self};\n");
    assert_eq!(import_circles(&sources), [["a", "b", "b::d", "c"]]);
}

/// Modules that import one another, by the paths and texts of a crate's files below `src`.
pub(crate) fn import_circles(sources: &[(String, String)]) -> Vec<Vec<String>> {
    let modules: Modules = sources
        .iter()
        .filter(|(path, _)| !path.ends_with("tests.rs") && !path.contains("tests/"))
        .map(|(path, text)| (module_of(path), imports(text)))
        .collect();
    let mut arrows: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for (module, paths) in &modules {
        let targets = paths.iter().filter_map(|path| resolve(&modules, &absolute(&modules, module, path)?, 0));
        let targets = targets.filter(|target| !is_within(target, module) && !is_within(module, target));
        arrows.insert(module, targets.collect());
    }
    let reached: BTreeMap<&str, BTreeSet<String>> =
        arrows.keys().map(|module| (*module, reachable(&arrows, module))).collect();
    let mut circles: Vec<Vec<String>> = Vec::new();
    for module in arrows.keys().filter(|module| reached[*module].contains(**module)) {
        if !circles.iter().flatten().any(|known| known == module) {
            let returns = |other: &&String| reached.get(other.as_str()).is_some_and(|back| back.contains(*module));
            circles.push(reached[module].iter().filter(returns).cloned().collect());
        }
    }
    circles
}

/// The imports of each module, by its path: `attention::chunk`, and nothing for the crate itself.
type Modules = BTreeMap<String, Vec<String>>;

fn module_of(path: &str) -> String {
    let path = path.trim_end_matches(".rs");
    let path = if ["lib", "main", "mod"].contains(&path) { "" } else { path.trim_end_matches("/mod") };
    path.replace('/', "::")
}

/// True if `module` is `outer` or inside of it. All modules are inside of the crate's root.
fn is_within(module: &str, outer: &str) -> bool {
    outer.is_empty() || module == outer || module.strip_prefix(outer).is_some_and(|rest| rest.starts_with("::"))
}

/// Single paths that a file imports or re-exports at its left margin, outside of tests.
fn imports(text: &str) -> Vec<String> {
    let code = code_only(text);
    let mut paths = Vec::new();
    let mut is_test = false;
    let mut rest = code.as_str();
    while let Some((line, after)) = rest.split_once('\n') {
        let visible =
            line.strip_prefix("pub(crate) ").or(line.strip_prefix("pub(super) ")).or(line.strip_prefix("pub "));
        let is_import = visible.unwrap_or(line).starts_with("use ");
        rest = after;
        if is_import {
            let start = code.len() - after.len() - line.len() - 1;
            let statement = code[start..].split(';').next().unwrap_or_default();
            rest = &code[start + statement.len()..];
            let (_, tree) = statement.split_once("use ").unwrap_or_default();
            let tree: String = tree.replace(" as ", "@").split_whitespace().collect();
            if !is_test {
                expand("", &tree, &mut paths);
            }
        }
        is_test = line.starts_with("#[cfg(") && line.contains("test");
    }
    paths
}

/// `a::{b, c::{d, e}}` is `a::b`, `a::c::d`, `a::c::e`.
fn expand(prefix: &str, tree: &str, paths: &mut Vec<String>) {
    let Some((head, body)) = tree.split_once('{') else {
        paths.push(format!("{prefix}{tree}"));
        return;
    };
    let body = body.strip_suffix('}').unwrap_or(body);
    let (mut depth, mut start) = (0, 0);
    for (index, c) in body.char_indices().chain([(body.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if index > start {
                    expand(&format!("{prefix}{head}"), &body[start..index], paths);
                }
                start = index + 1;
            }
            _ => {}
        }
    }
}

/// The path from the crate's root, if it stays in the crate.
fn absolute(modules: &Modules, module: &str, path: &str) -> Option<Vec<String>> {
    let mut parts: Vec<&str> = path.split("::").collect();
    let mut base: Vec<&str> = module.split("::").filter(|part| !part.is_empty()).collect();
    match parts[0] {
        "crate" => base.clear(),
        "self" => {}
        "super" => {
            while parts[0] == "super" && parts.len() > 1 {
                base.pop();
                parts.remove(0);
            }
            base.extend(parts);
            return Some(base.into_iter().map(str::to_owned).collect());
        }
        child => {
            let inner = if module.is_empty() { child.to_owned() } else { format!("{module}::{child}") };
            modules.get(&inner)?;
            base.push(child);
        }
    }
    base.extend(&parts[1..]);
    Some(base.into_iter().map(str::to_owned).collect())
}

/// The module that defines what a path from the root names.
fn resolve(modules: &Modules, path: &[String], depth: usize) -> Option<String> {
    let path: Vec<String> = path.iter().map(|part| part.split('@').next().unwrap_or_default().to_owned()).collect();
    let len = (0..=path.len()).rev().find(|len| modules.contains_key(&path[..*len].join("::")))?;
    let module = path[..len].join("::");
    let re_export = path.get(len).filter(|_| depth < 8).and_then(|name| {
        modules[&module].iter().find_map(|import| {
            let mut parts = import.trim_end_matches("::self").rsplit("::");
            let own_name = parts.next()?.rsplit('@').next()?;
            let target = absolute(modules, &module, import.trim_end_matches("::self"))?;
            (own_name == name).then(|| resolve(modules, &[&target, &path[len + 1..]].concat(), depth + 1))?
        })
    });
    re_export.or(Some(module))
}

fn reachable(arrows: &BTreeMap<&str, BTreeSet<String>>, from: &str) -> BTreeSet<String> {
    let mut reached = BTreeSet::new();
    let mut open = vec![from.to_owned()];
    while let Some(module) = open.pop() {
        for target in arrows.get(module.as_str()).into_iter().flatten() {
            if reached.insert(target.clone()) {
                open.push(target.clone());
            }
        }
    }
    reached
}
