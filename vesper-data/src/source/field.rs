//! Paths into records.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{DataError, Result};

/// Where in a record something is.
///
/// The names of the fields on the way, with dots between them: `text`, `page.body`. Names that hold dots are written
/// as a JSON pointer (RFC 6901): `/data.v1/body`, with `~1` for a slash in a name and `~0` for a tilde. A field of the
/// record whose name is the whole path is taken before the path is cut.
///
/// A list on the way stands for all of its elements, whose texts are joined with line breaks: `parts.text` takes the
/// field `text` of each element of `parts`. A number picks one element, from 0: `parts.0.text`.
///
/// # Examples
///
/// ```
/// use vesper_data::{ReadSettings, Sources};
///
/// # let folder = tempfile::tempdir()?;
/// # let file = folder.path().join("a.jsonl");
/// std::fs::write(&file, r#"{"parts": [{"text": "Un."}, {"text": "Deux."}], "id.fr": "x"}"#)?;
/// let read = |path: &str| -> vesper_data::Result<String> {
///     let settings = ReadSettings::default().with_text(path);
///     let mut documents = Sources::new([&file]).with_settings(settings).documents()?;
///     documents.next().map_or(Ok(String::new()), |document| Ok(document?.text))
/// };
/// assert_eq!(read("parts.text")?, "Un.\nDeux.");
/// assert_eq!(read("/parts/1/text")?, "Deux.");
/// assert_eq!(read("id.fr")?, "x");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FieldPath(String);

impl<T: Into<String>> From<T> for FieldPath {
    fn from(path: T) -> Self {
        Self(path.into())
    }
}

impl std::fmt::Display for FieldPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl FieldPath {
    /// The path as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(super) fn validate(&self, setting: &'static str) -> Result<()> {
        if self.steps().iter().any(|step| step.is_empty()) {
            return Err(DataError::Config {
                name: setting,
                got: format!("{:?}", self.0),
                expected: "names of fields like text, page.body or /page/body",
            });
        }
        Ok(())
    }

    /// The names on the way.
    pub(super) fn steps(&self) -> Vec<Cow<'_, str>> {
        match self.0.strip_prefix('/') {
            Some(pointer) => pointer.split('/').map(unescape).collect(),
            None => self.0.split('.').map(Cow::Borrowed).collect(),
        }
    }

    /// The names on the way, in a record for which `has` tells the fields.
    pub(super) fn steps_in(&self, has: impl FnOnce(&str) -> bool) -> Vec<Cow<'_, str>> {
        if has(&self.0) { vec![Cow::Borrowed(&self.0)] } else { self.steps() }
    }

    /// The text at this path of `record`, or what is there instead.
    pub(super) fn text(&self, record: &Value) -> Result<String, String> {
        let steps = self.steps_in(|name| record.get(name).is_some());
        let mut texts = Vec::new();
        collect(record, &steps, "", &mut texts)?;
        Ok(texts.join("\n"))
    }

    /// The value at this path of `record`, and what is there instead if that is nothing.
    pub(super) fn get<'v>(&self, record: &'v Value) -> Result<&'v Value, String> {
        let mut value = record;
        let mut place = String::new();
        for step in self.steps_in(|name| record.get(name).is_some()) {
            value = match value {
                Value::Object(fields) => fields.get(&*step),
                Value::Array(items) => step.parse::<usize>().ok().and_then(|index| items.get(index)),
                _ => None,
            }
            .ok_or_else(|| missing(value, &place, &step))?;
            place = join(&place, &step);
        }
        Ok(value)
    }
}

/// Collects the strings at the end of `steps` from `value`, which stands at `place`.
fn collect<'v>(
    value: &'v Value,
    steps: &[Cow<'_, str>],
    place: &str,
    texts: &mut Vec<&'v str>,
) -> Result<(), String> {
    match (value, steps) {
        (Value::String(text), []) => texts.push(text),
        (Value::Array(items), _) => {
            if let Some((step, rest)) = steps.split_first()
                && let Ok(at) = step.parse::<usize>()
            {
                let item = items.get(at).ok_or_else(|| missing(value, place, step))?;
                return collect(item, rest, &join(place, step), texts);
            }
            for (at, item) in items.iter().enumerate() {
                collect(item, steps, &join(place, &at.to_string()), texts)?;
            }
        }
        (other, []) => return Err(format!("{place:?} is {}, expected a string", kind(other))),
        (_, [step, rest @ ..]) => {
            let item = value.get(&**step).ok_or_else(|| missing(value, place, step))?;
            collect(item, rest, &join(place, step), texts)?;
        }
    }
    Ok(())
}

/// That `value`, which stands at `place`, has no `step`.
fn missing(value: &Value, place: &str, step: &str) -> String {
    let name = join(place, step);
    let within = if place.is_empty() { String::new() } else { format!(" of {place:?}") };
    match value {
        Value::Object(fields) => no_field(&name, &within, fields.keys().map(String::as_str)),
        Value::Array(items) => {
            let count = items.len();
            format!("the element {name:?} is missing (the list{within} has {count})")
        }
        other if place.is_empty() => format!("expected an object with {name:?}, got {}", kind(other)),
        other => format!("{place:?} is {}, expected an object with {step:?}", kind(other)),
    }
}

/// That there is no field `name` among `fields`.
pub(super) fn no_field<'a>(name: &str, within: &str, fields: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 8;
    let mut fields: Vec<&str> = fields.collect();
    fields.sort_unstable();
    let more = if fields.len() > SHOWN { ", ..." } else { "" };
    let shown: Vec<String> = fields.iter().take(SHOWN).map(|field| format!("{field:?}")).collect();
    match shown.len() {
        0 if within.is_empty() => format!("the field {name:?} is missing (it has no fields)"),
        0 => format!("the field {name:?} is missing (there are no fields{within})"),
        _ => format!("the field {name:?} is missing (the fields{within} are: {}{more})", shown.join(", ")),
    }
}

fn join(place: &str, step: &str) -> String {
    if place.is_empty() { step.to_owned() } else { format!("{place}.{step}") }
}

fn unescape(step: &str) -> Cow<'_, str> {
    if step.contains('~') {
        Cow::Owned(step.replace("~1", "/").replace("~0", "~"))
    } else {
        Cow::Borrowed(step)
    }
}

/// What a value is, for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn take(path: &str, record: &Value) -> Result<String, String> {
        FieldPath::from(path).text(record)
    }

    #[test]
    fn a_path_leads_through_objects_and_lists() {
        let record = json!({
            "a": {"b": "1", "c": ["2", "3"], "d": [{"e": "4"}, {"e": "5"}], "f": []},
            "a.b": "whole", "x/y": {"~": "6"},
        });
        for (path, expected) in [
            ("a.b", "whole"),
            ("/a/b", "1"),
            ("a.c", "2\n3"),
            ("a.c.1", "3"),
            ("a.d.e", "4\n5"),
            ("/a/d/0/e", "4"),
            ("a.f", ""),
            ("/x~1y/~0", "6"),
        ] {
            assert_eq!(take(path, &record).unwrap(), expected, "{path}");
        }
    }

    #[test]
    fn what_is_not_there_is_named_with_what_is() {
        let record = json!({"a": {"b": null, "c": [{"d": 1}, {"d": "x"}]}, "e": true});
        for (path, expected) in [
            ("x", "the field \"x\" is missing (the fields are: \"a\", \"e\")"),
            ("a.x", "the field \"a.x\" is missing (the fields of \"a\" are: \"b\", \"c\")"),
            ("a.b", "\"a.b\" is null, expected a string"),
            ("a.b.x", "\"a.b\" is null, expected an object with \"x\""),
            ("a.c.d", "\"a.c.0.d\" is a number, expected a string"),
            ("a.c.7", "the element \"a.c.7\" is missing (the list of \"a.c\" has 2)"),
            ("e", "\"e\" is a boolean, expected a string"),
        ] {
            assert_eq!(take(path, &record).unwrap_err(), expected);
            if let Ok(value) = FieldPath::from(path).get(&record) {
                assert!(!value.is_string(), "{path}");
            }
        }
        assert_eq!(take("x", &json!([])).unwrap(), "");
        assert_eq!(take("x", &json!(7)).unwrap_err(), "expected an object with \"x\", got a number");
    }
}
