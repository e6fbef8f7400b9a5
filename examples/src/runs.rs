//! Where runs are kept, and which one was the last.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::files;

/// The folder of runs that were given no `--out`, in the folder that the program is started from.
pub const FOLDER: &str = "runs";

/// The first of `runs/{name}-1`, `runs/{name}-2`, ... that does not exist.
pub fn new_folder(name: &str) -> PathBuf {
    let mut n = 1;
    loop {
        let path = Path::new(FOLDER).join(format!("{name}-{n}"));
        if !path.exists() {
            return path;
        }
        n += 1;
    }
}

fn pointer() -> PathBuf {
    Path::new(FOLDER).join("last")
}

/// Remembers a run as the last one.
///
/// # Errors
/// A folder that cannot be written.
pub fn remember(run: &Path) -> Result<()> {
    let run = std::path::absolute(run).with_context(|| format!("{}", run.display()))?;
    files::create_dir(Path::new(FOLDER))?;
    files::write(&pointer(), run.to_string_lossy().as_bytes())
}

/// The last run, if there was one and its folder is still there.
pub fn last() -> Option<PathBuf> {
    let path = PathBuf::from(std::fs::read_to_string(pointer()).ok()?.trim());
    path.is_dir().then_some(path)
}

/// The folder of a model: the one named (a model, or a run that has one), else that of the last run.
///
/// # Errors
/// Says what to do where there is none.
pub fn model_folder(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(named) = named {
        let inside = named.join("model");
        if named.join("config.json").is_file() || !inside.is_dir() {
            return Ok(named.into());
        }
        return Ok(inside);
    }
    let Some(run) = last() else {
        bail!("there is no trained model yet: train one with `cargo run --release --example train`");
    };
    let model = run.join("model");
    if !model.join("config.json").is_file() {
        bail!(
            "the last run, {}, has no model yet: finish it with `cargo run --release --example train -- --resume --out {}`",
            run.display(),
            run.display()
        );
    }
    crate::say!("Using the last trained model, {}.", model.display());
    Ok(model)
}
