//! The `tojson` filter of `transformers`: Python's `json.dumps` with `ensure_ascii=False`, no escapes for HTML, keys in
//! the order of the input.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::limits::{BYTES_PER_FUEL, MAX_DEPTH};

/// Maximum indent; a wider one only makes the output huge.
const MAX_INDENT: usize = 64;

/// `value | tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands over arguments by value")]
pub(super) fn tojson(state: &State, value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let style = Style::new(&args, &kwargs)?;
    let mut writer = Writer { state, style, out: String::new(), depth: 0 };
    writer.value(value)?;
    Ok(writer.out)
}

struct Style {
    ensure_ascii: bool,
    /// Indentation of one level; `None` writes everything on one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

impl Style {
    fn new(args: &[Value], kwargs: &Kwargs) -> Result<Self, Error> {
        let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
        if args.len() > names.len() {
            return Err(Error::from(ErrorKind::TooManyArguments));
        }
        let mut values = [const { None }; 4];
        for (index, name) in names.into_iter().enumerate() {
            values[index] = match args.get(index) {
                Some(value) => Some(value.clone()),
                None => kwargs.get::<Option<Value>>(name)?,
            };
        }
        kwargs.assert_all_used()?;
        let [ensure_ascii, indent, separators, sort_keys] = values.map(Option::unwrap_or_default);
        let (ensure_ascii, sort_keys) = (ensure_ascii.is_true(), sort_keys.is_true());
        let (indent, separators) = (parse_indent(&indent)?, parse_separators(&separators)?);
        let (item_separator, key_separator) = match separators {
            Some(pair) => pair,
            None if indent.is_some() => (",".into(), ": ".into()),
            None => (", ".into(), ": ".into()),
        };
        Ok(Self { ensure_ascii, indent, item_separator, key_separator, sort_keys })
    }
}

fn parse_indent(indent: &Value) -> Result<Option<String>, Error> {
    let text = match (indent.as_str(), i64::try_from(indent.clone())) {
        _ if indent.is_none() || indent.is_undefined() => return Ok(None),
        (Some(text), _) => text.to_owned(),
        (None, Ok(width)) => " ".repeat(usize::try_from(width).unwrap_or(0).min(MAX_INDENT + 1)),
        (None, Err(_)) => return Err(invalid("tojson: indent must be a number or a string")),
    };
    if text.len() > MAX_INDENT {
        return Err(invalid(&format!("tojson: indent is wider than {MAX_INDENT}")));
    }
    Ok(Some(text))
}

fn parse_separators(separators: &Value) -> Result<Option<(String, String)>, Error> {
    if separators.is_none() || separators.is_undefined() {
        return Ok(None);
    }
    let texts: Vec<Value> = separators.try_iter()?.take(3).collect();
    match texts.as_slice() {
        [item, key] => match (item.as_str(), key.as_str()) {
            (Some(item), Some(key)) => Ok(Some((item.to_owned(), key.to_owned()))),
            _ => Err(invalid("tojson: separators must be strings")),
        },
        _ => Err(invalid("tojson: separators must be two strings")),
    }
}

fn invalid(problem: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem.to_owned())
}

struct Writer<'a, 'env> {
    state: &'a State<'a, 'env>,
    style: Style,
    out: String,
    depth: usize,
}

impl Writer<'_, '_> {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        // A list that holds another twice, and so on, is small in memory and huge as text.
        self.state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value)?,
            ValueKind::String => self.string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.checked().collect::<Result<_, _>>()?;
                self.container(['[', ']'], &items, |writer, item| writer.value(item))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.checked().collect::<Result<_, _>>()?;
                if self.style.sort_keys {
                    keys.sort();
                }
                self.container(['{', '}'], &keys, |writer, key| {
                    writer.key(key)?;
                    let separator = writer.style.key_separator.clone();
                    writer.push(&separator)?;
                    writer.value(&value.get_item(key)?)
                })?;
            }
            kind => return Err(invalid(&format!("tojson: {kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn container<T>(
        &mut self,
        [open, close]: [char; 2],
        items: &[T],
        write_item: impl Fn(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(invalid(&format!("tojson: nested deeper than {MAX_DEPTH}")));
        }
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                let separator = self.style.item_separator.clone();
                self.push(&separator)?;
            }
            self.new_line()?;
            write_item(self, item)?;
        }
        self.depth -= 1;
        if !items.is_empty() {
            self.new_line()?;
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self) -> Result<(), Error> {
        let Some(indent) = &self.style.indent else { return Ok(()) };
        let line = format!("\n{}", indent.repeat(self.depth));
        self.push(&line)
    }

    /// Append text whose length the template controls.
    fn push(&mut self, text: &str) -> Result<(), Error> {
        self.state.consume_fuel((text.len() / BYTES_PER_FUEL) as u64)?;
        self.out.push_str(text);
        Ok(())
    }

    /// JSON has only string keys; Python writes null, booleans and numbers as their JSON text.
    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                self.out.push('"');
                self.value(key)?;
                self.out.push('"');
                Ok(())
            }
            kind => Err(invalid(&format!("tojson: a key must not be a {kind}"))),
        }
    }

    fn number(&mut self, value: &Value) -> Result<(), Error> {
        if value.is_integer() {
            return self.push(&value.to_string());
        }
        let number = f64::try_from(value.clone())?;
        self.push(&python_float(number))
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.state.consume_fuel((text.len() / BYTES_PER_FUEL) as u64)?;
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                ' '..='~' => self.out.push(c),
                _ if c >= ' ' && !self.style.ensure_ascii => self.out.push(c),
                _ => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string cannot fail.
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
            }
        }
        self.out.push('"');
        Ok(())
    }
}

/// A float as Python writes it: like Rust's `{:?}`, but the exponent has a sign and at least two digits.
fn python_float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    let text = format!("{number:?}");
    match text.split_once('e') {
        None => text,
        Some((mantissa, exponent)) => {
            let (sign, digits) = exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
            format!("{mantissa}e{sign}{digits:0>2}")
        }
    }
}
