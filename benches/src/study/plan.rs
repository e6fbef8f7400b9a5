//! Which runs a study makes, in which order, and what they amount to.

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::arm::Arm;
use super::task::{Data, Outcome, Setting, Task};

/// What is compared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The arms that are tuned and run with all seeds; the first is the baseline.
    pub tuned: Vec<Arm>,
    /// Further arms, tuned with one seed.
    pub swept: Vec<Arm>,
    /// The arms that are run at 4 and 8 times the best learning rate, and on corrupted data.
    pub stressed: Vec<Arm>,
    /// The arm that is run over shorter schedules, at its best learning rate.
    pub shortened: Option<Arm>,
    /// Learning rates that every arm tries.
    pub lrs: Vec<f64>,
    /// Seeds of the tuned arms.
    pub seeds: u64,
    /// Steps of a run.
    pub steps: u64,
    /// Shares of the steps that the shortened arm is run over.
    pub shares: Vec<f64>,
}

/// The file of a study: what was run where, and every run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record<P> {
    /// The machine.
    pub machine: String,
    /// The model and the data.
    pub model: String,
    /// Parameters of the model.
    pub parameters: usize,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// The text.
    pub data: String,
    /// Sequences a step.
    pub batch: usize,
    /// Tokens a sequence.
    pub seq: usize,
    /// Tokens of the held-out text that a run ends on.
    pub eval_tokens: usize,
    /// What was to be run.
    pub plan: P,
    /// What was run.
    pub runs: Vec<Outcome>,
}

/// A study under way.
pub struct Study<'a, P> {
    setting: &'a Setting,
    record: Record<P>,
    file: PathBuf,
    until: Instant,
}

impl<'a, P: Clone + Serialize + DeserializeOwned> Study<'a, P> {
    /// A study that writes its record after every run and starts no run after `limit`.
    ///
    /// # Errors
    /// `file` holds a record that cannot be read, or of another plan.
    pub fn new(setting: &'a Setting, mut record: Record<P>, file: &Path, limit: Duration) -> Result<Self> {
        if file.exists() {
            let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
            let old: Record<P> = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
            record.runs = old.runs; // a study that was stopped goes on
        }
        Ok(Self { setting, record, file: file.to_owned(), until: Instant::now() + limit })
    }

    /// What is compared.
    pub fn plan(&self) -> P {
        self.record.plan.clone()
    }

    /// What was run.
    pub fn into_record(self) -> Record<P> {
        self.record
    }

    /// Makes a run that was not made yet.
    ///
    /// # Errors
    /// It fails, or the record cannot be written.
    pub fn one(&mut self, task: Task) -> Result<()> {
        if Instant::now() >= self.until || self.record.runs.iter().any(|run| run.task == task) {
            return Ok(());
        }
        let outcome = self.setting.run(task)?;
        println!("{}", serde_json::to_string(&Line::from(&outcome))?);
        self.record.runs.push(outcome);
        let part = self.file.with_extension("part");
        std::fs::write(&part, serde_json::to_string_pretty(&self.record)? + "\n")
            .and_then(|()| std::fs::rename(&part, &self.file))
            .with_context(|| self.file.display().to_string())
    }
}

impl Study<'_, Plan> {
    /// Makes all runs that there is time for.
    ///
    /// # Errors
    /// A run fails, or the record cannot be written.
    pub fn run(mut self) -> Result<Record<Plan>> {
        let plan = self.plan();
        let task = |arm, lr, seed| Task::new(arm, lr, plan.steps, seed);
        for &lr in &plan.lrs {
            for &arm in &plan.tuned {
                self.one(task(arm, lr, 0))?;
            }
        }
        for seed in 1..plan.seeds {
            for &arm in &plan.tuned {
                if let Some(lr) = self.best(arm) {
                    self.one(task(arm, lr, seed))?;
                }
            }
        }
        for &share in &plan.shares {
            for seed in 0..plan.seeds {
                if let Some(arm) = plan.shortened
                    && let Some(lr) = self.best(arm)
                {
                    let steps = (plan.steps as f64 * share).round() as u64;
                    self.one(Task { steps, ..task(arm, lr, seed) })?;
                }
            }
        }
        let lr = plan.tuned.first().and_then(|&arm| self.best(arm));
        for &arm in &plan.stressed {
            // The same rates for all: multiples of the baseline's best.
            for factor in [4.0, 8.0, 1.0] {
                if let Some(lr) = lr {
                    self.one(task(arm, lr * factor, 0))?;
                }
            }
            if let Some(lr) = self.best(arm) {
                self.one(Task { data: Data::Corrupted, ..task(arm, lr, 0) })?;
            }
        }
        for &arm in &plan.swept {
            for &lr in &plan.lrs {
                self.one(task(arm, lr, 0))?;
            }
        }
        Ok(self.record)
    }

    /// The learning rate with the lowest held-out loss with seed 0.
    fn best(&self, arm: Arm) -> Option<f64> {
        best(&self.record, arm).map(|(lr, _)| lr)
    }
}

/// What is printed of a run.
#[derive(Serialize)]
struct Line {
    #[serde(flatten)]
    task: Task,
    loss: Option<f64>,
    seconds: f64,
}

impl From<&Outcome> for Line {
    fn from(run: &Outcome) -> Self {
        Self { task: run.task, loss: run.loss, seconds: run.seconds }
    }
}

/// The best learning rate of an arm with seed 0 over all steps, and its loss.
pub fn best(record: &Record<Plan>, arm: Arm) -> Option<(f64, f64)> {
    record
        .runs
        .iter()
        .filter(|run| {
            let task = run.task;
            task.arm == arm
                && task.seed == 0
                && task.steps == record.plan.steps
                && task.data == Data::Clean
                && record.plan.lrs.contains(&task.lr)
        })
        .filter_map(|run| Some((run.task.lr, run.loss?)))
        .min_by(|a, b| a.1.total_cmp(&b.1))
}
