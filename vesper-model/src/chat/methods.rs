//! Methods of Python's strings, lists and dictionaries beside those that `minijinja-contrib` has.

use minijinja::value::{Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Calls a method of a value.
pub(super) fn call(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let found = match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => of_text(text, method, args)?,
        (ValueKind::Map, _) if method == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        (ValueKind::Seq, _) if method == "index" => {
            let (item,): (Value,) = from_args(args)?;
            let place = value.try_iter()?.position(|other| other == item);
            Some(place.map(Value::from).ok_or_else(|| missing("list"))?)
        }
        _ => None,
    };
    match found {
        Some(result) => Ok(result),
        None => unknown_method_callback(state, value, method, args),
    }
}

fn of_text(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "partition" | "rpartition" => {
            let (by,): (&str,) = from_args(args)?;
            let last = method == "rpartition";
            let parts = match if last { text.rsplit_once(by) } else { text.split_once(by) } {
                Some((before, after)) => [before, by, after],
                None if last => ["", "", text],
                None => [text, "", ""],
            };
            Tuple::from(parts.map(Value::from)).into()
        }
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(args)?;
            let at = if method == "index" { text.find(part) } else { text.rfind(part) };
            let before = at.and_then(|at| text.get(..at)).ok_or_else(|| missing("text"))?;
            before.chars().count().into()
        }
        "rsplit" => {
            let (by, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most = most.and_then(|most| usize::try_from(most).ok());
            match by {
                Some(by) => {
                    let mut parts: Vec<&str> =
                        text.rsplitn(most.map_or(usize::MAX, |most| most.saturating_add(1)), by).collect();
                    parts.reverse();
                    parts.into_iter().map(Value::from).collect()
                }
                None if most.is_none() => text.split_whitespace().map(Value::from).collect(),
                None => return Ok(None),
            }
        }
        _ => return Ok(None),
    }))
}

fn missing(within: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("index: not in the {within}"))
}
