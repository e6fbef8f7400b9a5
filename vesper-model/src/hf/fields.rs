//! The fields of someone else's `config.json`, with errors that name them.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::invalid;
use crate::generate::OneOrMany;
use crate::{ModelError, Result};

/// A JSON object of a file, or one inside of it.
pub(super) struct Fields<'a> {
    pub(super) path: &'a Path,
    map: &'a Map<String, Value>,
    /// The field that the object is the value of, with a dot; empty for the whole file.
    within: String,
}

impl<'a> Fields<'a> {
    pub(super) fn new(path: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self { path, map, within: String::new() }
    }

    /// The object that is the value of a field; one that is empty says nothing, as in Python.
    pub(super) fn object(&self, key: &str) -> Result<Option<Fields<'a>>> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Self { path: self.path, map, within: format!("{}{key}.", self.within) }))
            }
            Some(_) => Err(self.refusal(key, "expected an object")),
        }
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// A field that is absent or null is `None`.
    pub(super) fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value.clone())
                .map(Some)
                .map_err(|error| self.refusal(key, &error.to_string())),
        }
    }

    pub(super) fn require<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        self.get(key)?.ok_or_else(|| invalid(self.path, format!("{}{key} is missing", self.within)))
    }

    /// What is wrong with the value of a field.
    pub(super) fn refusal(&self, key: &str, why: &str) -> ModelError {
        let value = self.map.get(key).unwrap_or(&Value::Null);
        invalid(self.path, format!("{}{key} is {value}: {why}", self.within))
    }

    /// `transformers` gives the beginning and end of text a default id, which an explicit null removes.
    pub(super) fn token(&self, key: &str, default: Option<u32>) -> Result<Option<u32>> {
        if !self.has(key) {
            return Ok(default);
        }
        Ok(self.get::<OneOrMany>(key)?.map(Vec::from).and_then(|ids| ids.first().copied()))
    }
}
