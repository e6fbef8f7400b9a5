//! A JSON document, value by value, so that it need not fit in memory.
//!
//! Only what is entered is looked into; values are found by their brackets and quotes, and are parsed by serde once
//! they are in memory. What is skipped is not checked further.

use std::io::BufRead;

use super::input::Input;
use crate::error::{DataError, Result};

/// How many lists and objects may be in one another; serde_json has the same limit.
const MAX_DEPTH: usize = 128;
/// The most bytes that the name of a field may have.
const MAX_KEY: usize = 1 << 16;

pub(super) struct JsonStream {
    input: Input,
    /// The most bytes of a value that are kept.
    limit: usize,
    /// The line that the next byte is on, from 1.
    line: u64,
    started: bool,
    /// The lists and objects that were entered: how each ends, and whether anything in it was read.
    entered: Vec<(u8, bool)>,
}

/// A value as it stands in the file.
pub(super) struct RawValue {
    /// Its bytes, or `None` if they are more than the limit.
    pub(super) bytes: Option<Vec<u8>>,
    /// The line on which it starts, from 1.
    pub(super) line: u64,
}

impl JsonStream {
    pub(super) fn new(input: Input, limit: usize) -> Self {
        Self { input, limit, line: 1, started: false, entered: Vec::new() }
    }

    pub(super) fn input(&self) -> &Input {
        &self.input
    }

    /// The line that the next byte is on, from 1.
    pub(super) fn line(&self) -> u64 {
        self.line
    }

    /// That the document is no JSON, or not what was expected.
    pub(super) fn failed(&self, problem: impl std::fmt::Display) -> DataError {
        DataError::Unreadable {
            path: self.input.path().to_path_buf(),
            format: "JSON",
            problem: format!("line {}: {problem}", self.line),
        }
    }

    /// The next byte that is not white space; `None` at the end of the file.
    pub(super) fn peek(&mut self) -> Result<Option<u8>> {
        if !std::mem::replace(&mut self.started, true) && self.input.peek(3)? == b"\xEF\xBB\xBF" {
            self.input.consume(3);
        }
        loop {
            let chunk = match self.input.fill_buf() {
                Ok(chunk) => chunk,
                Err(error) => return Err(self.input.failed(error)),
            };
            if chunk.is_empty() {
                return Ok(None);
            }
            let at = chunk.iter().position(|byte| !is_space(*byte));
            let blank = chunk.get(..at.unwrap_or(chunk.len())).unwrap_or_default();
            self.line += breaks(blank);
            let found = at.and_then(|at| chunk.get(at)).copied();
            let blank = blank.len();
            self.input.consume(blank);
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    /// The next byte that is not white space, which is taken, is `expected`.
    fn expect(&mut self, expected: u8) -> Result<()> {
        let found = self.peek()?;
        if found == Some(expected) {
            self.input.consume(1);
            return Ok(());
        }
        Err(self.failed(format!("expected {:?}, got {}", char::from(expected), name(found))))
    }

    /// Goes into a list (`[`) or an object (`{`).
    pub(super) fn enter(&mut self, open: u8) -> Result<()> {
        self.expect(open)?;
        self.entered.push((closing(open), false));
        Ok(())
    }

    /// Whether the list or object that was entered last has something more; if not, it is left.
    pub(super) fn next_element(&mut self) -> Result<bool> {
        let Some((close, any)) = self.entered.last().copied() else { return Ok(false) };
        let found = self.peek()?;
        if found == Some(close) {
            self.input.consume(1);
            self.entered.pop();
            return Ok(false);
        }
        if any {
            if found != Some(b',') {
                let close = char::from(close);
                return Err(self.failed(format!("expected ',' or {close:?}, got {}", name(found))));
            }
            self.input.consume(1);
        } else if let Some(last) = self.entered.last_mut() {
            last.1 = true;
        }
        Ok(true)
    }

    /// The name of the next field of the object that was entered last; if there is none, the object is left.
    pub(super) fn next_key(&mut self) -> Result<Option<String>> {
        if !self.next_element()? {
            return Ok(None);
        }
        let found = self.peek()?;
        if found != Some(b'"') {
            return Err(self.failed(format!("expected the name of a field, got {}", name(found))));
        }
        let mut key = Vec::new();
        self.scan(Some((&mut key, MAX_KEY)))?;
        let key = serde_json::from_slice(&key)
            .map_err(|_| self.failed("the name of a field is no string of JSON, or too long"))?;
        self.expect(b':')?;
        Ok(Some(key))
    }

    /// The value that comes next.
    pub(super) fn value(&mut self) -> Result<RawValue> {
        self.peek()?;
        let line = self.line;
        let mut bytes = Vec::new();
        let limit = self.limit;
        self.scan(Some((&mut bytes, limit)))?;
        Ok(RawValue { bytes: (bytes.len() <= limit).then_some(bytes), line })
    }

    /// Passes over the value that comes next.
    pub(super) fn skip_value(&mut self) -> Result<()> {
        self.scan(None)
    }

    /// Reads the rest of the document, to see that it is whole.
    pub(super) fn finish(&mut self) -> Result<()> {
        while let Some((close, _)) = self.entered.last().copied() {
            let more = if close == b'}' { self.next_key()?.is_some() } else { self.next_element()? };
            if more {
                self.skip_value()?;
            }
        }
        match self.peek()? {
            None => Ok(()),
            found => Err(self.failed(format!("expected the end of the file, got {}", name(found)))),
        }
    }

    /// Reads one value, of which up to one byte more than a limit is kept.
    fn scan(&mut self, mut keep: Option<(&mut Vec<u8>, usize)>) -> Result<()> {
        let start = self.peek()?;
        if matches!(start, None | Some(b',' | b':' | b']' | b'}')) {
            return Err(self.failed(format!("expected a value, got {}", name(start))));
        }
        let first_line = self.line;
        let mut scanner = Scanner::default();
        loop {
            let chunk = match self.input.fill_buf() {
                Ok(chunk) => chunk,
                Err(error) => return Err(self.input.failed(error)),
            };
            if chunk.is_empty() {
                if scanner.is_scalar() {
                    return Ok(());
                }
                return Err(
                    self.failed(format!("the file ends within a value that starts on line {first_line}"))
                );
            }
            let (used, end) = scanner.advance(chunk);
            let used_bytes = chunk.get(..used).unwrap_or_default();
            if let Some((bytes, limit)) = &mut keep {
                let room = limit.saturating_add(1).saturating_sub(bytes.len());
                bytes.extend_from_slice(used_bytes.get(..room).unwrap_or(used_bytes));
            }
            self.line += breaks(used_bytes);
            self.input.consume(used);
            match end {
                Some(Ok(())) => return Ok(()),
                Some(Err(problem)) => return Err(self.failed(problem)),
                None => {}
            }
        }
    }
}

/// Finds the end of one value.
#[derive(Default)]
struct Scanner {
    /// How the lists and objects that are open end.
    open: Vec<u8>,
    in_string: bool,
    escaped: bool,
    /// Whether any byte of the value was seen.
    begun: bool,
}

impl Scanner {
    /// Whether the value is a number or a word, which ends with the file at the latest.
    fn is_scalar(&self) -> bool {
        self.open.is_empty() && !self.in_string
    }

    /// How many of the bytes belong to the value, and whether it ends with them.
    fn advance(&mut self, chunk: &[u8]) -> (usize, Option<Result<(), String>>) {
        for (at, &byte) in chunk.iter().enumerate() {
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => {
                        self.in_string = false;
                        if self.open.is_empty() {
                            return (at + 1, Some(Ok(())));
                        }
                    }
                    _ => {}
                }
                continue;
            }
            let begun = std::mem::replace(&mut self.begun, true);
            match byte {
                // A number or a word ends before what cannot belong to it.
                b',' | b':' | b'}' | b']' | b'"' | b'{' | b'[' if begun && self.open.is_empty() => {
                    return (at, Some(Ok(())));
                }
                _ if begun && self.open.is_empty() && is_space(byte) => {
                    return (at, Some(Ok(())));
                }
                b'"' => self.in_string = true,
                b'{' | b'[' if self.open.len() == MAX_DEPTH => {
                    return (
                        at,
                        Some(Err(format!("more than {MAX_DEPTH} lists and objects in one another"))),
                    );
                }
                b'{' | b'[' => self.open.push(closing(byte)),
                b'}' | b']' => {
                    let expected = self.open.pop();
                    if let Some(expected) = expected.filter(|expected| *expected != byte) {
                        let (expected, found) = (char::from(expected), char::from(byte));
                        return (at, Some(Err(format!("expected {expected:?}, got {found:?}"))));
                    }
                    if self.open.is_empty() {
                        return (at + 1, Some(Ok(())));
                    }
                }
                _ => {}
            }
        }
        (chunk.len(), None)
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

fn closing(open: u8) -> u8 {
    if open == b'{' { b'}' } else { b']' }
}

fn breaks(bytes: &[u8]) -> u64 {
    bytes.split(|byte| *byte == b'\n').skip(1).count() as u64
}

fn name(byte: Option<u8>) -> String {
    match byte {
        None => "the end of the file".to_owned(),
        Some(byte) if byte.is_ascii_graphic() => format!("{:?}", char::from(byte)),
        Some(byte) => format!("the byte {byte}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn stream(bytes: &[u8]) -> JsonStream {
        JsonStream::new(Input::of(bytes), 1 << 20)
    }

    fn elements(bytes: &[u8]) -> Result<Vec<Value>> {
        let mut stream = stream(bytes);
        stream.enter(b'[')?;
        let mut values = Vec::new();
        while stream.next_element()? {
            let bytes = stream.value()?.bytes.unwrap_or_default();
            values.push(serde_json::from_slice(&bytes).map_err(|error| stream.failed(error))?);
        }
        stream.finish()?;
        Ok(values)
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[ -~é\"\\\\\n{}\\[\\],:]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map("[a-z\"\\\\{]{0,3}", inner, 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn the_elements_of_any_list_are_found(values in proptest::collection::vec(any_json(), 0..6), pretty in any::<bool>()) {
            let list = Value::Array(values.clone());
            let bytes = if pretty { serde_json::to_vec_pretty(&list) } else { serde_json::to_vec(&list) }.unwrap();
            prop_assert_eq!(elements(&bytes).unwrap(), values);
            // Cut anywhere, it is no longer a list.
            for end in 0..bytes.len() {
                prop_assert!(elements(&bytes[..end]).is_err());
            }
        }

        #[test]
        fn any_bytes_give_elements_or_an_error(bytes in proptest::collection::vec(
            prop_oneof![any::<u8>(), Just(b'['), Just(b'{'), Just(b'"'), Just(b','), Just(b']'), Just(b'}')], 0..48,
        )) {
            let mut list = vec![b'['];
            list.extend(bytes);
            let parsed: std::result::Result<Vec<Value>, _> = serde_json::from_slice(&list);
            match elements(&list) {
                Ok(values) => prop_assert_eq!(values, parsed.unwrap()),
                Err(_) => prop_assert!(parsed.is_err()),
            }
        }
    }

    #[test]
    fn fields_are_named_and_lines_counted() {
        let mut stream = stream(b"\xEF\xBB\xBF\n{\"a\\u0062\" : 12,\n\"c\":[1,\n2], \"d\": \"x\"}\n");
        stream.enter(b'{').unwrap();
        assert_eq!(stream.next_key().unwrap().as_deref(), Some("ab"));
        let value = stream.value().unwrap();
        assert_eq!((value.bytes.as_deref(), value.line), (Some(&b"12"[..]), 2));
        assert_eq!(stream.next_key().unwrap().as_deref(), Some("c"));
        stream.skip_value().unwrap();
        assert_eq!(stream.next_key().unwrap().as_deref(), Some("d"));
        assert_eq!(stream.value().unwrap().line, 4);
        assert_eq!(stream.next_key().unwrap(), None);
        stream.finish().unwrap();
    }

    #[test]
    fn a_value_longer_than_the_limit_is_passed_over() {
        let long = format!("[\"{}\", 1]", "x".repeat(200_000));
        let mut stream = JsonStream::new(Input::of(long.as_bytes()), 10);
        stream.enter(b'[').unwrap();
        assert!(stream.next_element().unwrap() && stream.value().unwrap().bytes.is_none());
        assert!(stream.next_element().unwrap());
        assert_eq!(stream.value().unwrap().bytes.unwrap(), b"1");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, expected) in [
            ("[1 2]", "line 1: expected ',' or ']', got '2'"),
            ("[1,\n]", "line 2: expected a value, got ']'"),
            ("[{\"a\": [1}]", "line 1: expected ']', got '}'"),
            ("[\n{\"a\": \"", "line 2: the file ends within a value that starts on line 2"),
            ("[1", "line 1: expected ',' or ']', got the end of the file"),
            ("[1] 2", "line 1: expected the end of the file, got '2'"),
            ("{}", "line 1: expected '[', got '{'"),
        ] {
            let error = elements(text.as_bytes()).unwrap_err().to_string();
            assert!(error.ends_with(&format!("cannot be read as JSON: {expected}")), "{text}: {error}");
        }
        let deep = "[".repeat(200);
        assert!(elements(deep.as_bytes()).unwrap_err().to_string().contains("more than 128 lists"));
        assert_eq!(elements(json!([[], {}, null]).to_string().as_bytes()).unwrap().len(), 3);
    }
}
