//! What came of a quantisation, for people and for the record.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use vesper_model::quantized::{Report, TensorReport};

use super::measure::Measured;

/// `quantize.json`
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// What it was measured on.
    pub machine: String,
    /// When, in UTC.
    pub date: String,
    /// Threads of the process.
    pub threads: usize,
    /// The model.
    pub model: String,
    /// Its parameters.
    pub parameters: usize,
    /// What the loss was measured on.
    pub text: String,
    /// Tokens of it.
    pub tokens: usize,
    /// Tokens a window.
    pub window: usize,
    /// The model as it was.
    pub before: Row,
    /// In each type that was asked for.
    pub types: Vec<Row>,
}

/// One form of the model.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    /// The type of its weights.
    pub name: String,
    /// Bytes of its weights.
    pub bytes: usize,
    /// Loss and speed.
    pub measured: Measured,
    /// What each tensor became.
    #[serde(default, skip_deserializing, skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<TensorReport>,
}

impl Record {
    /// The table of all forms.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:8} {:>9} {:>6} {:>11} {:>8} {:>13} {:>11} {:>12}\n",
            "type", "MiB", "size", "perplexity", "change", "token by token", "tokens/s", "prompt tok/s"
        );
        for row in std::iter::once(&self.before).chain(&self.types) {
            let (m, base) = (&row.measured, &self.before.measured);
            let _ = writeln!(
                text,
                "{:8} {:>9.2} {:>4.0} % {:>11.4} {:>6.2} % {:>14.4} {:>11.0} {:>12.0}",
                row.name,
                row.bytes as f64 / f64::from(1 << 20),
                100.0 * row.bytes as f64 / self.before.bytes as f64,
                m.perplexity,
                100.0 * (m.perplexity / base.perplexity - 1.0),
                m.perplexity_token_by_token,
                m.decode_tokens_per_second,
                m.prefill_tokens_per_second,
            );
        }
        text
    }
}

/// What the tensors became, those of all blocks that became the same in one line.
pub fn tensors(report: &Report) -> String {
    let mut lines: Vec<(String, &TensorReport, usize, f64)> = Vec::new();
    for tensor in &report.tensors {
        let name = general(&tensor.name);
        let same = |(other, first, ..): &&mut (String, &TensorReport, usize, f64)| {
            *other == name && first.got == tensor.got && first.asked == tensor.asked
        };
        if let Some((_, _, count, error)) = lines.iter_mut().find(same) {
            *count += 1;
            *error = error.max(tensor.error);
        } else {
            lines.push((name, tensor, 1, tensor.error));
        }
    }
    let width = lines.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, tensor, count, error) in lines {
        let shape = tensor.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(" x ");
        let reason = tensor.reason().map_or(String::new(), |reason| format!(": {reason}"));
        let _ = writeln!(
            text,
            "  {name:width$} {shape:>13} {count:>4} x {:5} {:>6.2} %{reason}",
            tensor.got.name(),
            100.0 * error
        );
    }
    text
}

/// A name with `*` for the number of the block.
fn general(name: &str) -> String {
    let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    name.split('.').map(|part| if is_number(part) { "*" } else { part }).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use vesper_model::quantized::BlockType;

    use super::*;

    #[test]
    fn blocks_that_are_alike_share_a_line() {
        let tensor = |name: &str, got: BlockType, error: f64| TensorReport {
            name: name.into(),
            shape: vec![8, 160],
            asked: Some(BlockType::Q4K),
            got,
            bytes_before: 5120,
            bytes: got.bytes(1280),
            error,
        };
        let report = Report {
            tensors: vec![
                tensor("model.layers.0.a.weight", BlockType::Q5_0, 0.01),
                tensor("model.layers.1.a.weight", BlockType::Q5_0, 0.02),
                tensor("model.layers.2.a.weight", BlockType::Q8_0, 0.0),
                tensor("model.layers.0.a_name_that_is_as_long_as_a_name_can_be.weight", BlockType::Q8_0, 0.0),
            ],
        };
        let text = tensors(&report);
        assert_eq!(text.lines().count(), 3, "{text}");
        let column = |line: &str| line.find("8 x 160");
        assert!(column(&text).is_some() && text.lines().all(|line| column(line) == column(&text)), "{text}");
        assert!(text.contains("model.layers.*.a.weight") && text.contains("2 x q5_0    2.00 %"), "{text}");
        assert!(text.contains("rows of 160 do not divide into blocks of 256"), "{text}");
    }
}
