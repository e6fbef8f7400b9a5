//! What was measured, as a file and as tables.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::answers::{RANDOM, SECOND};
use crate::files;

/// `metacognition.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// The day, in UTC.
    pub date: String,
    /// The machine.
    pub machine: String,
    /// The model: its folder's name.
    pub model: String,
    /// Its parameters.
    pub parameters: usize,
    /// Its vocabulary.
    pub vocab: usize,
    /// Its loss on the test parts, nats a token, mean over the seeds.
    pub loss: f64,
    /// The held-out text.
    pub data: String,
    /// Documents of it.
    pub documents: usize,
    /// Documents that were left out: twice there, or trained on.
    pub left_out: usize,
    /// Tokens of a seed's parts: training of the head, calibration, test.
    pub tokens: [usize; 3],
    /// Hidden units of the heads that have any.
    pub units: usize,
    /// Epochs of a head's training.
    pub epochs: usize,
    /// Its learning rate.
    pub lr: f64,
    /// Questions of each seed's calibration and test part.
    pub questions: usize,
    /// Tokens of a prompt and of an answer.
    pub question_tokens: [usize; 2],
    /// The temperature of drafts that are drawn.
    pub temperature: f64,
    /// The seeds: each divides the documents anew, and is that of heads, questions and draws.
    pub seeds: Vec<Seed>,
    /// Seconds of all of it.
    pub seconds: f64,
}

/// What one seed came to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Seed {
    /// The seed.
    pub seed: u64,
    /// Share of the model's likeliest tokens that are wrong in the test part.
    pub error_rate: f64,
    /// Shares of the kinds of errors there.
    pub kinds: BTreeMap<String, f64>,
    /// How well the head (both, hidden layer) tells each kind from all others: AUROC; none where a kind does not occur.
    pub kind_auroc: BTreeMap<String, Option<f64>>,
    /// The prediction of errors token by token, by the name of the score.
    pub tokens: Vec<(String, Quality)>,
    /// The same for tokens that are drawn.
    pub drawn: Vec<(String, Quality)>,
    /// That of whole greedy answers.
    pub answers: Vec<(String, Quality)>,
    /// Share of the greedy answers that are wrong.
    pub answer_error_rate: f64,
    /// What policies of decoding do.
    pub policies: Vec<Policy>,
}

/// How good the prediction of errors is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Area under the receiver operating characteristic.
    pub auroc: f64,
    /// Expected calibration error after Platt's calibration, 15 bins of equal width.
    pub ece: f64,
    /// The same after isotonic calibration.
    pub ece_isotonic: f64,
    /// Brier score after Platt's calibration.
    pub brier: f64,
    /// Error rate among the half with the highest confidence.
    pub error_at_half: f64,
}

/// What a policy of decoding came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// What is done.
    pub policy: String,
    /// The confidence that it follows.
    pub source: String,
    /// Tokens chosen for a question, in all its drafts.
    pub cost: f64,
    /// Share of wrong answers if none is withheld.
    pub error: f64,
    /// That among the four fifths with the highest confidence; none where the row is computed from others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_at_four_fifths: Option<f64>,
    /// That among the half with the highest confidence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_at_half: Option<f64>,
    /// Where the policy abstains: the share of questions that were answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coverage: Option<f64>,
    /// And the share of those answers that are wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_of_answered: Option<f64>,
}

/// The score that the others are compared with.
pub const BASELINE: &str = "probability";

impl Record {
    /// Reads `metacognition.json`.
    ///
    /// # Errors
    /// A file that cannot be read, is no JSON, or is JSON of something else: names it, and what is missing.
    pub fn read(file: &Path) -> Result<Self> {
        let json: Value = files::read_json(file)?;
        Self::deserialize(json).with_context(|| format!("{}: not a record of metacognition", file.display()))
    }

    /// All tables, in Markdown.
    pub fn tables(&self) -> String {
        let share = |x: f64| format!("{:.1} %", 100.0 * x);
        let mean = |of: fn(&Seed) -> f64| spread(&self.seeds.iter().map(of).collect::<Vec<_>>()).0;
        let kinds =
            self.seeds.first().map(|seed| seed.kinds.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
        let kind = |name: &String| {
            let shares: Vec<f64> =
                self.seeds.iter().filter_map(|seed| seed.kinds.get(name).copied()).collect();
            let found: Vec<f64> = self.seeds.iter().filter_map(|seed| *seed.kind_auroc.get(name)?).collect();
            vec![name.clone(), share(spread(&shares).0), plus_minus(&found, 3)]
        };
        let head = ["kind", "share of tokens", "AUROC of the head, one against the rest"];
        let kinds: Vec<Vec<String>> = kinds.iter().map(kind).collect();
        [
            format!(
                "\nTokens: {} of the likeliest are wrong. AUROC, calibration error and Brier score on the test part, {} seeds.\n\n",
                share(mean(|seed| seed.error_rate)),
                self.seeds.len()
            ),
            self.qualities(|seed| &seed.tokens),
            "\n".into(),
            table(&head, &kinds),
            format!("\nTokens that are drawn at temperature {}.\n\n", self.temperature),
            self.qualities(|seed| &seed.drawn),
            format!(
                "\nAnswers of {} tokens, greedy: {} are wrong.\n\n",
                self.question_tokens[1],
                share(mean(|seed| seed.answer_error_rate))
            ),
            self.qualities(|seed| &seed.answers),
            "\nWhat is done about it: cost in tokens a question, error rates.\n\n".into(),
            self.policies(),
            "\nThe error of a second draft when unsure, less that of one at random at the same cost.\n\n".into(),
            self.equal_cost(),
        ]
        .concat()
    }

    fn equal_cost(&self) -> String {
        let Some(first) = self.seeds.first() else { return String::new() };
        let errors = |policy: &str, source: &str| -> Vec<f64> {
            let one = |seed: &Seed| {
                let same = |p: &&Policy| p.policy == policy && p.source == source;
                seed.policies.iter().find(same).map(|p| p.error)
            };
            self.seeds.iter().filter_map(one).collect()
        };
        let row = |random: &Policy| {
            let source = &random.source;
            vec![source.clone(), difference(&errors(SECOND, source), &errors(RANDOM, source), 4)]
        };
        let random = first.policies.iter().filter(|p| p.policy == RANDOM);
        table(&["confidence", "difference"], &random.map(row).collect::<Vec<_>>())
    }

    fn qualities(&self, of: fn(&Seed) -> &Vec<(String, Quality)>) -> String {
        let Some(first) = self.seeds.first() else { return String::new() };
        let values = |name: &str, value: fn(&Quality) -> f64| -> Vec<f64> {
            let one = |seed: &Seed| {
                of(seed).iter().find(|(other, _)| other == name).map(|(_, quality)| value(quality))
            };
            self.seeds.iter().filter_map(one).collect()
        };
        let row = |(name, _): &(String, Quality)| {
            let auroc = values(name, |quality| quality.auroc);
            vec![
                name.clone(),
                plus_minus(&auroc, 4),
                if name == BASELINE {
                    String::new()
                } else {
                    difference(&auroc, &values(BASELINE, |q| q.auroc), 4)
                },
                plus_minus(&values(name, |quality| quality.ece), 4),
                plus_minus(&values(name, |quality| quality.ece_isotonic), 4),
                plus_minus(&values(name, |quality| quality.brier), 4),
                plus_minus(&values(name, |quality| quality.error_at_half), 3),
            ]
        };
        let head = [
            "score",
            "AUROC",
            "against probability",
            "ECE, Platt",
            "ECE, isotonic",
            "Brier",
            "error of the surer half",
        ];
        table(&head, &of(first).iter().map(row).collect::<Vec<_>>())
    }

    fn policies(&self) -> String {
        let Some(first) = self.seeds.first() else { return String::new() };
        let values = |like: &Policy, source: &str, value: fn(&Policy) -> Option<f64>| -> Vec<f64> {
            let one = |seed: &Seed| {
                let same = |p: &&Policy| p.policy == like.policy && p.source == source;
                seed.policies.iter().find(same).and_then(value)
            };
            self.seeds.iter().filter_map(one).collect()
        };
        let row = |policy: &Policy| {
            let own = |value| values(policy, &policy.source, value);
            let error = own(|p| Some(p.error));
            let against = if policy.source == BASELINE {
                String::new()
            } else {
                difference(&error, &values(policy, BASELINE, |p| Some(p.error)), 3)
            };
            let answered = own(|p| p.error_of_answered);
            let abstained = if answered.is_empty() {
                String::new()
            } else {
                format!("{} of {}", plus_minus(&answered, 3), plus_minus(&own(|p| p.coverage), 2))
            };
            vec![
                policy.policy.clone(),
                policy.source.clone(),
                format!("{:.2}", spread(&own(|p| Some(p.cost))).0),
                plus_minus(&error, 3),
                against,
                plus_minus(&own(|p| p.error_at_four_fifths), 3),
                plus_minus(&own(|p| p.error_at_half), 3),
                abstained,
            ]
        };
        let head = [
            "policy",
            "confidence",
            "cost",
            "error",
            "against probability",
            "at coverage .8",
            "at coverage .5",
            "of those answered",
        ];
        // Policy by policy, not source by source.
        let mut names: Vec<&str> = Vec::new();
        for policy in &first.policies {
            if !names.contains(&policy.policy.as_str()) {
                names.push(&policy.policy);
            }
        }
        let of =
            |name: &&str| first.policies.iter().filter(|p| p.policy == **name).map(row).collect::<Vec<_>>();
        table(&head, &names.iter().flat_map(of).collect::<Vec<_>>())
    }
}

/// Mean and sample standard deviation.
fn spread(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, variance.sqrt())
}

fn plus_minus(values: &[f64], digits: usize) -> String {
    if values.is_empty() {
        return String::new();
    }
    let (mean, deviation) = spread(values);
    if values.len() < 2 {
        return format!("{mean:.digits$}");
    }
    format!("{mean:.digits$} ± {deviation:.digits$}")
}

/// The mean of the differences seed by seed; a null where it is below two of its standard errors, which one seed has none of.
fn difference(own: &[f64], baseline: &[f64], digits: usize) -> String {
    if own.len() != baseline.len() || own.is_empty() {
        return String::new();
    }
    let differences: Vec<f64> = own.iter().zip(baseline).map(|(a, b)| a - b).collect();
    let (mean, deviation) = spread(&differences);
    if differences.len() < 2 {
        return format!("{mean:+.digits$}, one seed");
    }
    let error = deviation / (differences.len() as f64).sqrt();
    let verdict = if mean.abs() <= 2.0 * error { ", null" } else { "" };
    format!("{mean:+.digits$} ± {error:.digits$}{verdict}")
}

fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let rows: String = rows.iter().map(|row| line(row)).collect();
    line(&head) + &line(&vec!["---".to_owned(); head.len()]) + &rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_within_two_standard_errors_are_nulls() {
        assert_eq!(difference(&[0.5, 0.7], &[0.4, 0.6], 2), "+0.10 ± 0.00");
        assert_eq!(difference(&[0.5, 0.5], &[0.4, 0.6], 2), "+0.00 ± 0.10, null");
        assert_eq!(difference(&[0.5], &[0.4], 2), "+0.10, one seed", "which shows nothing");
        assert_eq!(difference(&[], &[], 2), "");
        assert_eq!(plus_minus(&[1.0, 3.0], 1), "2.0 ± 1.4");
        assert_eq!(plus_minus(&[2.0], 1), "2.0");
    }
}
