//! `log.jsonl`: one line a step.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Deserializer, Serialize};

use crate::files;

/// One step of training. Losses in nats a token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The step, from 1.
    pub step: u64,
    /// Mean loss of the batch, before the update.
    pub loss: f64,
    /// `exp(loss)`; infinite, which JSON writes as null, for a loss over 709.
    #[serde(deserialize_with = "infinite_where_null")]
    pub perplexity: f64,
    /// The learning rate that was applied.
    pub lr: f64,
    /// The first beta that was applied.
    pub beta1: f64,
    /// Global norm of the gradient, before clipping.
    pub grad_norm: Option<f64>,
    /// Tokens trained on in this step, by the seconds that it took.
    pub tokens_per_second: f64,
    /// Loss on held-out text after the step, where it was evaluated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
}

fn infinite_where_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
}

/// The log of a run, open for appending.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
    records: Vec<Record>,
}

impl Log {
    /// Opens the log of a run that goes on after `step`: what it says of later steps, which the run will make again,
    /// is dropped. Step 0 starts a new log.
    ///
    /// # Errors
    /// A file that cannot be read or written, or a line before `step` that is damaged.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let mut records = Vec::new();
        if step > 0 && path.exists() {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            for (i, line) in text.lines().enumerate() {
                // The last line of a killed run may be cut short; it is of a step that is made again.
                if records.len() as u64 == step {
                    break;
                }
                let record: Record = serde_json::from_str(line)
                    .with_context(|| format!("{}, line {}", path.display(), i + 1))?;
                records.push(record);
            }
        }
        let mut text = Vec::new();
        for record in &records {
            serde_json::to_writer(&mut text, record)?;
            text.push(b'\n');
        }
        files::write(path, &text)?;
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { path: path.into(), file, records })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// A full disk: names the file.
    pub fn push(&mut self, record: Record) -> Result<()> {
        let mut line = serde_json::to_vec(&record)?;
        line.push(b'\n');
        self.file.write_all(&line).with_context(|| format!("cannot write {}", self.path.display()))?;
        self.records.push(record);
        Ok(())
    }

    /// Waits until the lines are on the disk: a checkpoint must not outlive the log of its steps.
    ///
    /// # Errors
    /// A full disk: names the file.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// All steps so far.
    pub fn records(&self) -> &[Record] {
        &self.records
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> Record {
        Record {
            step,
            loss: 1.0 / step as f64,
            perplexity: if step == 2 { f64::INFINITY } else { 1.0 },
            lr: 0.1,
            beta1: 0.9,
            grad_norm: Some(0.1 + 0.2),
            tokens_per_second: 5.0,
            eval_loss: None,
        }
    }

    #[test]
    fn a_resumed_log_drops_the_steps_that_are_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let mut log = Log::open(&path, 0).unwrap();
        for step in 1..=5 {
            log.push(record(step)).unwrap();
        }
        drop(log);
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("{\"step\":6,\"lo"); // killed while writing
        std::fs::write(&path, text).unwrap();

        let mut log = Log::open(&path, 3).unwrap();
        assert_eq!(log.records(), [record(1), record(2), record(3)]);
        log.push(record(4)).unwrap();
        let lines = std::fs::read_to_string(&path).unwrap();
        assert_eq!(lines.lines().count(), 4);
        assert!(Log::open(&path, 0).unwrap().records().is_empty());
    }

    #[test]
    fn a_damaged_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        std::fs::write(&path, "nonsense\n").unwrap();
        let message = format!("{:#}", Log::open(&path, 1).unwrap_err());
        assert!(message.contains("log.jsonl, line 1"), "{message}");
    }
}
