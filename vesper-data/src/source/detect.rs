//! Which format a file has, by its name and its first bytes.

use std::path::Path;

use serde::de::IgnoredAny;

use super::FormatKind;
use super::dialogue::is_turn;
use super::input::Input;
use super::json_stream::JsonStream;
use crate::error::{DataError, Result};

/// How much of a text, and of a JSON document, is looked at.
const PEEK_TEXT: usize = 1 << 16;
const PEEK_JSON: usize = 1 << 20;

/// The extension in lower case, with that of a compression left out: `jsonl` of `a.JSONL.gz`.
fn extension(path: &Path) -> Option<String> {
    let lower = |path: &Path| Some(path.extension()?.to_str()?.to_ascii_lowercase());
    let outer = lower(path)?;
    if matches!(outer.as_str(), "gz" | "zst" | "zstd") {
        return lower(Path::new(path.file_stem()?));
    }
    Some(outer)
}

/// The formats that a file with this name can have.
fn named(path: &Path) -> impl Iterator<Item = FormatKind> {
    let extension = extension(path);
    FormatKind::ALL
        .iter()
        .copied()
        .filter(move |kind| extension.as_deref().is_some_and(|name| kind.extensions().contains(&name)))
}

/// Whether a file of a folder is read: if its name is that of `format`, or of any where that is `None`.
pub(super) fn is_data(path: &Path, format: Option<FormatKind>) -> bool {
    named(path).any(|kind| format.is_none_or(|format| format == kind))
}

/// All extensions of `format`, or of every one, for a message: ".txt, .md or .jsonl".
pub(super) fn extensions(format: Option<FormatKind>) -> String {
    let mut all: Vec<String> = Vec::new();
    for kind in FormatKind::ALL.iter().filter(|kind| format.is_none_or(|format| format == **kind)) {
        for extension in kind.extensions().iter().map(|extension| format!(".{extension}")) {
            if !all.contains(&extension) {
                all.push(extension);
            }
        }
    }
    match all.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => all.concat(),
    }
}

/// The format of a file, of which nothing was read yet.
pub(super) fn format(input: &mut Input, set: Option<FormatKind>) -> Result<FormatKind> {
    let kind = match set {
        Some(kind) => kind,
        None => by_content(input)?,
    };
    if let (FormatKind::Parquet, Some(compression)) = (kind, input.compression()) {
        return Err(DataError::Unreadable {
            path: input.path().to_path_buf(),
            format: "parquet",
            problem: format!("the file as a whole is compressed ({compression}): decompress it first"),
        });
    }
    Ok(kind)
}

fn by_content(input: &mut Input) -> Result<FormatKind> {
    if input.peek(4)? == b"PAR1" {
        return Ok(FormatKind::Parquet);
    }
    let path = input.path().clone();
    let name = named(&path).next();
    Ok(match (name, extension(&path).as_deref()) {
        (Some(FormatKind::Text), Some("md")) => FormatKind::Text,
        (Some(FormatKind::Text), _) => {
            let start = input.peek(PEEK_TEXT)?;
            if is_dialogue(start) {
                FormatKind::Dialogue
            } else if looks_like_json(start) {
                // Records are no text, whatever the file is called.
                records(input.peek(PEEK_JSON)?).unwrap_or(FormatKind::Text)
            } else {
                FormatKind::Text
            }
        }
        // A name for lists of records, and for lines of them.
        (Some(FormatKind::Jsonl), Some("json")) => json(input.peek(PEEK_JSON)?).unwrap_or(FormatKind::Json),
        (Some(FormatKind::Jsonl), _) => {
            // Nearly always the first line is enough.
            if json(input.peek(PEEK_TEXT)?) == Some(FormatKind::Jsonl) {
                return Ok(FormatKind::Jsonl);
            }
            let start = input.peek(PEEK_JSON)?;
            match json(start) {
                Some(FormatKind::Squad) => FormatKind::Squad,
                Some(FormatKind::Json) if looks_like_json(start) && is_list(start) => FormatKind::Json,
                _ => FormatKind::Jsonl,
            }
        }
        (Some(kind), _) => kind,
        (None, _) => {
            let start = input.peek(PEEK_JSON)?;
            if is_dialogue(start) {
                FormatKind::Dialogue
            } else if looks_like_json(start) {
                json(start).unwrap_or(FormatKind::Jsonl)
            } else {
                FormatKind::Text
            }
        }
    })
}

/// Whether the first lines of a text all begin with the name of a speaker.
fn is_dialogue(start: &[u8]) -> bool {
    const LINES: usize = 4;
    let mut lines = without_mark(start)
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.trim_ascii().is_empty())
        .take(LINES)
        .map(|line| is_turn(&String::from_utf8_lossy(line)))
        .peekable();
    lines.peek().is_some() && lines.all(|turn| turn)
}

/// The format of what is without doubt records, and no text: two lines that are an object each, or questions on
/// paragraphs.
fn records(start: &[u8]) -> Option<FormatKind> {
    if is_list(start) {
        return None;
    }
    let is_object = |line: &[u8]| {
        line.trim_ascii_start().starts_with(b"{") && serde_json::from_slice::<IgnoredAny>(line).is_ok()
    };
    let mut lines =
        without_mark(start).split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
    if lines.next().is_some_and(is_object) && lines.next().is_some_and(is_object) {
        return Some(FormatKind::Jsonl);
    }
    json(start).filter(|kind| *kind == FormatKind::Squad)
}

fn without_mark(start: &[u8]) -> &[u8] {
    start.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(start)
}

fn is_list(start: &[u8]) -> bool {
    without_mark(start).trim_ascii_start().starts_with(b"[")
}

/// Whether a text begins as lists of records and objects do.
fn looks_like_json(start: &[u8]) -> bool {
    let start = without_mark(start).trim_ascii_start();
    let second = start.get(1..).unwrap_or_default().trim_ascii_start().first();
    match start.first() {
        Some(b'[') => second == Some(&b'{'),
        Some(b'{') => matches!(second, Some(b'"' | b'}')),
        _ => false,
    }
}

/// Which kind of JSON the start of a file is, if that can be said.
fn json(start: &[u8]) -> Option<FormatKind> {
    let mut stream = JsonStream::new(Input::of(start), 0);
    match stream.peek().ok()?? {
        b'[' => return Some(FormatKind::Json),
        b'{' => {}
        _ => return None,
    }
    stream.enter(b'{').ok()?;
    let first_line = stream.line();
    loop {
        let Ok(key) = stream.next_key() else {
            // It goes on behind what was looked at, or is no JSON.
            return (stream.line() > first_line).then_some(FormatKind::Json);
        };
        match key.as_deref() {
            // A second value behind the first.
            None => {
                let more = stream.peek().ok()?.is_some();
                return Some(if more { FormatKind::Jsonl } else { FormatKind::Json });
            }
            Some("data") if stream.peek().ok()? == Some(b'[') => {
                if is_articles(&mut stream).unwrap_or(false) {
                    return Some(FormatKind::Squad);
                }
                return Some(FormatKind::Json);
            }
            Some(_) => {
                if stream.skip_value().is_err() {
                    return (stream.line() > first_line).then_some(FormatKind::Json);
                }
            }
        }
    }
}

/// Whether the list that comes next is SQuAD's: its first element has paragraphs.
fn is_articles(stream: &mut JsonStream) -> Result<bool> {
    stream.enter(b'[')?;
    if !stream.next_element()? || stream.peek()? != Some(b'{') {
        return Ok(false);
    }
    stream.enter(b'{')?;
    while let Some(key) = stream.next_key()? {
        if key == "paragraphs" {
            return Ok(true);
        }
        stream.skip_value()?;
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kind(name: &str, bytes: &[u8]) -> FormatKind {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        format(&mut Input::open(&path).unwrap(), None).unwrap()
    }

    #[test]
    fn extensions_are_known_in_any_case_and_compressed() {
        let of = |name: &str| named(Path::new(name)).next();
        assert_eq!(of("A.TXT"), Some(FormatKind::Text));
        assert_eq!(of("a.b.JsonL"), Some(FormatKind::Jsonl));
        assert_eq!(of("a.jsonl.gz"), Some(FormatKind::Jsonl));
        assert_eq!(of("a.json.ZST"), Some(FormatKind::Jsonl));
        assert_eq!(of("a.parquet"), Some(FormatKind::Parquet));
        for name in ["txt", "gz", "a.gz", "a.tar.gz", "a.jpg", "a"] {
            assert_eq!(of(name), None, "{name}");
        }
        assert!(is_data(Path::new("a.json"), Some(FormatKind::Squad)));
        assert!(!is_data(Path::new("a.jsonl"), Some(FormatKind::Squad)));
        assert_eq!(extensions(None), ".txt, .text, .md, .jsonl, .ndjson, .json or .parquet");
        assert_eq!(extensions(Some(FormatKind::Parquet)), ".parquet");
    }

    #[test]
    fn content_decides_where_the_name_does_not() {
        use FormatKind::{Dialogue, Json, Jsonl, Parquet, Squad, Text};
        let squad = br#"{"version": "1.1", "data": [{"title": "a", "paragraphs": []}]}"#;
        for (name, bytes, expected) in [
            ("a.txt", &b"[speaker001:] oui\n\n[speaker002:] non"[..], Dialogue),
            ("a.txt", b"\xEF\xBB\xBF\r\n[a:] oui\r\n", Dialogue),
            ("a.txt", b"[a:] oui\nnon", Text),
            ("a.txt", b"[Illustration]\n", Text),
            ("a.txt", b"{\"text\": 1}", Text),
            ("a.md", b"[a:] oui", Text),
            ("a.txt", b"", Text),
            ("a.json", b"[1, 2]", Json),
            ("a.json", b" \n{\"a\": 1}", Json),
            ("a.json", b"{\"a\": 1}\n{\"a\": 2}\n", Jsonl),
            ("a.json", b"{\"data\": [{\"a\": 1}]}", Json),
            ("a.json", b"{\"data\": []}", Json),
            ("a.json", b"nonsense", Json),
            ("a.json", squad, Squad),
            ("a", squad, Squad),
            ("a.jsonl", squad, Squad),
            ("a.jsonl", b"[\n  {\"text\": \"a\"}\n]\n", Json),
            ("a.jsonl", b"[1, 2]\n[3]\n", Jsonl),
            ("a.jsonl", b"{\"text\": \"a\"}\n", Jsonl),
            ("a.jsonl", b"", Jsonl),
            ("a.txt", squad, Squad),
            ("a.txt", b"\xEF\xBB\xBF{\"text\": \"a\"}\r\n\r\n{\"text\": \"b\"}\r\n", Jsonl),
            ("a.txt", b"{\"text\": \"a\"}\n{a set}\n", Text),
            ("a.txt", b"[{\"text\": \"a\"}]", Text),
            ("a.md", b"{\"text\": \"a\"}\n{\"text\": \"b\"}", Text),
            ("a", b"{\"text\": \"a\"}", Json),
            ("a", b"{\n  \"text\": \"a", Json),
            ("a", b"{\"text\": \"a", Jsonl),
            ("a", b"{\"a\": 1} {\"a\": 2}", Jsonl),
            ("a", b"[ {\"text\": \"a\"}]", Json),
            ("a", b"[1900] an old book", Text),
            ("a", b"{x} a set", Text),
            ("a", b"[speaker001:] oui", Dialogue),
            ("a.txt", b"PAR1", Parquet),
            ("a.parquet", b"text", Parquet),
        ] {
            assert_eq!(kind(name, bytes), expected, "{name}: {}", String::from_utf8_lossy(bytes));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_have_a_format(bytes in proptest::collection::vec(any::<u8>(), 0..64), name in "a(\\.(txt|json))?") {
            let head = [b"{\"data\": [{", &bytes[..]].concat();
            for bytes in [bytes, head] {
                let compressed = bytes.starts_with(&[0x1F, 0x8B]) || bytes.starts_with(&[0x28, 0xB5]);
                prop_assume!(!compressed && bytes.first().is_none_or(|first| first & 0xF0 != 0x50));
                kind(&name, &bytes);
            }
        }
    }
}
