//! Text that the model was not trained on.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use vesper_data::{Sources, TextTokenizer, Tokens};
use vesper_model::{VesperConfig, hf};

use crate::checkpoint::Checkpoint;
use crate::data::Data;

/// The text named, or the held-out part of the data that the run in whose folder the model lies was trained on; and what it
/// is, for people.
///
/// # Errors
/// A model that is of no run where no text is named; text that cannot be read, or that is not what it was in the run.
pub fn held_out(model: &Path, config: &VesperConfig, named: &[PathBuf]) -> Result<(String, Tokens)> {
    let file = model.join("tokenizer.json");
    if !named.is_empty() {
        let tokenizer = TextTokenizer::from_file(file)?;
        hf::check_tokenizer(tokenizer.inner(), config)?;
        let sources = Sources::new(named);
        let texts = sources.documents()?.map(|document| document.map(|document| document.text));
        let names = named.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        return Ok((names, Tokens::from_documents(tokenizer.encode_documents(texts))?));
    }
    let run = model.parent().unwrap_or(Path::new("."));
    let checkpoint = Checkpoint::of(run);
    if !checkpoint.exists() {
        bail!(
            "{}: of no run of `train`, so there is no held-out text to judge by: name some with --data",
            model.display()
        );
    }
    let state = checkpoint.state()?;
    let mut settings = state.settings.clone();
    if settings.data.is_empty() {
        // The held-out stories are the same however many there are to train on.
        settings.steps = 1;
    }
    let preset = VesperConfig::preset(&settings.size)?;
    let data = Data::prepare(&settings, &preset, Some(&checkpoint.tokenizer()), &run.join("cache"))?;
    state
        .check_data(&data)
        .context("the held-out text would not be held out: name other text with --data")?;
    Ok((format!("the held-out part of {}", data.name), data.eval))
}
