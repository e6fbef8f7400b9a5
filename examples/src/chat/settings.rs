//! The settings of sampling: as flags, as commands, and as the panel of the interface shows and changes them.

use anyhow::{Context, Result};
use clap::Args;
use vesper_model::generate::GenerationConfig;

/// The settings as flags. What is not given is the model's.
#[derive(Debug, Clone, Default, Args)]
pub struct Sampling {
    /// 0 always takes the likeliest token; 1 draws from the model's distribution [default: the model's]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub temperature: Option<f64>,
    /// Draw from the K likeliest tokens only; 0: from all
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Draw from the likeliest tokens that reach probability P together; 1: from all
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Draw from the tokens at least P times as likely as the likeliest; 0: from all
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f64>,
    /// Over 1: tokens that were already used become less likely
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f64>,
    /// The most tokens of an answer
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// The same seed and prompt give the same answer [default: 0]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

impl Sampling {
    /// Changes what is given.
    pub fn apply(&self, settings: &mut GenerationConfig) {
        fn set<T: Copy>(to: &mut T, from: Option<T>) {
            if let Some(value) = from {
                *to = value;
            }
        }
        set(&mut settings.temperature, self.temperature);
        set(&mut settings.top_k, self.top_k);
        set(&mut settings.top_p, self.top_p);
        set(&mut settings.min_p, self.min_p);
        set(&mut settings.repetition_penalty, self.repetition_penalty);
        set(&mut settings.max_new_tokens, self.max_tokens);
        set(&mut settings.seed, self.seed);
        if self.max_tokens.is_some() {
            settings.max_length = None; // the file's, which would count the prompt
        }
        let draws = self.temperature.is_some()
            || self.top_k.is_some()
            || self.top_p.is_some()
            || self.min_p.is_some();
        settings.do_sample |= draws; // a temperature of 0 is greedy all the same
    }
}

/// One setting that can be changed while the program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// How wild.
    Temperature,
    /// How many tokens to draw from.
    TopK,
    /// How much probability to draw from.
    TopP,
    /// How much of the likeliest token's probability a token needs.
    MinP,
    /// How much less likely used tokens become.
    RepetitionPenalty,
    /// How long an answer may be.
    MaxTokens,
    /// What the draws begin with.
    Seed,
}

impl Setting {
    /// All, in the order in which they are shown.
    pub const ALL: [Self; 7] = [
        Self::Temperature,
        Self::TopK,
        Self::TopP,
        Self::MinP,
        Self::RepetitionPenalty,
        Self::MaxTokens,
        Self::Seed,
    ];

    /// The name of its flag and its command.
    pub fn name(self) -> &'static str {
        match self {
            Self::Temperature => "temperature",
            Self::TopK => "top-k",
            Self::TopP => "top-p",
            Self::MinP => "min-p",
            Self::RepetitionPenalty => "repetition-penalty",
            Self::MaxTokens => "max-tokens",
            Self::Seed => "seed",
        }
    }

    /// Its value as one writes it.
    pub fn show(self, settings: &GenerationConfig) -> String {
        match self {
            Self::Temperature if settings.is_greedy() => "0".into(),
            Self::Temperature => settings.temperature.to_string(),
            Self::TopK => settings.top_k.to_string(),
            Self::TopP => settings.top_p.to_string(),
            Self::MinP => settings.min_p.to_string(),
            Self::RepetitionPenalty => settings.repetition_penalty.to_string(),
            Self::MaxTokens => settings.max_new_tokens.to_string(),
            Self::Seed => settings.seed.to_string(),
        }
    }

    /// Takes a value as one writes it; one that is out of range changes nothing.
    ///
    /// # Errors
    /// Says what the setting can be.
    pub fn set(self, settings: &mut GenerationConfig, value: &str) -> Result<()> {
        let mut new = settings.clone();
        let value = value.trim();
        let wrong = || format!("/{} {value}: not a number that it can take", self.name());
        match self {
            Self::Temperature => new.temperature = value.parse().with_context(wrong)?,
            Self::TopK => new.top_k = value.parse().with_context(wrong)?,
            Self::TopP => new.top_p = value.parse().with_context(wrong)?,
            Self::MinP => new.min_p = value.parse().with_context(wrong)?,
            Self::RepetitionPenalty => new.repetition_penalty = value.parse().with_context(wrong)?,
            Self::MaxTokens => {
                new.max_new_tokens = value.parse().with_context(wrong)?;
                new.max_length = None; // the file's, which would count the prompt
            }
            Self::Seed => new.seed = value.parse().with_context(wrong)?,
        }
        new.do_sample |= matches!(self, Self::Temperature | Self::TopK | Self::TopP | Self::MinP);
        new.validate()?;
        *settings = new;
        Ok(())
    }

    /// One step up or down, within its range.
    pub fn step(self, settings: &mut GenerationConfig, up: bool) {
        fn real(value: f64, step: f64, up: bool, range: (f64, f64)) -> String {
            let next = if up { value + step } else { value - step };
            let next = (next.clamp(range.0, range.1) / step).round() * step;
            format!("{next:.2}").trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        fn whole(value: usize, step: usize, up: bool) -> String {
            if up { value.saturating_add(step) } else { value.saturating_sub(step) }.to_string()
        }
        let value = match self {
            Self::Temperature => {
                let now = if settings.is_greedy() { 0.0 } else { settings.temperature };
                real(now, 0.05, up, (0.0, 5.0))
            }
            Self::TopK => whole(settings.top_k, 5, up),
            Self::TopP => real(settings.top_p, 0.05, up, (0.05, 1.0)),
            Self::MinP => real(settings.min_p, 0.01, up, (0.0, 1.0)),
            Self::RepetitionPenalty => real(settings.repetition_penalty, 0.05, up, (0.05, 5.0)),
            Self::MaxTokens => whole(settings.max_new_tokens, 16, up),
            Self::Seed => {
                let seed = settings.seed;
                if up { seed.saturating_add(1) } else { seed.saturating_sub(1) }.to_string()
            }
        };
        // Every step is in range; where a model's own settings forbid it, nothing changes.
        let _ = self.set(settings, &value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_can_be_stepped_up_and_down_and_stays_in_its_range() {
        for setting in Setting::ALL {
            let mut settings = GenerationConfig::default();
            setting.step(&mut settings, true);
            let up = setting.show(&settings);
            for _ in 0..200 {
                setting.step(&mut settings, false);
                settings.validate().unwrap();
            }
            assert_ne!(setting.show(&settings), up, "{}", setting.name());
            for _ in 0..200 {
                setting.step(&mut settings, true);
                settings.validate().unwrap();
            }
        }
    }

    #[test]
    fn steps_have_no_digits_to_spare() {
        let mut settings = GenerationConfig::default();
        for expected in ["0.85", "0.9", "0.95", "1"] {
            Setting::Temperature.step(&mut settings, true);
            assert_eq!(Setting::Temperature.show(&settings), expected);
        }
    }

    #[test]
    fn a_value_out_of_range_changes_nothing() {
        let mut settings = GenerationConfig::default();
        for (setting, value, part) in [
            (Setting::Temperature, "-1", "temperature is -1"),
            (Setting::TopK, "-1", "/top-k -1"),
            (Setting::TopP, "-1", "top_p is -1"),
            (Setting::MinP, "2", "min_p is 2"),
            (Setting::MaxTokens, "many", "/max-tokens many"),
            (Setting::Seed, "", "/seed"),
        ] {
            let error = setting.set(&mut settings, value).unwrap_err();
            assert!(format!("{error:#}").contains(part), "{error:#}");
            assert_eq!(settings, GenerationConfig::default());
        }
    }

    #[test]
    fn a_length_that_is_asked_for_is_not_cut_by_that_of_the_file() {
        let mut settings = GenerationConfig::default().with_max_length(Some(20));
        Setting::MaxTokens.set(&mut settings, "50").unwrap();
        assert_eq!((settings.max_new_tokens, settings.max_length), (50, None));
        let mut settings = GenerationConfig::default().with_max_length(Some(20));
        Sampling { max_tokens: Some(50), ..Sampling::default() }.apply(&mut settings);
        assert_eq!((settings.max_new_tokens, settings.max_length), (50, None));
        let mut settings = GenerationConfig::default().with_max_length(Some(20));
        Sampling::default().apply(&mut settings);
        assert_eq!(settings.max_length, Some(20));
    }

    #[test]
    fn a_greedy_model_draws_as_soon_as_it_is_asked_to() {
        let mut settings = GenerationConfig::greedy();
        assert_eq!(Setting::Temperature.show(&settings), "0");
        Setting::Temperature.step(&mut settings, true);
        assert_eq!(Setting::Temperature.show(&settings), "0.05");
        assert!(!settings.is_greedy());
    }
}
