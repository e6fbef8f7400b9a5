//! What `transformers` gives to a template, as Python does it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;

use chrono::{Local, NaiveDateTime};
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, escape_formatter};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use super::methods;

/// The text of `raise_exception`, to be told from a mistake in the template.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// Adds what is there beside Jinja's own: `raise_exception`, `strftime_now`, `tojson`, and the methods of Python's
/// strings, lists and dictionaries.
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(methods::call);
    // As Python has it: None has no elements, and what has a length and places is a sequence, text too.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        let text_or_map = matches!(value.kind(), ValueKind::String | ValueKind::Map | ValueKind::Undefined);
        text_or_map || value.kind() == ValueKind::Seq
    });
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

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`: not Jinja's own filter, which
/// writes for HTML. Separators count where there is no indent.
#[allow(clippy::needless_pass_by_value, reason = "a filter gets its options by value")]
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let value = if sorted == Some(true) { &sorted_keys(value)? } else { value };
    let [item, key] = separators
        .map_or(Ok([", ".into(), ": ".into()]), <[String; 2]>::try_from)
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, "tojson: separators are two texts"))?;
    let mut bytes = Vec::new();
    let written = match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(64));
            value.serialize(&mut Serializer::with_formatter(
                &mut bytes,
                PrettyFormatter::with_indent(spaces.as_bytes()),
            ))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, OneLine { item, key })),
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

/// The same value with the keys of its objects in order.
fn sorted_keys(value: &Value) -> Result<Value, Error> {
    Ok(match value.kind() {
        ValueKind::Map => {
            let pairs = value.try_iter()?.map(|key| {
                let item = sorted_keys(&value.get_item(&key)?)?;
                Ok((key.to_string(), item))
            });
            Value::from(pairs.collect::<Result<BTreeMap<_, _>, Error>>()?)
        }
        ValueKind::Seq => {
            value.try_iter()?.map(|item| sorted_keys(&item)).collect::<Result<Vec<_>, _>>()?.into()
        }
        _ => value.clone(),
    })
}

/// JSON in one line, with what stands between elements, and between a key and its value.
struct OneLine {
    item: String,
    key: String,
}

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.item.as_bytes()) }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.item.as_bytes()) }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.key.as_bytes())
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
