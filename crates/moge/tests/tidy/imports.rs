//! Which file of a crate imports which, read off its `use` declarations.

use std::collections::{BTreeMap, BTreeSet};

use super::{assert_holds, code_only, files_ending_in, read};

/// A module's path below the crate: `["network", "cpu"]`.
type Module = Vec<String>;

/// The files of one crate by module, and the imports of each.
struct Crate {
    files: BTreeMap<Module, String>,
    uses: BTreeMap<Module, Vec<Vec<String>>>,
}

#[test]
fn the_files_of_a_crate_do_not_import_one_another_in_a_circle() {
    let sources: Vec<String> = files_ending_in(".rs").into_iter().filter(|path| path.contains("/src/")).collect();
    let crates: BTreeSet<&str> = sources.iter().filter_map(|path| path.split_once("/src/")).map(|(at, _)| at).collect();
    let mut broken = Vec::new();
    for at in crates {
        let crate_ = Crate::read(at, &sources);
        let imports: BTreeMap<&Module, BTreeSet<Module>> =
            crate_.uses.keys().map(|module| (module, crate_.imports(module))).collect();
        let mut seen = BTreeSet::new();
        for (&module, targets) in &imports {
            for target in targets {
                let circle = path_between(&imports, target, module);
                let mut files: Vec<&str> = circle.iter().map(|module| crate_.files[module].as_str()).collect();
                files.sort_unstable();
                if !files.is_empty() && seen.insert(files.clone()) {
                    broken.push(format!("{}:1: a circle of imports: {}", files[0], files.join(", ")));
                }
            }
        }
    }
    assert_holds(&broken);
}

/// The modules on a shortest way of imports; empty if there is none.
fn path_between(imports: &BTreeMap<&Module, BTreeSet<Module>>, from: &Module, to: &Module) -> Vec<Module> {
    let mut ways = vec![vec![from.clone()]];
    let mut visited = BTreeSet::from([from.clone()]);
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for way in ways {
            let last = &way[way.len() - 1];
            if last == to {
                return way;
            }
            for next in imports.get(last).into_iter().flatten() {
                if visited.insert(next.clone()) {
                    longer.push([&way[..], std::slice::from_ref(next)].concat());
                }
            }
        }
        ways = longer;
    }
    Vec::new()
}

impl Crate {
    fn read(at: &str, sources: &[String]) -> Crate {
        let mut crate_ = Crate { files: BTreeMap::new(), uses: BTreeMap::new() };
        for path in sources {
            let Some(inside) = path.strip_prefix(&format!("{at}/src/")) else { continue };
            let inside = inside.trim_end_matches(".rs");
            let mut module: Module = inside.split('/').map(str::to_owned).collect();
            if module.iter().any(|part| part == "tests" || part == "testing") {
                continue;
            }
            if ["lib", "main", "mod"].contains(&module[module.len() - 1].as_str()) {
                module.pop();
            }
            let code = code_only(&read(path));
            // What follows is tests, by our custom.
            let code = code.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
            crate_.uses.insert(module.clone(), used_paths(code));
            crate_.files.insert(module, path.clone());
        }
        crate_
    }

    /// Modules whose items `module` imports. A folder's files may use what the file above them defines for all of them,
    /// and the other way round: such imports do not count.
    fn imports(&self, module: &Module) -> BTreeSet<Module> {
        let uses = self.uses[module].iter().filter_map(|path| self.absolute(module, path));
        let targets = uses.filter_map(|path| self.definer(&path, 0));
        targets.filter(|target| !target.starts_with(module) && !module.starts_with(target)).collect()
    }

    /// The path below the crate's root; `None` if it is another crate's.
    fn absolute(&self, module: &Module, path: &[String]) -> Option<Vec<String>> {
        let supers = path.iter().take_while(|part| *part == "super").count();
        let (base, rest) = match path[0].as_str() {
            "crate" => (Vec::new(), &path[1..]),
            "super" => (module[..module.len().checked_sub(supers)?].to_vec(), &path[supers..]),
            "self" => (module.clone(), &path[1..]),
            _ => (module.clone(), path),
        };
        let path = [&base[..], rest].concat();
        let is_ours = path[..].len() > 1 || path[0].chars().next().is_some_and(char::is_lowercase);
        (base != *module || self.files.contains_key(&path[..=base.len().min(path.len() - 1)]) || !is_ours)
            .then_some(path)
    }

    /// The module in which the item at `path` is defined, through re-exports.
    fn definer(&self, path: &[String], depth: usize) -> Option<Module> {
        let (module, item) = (0..=path.len()).rev().find_map(|len| {
            let (module, item) = path.split_at(len);
            self.files.contains_key(module).then(|| (module.to_vec(), item.first()))
        })?;
        let Some(item) = item.filter(|_| depth < 8) else { return Some(module) };
        let re_export = self.uses[&module].iter().find(|used| used.last() == Some(item) && used[0] != "std");
        match re_export.and_then(|used| self.absolute(&module, used)).filter(|used| used[..] != *path) {
            Some(used) => self.definer(&used, depth + 1).or(Some(module)),
            None => Some(module),
        }
    }
}

/// The paths of all `use` declarations at the beginning of a line, braces expanded.
fn used_paths(code: &str) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    let mut rest = format!("\n{code}");
    while let Some(start) = ["\nuse ", "\npub use ", "\npub(crate) use ", "\npub(super) use "]
        .iter()
        .filter_map(|word| rest.find(word).map(|at| at + word.len()))
        .min()
    {
        let declaration = rest[start..].split(';').next().unwrap_or_default().replace(char::is_whitespace, " ");
        rest = rest[start..].to_owned();
        expand(&declaration.replace(' ', ""), "", &mut paths);
    }
    paths
}

fn expand(tree: &str, prefix: &str, paths: &mut Vec<Vec<String>>) {
    let (head, group) = tree.split_once('{').map_or((tree, None), |(head, rest)| (head, rest.strip_suffix('}')));
    let Some(group) = group else {
        let full = format!("{prefix}{head}");
        let full = full.strip_suffix("::self").unwrap_or(&full);
        paths.push(full.split("::").map(str::to_owned).collect());
        return;
    };
    let (mut depth, mut start) = (0, 0);
    for (at, c) in group.char_indices().chain([(group.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                let part = &group[start..at];
                if !part.is_empty() {
                    expand(part, &format!("{prefix}{head}"), paths);
                }
                start = at + 1;
            }
            _ => {}
        }
    }
}
