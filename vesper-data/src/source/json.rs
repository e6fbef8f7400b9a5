//! A JSON document: a list of records, or one that is somewhere in it.

use super::format::{Context, FileDocuments, Format};
use super::input::Input;
use super::json_stream::JsonStream;
use super::settings::too_long;
use super::{Document, FieldPath, field, record};
use crate::error::{DataError, Place, Result};

/// A list of records; or an object with such a list at the path of the setting `records`; or one record.
///
/// It is read element by element.
pub(super) struct Json;

impl Format for Json {
    fn name(&self) -> &'static str {
        "json"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["json"]
    }

    fn open(&self, input: Input, context: &Context) -> Result<FileDocuments> {
        let stream = JsonStream::new(input, context.settings.max_record());
        let mut reader = Elements { stream, context: context.clone(), number: 0, state: State::Start };
        Ok(Box::new(std::iter::from_fn(move || reader.next_document().transpose())))
    }
}

enum State {
    Start,
    /// Within the list.
    List,
    /// The document is the one record, and whether that is an object.
    Single(bool),
    Done,
}

struct Elements {
    stream: JsonStream,
    context: Context,
    /// The number of the element that was read last, from 1.
    number: u64,
    state: State,
}

impl Elements {
    fn next_document(&mut self) -> Result<Option<Document>> {
        loop {
            match self.state {
                State::Start => self.state = self.start()?,
                State::Done => return Ok(None),
                State::List if !self.stream.next_element()? => {
                    self.state = State::Done;
                    self.stream.finish()?;
                }
                State::List => {
                    if let Some(document) = self.record()? {
                        return Ok(Some(document));
                    }
                }
                State::Single(object) => {
                    self.state = State::Done;
                    let document = self.record().map_err(|error| if object { hint(error) } else { error });
                    // A broken record is one whether or not more comes behind it.
                    self.stream.finish()?;
                    return document;
                }
            }
        }
    }

    /// Goes to the list of records.
    fn start(&mut self) -> Result<State> {
        let records = self.context.settings.records.clone();
        let found = self.stream.peek()?;
        match (found, records) {
            (None, _) => Ok(State::Done),
            (Some(b'['), None) => {
                self.stream.enter(b'[')?;
                Ok(State::List)
            }
            (found, None) => Ok(State::Single(found == Some(b'{'))),
            (_, Some(path)) => {
                self.go_to(&path)?;
                Ok(State::List)
            }
        }
    }

    fn go_to(&mut self, path: &FieldPath) -> Result<()> {
        let mut place = String::new();
        let steps = path.steps();
        for step in &steps {
            if self.stream.peek()? != Some(b'{') {
                let what = if place.is_empty() { "the document".to_owned() } else { format!("{place:?}") };
                return Err(self.stream.failed(format!("{what} is no object with {step:?}")));
            }
            self.stream.enter(b'{')?;
            let mut others = Vec::new();
            loop {
                match self.stream.next_key()? {
                    Some(key) if key == *step => break,
                    Some(key) => {
                        self.stream.skip_value()?;
                        if others.len() < 9 {
                            others.push(key);
                        }
                    }
                    None => {
                        let others = others.iter().map(String::as_str);
                        let within = if place.is_empty() { String::new() } else { format!(" of {place:?}") };
                        return Err(self.stream.failed(field::no_field(step, &within, others)));
                    }
                }
            }
            place = if place.is_empty() { step.to_string() } else { format!("{place}.{step}") };
        }
        if self.stream.peek()? != Some(b'[') {
            return Err(self.stream.failed(format!("{place:?} is no list of records")));
        }
        self.stream.enter(b'[')
    }

    fn record(&mut self) -> Result<Option<Document>> {
        let value = self.stream.value()?;
        self.number += 1;
        let place = || Place::Record { number: self.number, line: value.line };
        let path = self.stream.input().path();
        let limit = self.context.settings.max_record();
        value
            .bytes
            .ok_or_else(|| too_long("record", limit))
            .and_then(|bytes| record::parse(&bytes, Some(value.line)))
            .and_then(|record| record::document(&record, &self.context, path, place))
            .map_err(|problem| DataError::Record { path: path.to_path_buf(), place: place(), problem })
    }
}

/// Where the whole document is the one record: what it may be instead.
fn hint(error: DataError) -> DataError {
    match error {
        DataError::Record { path, place, problem } => {
            let problem = format!("{problem}; the setting \"records\" names a list within the document");
            DataError::Record { path, place, problem }
        }
        other => other,
    }
}
