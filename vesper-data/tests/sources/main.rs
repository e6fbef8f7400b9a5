//! Reading documents: formats, settings, faults.
// The helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

mod broken;
mod chat;
mod compressed;
mod dialogue;
mod files;
#[cfg(feature = "hub")]
mod hub;
mod json;
mod large;
mod mixture;
mod real;
mod squad;
mod table;

use std::path::Path;

use vesper_data::{Document, Documents, ReadSettings, Result, Sources};

/// A folder with these files.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    folder
}

fn read(path: impl AsRef<Path>) -> Result<Vec<Document>> {
    Documents::open(&[path.as_ref().to_path_buf()])?.collect()
}

/// The documents of one file with these bytes, read with these settings.
fn read_with(name: &str, bytes: &[u8], settings: ReadSettings) -> Result<Vec<Document>> {
    let folder = folder(&[(name, bytes)]);
    Sources::new([folder.path().join(name)]).with_settings(settings).documents()?.collect()
}

/// The documents of one file with these bytes, and the lines on which they start.
fn read_file(name: &str, bytes: &[u8]) -> Result<Vec<(String, u64)>> {
    let documents = read_with(name, bytes, ReadSettings::default())?;
    Ok(documents.into_iter().map(|document| (document.text, document.line)).collect())
}

fn texts(documents: &[Document]) -> Vec<&str> {
    documents.iter().map(|document| document.text.as_str()).collect()
}

/// The parts of a document that count in the loss.
fn learned(document: &Document) -> Vec<&str> {
    let ranges = document.loss.as_ref().unwrap();
    ranges.iter().map(|range| &document.text[range.clone()]).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

/// The message of the error that reading a file with these bytes ends in, with the folder cut off.
fn message(name: &str, bytes: &[u8]) -> String {
    message_with(name, bytes, ReadSettings::default())
}

fn message_with(name: &str, bytes: &[u8], settings: ReadSettings) -> String {
    let error = read_with(name, bytes, settings).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    let (_, rest) = error.split_once(name).unwrap_or_else(|| panic!("{name} is not named: {error}"));
    rest.to_owned()
}
