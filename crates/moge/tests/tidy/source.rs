//! Rust source as far as the rules read it.

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

/// Identifiers and numbers.
pub(crate) fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// Rust source with spaces for comments, strings and characters; lines stay where they are.
pub(crate) fn code_only(source: &str) -> String {
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
