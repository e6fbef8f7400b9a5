//! A study's record as Markdown tables.

use serde::Serialize;

use super::arm::Arm;
use super::parts::{Condition, Part, Parts};
use super::plan::{Plan, Record, best};
use super::task::{Data, Task};

/// All tables: learning rates, shorter schedules, wrong learning rates and corrupted data.
pub fn report(record: &Record<Plan>) -> String {
    [learning_rates(record), shorter_schedules(record), stress(record)].concat()
}

/// All tables of a study of parts: losses, and differences to the arm alone with the same seed.
pub fn report_parts(record: &Record<Parts>) -> String {
    let plan = &record.plan;
    let mut tables = String::new();
    for arm in Parts::ARMS {
        let conditions = Parts::conditions(arm);
        let mut head = vec![name(arm)];
        head.extend(conditions.iter().map(|&condition| label(condition)));
        let cells = |part: Part, cell: &dyn Fn(Condition) -> String| {
            let mut row = vec![if part.is_none() { "alone".to_owned() } else { name(part) }];
            row.extend(conditions.iter().map(|&condition| cell(condition)));
            row
        };
        let loss = |part, condition, seed| {
            let task = plan.task(arm, part, condition, seed)?;
            losses(record, |t| *t == task).first().copied()
        };
        let seeds = |of: &dyn Fn(u64) -> Option<f64>| (0..plan.seeds).filter_map(of).collect::<Vec<_>>();
        let parts = Parts::parts(arm);
        let rows = |of: &dyn Fn(Part, Condition, u64) -> Option<f64>, signed: bool| {
            let row = |&part: &Part| {
                cells(part, &|condition| {
                    let values = seeds(&|seed| of(part, condition, seed));
                    if signed { signed_cell(&values) } else { cell(&values) }
                })
            };
            parts.iter().skip(usize::from(signed)).map(row).collect::<Vec<_>>()
        };
        tables += &table(&head, &rows(&loss, false));
        let difference =
            |part, condition, seed| Some(loss(part, condition, seed)? - loss(Part::None, condition, seed)?);
        tables += &table(&head, &rows(&difference, true));
    }
    let near = |&(arm, best): &(Arm, f64)| {
        let mut row = vec![name(arm)];
        row.extend([0.5, 1.0, 2.0].map(|factor| {
            let task = Task::new(arm, best * factor, plan.steps, 0);
            cell(&losses(record, |t| *t == task))
        }));
        row
    };
    let head = ["seed 0", "half of the best lr", "the best", "twice the best"].map(str::to_owned);
    let rates: Vec<_> =
        [(Arm::Adamw, plan.adamw_lr), (Arm::Velvet, plan.velvet_lr)].iter().map(near).collect();
    tables + &table(&head, &rates)
}

fn label(condition: Condition) -> String {
    match condition {
        Condition::Tuned => "tuned".to_owned(),
        Condition::Rate(factor) => format!("{factor} x the best lr"),
        Condition::Cold => "no warm-up".to_owned(),
        Condition::Corrupted => "corrupted batches".to_owned(),
    }
}

fn learning_rates(record: &Record<Plan>) -> String {
    let plan = &record.plan;
    let mut head = vec![String::new()];
    head.extend(plan.lrs.iter().map(|lr| format!("lr {lr}")));
    head.push("seeds at the best".to_owned());
    head.push("ms a step".to_owned());
    let row = |&arm: &Arm| {
        let mut row = vec![name(arm)];
        for &lr in &plan.lrs {
            row.push(cell(&losses(record, |t| full(record, t) && t.arm == arm && t.lr == lr && t.seed == 0)));
        }
        let lr = best(record, arm).map(|(lr, _)| lr);
        row.push(cell(&losses(record, |t| full(record, t) && t.arm == arm && Some(t.lr) == lr)));
        let mut steps: Vec<f64> = record
            .runs
            .iter()
            .filter(|run| full(record, &run.task) && run.task.arm == arm && run.loss.is_some())
            .map(|run| 1e3 * run.seconds / run.task.steps as f64)
            .collect();
        steps.sort_by(f64::total_cmp);
        row.push(steps.get(steps.len() / 2).map_or_else(String::new, |ms| format!("{ms:.1}")));
        row
    };
    table(&head, &plan.tuned.iter().chain(&plan.swept).map(row).collect::<Vec<_>>())
}

fn shorter_schedules(record: &Record<Plan>) -> String {
    let plan = &record.plan;
    let (Some(arm), Some(&baseline)) = (plan.shortened, plan.tuned.first()) else { return String::new() };
    let (Some((lr, _)), Some((base_lr, _))) = (best(record, arm), best(record, baseline)) else {
        return String::new();
    };
    let base = losses(record, |t| full(record, t) && t.arm == baseline && t.lr == base_lr);
    let row = |&share: &f64| {
        let steps = (plan.steps as f64 * share).round() as u64;
        let all = losses(record, |t| t.arm == arm && t.lr == lr && t.steps == steps && t.data == Data::Clean);
        let difference = format!("{:+.4}", spread(&all).0 - spread(&base).0);
        vec![format!("{} over {share} of the steps", name(arm)), cell(&all), difference]
    };
    let head = [String::new(), "loss".to_owned(), format!("against {} over all", name(baseline))];
    table(&head, &plan.shares.iter().chain(&[1.0]).map(row).collect::<Vec<_>>())
}

fn stress(record: &Record<Plan>) -> String {
    let plan = &record.plan;
    let Some((base_lr, _)) = plan.tuned.first().and_then(|&arm| best(record, arm)) else {
        return String::new();
    };
    let row = |&arm: &Arm| {
        let mut row = vec![name(arm)];
        for factor in [1.0, 4.0, 8.0] {
            let lr = base_lr * factor;
            row.push(cell(&losses(record, |t| full(record, t) && t.arm == arm && t.lr == lr && t.seed == 0)));
        }
        row.push(cell(&losses(record, |t| t.data == Data::Corrupted && t.arm == arm)));
        row
    };
    let head = ["", "at the baseline's lr", "4 x", "8 x", "corrupted batches, at its best lr"];
    table(&head.map(str::to_owned), &plan.stressed.iter().map(row).collect::<Vec<_>>())
}

/// A run over all steps on clean data.
fn full(record: &Record<Plan>, task: &Task) -> bool {
    task.steps == record.plan.steps && task.data == Data::Clean
}

/// The losses of some runs; a diverged one counts as infinite.
fn losses<P>(record: &Record<P>, pick: impl Fn(&Task) -> bool) -> Vec<f64> {
    record.runs.iter().filter(|run| pick(&run.task)).map(|run| run.loss.unwrap_or(f64::INFINITY)).collect()
}

/// Nothing, one loss, or mean, standard deviation and number.
pub(super) fn cell(losses: &[f64]) -> String {
    match losses {
        [] => String::new(),
        [loss] => format!("{loss:.3}"),
        _ => {
            let (mean, deviation) = spread(losses);
            format!("{mean:.4} ± {deviation:.4} ({})", losses.len())
        }
    }
}

/// Nothing, or mean, standard deviation and number of differences.
fn signed_cell(differences: &[f64]) -> String {
    if differences.is_empty() {
        return String::new();
    }
    let (mean, deviation) = spread(differences);
    format!("{mean:+.4} ± {deviation:.4} ({})", differences.len())
}

pub(super) fn table(head: &[String], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let rule = line(&vec!["---".to_owned(); head.len()]);
    let rows: Vec<String> = rows.iter().map(|row| line(row)).collect();
    [line(head), rule, rows.concat(), "\n".to_owned()].concat()
}

fn name(arm: impl Serialize) -> String {
    serde_json::to_value(arm).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Mean and sample standard deviation.
pub(super) fn spread(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, variance.sqrt())
}
