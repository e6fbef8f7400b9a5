//! Which model suits how much text.

use anyhow::{Result, bail};
use serde::Serialize;
use vesper_data::TrainConfig;
use vesper_data::sizing::{self, Budget, Law, Sizing, USEFUL_EPOCHS};
use vesper_model::VesperConfig;

use crate::dataset::access;
use crate::dataset::flags::Plan as Flags;

/// How far from the law's optimum a preset may be.
const TOLERANCE: f64 = 2.5;

/// A plan.
#[derive(Debug, Serialize)]
pub struct Plan {
    /// Tokens of the text, where there is one.
    pub tokens: Option<f64>,
    /// Entries of the vocabulary that these are counted with.
    pub vocab_size: Option<usize>,
    /// Operations to spend, where that was asked.
    pub flops: Option<f64>,
    /// Parameters of the best model of all.
    pub best_parameters: f64,
    /// Tokens it is to be trained on.
    pub best_tokens: f64,
    /// The preset that is near enough to it.
    pub preset: Option<&'static str>,
    /// Why there is none.
    pub refused: Option<String>,
    /// What each preset would need.
    pub presets: Vec<Row>,
}

/// What a preset needs.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// Entries of its vocabulary: the tokenizer's; that which `train` takes for its size, where none is asked for.
    pub vocab_size: usize,
    /// Its parameters, with that vocabulary.
    pub parameters: usize,
    /// Tokens to train it on.
    pub tokens: f64,
    /// Operations that takes.
    pub flops: f64,
    /// How often the text is read for that.
    pub epochs: Option<f64>,
    /// Hours, at the speed that was given.
    pub hours: Option<f64>,
}

impl Plan {
    /// Plans for the text, tokens or operations of the flags.
    ///
    /// # Errors
    /// Names what cannot be read, a number that is not positive, or a budget that no model follows from.
    pub fn of(flags: &Flags) -> Result<Self> {
        let numbers = [
            // With the most that there is any use for.
            ("--tokens", flags.tokens, 1e18),
            ("--flops", flags.flops, 1e30),
            ("--ratio", Some(flags.ratio), 1e6),
            ("--speed", flags.speed, 1e12),
        ];
        for (flag, value, most) in numbers {
            let Some(value) = value else { continue };
            if !(value.is_finite() && value > 0.0) {
                bail!("{flag} {value}: expected a positive number");
            }
            if value > most {
                bail!("{flag} {value:e}: expected at most {most:e}");
            }
        }
        let (tokens, vocab) = text(flags)?;
        let law = flags.law();
        let budget = match (flags.flops, tokens) {
            (Some(flops), _) => Budget::Flops(flops),
            (None, Some(tokens)) => Budget::Tokens(tokens),
            (None, None) => bail!("plan for what? expected text (a PATH), --tokens N or --flops C"),
        };
        let best = law.optimum(budget)?;
        let mut presets = Vec::new();
        for name in VesperConfig::PRESETS {
            let preset = VesperConfig::preset(name)?;
            let config = match vocab {
                Some(vocab) if flags.text.leaves_the_vocabulary_open() => {
                    // A text with few strings to learn has fewer entries, for `train` too.
                    let found_all = vocab < TrainConfig::default().vocab_size;
                    let usual = preset.vocab_size;
                    preset.with_vocab(if found_all { vocab.min(usual) } else { usual })
                }
                Some(vocab) => preset.with_vocab(vocab),
                None => preset,
            };
            presets.push(row(name, &config, law, tokens, flags.speed)?);
        }
        let sizes: Vec<f64> = presets.iter().map(|row| row.parameters as f64).collect();
        let chosen = sizing::choose(&sizes, law, budget, TOLERANCE);
        Ok(Self {
            tokens,
            vocab_size: vocab,
            flops: flags.flops,
            best_parameters: best.parameters,
            best_tokens: best.tokens,
            preset: chosen.as_ref().ok().and_then(|&index| presets.get(index)).map(|row| row.name),
            refused: chosen.err().map(|error| error.to_string()),
            presets,
        })
    }

    /// Prints the plan for people.
    pub fn print(&self) {
        if let Some(tokens) = self.tokens {
            let of = self.vocab_size.map_or(String::new(), |vocab| format!(" of a vocabulary of {vocab}"));
            crate::say!("{} tokens{of}", short(tokens));
        }
        if let Some(flops) = self.flops {
            crate::say!("{flops:.3e} operations");
        }
        crate::say!(
            "The best model has {} parameters and is trained on {} tokens.",
            short(self.best_parameters),
            short(self.best_tokens)
        );
        crate::say!(
            "\n{:<8} {:>10} {:>11} {:>12} {:>11} {:>8} {:>8}",
            "size",
            "vocabulary",
            "parameters",
            "its tokens",
            "operations",
            "epochs",
            "hours"
        );
        let or_dash = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
        for row in &self.presets {
            crate::say!(
                "{:<8} {:>10} {:>11} {:>12} {:>11} {:>8} {:>8}{}",
                row.name,
                row.vocab_size,
                short(row.parameters as f64),
                short(row.tokens),
                format!("{:.1e}", row.flops),
                or_dash(row.epochs),
                or_dash(row.hours),
                if row.name == self.preset.unwrap_or_default() { "  <- suits best" } else { "" }
            );
        }
        if let Some(refused) = &self.refused {
            crate::say!("\nNo size is recommended: {refused}.");
        }
        if self.presets.iter().any(|row| row.epochs.is_some_and(|epochs| epochs > USEFUL_EPOCHS)) {
            crate::say!(
                "\nBeyond {USEFUL_EPOCHS} epochs, reading the same text again teaches clearly less than new text would."
            );
        }
    }
}

/// The tokens of the text or of `--tokens`, and the tokenizer's vocabulary.
fn text(flags: &Flags) -> Result<(Option<f64>, Option<usize>)> {
    match (flags.tokens, flags.text.paths().next()) {
        (Some(_), Some(_)) => bail!("--tokens: the text has its own number of tokens"),
        (Some(tokens), None) => Ok((Some(tokens), None)),
        (None, None) => Ok((None, None)),
        (None, Some(_)) => {
            let opened = access::open(&flags.text)?;
            Ok((Some(opened.cache.len() as f64), Some(opened.tokenizer.vocab_size())))
        }
    }
}

fn row(
    name: &'static str,
    config: &VesperConfig,
    law: Law,
    tokens: Option<f64>,
    speed: Option<f64>,
) -> Result<Row> {
    let parameters = config.num_parameters();
    let sizing: Sizing = law.optimum(Budget::Parameters(parameters as f64))?;
    Ok(Row {
        name,
        vocab_size: config.vocab_size,
        parameters,
        tokens: sizing.tokens,
        flops: sizing.flops(),
        epochs: tokens.map(|tokens| sizing.epochs(tokens)).transpose()?,
        hours: speed.map(|speed| sizing.hours(speed)).transpose()?,
    })
}

/// A large number for people: `22.9 M`.
fn short(number: f64) -> String {
    for (unit, size) in [("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)] {
        if number >= size {
            return format!("{:.1} {unit}", number / size);
        }
    }
    format!("{number:.0}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use vesper_data::sizing::Architecture;

    #[test]
    fn the_formula_of_an_architecture_is_that_of_the_model() {
        for name in VesperConfig::PRESETS {
            let config = VesperConfig::preset(name).unwrap();
            let architecture = Architecture {
                vocab_size: config.vocab_size as u64,
                hidden_size: config.hidden_size as u64,
                layers: config.num_hidden_layers as u64,
                heads: config.num_attention_heads as u64,
                kv_heads: config.num_key_value_heads as u64,
                head_dim: config.head_dim as u64,
                intermediate_size: config.intermediate_size as u64,
                tied_embeddings: config.tie_word_embeddings,
            };
            assert_eq!(architecture.parameters().unwrap(), config.num_parameters() as u64, "{name}");
        }
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([22_934_400.0, 1.4e12, 999.0, 2560.0].map(short), ["22.9 M", "1.4 T", "999", "2.6 k"]);
    }
}
