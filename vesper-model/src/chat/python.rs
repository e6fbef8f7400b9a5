//! What `transformers` gives to a template, as Python does it.

use std::fmt::Write as _;
use std::io;

use chrono::{Local, NaiveDateTime};
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, escape_formatter};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// The text of `raise_exception`, to be told from a mistake in the template.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// Adds what is there beside Jinja's own: `raise_exception`, `strftime_now`, `tojson`, and the methods of Python's
/// strings, lists and dictionaries.
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(format);
    environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text.clone()).with_source(Raised(text)))
    });
    environment.add_function("strftime_now", |format: &str| strftime(&Local::now().naive_local(), format));
    environment.add_filter("tojson", to_json);
}

/// Python writes `True`, `False` and `None` with capitals.
fn format(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    let text = if value.is_none() {
        "None"
    } else {
        match (value.kind(), value.is_true()) {
            (ValueKind::Bool, true) => "True",
            (ValueKind::Bool, false) => "False",
            _ => return escape_formatter(out, state, value),
        }
    };
    out.write_str(text).map_err(Error::from)
}

/// A time as `datetime.strftime` writes it.
fn strftime(time: &NaiveDateTime, format: &str) -> Result<String, Error> {
    let mut text = String::new();
    // An unknown letter after the % is an error of the writing.
    write!(text, "{}", time.format(format)).map_err(|_| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know the format `{format}`"))
    })?;
    Ok(text)
}

/// `json.dumps(value, ensure_ascii=False, indent=None)`: not Jinja's own filter, which writes for HTML.
#[allow(clippy::needless_pass_by_value, reason = "a filter gets its options by value")]
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(64));
            value.serialize(&mut Serializer::with_formatter(
                &mut bytes,
                PrettyFormatter::with_indent(spaces.as_bytes()),
            ))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, OneLine)),
    };
    let failed = |reason: String| Error::new(ErrorKind::BadSerialization, reason);
    written.map_err(|error| failed(error.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|error| failed(error.to_string()))?;
    Ok(if ascii == Some(true) { escaped(&text) } else { text })
}

/// Only the strings of JSON hold other characters than ASCII, so that all of the text can be treated alike.
fn escaped(json: &str) -> String {
    let mut text = String::new();
    for c in json.chars() {
        if c.is_ascii() {
            text.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(text, "\\u{unit:04x}"); // a String takes everything
            }
        }
    }
    text
}

/// JSON in one line, with a space after each comma and colon.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_python_writes_them() {
        let time = chrono::NaiveDate::from_ymd_opt(2024, 3, 5).unwrap().and_hms_opt(7, 8, 9).unwrap();
        for (format, text) in [
            ("%d %b %Y", "05 Mar 2024"),
            ("%Y-%m-%d", "2024-03-05"),
            ("%H:%M:%S %A", "07:08:09 Tuesday"),
            ("100 %%", "100 %"),
        ] {
            assert_eq!(strftime(&time, format).unwrap(), text);
        }
        let error = strftime(&time, "%Q").unwrap_err().to_string();
        assert!(error.contains("`%Q`"), "{error}");
    }
}
