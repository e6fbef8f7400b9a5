//! French text with one typography.

use std::io::{BufWriter, Write};

use anyhow::{Context, Result, bail};
use vesper_data::french::renumber_speakers;
use vesper_data::{DataError, Sources};

use crate::dataset::access;
use crate::dataset::flags::Clean as Flags;
use crate::files;

/// What was written.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// Documents.
    pub documents: u64,
    /// Those of them that changed.
    pub changed: u64,
}

/// Writes the documents as JSONL, cleaned; never over one of the files that they are read from.
///
/// # Errors
/// Names what cannot be read or written.
pub fn write(flags: &Flags) -> Result<Cleaned> {
    let cleanup = flags.cleanup();
    let mut cleaned = Cleaned::default();
    let mut failed = None;
    let sources = Sources::new(&flags.paths).with_settings(flags.read.settings()?);
    let mut documents = access::documents(&sources)?;
    if let Ok(out) = flags.out.canonicalize()
        && sources.files()?.iter().any(|file| file.canonicalize().is_ok_and(|file| file == out))
    {
        bail!("--out {}: one of the files that are read, which it would replace", flags.out.display());
    }
    let report = documents.report();
    let written = files::replace(&flags.out, |file| {
        let mut out = BufWriter::new(file);
        for document in &mut documents {
            let document = match document {
                Ok(document) if document.loss.is_none() => document,
                Ok(document) => {
                    let path = document.path.to_path_buf();
                    failed = Some(Refused::Loss(path));
                    return Err(std::io::Error::other("stopped"));
                }
                Err(error) => {
                    failed = Some(Refused::Data(error));
                    return Err(std::io::Error::other("stopped"));
                }
            };
            let mut text = cleanup.clean(&document.text);
            if flags.renumber_speakers {
                text = renumber_speakers(&text).into_owned().into();
            }
            cleaned.documents += 1;
            cleaned.changed += u64::from(*text != *document.text);
            serde_json::to_writer(&mut out, &serde_json::json!({ "text": text }))?;
            out.write_all(b"\n")?;
        }
        out.flush()
    });
    match failed {
        Some(Refused::Data(error)) => Err(error.into()),
        Some(Refused::Loss(path)) => bail!(
            "{}: questions with answers cannot be written as plain text: clean them in your own program, with Cleanup::clean_document",
            path.display()
        ),
        None => {
            access::say_remarks(&report);
            written.map(|()| cleaned).context("--out")
        }
    }
}

/// Why the text cannot be written.
enum Refused {
    /// It cannot be read.
    Data(DataError),
    /// The loss is taken over parts of it, which the file would not say.
    Loss(std::path::PathBuf),
}
