//! Rewrites tags that the template engine does not know to ones that it does.

use super::namespace::ASSIGN;

/// Rewrite the tags that the engine does not know: `{% generation %}`, which marks the assistant's text for
/// training and prints its content, to `{% with %}`, which also opens a scope; and assignments to namespaces.
pub(super) fn rewrite_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let (control, code) = tag.split_at(tag.len() - tag.trim_start_matches(['-', '+']).len());
        out.push_str(control);
        rest = code;
        if let Some((assignment, old_len)) = rewrite_assignment(code) {
            out.push_str(&assignment);
            rest = &code[old_len..];
        }
        for (generation, with) in [("generation", " with"), ("endgeneration", " endwith")] {
            let Some(after) = code.trim_start().strip_prefix(generation) else { continue };
            if after.trim_start().trim_start_matches(['-', '+']).starts_with("%}") {
                out.push_str(with);
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

/// Rewrite the code `set ns.name = value` of a tag to a call of [`ASSIGN`]; `None` for other code. `tag` begins after
/// `{%` and its white space control. Returns the new text and the length of the old one.
fn rewrite_assignment(tag: &str) -> Option<(String, usize)> {
    let target = tag.trim_start().strip_prefix("set")?.strip_prefix(char::is_whitespace)?;
    let (target, value) = target.split_once('=')?;
    let (object, name) = target.trim().rsplit_once('.')?;
    let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !is_name(name) || !object.split('.').all(is_name) {
        return None;
    }
    let (start, len) = (tag.len() - value.len(), tag_end(value)?);
    let (value, old_len) = (&value[..len], start + len);
    Some((format!(" set __ = {ASSIGN}({object}, '{name}', ({value})) "), old_len))
}

/// End of the code before `%}`, `-%}` or `+%}`.
fn tag_end(code: &str) -> Option<usize> {
    let mut quote = None;
    let mut bytes = code.bytes().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match (quote, byte) {
            (Some(_), b'\\') => {
                bytes.next();
            }
            (Some(open), _) if open == byte => quote = None,
            (None, b'\'' | b'"') => quote = Some(byte),
            (None, b'%') if code[at..].starts_with("%}") => return Some(code[..at].trim_end_matches(['-', '+']).len()),
            _ => {}
        }
    }
    None
}
