//! Text and JSONL files to documents, in memory that does not grow with the files.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, BufRead, Read};

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

/// Longest text that is tokenised in one go. A longer one is cut at the last end of a line before; a tokenizer may see that
/// cut in a token or two.
const MAX_PART_BYTES: usize = 1 << 20;

/// Why a text ends early.
#[derive(Debug)]
pub(super) enum TextError {
    Read(io::Error),
    NotUtf8 {
        /// Where the first wrong byte is.
        position: u64,
    },
}

/// A text in parts that are tokenised one by one.
pub(super) struct Parts<R> {
    reader: R,
    buffer: Vec<u8>,
    /// Bytes at the beginning of the buffer that were given out.
    num_given: usize,
    /// Where the buffer begins in the text.
    position: u64,
}

impl<R: Read> Parts<R> {
    pub(super) fn new(reader: R) -> Parts<R> {
        Parts { reader, buffer: Vec::new(), num_given: 0, position: 0 }
    }

    /// The next part, never an empty one; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<&str>, TextError> {
        self.buffer.drain(..self.num_given);
        self.position += self.num_given as u64;
        self.num_given = 0;
        // One byte more than a part, so that the end is known.
        let missing = MAX_PART_BYTES + 1 - self.buffer.len();
        self.reader.by_ref().take(missing as u64).read_to_end(&mut self.buffer).map_err(TextError::Read)?;
        let is_end = self.buffer.len() <= MAX_PART_BYTES;
        let whole = match str::from_utf8(&self.buffer) {
            Ok(text) => text,
            // The buffer may end within a character.
            Err(error) if error.error_len().is_none() && !is_end => {
                str::from_utf8(&self.buffer[..error.valid_up_to()]).unwrap_or_default()
            }
            Err(error) => {
                return Err(TextError::NotUtf8 { position: self.position + error.valid_up_to() as u64 });
            }
        };
        let part = if is_end {
            whole
        } else {
            let longest = &whole[..whole.floor_char_boundary(MAX_PART_BYTES)];
            longest.rfind('\n').map_or(longest, |end| &longest[..=end])
        };
        self.num_given = part.len();
        Ok(if part.is_empty() { None } else { Some(part) })
    }
}

/// What [`read_line`] found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// Nothing is left.
    End,
    /// A line, in the buffer, without its end.
    Whole,
    /// A line that is longer than allowed; it was passed over.
    TooLong,
}

/// Read a line of at most `max_bytes`. Returns also how many bytes it has with its end.
pub(super) fn read_line(reader: &mut impl BufRead, max_bytes: u64, line: &mut Vec<u8>) -> io::Result<(Line, u64)> {
    line.clear();
    let mut num_bytes = reader.by_ref().take(max_bytes + 1).read_until(b'\n', line)? as u64;
    if line.last() == Some(&b'\n') {
        line.pop();
        return Ok((Line::Whole, num_bytes));
    }
    if num_bytes <= max_bytes {
        return Ok((if line.is_empty() { Line::End } else { Line::Whole }, num_bytes));
    }
    num_bytes += reader.skip_until(b'\n')? as u64;
    Ok((Line::TooLong, num_bytes))
}

/// The string in the field `field` of a JSON object.
///
/// # Errors
/// What is wrong with the line.
pub(super) fn text_of_line(line: &[u8], field: &str) -> Result<String, String> {
    if let Err(error) = str::from_utf8(line) {
        return Err(format!("not UTF-8 at column {}", error.valid_up_to() + 1));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(line);
    let result = FieldOf(field).deserialize(&mut deserializer).and_then(|text| {
        deserializer.end()?;
        Ok(text)
    });
    match result {
        Ok(Some(text)) => Ok(text),
        Ok(None) => Err(format!("no field {field:?}; allowed: a JSON object with a string in it")),
        Err(error) => {
            let problem = error.to_string();
            // The library counts lines too, and there is only one.
            let problem = problem.rsplit_once(" at line ").map_or(problem.as_str(), |(problem, _)| problem);
            let kind = if error.is_data() { "not a document" } else { "not JSON" };
            Err(format!("{kind}: {problem} at column {}", error.column()))
        }
    }
}

/// Reads one field of an object, and nothing else into memory: a short line can describe a value that is many times as large.
struct FieldOf<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for FieldOf<'_> {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<String>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for FieldOf<'_> {
    type Value = Option<String>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "an object with the field {:?}", self.0)
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Option<String>, M::Error> {
        let mut text = None;
        while let Some(key) = map.next_key::<Cow<'_, str>>()? {
            if key != self.0 {
                map.next_value::<IgnoredAny>()?;
            } else if text.is_some() {
                return Err(M::Error::custom(format_args!("the field {:?} is there twice", self.0)));
            } else {
                text = Some(map.next_value::<String>()?);
            }
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;

    fn parts(text: &[u8]) -> Result<Vec<String>, TextError> {
        let mut parts = Parts::new(text);
        let mut found = Vec::new();
        while let Some(part) = parts.next()? {
            found.push(part.to_owned());
        }
        Ok(found)
    }

    #[test]
    fn a_long_text_is_cut_at_ends_of_lines_and_else_between_characters() {
        assert!(parts(b"").unwrap().is_empty());
        assert_eq!(parts("häße\n".as_bytes()).unwrap(), ["häße\n"]);
        let line = "x".repeat(MAX_PART_BYTES / 3) + "\n";
        let lengths = |text: &str| parts(text.as_bytes()).unwrap().iter().map(String::len).collect::<Vec<usize>>();
        assert_eq!(lengths(&line.repeat(5)), [2 * line.len(), 2 * line.len(), line.len()]);
        assert_eq!(lengths(&"x".repeat(MAX_PART_BYTES)), [MAX_PART_BYTES]);
        // Two bytes each: the limit is within a character.
        let text = "x".to_owned() + &"ä".repeat(MAX_PART_BYTES / 2 + 7);
        assert_eq!(lengths(&text), [MAX_PART_BYTES - 1, 16]);
        assert_eq!(parts(text.as_bytes()).unwrap().concat(), text);
    }

    #[test]
    fn bytes_that_are_no_utf8_are_named_by_their_place_in_the_text() {
        let position = |text: &[u8]| match parts(text) {
            Err(TextError::NotUtf8 { position }) => position,
            other => panic!("{other:?}"),
        };
        assert_eq!(position(b"ab\xff"), 2);
        assert_eq!(position(b"abc\xc3"), 3);
        let long = ["x".repeat(MAX_PART_BYTES).as_bytes(), b"abcd\xe4"].concat();
        assert_eq!(position(&long), MAX_PART_BYTES as u64 + 4);
    }

    #[test]
    fn lines_are_read_without_their_ends_and_too_long_ones_passed_over() {
        let mut reader = BufReader::new(b"one\n\nfifteen letters\nfourteen lette\nfourteen lette\r\ntwo".as_slice());
        let mut line = Vec::new();
        let mut found = Vec::new();
        loop {
            let (kind, num_bytes) = read_line(&mut reader, 14, &mut line).unwrap();
            match kind {
                Line::End => break,
                Line::Whole => found.push((String::from_utf8(line.clone()).unwrap(), num_bytes)),
                Line::TooLong => found.push(("too long".to_owned(), num_bytes)),
            }
        }
        let expected = [("one", 4), ("", 1), ("too long", 16), ("fourteen lette", 15), ("too long", 16), ("two", 3)];
        assert_eq!(found, expected.map(|(line, num_bytes)| (line.to_owned(), num_bytes)));
    }

    #[test]
    fn the_text_of_a_line_is_found_among_anything_else() {
        let text = |line: &str| text_of_line(line.as_bytes(), "text");
        assert_eq!(text(r#"{"text": "a\nb\u00e4"}"#).unwrap(), "a\nbä");
        assert_eq!(text("{\"id\": [{\"text\": 1}], \"text\": \"\", \"x\": null}\r").unwrap(), "");
    }

    #[test]
    fn lines_that_hold_no_document_are_refused_with_what_is_wrong() {
        let deep = "[".repeat(100_000);
        for (line, problem) in [
            ("", "not JSON: EOF while parsing a value at column 0"),
            ("{\"text\": \"a\"", "not JSON: EOF while parsing an object"),
            ("{\"text\": \"a\"} x", "not JSON: trailing characters at column 15"),
            ("{\"texts\": \"a\"}", "no field \"text\"; allowed: a JSON object with a string in it"),
            ("{\"text\": 3}", "not a document: invalid type: integer `3`, expected a string at column 10"),
            ("{\"text\": null}", "not a document: invalid type: null, expected a string"),
            ("{\"text\": \"a\", \"text\": \"b\"}", "the field \"text\" is there twice"),
            ("[\"text\"]", "not a document: invalid type: sequence, expected an object with the field \"text\""),
            ("{\"text\": \"\\ud800\"}", "not JSON: "),
            (&format!("{{\"text\": {deep}"), "not a document: invalid type: sequence"),
            (&format!("{{\"x\": {deep}"), "not JSON: "),
        ] {
            let error = text_of_line(line.as_bytes(), "text").unwrap_err();
            assert!(error.contains(problem), "{}: {error}", &line[..line.len().min(40)]);
        }
        assert_eq!(text_of_line(b"{\"text\": \"a\xff\"}", "text").unwrap_err(), "not UTF-8 at column 12");
    }
}
