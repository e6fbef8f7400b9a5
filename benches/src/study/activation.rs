//! The study of the activations: one model, one text, one optimizer, many activations of the feed-forward, each with the
//! same budget for its learning rate. What the trained models do with their units is measured on held-out tokens.

use anyhow::{Context, Result, bail};
use candle_core::{D, DType, Tensor};
use era_act::Activation;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vesper_data::EvalBatches;
use vesper_model::VesperLM;

use super::arm::Arm;
use super::report::{cell, spread, table};
use super::task::{Setting, Task};

/// What is compared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The activations; the first is the one that the others are compared with.
    pub activations: Vec<Activation>,
    /// How all models are updated.
    pub optimizer: Arm,
    /// Learning rates that every activation tries, with one seed.
    pub lrs: Vec<f64>,
    /// Seeds at the best learning rate.
    pub seeds: u64,
    /// Steps of a run.
    pub steps: u64,
}

/// The file of a study: what was run where, and every run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The machine.
    pub machine: String,
    /// The model and the data.
    pub model: String,
    /// Parameters of the model, the same for every activation.
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
    /// Tokens of it that the units are measured on.
    pub unit_tokens: usize,
    /// What was to be run.
    pub plan: Plan,
    /// What was run.
    pub runs: Vec<Run>,
}

/// A run and what it came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// The activation.
    pub activation: Activation,
    /// The base learning rate.
    pub lr: f64,
    /// Of the first weights and the order of the data, the same for all activations.
    pub seed: u64,
    /// Held-out loss at the end, nats a token; none where the run diverged.
    pub loss: Option<f64>,
    /// Milliseconds a step.
    pub step_ms: f64,
    /// What the units do; none where the run diverged.
    pub units: Option<Units>,
    /// Mean training loss of each twentieth of the run.
    pub curve: Vec<f64>,
}

/// What the units of the feed-forwards do on held-out tokens, over all layers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Units {
    /// The share of units that are dead: their activation is below 1 % of its root mean square over the layer, on every
    /// token.
    pub dead: f64,
    /// The share of all activations that are below that.
    pub idle: f64,
    /// The mean entropy of the gate `sigmoid(x)`, x what goes into the activation: nats, at most ln 2 = 0.693.
    pub gate_entropy: f64,
    /// How evenly a layer's units are used: the entropy of the mean sizes of their activations, as a share of that of
    /// equal ones.
    pub evenness: f64,
}

/// Measures the units of one layer; gates: (tokens, units), what goes into the activation.
///
/// # Errors
/// candle's own.
pub fn units(activation: Activation, gates: &Tensor) -> Result<Units> {
    let gates = gates.to_dtype(DType::F32)?;
    let size = activation.forward(&gates)?.abs()?;
    let root = f64::from(size.sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt();
    let largest = size.max(0)?; // (units)
    let share = |t: &Tensor| -> Result<f64> {
        let below = t.lt(0.01 * root)?.to_dtype(DType::F32)?;
        Ok(f64::from(below.mean_all()?.to_scalar::<f32>()?))
    };
    // H(sigmoid(z)) = ln(1 + e) + |z| e / (1 + e), e = exp(-|z|)
    let magnitude = gates.abs()?;
    let exp = magnitude.neg()?.exp()?;
    let one_plus = (&exp + 1.0)?;
    let entropy = (one_plus.log()? + (magnitude * exp.div(&one_plus)?)?)?;
    let mean: Vec<f32> = size.mean(0)?.to_vec1()?;
    let total: f64 = mean.iter().map(|m| f64::from(*m)).sum();
    let used = mean.iter().map(|m| f64::from(*m) / total).filter(|p| *p > 0.0);
    let evenness = used.map(|p| -p * p.ln()).sum::<f64>() / (gates.dim(D::Minus1)? as f64).ln();
    Ok(Units {
        dead: share(&largest)?,
        idle: share(&size)?,
        gate_entropy: f64::from(entropy.mean_all()?.to_scalar::<f32>()?),
        evenness,
    })
}

/// A study under way.
pub struct Study<'a> {
    setting: &'a Setting,
    /// What this call is to run: the record's own plan may hold more.
    asked: Plan,
    record: Record,
    file: PathBuf,
    until: Instant,
}

impl<'a> Study<'a> {
    /// A study that writes its record after every run and starts no run after `limit`. A record that is there already is
    /// gone on with: activations, learning rates and seeds may be others, and join those that it has.
    ///
    /// # Errors
    /// `file` holds a record that cannot be read, or was run otherwise.
    pub fn new(setting: &'a Setting, mut record: Record, file: &Path, limit: Duration) -> Result<Self> {
        let asked = record.plan.clone();
        if file.exists() {
            let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
            let old: Record = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
            record = joined(old, &record).with_context(|| file.display().to_string())?;
        }
        Ok(Self { setting, asked, record, file: file.to_owned(), until: Instant::now() + limit })
    }

    /// Makes all runs that there is time for.
    ///
    /// # Errors
    /// A run fails, or the record cannot be written.
    pub fn run(mut self) -> Result<Record> {
        let plan = self.asked.clone();
        for &lr in &plan.lrs {
            for &activation in &plan.activations {
                self.one(activation, lr, 0)?;
            }
        }
        for seed in 1..plan.seeds {
            for &activation in &plan.activations {
                if let Some(lr) = best(&self.record, activation) {
                    self.one(activation, lr, seed)?;
                }
            }
        }
        Ok(self.record)
    }

    /// Makes a run that was not made yet.
    fn one(&mut self, activation: Activation, lr: f64, seed: u64) -> Result<()> {
        let made = |run: &Run| run.activation == activation && run.lr == lr && run.seed == seed;
        if Instant::now() >= self.until || self.record.runs.iter().any(made) {
            return Ok(());
        }
        let mut setting = self.setting.clone();
        setting.model = setting.model.with_activation(activation);
        let (arm, steps) = (self.record.plan.optimizer, self.record.plan.steps);
        let task = Task::new(arm, lr, steps, seed);
        let (outcome, units) = setting.run_and(task, |model| measured(&setting, model))?;
        let run = Run {
            activation,
            lr,
            seed,
            loss: outcome.loss,
            step_ms: 1e3 * outcome.seconds / steps as f64,
            units: outcome.loss.map(|_| units),
            curve: outcome.curve,
        };
        println!(
            "{activation} lr {lr} seed {seed}: loss {:?}, {:.2} ms a step, {:?}",
            run.loss, run.step_ms, run.units
        );
        self.record.runs.push(run);
        let part = self.file.with_extension("part");
        std::fs::write(&part, serde_json::to_string_pretty(&self.record)? + "\n")
            .and_then(|()| std::fs::rename(&part, &self.file))
            .with_context(|| self.file.display().to_string())
    }
}

/// A record with its plan widened by that of a new one, which must have been run in the same way.
fn joined(mut old: Record, new: &Record) -> Result<Record> {
    let how = |record: &Record| {
        let Record {
            machine,
            model,
            parameters,
            vocab,
            data,
            batch,
            seq,
            eval_tokens,
            unit_tokens,
            plan,
            ..
        } = record;
        [
            ("machine", machine.clone()),
            ("model", model.clone()),
            ("parameters", parameters.to_string()),
            ("vocab", vocab.to_string()),
            ("data", data.clone()),
            ("batch", batch.to_string()),
            ("seq", seq.to_string()),
            ("eval_tokens", eval_tokens.to_string()),
            ("unit_tokens", unit_tokens.to_string()),
            ("optimizer", format!("{:?}", plan.optimizer)),
            ("steps", plan.steps.to_string()),
        ]
    };
    for ((field, before), (_, now)) in how(&old).into_iter().zip(how(new)) {
        if before != now {
            bail!("the record has {field} = {before:?}, this study {now:?}: give another file");
        }
    }
    for &activation in &new.plan.activations {
        if !old.plan.activations.contains(&activation) {
            old.plan.activations.push(activation);
        }
    }
    for &lr in &new.plan.lrs {
        if !old.plan.lrs.contains(&lr) {
            old.plan.lrs.push(lr);
        }
    }
    old.plan.lrs.sort_by(f64::total_cmp);
    old.plan.seeds = old.plan.seeds.max(new.plan.seeds);
    Ok(old)
}

/// The mean over the layers, on the first held-out batch.
fn measured(setting: &Setting, model: &VesperLM) -> Result<Units> {
    let mut batches =
        EvalBatches::new(setting.held_out.clone(), setting.batch, setting.seq, &setting.device)?;
    let batch = batches.next().context("no held-out text")??;
    let layers = model
        .gates(&batch.inputs)?
        .iter()
        .map(|gates| units(setting.model.hidden_act, &gates.flatten_to(1)?))
        .collect::<Result<Vec<_>>>()?;
    let mean = |of: fn(&Units) -> f64| layers.iter().map(of).sum::<f64>() / layers.len() as f64;
    Ok(Units {
        dead: mean(|u| u.dead),
        idle: mean(|u| u.idle),
        gate_entropy: mean(|u| u.gate_entropy),
        evenness: mean(|u| u.evenness),
    })
}

/// The learning rate with the lowest held-out loss with seed 0.
pub fn best(record: &Record, activation: Activation) -> Option<f64> {
    let of = |run: &&Run| run.activation == activation && run.seed == 0 && record.plan.lrs.contains(&run.lr);
    let runs = record.runs.iter().filter(of).filter_map(|run| Some((run.lr, run.loss?)));
    runs.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(lr, _)| lr)
}

/// The record as Markdown tables: the losses, and what the units do.
///
/// A difference from the first activation is called a null where it is below two of its standard errors.
pub fn report(record: &Record) -> String {
    let plan = &record.plan;
    let at_best = |activation: Activation| -> Vec<&Run> {
        let lr = best(record, activation);
        record.runs.iter().filter(|run| run.activation == activation && Some(run.lr) == lr).collect()
    };
    let losses =
        |runs: &[&Run]| -> Vec<f64> { runs.iter().map(|run| run.loss.unwrap_or(f64::INFINITY)).collect() };
    let Some(&first) = plan.activations.first() else { return String::new() };
    let baseline = losses(&at_best(first));

    let mut head = vec!["activation".to_owned()];
    head.extend(plan.lrs.iter().map(|lr| format!("lr {lr}")));
    head.extend(["seeds at the best".to_owned(), format!("against {first}"), "ms a step".to_owned()]);
    let row = |&activation: &Activation| {
        let mut row = vec![activation.to_string()];
        for &lr in &plan.lrs {
            let one = |run: &&Run| run.activation == activation && run.lr == lr && run.seed == 0;
            row.push(cell(&losses(&record.runs.iter().filter(one).collect::<Vec<_>>())));
        }
        let runs = at_best(activation);
        let own = losses(&runs);
        row.push(cell(&own));
        row.push(if activation == first { String::new() } else { against(&own, &baseline) });
        let mut steps: Vec<f64> = runs.iter().map(|run| run.step_ms).collect();
        steps.sort_by(f64::total_cmp);
        row.push(steps.get(steps.len() / 2).map_or_else(String::new, |ms| format!("{ms:.2}")));
        row
    };
    let first_table = table(&head, &plan.activations.iter().map(row).collect::<Vec<_>>());

    let head =
        ["activation", "dead units", "idle activations", "entropy of the gate, nats", "evenness of use"];
    let row = |&activation: &Activation| {
        let units: Vec<Units> = at_best(activation).iter().filter_map(|run| run.units).collect();
        let of = |value: fn(&Units) -> f64, factor: f64| {
            let (mean, deviation) = spread(&units.iter().map(|u| factor * value(u)).collect::<Vec<_>>());
            if units.is_empty() { String::new() } else { format!("{mean:.3} ± {deviation:.3}") }
        };
        let percent = |value| of(value, 100.0) + " %";
        let shares =
            [percent(|u| u.dead), percent(|u| u.idle), of(|u| u.gate_entropy, 1.0), of(|u| u.evenness, 1.0)];
        std::iter::once(activation.to_string()).chain(shares).collect()
    };
    let rows: Vec<Vec<String>> = plan.activations.iter().map(row).collect();
    first_table + &table(&head.map(str::to_owned), &rows)
}

/// The difference of two means with its standard error, and whether it is one.
fn against(own: &[f64], baseline: &[f64]) -> String {
    if own.len() < 2 || baseline.len() < 2 {
        return String::new();
    }
    let ((mean, deviation), (base, base_deviation)) = (spread(own), spread(baseline));
    let error =
        (deviation.powi(2) / own.len() as f64 + base_deviation.powi(2) / baseline.len() as f64).sqrt();
    let difference = mean - base;
    let verdict = if difference.abs() < 2.0 * error { ", null" } else { "" };
    format!("{difference:+.4} ± {error:.4}{verdict}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn units_that_are_never_used_are_dead_and_undecided_gates_have_the_entropy_of_a_coin() {
        // Three units: one that is never positive, one that is now and then, one that always is.
        let gates = Tensor::new(&[[-1f32, -2.0, 3.0], [-1.0, 4.0, 3.0]], &Device::Cpu).unwrap();
        let relu = units(Activation::Relu, &gates).unwrap();
        assert!((relu.dead - 1.0 / 3.0).abs() < 1e-6 && (relu.idle - 0.5).abs() < 1e-6);
        let silu = units(Activation::Silu, &gates).unwrap();
        assert_eq!(silu.dead, 0.0);
        let undecided =
            units(Activation::Silu, &Tensor::new(&[[1e-4f32, -1e-4]], &Device::Cpu).unwrap()).unwrap();
        assert!((undecided.gate_entropy - std::f64::consts::LN_2).abs() < 1e-6);
        assert!((undecided.evenness - 1.0).abs() < 1e-3);
        assert!(silu.evenness < 1.0 && relu.evenness < silu.evenness);
    }

    #[test]
    fn a_record_is_gone_on_with_by_single_arms_but_not_in_another_way() {
        let record = |activations: &[Activation], lrs: &[f64], seeds, steps| Record {
            machine: "here".into(),
            model: "small".into(),
            parameters: 1,
            vocab: 2,
            data: "text".into(),
            batch: 1,
            seq: 1,
            eval_tokens: 1,
            unit_tokens: 1,
            plan: Plan {
                activations: activations.to_vec(),
                optimizer: Arm::Adamw,
                lrs: lrs.to_vec(),
                seeds,
                steps,
            },
            runs: Vec::new(),
        };
        let old = || record(&[Activation::Silu, Activation::Relu], &[1e-3, 2e-3], 3, 5);
        let new = record(&[Activation::Relu, Activation::Gelu], &[5e-4, 1e-3], 2, 5);
        let plan = joined(old(), &new).unwrap().plan;
        assert_eq!(plan.activations, [Activation::Silu, Activation::Relu, Activation::Gelu]);
        assert_eq!((plan.lrs, plan.seeds), (vec![5e-4, 1e-3, 2e-3], 3));
        let error = joined(old(), &record(&[Activation::Relu], &[1e-3], 3, 6)).unwrap_err().to_string();
        assert_eq!(error, "the record has steps = \"5\", this study \"6\": give another file");
        let elsewhere = Record { machine: "there".into(), ..new };
        assert!(joined(old(), &elsewhere).unwrap_err().to_string().contains("machine"));
    }

    #[test]
    fn a_difference_below_two_standard_errors_is_called_a_null() {
        assert_eq!(against(&[1.0, 1.2], &[1.05, 1.1]), "+0.0250 ± 0.1031, null");
        assert_eq!(against(&[1.0, 1.01], &[2.0, 2.01]), "-1.0000 ± 0.0071");
        assert_eq!(against(&[1.0], &[2.0, 2.01]), "");
    }

    #[test]
    fn a_report_has_a_row_for_each_activation_at_its_best_learning_rate() {
        let run = |activation, lr, seed, loss: f64| Run {
            activation,
            lr,
            seed,
            loss: Some(loss),
            step_ms: 8.5,
            units: Some(Units { dead: 0.25, idle: 0.5, gate_entropy: 0.4, evenness: 0.9 }),
            curve: Vec::new(),
        };
        let activations = vec![Activation::Silu, Activation::default()];
        let mut runs = Vec::new();
        for &activation in &activations {
            for (lr, loss) in [(0.001, 4.0), (0.002, 3.0)] {
                runs.push(run(activation, lr, 0, loss));
            }
            runs.push(run(activation, 0.002, 1, 3.25));
        }
        let record = Record {
            machine: "here".into(),
            model: "small".into(),
            parameters: 1,
            vocab: 2,
            data: "text".into(),
            batch: 1,
            seq: 1,
            eval_tokens: 1,
            unit_tokens: 1,
            plan: Plan { activations, optimizer: Arm::Adamw, lrs: vec![0.001, 0.002], seeds: 2, steps: 3 },
            runs,
        };
        let read: Record = serde_json::from_str(&serde_json::to_string(&record).unwrap()).unwrap();
        let text = report(&read);
        assert!(text.contains("| silu | 4.000 | 3.000 | 3.1250 ± 0.1768 (2) |  | 8.50 |"), "{text}");
        assert!(
            text.contains("| era | 4.000 | 3.000 | 3.1250 ± 0.1768 (2) | +0.0000 ± 0.1768, null | 8.50 |"),
            "{text}"
        );
        assert!(
            text.contains("| era | 25.000 ± 0.000 % | 50.000 ± 0.000 % | 0.400 ± 0.000 | 0.900 ± 0.000 |"),
            "{text}"
        );
    }
}
