//! The inside of a tool call, one character at a time.

use std::ops::Range;

use moge_model::ToolFormat;

use super::delta::Deltas;

/// The longest name of a function, as OpenAI's API allows it.
pub(crate) const MAX_NAME_LEN: usize = 64;

/// True for the characters of a function's name: those that OpenAI's API allows, and dots.
pub(crate) fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')
}

/// State of a call after a character.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The character belongs to it, and it is not at its end.
    More,
    /// The character ends it, but for the marker after it.
    Done,
    /// The character, which has not been taken, cannot belong to it.
    Failed,
}

/// Reads one tool call, or Pangu's list of them. A call is announced as soon as its name is known and its arguments have
/// begun; until then its text is held, to be given back as content if it turns out to be no call.
pub(super) struct CallParser {
    format: ToolFormat,
    /// Text since the marker, or since the last call was announced, that has gone nowhere yet.
    held: String,
    expect: Expect,
    /// The value being read.
    scanner: Scanner,
    /// Start of that value in `held`.
    value_start: usize,
    /// The name that is known: `held` has it as JSON (for GLM-4: as it is).
    name: Option<Range<usize>>,
    /// Arguments that came before the name, complete.
    arguments: Option<Range<usize>>,
    /// The current call has been announced.
    announced: bool,
    /// Some call has been announced.
    has_announced: bool,
}

/// The expected next element.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expect {
    /// `[` of Pangu's list.
    List,
    /// `{` of a call.
    Object,
    /// A key.
    Key,
    /// The rest of a key.
    KeyText,
    /// `:` after the key of this field.
    Colon(Field),
    /// A value of this field.
    Value(Field),
    /// The rest of a value: a string, an object or a list.
    ValueText(Field),
    /// The rest of a number or a word.
    Scalar,
    /// `,` or `}` after a value.
    CommaOrEnd,
    /// `,` or `]` after a call in Pangu's list.
    CommaOrListEnd,
    /// The rest of GLM-4's name, then a line break.
    NameLine,
    /// Spaces after it, then a line break.
    LineEnd,
    /// `{` of the arguments below it.
    ArgumentsLine,
}

/// Meaning of a key of a call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    Name,
    Arguments,
    Other,
}

impl CallParser {
    /// A call that begins with the text `held`. GLM-4's name begins at `name_start` in it.
    pub(super) fn new(format: ToolFormat, held: String, name_start: usize) -> CallParser {
        let expect = match format {
            ToolFormat::PanguList => Expect::List,
            ToolFormat::Hermes => Expect::Object,
            ToolFormat::Glm4 => Expect::NameLine,
        };
        CallParser {
            format,
            held,
            expect,
            scanner: Scanner::default(),
            value_start: name_start,
            name: None,
            arguments: None,
            announced: false,
            has_announced: false,
        }
    }

    /// Text that belongs to no call that was announced.
    pub(super) fn take_held(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// True if a call has been announced.
    pub(super) fn has_announced(&self) -> bool {
        self.has_announced
    }

    /// Read a further character; announced arguments go to `deltas` at once.
    pub(super) fn step(&mut self, c: char, deltas: &mut Deltas) -> Progress {
        match self.expect {
            Expect::KeyText => self.step_key(c),
            Expect::ValueText(field) => self.step_value(field, c, deltas),
            Expect::Scalar if c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.') => self.keep(c, Expect::Scalar),
            Expect::NameLine | Expect::LineEnd => self.step_name_line(c),
            Expect::Scalar if c.is_ascii_whitespace() => self.keep(c, Expect::CommaOrEnd),
            _ if c.is_ascii_whitespace() => self.keep(c, self.expect),
            _ => self.step_structure(c, deltas),
        }
    }

    /// A character between keys and values.
    fn step_structure(&mut self, c: char, deltas: &mut Deltas) -> Progress {
        match (self.expect, c) {
            (Expect::List, '[') | (Expect::CommaOrListEnd, ',') => self.keep(c, Expect::Object),
            (Expect::Object, '{') | (Expect::CommaOrEnd | Expect::Scalar, ',') => self.keep(c, Expect::Key),
            (Expect::Key, '"') => self.begin(c, Expect::KeyText),
            (Expect::Colon(field), ':') => self.keep(c, Expect::Value(field)),
            (Expect::Value(field), _) => self.begin_value(field, c, deltas),
            (Expect::CommaOrEnd | Expect::Scalar, '}') if self.announced => self.end_call(),
            (Expect::CommaOrListEnd, ']') => {
                self.held.clear();
                Progress::Done
            }
            (Expect::ArgumentsLine, '{') => self.begin_value(Field::Arguments, c, deltas),
            _ => Progress::Failed,
        }
    }

    fn step_name_line(&mut self, c: char) -> Progress {
        let length = self.held.len() - self.value_start;
        match (self.expect, c) {
            (Expect::NameLine, c) if is_name_char(c) && length < MAX_NAME_LEN => self.keep(c, Expect::NameLine),
            (Expect::NameLine, '\n' | ' ' | '\t' | '\r') if length > 0 => {
                self.name = Some(self.value_start..self.held.len());
                self.keep(c, if c == '\n' { Expect::ArgumentsLine } else { Expect::LineEnd })
            }
            (Expect::LineEnd, ' ' | '\t' | '\r') => self.keep(c, Expect::LineEnd),
            (Expect::LineEnd, '\n') => self.keep(c, Expect::ArgumentsLine),
            _ => Progress::Failed,
        }
    }

    fn step_key(&mut self, c: char) -> Progress {
        match self.scanner.step(c) {
            Scan::Invalid => Progress::Failed,
            Scan::Inside => self.keep(c, Expect::KeyText),
            Scan::Complete => {
                // The quotation mark that ends the key is not in `held` yet.
                let field = match &self.held[self.value_start..] {
                    "\"name" => Field::Name,
                    "\"arguments" => Field::Arguments,
                    _ => Field::Other,
                };
                self.keep(c, Expect::Colon(field))
            }
        }
    }

    fn begin_value(&mut self, field: Field, c: char, deltas: &mut Deltas) -> Progress {
        let is_repeated = match field {
            Field::Name => self.announced || self.name.is_some(),
            Field::Arguments => self.announced || self.arguments.is_some(),
            Field::Other => false,
        };
        match (field, c) {
            _ if is_repeated => Progress::Failed,
            (Field::Arguments, '{') if self.name.is_some() => {
                if !self.announce(deltas) {
                    return Progress::Failed;
                }
                deltas.arguments("{");
                self.scanner = Scanner::begin(c);
                self.expect = Expect::ValueText(field);
                Progress::More
            }
            (Field::Name | Field::Other, '"') | (Field::Arguments | Field::Other, '{') | (Field::Other, '[') => {
                self.begin(c, Expect::ValueText(field))
            }
            (Field::Other, '-' | '0'..='9' | 'a'..='z') => self.keep(c, Expect::Scalar),
            _ => Progress::Failed,
        }
    }

    fn step_value(&mut self, field: Field, c: char, deltas: &mut Deltas) -> Progress {
        let scan = self.scanner.step(c);
        if scan == Scan::Invalid {
            return Progress::Failed;
        }
        if field == Field::Arguments && self.announced {
            deltas.arguments(c.encode_utf8(&mut [0; 4]));
            if scan == Scan::Complete {
                self.expect = Expect::CommaOrEnd;
            }
            return if scan == Scan::Complete && self.format == ToolFormat::Glm4 {
                Progress::Done
            } else {
                Progress::More
            };
        }
        if scan == Scan::Inside {
            return self.keep(c, self.expect);
        }
        self.keep(c, Expect::CommaOrEnd);
        let range = self.value_start..self.held.len();
        match field {
            Field::Name => self.name = Some(range),
            Field::Arguments => self.arguments = Some(range),
            Field::Other => {}
        }
        let is_called = field == Field::Name && self.arguments.is_some();
        if is_called && !self.announce(deltas) {
            self.held.pop();
            return Progress::Failed;
        }
        Progress::More
    }

    /// Hand out the name, and the arguments if they came before it. False if the name is not valid.
    fn announce(&mut self, deltas: &mut Deltas) -> bool {
        let name = self.name.take().map_or("", |range| &self.held[range]);
        let name = match self.format {
            ToolFormat::Glm4 => name.to_owned(),
            ToolFormat::PanguList | ToolFormat::Hermes => serde_json::from_str(name).unwrap_or_default(),
        };
        if name.is_empty() {
            return false;
        }
        deltas.call(name);
        if let Some(range) = self.arguments.take() {
            deltas.arguments(&self.held[range]);
        }
        self.held.clear();
        self.announced = true;
        self.has_announced = true;
        true
    }

    /// The object of an announced call is at its end.
    fn end_call(&mut self) -> Progress {
        self.held.clear();
        self.announced = false;
        self.expect = Expect::CommaOrListEnd;
        if self.format == ToolFormat::PanguList { Progress::More } else { Progress::Done }
    }

    /// A value or key begins with this character.
    fn begin(&mut self, c: char, expect: Expect) -> Progress {
        self.value_start = self.held.len();
        self.scanner = Scanner::begin(c);
        self.keep(c, expect)
    }

    fn keep(&mut self, c: char, expect: Expect) -> Progress {
        self.held.push(c);
        self.expect = expect;
        Progress::More
    }
}

/// Finds the end of a JSON string, object or list. Brackets must match; what stands between them is not judged.
#[derive(Default)]
struct Scanner {
    /// The brackets that are still to be closed, the innermost last.
    brackets: Vec<char>,
    in_string: bool,
    after_backslash: bool,
}

#[derive(PartialEq, Eq)]
enum Scan {
    Inside,
    /// The character ends the value.
    Complete,
    /// The character closes another bracket than the innermost.
    Invalid,
}

impl Scanner {
    /// Of a value that begins with this character: `"`, `{` or `[`.
    fn begin(c: char) -> Scanner {
        let mut scanner = Scanner::default();
        scanner.step(c);
        scanner
    }

    fn step(&mut self, c: char) -> Scan {
        if self.in_string {
            let is_end = c == '"' && !self.after_backslash;
            self.after_backslash = c == '\\' && !self.after_backslash;
            self.in_string = !is_end;
            return if is_end && self.brackets.is_empty() { Scan::Complete } else { Scan::Inside };
        }
        match c {
            '"' => self.in_string = true,
            '{' => self.brackets.push('}'),
            '[' => self.brackets.push(']'),
            '}' | ']' => {
                if self.brackets.pop() != Some(c) {
                    return Scan::Invalid;
                }
                if self.brackets.is_empty() {
                    return Scan::Complete;
                }
            }
            _ => {}
        }
        Scan::Inside
    }
}
