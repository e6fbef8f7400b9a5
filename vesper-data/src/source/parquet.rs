//! Apache Parquet: a table, of which only the columns that are needed are read, page by page.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Compression, ConvertedType};
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::field::no_field;
use super::format::{Context, FileDocuments, Format};
use super::input::Input;
use super::record::Layout;
use super::{Document, record};
use crate::error::{DataError, Place, Result, one_line};

/// How many values of a column are decoded at a time.
const BATCH: usize = 64;
/// The most of another crate's message that is shown: it may hold a whole text.
const MESSAGE: usize = 300;

/// A table with a row for each document.
pub(super) struct Parquet;

impl Format for Parquet {
    fn name(&self) -> &'static str {
        "parquet"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["parquet"]
    }

    fn open(&self, input: Input, context: &Context) -> Result<FileDocuments> {
        let path = input.path().clone();
        // The end of the file is read first: it says what is where.
        drop(input);
        let iter = open(&path, context)?;
        let mut reader = Rows { iter, path, context: context.clone(), number: 0 };
        Ok(Box::new(std::iter::from_fn(move || reader.next_document().transpose())))
    }
}

struct Rows {
    iter: RowIter<'static>,
    path: Arc<Path>,
    context: Context,
    /// The number of the row that was read last, from 1.
    number: u64,
}

impl Rows {
    fn next_document(&mut self) -> Result<Option<Document>> {
        loop {
            let row = guarded(&self.path, || self.iter.next().transpose())?;
            let Some(row) = row else { return Ok(None) };
            self.number += 1;
            let place = || Place::Row(self.number);
            let document = fields(row.into_columns().into_iter())
                .and_then(|row| record::document(&row, &self.context, &self.path, place))
                .map_err(|problem| DataError::Record {
                    path: self.path.to_path_buf(),
                    place: place(),
                    problem,
                })?;
            if document.is_some() {
                return Ok(document);
            }
        }
    }
}

fn open(path: &Path, context: &Context) -> Result<RowIter<'static>> {
    let file = File::open(path).map_err(|error| DataError::io("open", path, error))?;
    let reader = guarded(path, || SerializedFileReader::new(file))?;
    let schema = reader.metadata().file_metadata().schema();
    let wanted = projection(schema, context).map_err(|problem| unreadable(path, problem))?;
    let names: Vec<String> = wanted.get_fields().iter().map(|field| field.name().to_owned()).collect();
    check_codecs(path, &reader, &names)?;
    guarded(path, || {
        Ok(RowIter::from_file_into(Box::new(reader)).project(Some(wanted))?.with_batch_size(BATCH))
    })
}

/// The columns that the text is made of, or which one is missing.
fn projection(schema: &Type, context: &Context) -> Result<Type, String> {
    let column = |name: &str| schema.get_fields().iter().find(|field| field.name() == name);
    let layout = Layout::of(&context.settings.fields, |name| column(name).is_some());
    let (paths, needed) = layout.paths();
    // A text is one string of a row, so that of a struct no other field is needed.
    let narrow = matches!(layout, Layout::Text(_));
    let mut fields: Vec<Arc<Type>> = Vec::new();
    for (at, path) in paths.iter().enumerate() {
        let steps = path.steps_in(|name| column(name).is_some());
        let Some((first, rest)) = steps.split_first() else { continue };
        match column(first) {
            Some(field) if fields.iter().any(|taken| taken.name() == field.name()) => {}
            Some(field) if narrow => fields.push(narrowed(field, rest, first)?),
            Some(field) => fields.push(field.clone()),
            None if at < needed => {
                let names = schema.get_fields().iter().map(|field| field.name());
                return Err(no_field(first, "", names)
                    .replace("the field", "the column")
                    .replace("the fields", "the columns"));
            }
            None => {}
        }
    }
    Type::group_type_builder(schema.name()).with_fields(fields).build().map_err(|error| short(&error))
}

/// A column with no more than what `steps` lead to. Lists are left as they are.
fn narrowed<S: AsRef<str>>(field: &Arc<Type>, steps: &[S], place: &str) -> Result<Arc<Type>, String> {
    let Some((step, rest)) = steps.split_first() else { return Ok(field.clone()) };
    let step = step.as_ref();
    let info = field.get_basic_info();
    let plain = info.converted_type() == ConvertedType::NONE && info.logical_type_ref().is_none();
    if field.is_primitive() || !plain {
        return Ok(field.clone());
    }
    let place = format!("{place}.{step}");
    let Some(child) = field.get_fields().iter().find(|child| child.name() == step) else {
        let names = field.get_fields().iter().map(|child| child.name());
        return Err(no_field(&place, &format!(" of {:?}", field.name()), names));
    };
    let child = narrowed(child, rest, &place)?;
    let group = Type::group_type_builder(field.name())
        .with_repetition(info.repetition())
        .with_id(info.has_id().then(|| info.id()))
        .with_fields(vec![child])
        .build();
    group.map(Arc::new).map_err(|error| short(&error))
}

/// Whether all pages of the columns can be decompressed.
fn check_codecs(path: &Path, reader: &SerializedFileReader<File>, columns: &[String]) -> Result<()> {
    if cfg!(feature = "parquet-zstd") {
        return Ok(());
    }
    let zstd = reader.metadata().row_groups().iter().flat_map(RowGroupMetaData::columns).any(|column| {
        let name = column.column_path().parts().first();
        matches!(column.compression(), Compression::ZSTD(_))
            && name.is_some_and(|name| columns.contains(name))
    });
    if zstd {
        let what = format!("{}: a Parquet file with zstd compression", path.display());
        return Err(DataError::Feature { what, feature: "parquet-zstd" });
    }
    Ok(())
}

/// Runs code of the `parquet` crate, which panics on some damaged files.
fn guarded<T>(path: &Path, read: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(result) => result.map_err(|error| unreadable(path, short(&error))),
        Err(_) => Err(unreadable(path, "it is damaged".to_owned())),
    }
}

fn unreadable(path: &Path, problem: String) -> DataError {
    DataError::Unreadable { path: path.to_path_buf(), format: "parquet", problem }
}

fn short(error: &parquet::errors::ParquetError) -> String {
    let mut message = one_line(error);
    if let Some((end, _)) = message.char_indices().nth(MESSAGE) {
        message.truncate(end);
        message.push_str("...");
    }
    message
}

/// An object of a row's or a struct's fields.
fn fields(fields: impl Iterator<Item = (String, Field)>) -> Result<Value, String> {
    let pairs = fields.map(|(name, field)| {
        let value = value(field).map_err(|problem| format!("{name:?} {problem}"))?;
        Ok((name, value))
    });
    Ok(Value::Object(pairs.collect::<Result<Map<String, Value>, String>>()?))
}

/// A field as JSON has it.
fn value(field: Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) => value.into(),
        Field::Long(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        Field::Float(value) => Number::from_f64(value.into()).into(),
        Field::Double(value) => Number::from_f64(value).into(),
        Field::Str(text) => text.into(),
        // Some writers do not say that their texts are text.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(error) => return Err(format!("has invalid UTF-8 at its byte {}", error.valid_up_to())),
        },
        Field::Group(row) => fields(row.into_columns().into_iter())?,
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().cloned().map(value).collect::<Result<_, _>>()?)
        }
        Field::MapInternal(map) => fields(map.entries().iter().map(|(key, field)| {
            let name = if let Field::Str(name) = key { name.clone() } else { key.to_string() };
            (name, field.clone())
        }))?,
        // Dates, times and decimal numbers: no text is made of them.
        other => other.to_string().into(),
    })
}
