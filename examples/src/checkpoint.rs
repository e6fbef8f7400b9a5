//! Checkpoints that a crash, a full disk or Ctrl-C cannot damage.
//!
//! A checkpoint is a folder with `state.json`, which names the files of one step: `model-STEP.safetensors`,
//! `optimizer-STEP.safetensors`, `tokenizer.json`. The files of a new step are written beside the old ones; then
//! `state.json` is replaced in one rename; then the old files are removed. Whatever happens in between, `state.json`
//! names complete files.
//!
//! What is random in a run, the first weights and the order of the data, follows from the seed in the settings and
//! the position of the sampler, so these two are the state of its random generator.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use candle_nn::VarMap;
use serde::{Deserialize, Serialize};
use velvet_optim::Velvet;
use vesper_data::{SamplerState, TextTokenizer};

use crate::data::Data;
use crate::files;
use crate::settings::Settings;

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Version of this format.
    pub version: u32,
    /// Steps made.
    pub step: u64,
    /// The settings of the run.
    pub settings: Settings,
    /// The batch to go on with.
    pub sampler: SamplerState,
    /// What the data was, see [`Data::digest`].
    pub data: Option<String>,
    /// Tokens trained on.
    pub tokens: u64,
    /// Seconds spent on training steps, over all parts of the run.
    pub seconds: f64,
}

impl State {
    /// Checks that the run goes on with the data that it began with.
    ///
    /// # Errors
    /// Names the data that changed.
    pub fn check_data(&self, data: &Data) -> Result<()> {
        if self.data != data.digest {
            bail!("--resume: {} changed since the run began, so the run cannot go on", data.name);
        }
        Ok(())
    }
}

/// The version that this program writes and reads.
pub const VERSION: u32 = 1;

const STATE: &str = "state.json";
const TOKENIZER: &str = "tokenizer.json";

/// The checkpoint folder of a run.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    dir: PathBuf,
}

impl Checkpoint {
    /// The checkpoint of the run in `run`, which need not exist.
    pub fn of(run: &Path) -> Self {
        Self { dir: run.join("checkpoint") }
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether there is one.
    pub fn exists(&self) -> bool {
        self.dir.join(STATE).is_file()
    }

    /// The tokenizer of the run.
    pub fn tokenizer(&self) -> PathBuf {
        self.dir.join(TOKENIZER)
    }

    fn model(&self, step: u64) -> PathBuf {
        self.dir.join(format!("model-{step}.safetensors"))
    }

    fn optimizer(&self, step: u64) -> PathBuf {
        self.dir.join(format!("optimizer-{step}.safetensors"))
    }

    /// Writes the checkpoint of a step and removes the one before.
    ///
    /// # Errors
    /// A full disk or a folder that cannot be written: names the file, and the checkpoint before stays.
    pub fn save(
        &self,
        state: &State,
        varmap: &VarMap,
        optimizer: &Velvet,
        tokenizer: &TextTokenizer,
    ) -> Result<()> {
        files::create_dir(&self.dir)?;
        let written = self.write(state, varmap, optimizer, tokenizer);
        // After a success this removes the old files, after a failure the new ones.
        self.remove_unnamed();
        written
    }

    fn write(
        &self,
        state: &State,
        varmap: &VarMap,
        optimizer: &Velvet,
        tokenizer: &TextTokenizer,
    ) -> Result<()> {
        if !self.tokenizer().is_file() {
            tokenizer.save(self.tokenizer())?;
        }
        let model = self.model(state.step);
        {
            let data = varmap.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let mut tensors: Vec<(&String, Tensor)> =
                data.iter().map(|(name, var)| (name, var.as_tensor().clone())).collect();
            tensors.sort_by(|a, b| a.0.cmp(b.0));
            let bytes = safetensors::serialize(tensors, None)
                .with_context(|| format!("cannot write {}", model.display()))?;
            files::write(&model, &bytes)?;
        }
        optimizer.save(self.optimizer(state.step))?;
        files::write_json(&self.dir.join(STATE), state)
    }

    fn remove_unnamed(&self) {
        let Ok(state) = self.state() else { return };
        let keep: BTreeSet<PathBuf> =
            [self.dir.join(STATE), self.tokenizer(), self.model(state.step), self.optimizer(state.step)]
                .into();
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|e| e == "safetensors") && !keep.contains(&path) {
                // A file that cannot be removed costs space, nothing else.
                let _ = std::fs::remove_file(path);
            }
        }
    }

    /// What there is to go on with when a run goes wrong, for people.
    pub fn advice(&self) -> String {
        match self.state() {
            Ok(state) => format!(
                "its last checkpoint, of step {}, is kept in {}; where training diverged, try a lower --lr in a new run",
                state.step,
                self.dir.display()
            ),
            Err(_) => "it has no checkpoint yet; where training diverged, try a lower --lr".into(),
        }
    }

    /// Reads where the run stands.
    ///
    /// # Errors
    /// A missing or damaged `state.json`, one of another version or with a time that nothing can have taken.
    pub fn state(&self) -> Result<State> {
        let state: State = files::read_json(&self.dir.join(STATE))?;
        if state.version != VERSION {
            bail!("{}: version {}, expected {VERSION}", self.dir.join(STATE).display(), state.version);
        }
        if !(state.seconds.is_finite() && state.seconds >= 0.0) {
            bail!("{}: seconds is {}, expected at least 0", self.dir.join(STATE).display(), state.seconds);
        }
        Ok(state)
    }

    /// Puts the weights of a step back into their variables.
    ///
    /// # Errors
    /// A file that is truncated or not of this model: names it, and the tensor.
    pub fn load_model(&self, step: u64, varmap: &VarMap, device: &Device) -> Result<()> {
        let path = self.model(step);
        let context = || format!("cannot read {}", path.display());
        let bytes = std::fs::read(&path).with_context(context)?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, device)
            .with_context(|| format!("{} is damaged or cut short", path.display()))?;
        let data = varmap.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut vars: Vec<_> = data.iter().collect();
        vars.sort_by_key(|(name, _)| *name); // the first problem by name, not any
        for (name, var) in vars {
            let tensor =
                tensors.get(name).with_context(|| format!("{}: no tensor {name}", path.display()))?;
            if tensor.dims() != var.dims() || tensor.dtype() != var.dtype() {
                bail!(
                    "{}: {name} is {:?} {:?}, expected {:?} {:?}",
                    path.display(),
                    tensor.dtype(),
                    tensor.dims(),
                    var.dtype(),
                    var.dims()
                );
            }
            var.set(tensor).with_context(|| format!("{}: {name}", path.display()))?;
        }
        match tensors.keys().filter(|name| !data.contains_key(*name)).min() {
            Some(name) => bail!("{}: an unexpected tensor {name}", path.display()),
            None => Ok(()),
        }
    }

    /// Puts the optimizer's state of a step back.
    ///
    /// # Errors
    /// A file that is truncated or of another model.
    pub fn load_optimizer(&self, step: u64, optimizer: &mut Velvet) -> Result<()> {
        Ok(optimizer.load(self.optimizer(step))?)
    }
}
