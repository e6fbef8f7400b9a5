//! Where runs are kept, and which one was the last.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use crate::checkpoint::{Checkpoint, State};
use crate::files;
use crate::settings::Flags;

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

/// The folder of a program's results: the one that is named, else `runs/{name}-N`.
///
/// # Errors
/// One that holds such results already.
pub fn results_folder(named: Option<&Path>, name: &str) -> Result<PathBuf> {
    let Some(out) = named else { return Ok(new_folder(name)) };
    if out.join(format!("{name}.json")).exists() {
        bail!("--out {}: there is a {name}.json already, choose another folder", out.display());
    }
    Ok(out.into())
}

fn pointer() -> PathBuf {
    Path::new(FOLDER).join("last")
}

/// The folder of a run, and where the run stands if it goes on.
///
/// # Errors
/// Nothing to go on with, a checkpoint that is damaged, or a folder that holds a run already.
pub fn open(flags: &Flags) -> Result<(PathBuf, Option<State>)> {
    if flags.resume {
        let Some(out) = flags.out.clone().or_else(last) else {
            bail!("--resume: there is no run yet; name its folder with --out");
        };
        let checkpoint = Checkpoint::of(&out);
        if !checkpoint.exists() {
            bail!("--resume: there is no checkpoint in {}", checkpoint.dir().display());
        }
        return Ok((out, Some(checkpoint.state()?)));
    }
    let out = match &flags.out {
        Some(out) => out.clone(),
        None => new_folder(flags.size.as_deref().unwrap_or("nano")),
    };
    if Checkpoint::of(&out).exists() {
        bail!("{} holds a run already: go on with --resume, or choose another --out", out.display());
    }
    Ok((out, None))
}

/// Remembers a run as the last one. Where that is not possible, `--out` and `--model` still find it.
pub fn remember(run: &Path) {
    let write = || {
        let run = std::path::absolute(run).with_context(|| format!("{}", run.display()))?;
        files::create_dir(Path::new(FOLDER))?;
        files::write(&pointer(), run.to_string_lossy().as_bytes())
    };
    if let Err(error) = write() {
        crate::note!("warning: this will not be remembered as the last run: {error:#}");
    }
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
        if !named.join("config.json").is_file() && inside.is_dir() {
            return Ok(inside);
        }
        if !named.join("config.json").is_file() && Checkpoint::of(named).exists() {
            return Err(unfinished("the run", named));
        }
        if !named.exists() {
            let what = if named.extension().is_some_and(|of| of == "gguf") { "file" } else { "folder" };
            bail!(
                "{}: no such {what}; train a model with `cargo run --release --example train`",
                named.display()
            );
        }
        return Ok(named.into());
    }
    let Some(run) = last() else {
        bail!("there is no trained model yet: train one with `cargo run --release --example train`");
    };
    let model = run.join("model");
    if !model.join("config.json").is_file() {
        return Err(unfinished("the last run,", &run));
    }
    crate::note!("Using the last trained model, {}.", model.display());
    Ok(model)
}

/// A run that was stopped: its checkpoint is no model.
fn unfinished(which: &str, run: &Path) -> anyhow::Error {
    let run = run.display();
    anyhow!(
        "{which} {run} has no model yet: finish it with `cargo run --release --example train -- --resume --out {run}`"
    )
}
