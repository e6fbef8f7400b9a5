//! Fields of a configuration, each with the error that it is not what it should be.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::PATTERN_FRAME;
use crate::targets::Pattern;
use crate::{Error, Result};

/// The fields of a file.
pub(super) struct Reader<'a> {
    pub(super) path: &'a Path,
    pub(super) fields: &'a Map<String, Value>,
}

impl Reader<'_> {
    pub(super) fn flag(&self, field: &str) -> Result<bool> {
        match self.fields.get(field) {
            Some(Value::Bool(flag)) => Ok(*flag),
            None | Some(Value::Null) => Ok(false),
            other => Err(self.wrong(field, "true or false", other)),
        }
    }

    pub(super) fn number(&self, field: &str) -> Result<f64> {
        let value = self.fields.get(field);
        value.and_then(Value::as_f64).ok_or_else(|| self.wrong(field, "a number", value))
    }

    pub(super) fn rank(&self, field: &str) -> Result<usize> {
        self.rank_value(field, self.fields.get(field))
    }

    pub(super) fn rank_value(&self, field: &str, value: Option<&Value>) -> Result<usize> {
        let r = value.and_then(Value::as_u64).and_then(|r| usize::try_from(r).ok()).filter(|r| *r > 0);
        r.ok_or_else(|| self.wrong(field, "a whole number from 1 on", value))
    }

    pub(super) fn alpha_value(&self, field: &str, value: Option<&Value>) -> Result<f64> {
        let alpha = value.and_then(Value::as_f64).filter(|a| a.is_finite() && *a != 0.0);
        alpha.ok_or_else(|| self.wrong(field, "a number other than 0", value))
    }

    pub(super) fn names(&self, field: &str, value: &Value) -> Result<Vec<String>> {
        let items = match value {
            Value::Null => Some(Vec::new()),
            Value::Array(items) => items.iter().map(|item| item.as_str().map(str::to_owned)).collect(),
            _ => None,
        };
        items.ok_or_else(|| self.wrong(field, "a list of names", Some(value)))
    }

    pub(super) fn pattern(&self, field: &str, key: &str) -> Result<Pattern> {
        Pattern::new(field, key, PATTERN_FRAME)
            .map_err(|_| self.unsupported(field, &json!(key), "it cannot be read as a regular expression"))
    }

    pub(super) fn wrong(&self, field: &str, expected: &str, value: Option<&Value>) -> Error {
        let got = value.map_or("nothing".into(), Value::to_string);
        self.format(format!("{field}: expected {expected}, got {got}"))
    }

    pub(super) fn format(&self, message: String) -> Error {
        Error::Format { path: self.path.to_owned(), message }
    }

    pub(super) fn unsupported(&self, field: &str, value: &Value, reason: &'static str) -> Error {
        Error::Unsupported {
            path: self.path.to_owned(),
            field: field.to_owned(),
            value: value.to_string(),
            reason,
        }
    }
}

pub(super) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}
