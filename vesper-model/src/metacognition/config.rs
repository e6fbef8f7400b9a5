//! What an error head is made of, and which model it is for.

use serde::{Deserialize, Serialize};

use super::{Choice, Features, KindRule};
use crate::{ModelError, Result, VesperLM};

/// The shape of an error head and what it is trained to say.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadConfig {
    /// What it sees. Default both: the hidden state and statistics of the distribution.
    pub features: Features,
    /// Units of its hidden layer; 0 for none, a linear head. Default 64.
    pub units: usize,
    /// What it tells apart.
    pub kinds: KindRule,
    /// Which choices of the model it judges. Default greedy ones.
    pub choice: Choice,
}

impl Default for HeadConfig {
    fn default() -> Self {
        Self {
            features: Features::default(),
            units: 64,
            kinds: KindRule::default(),
            choice: Choice::default(),
        }
    }
}

impl HeadConfig {
    /// Sets what it sees.
    pub fn with_features(mut self, features: Features) -> Self {
        self.features = features;
        self
    }

    /// Sets the units of its hidden layer; 0 makes it linear.
    pub fn with_units(mut self, units: usize) -> Self {
        self.units = units;
        self
    }

    /// Sets what it tells apart.
    pub fn with_kinds(mut self, kinds: KindRule) -> Self {
        self.kinds = kinds;
        self
    }

    /// Sets which choices it judges.
    pub fn with_choice(mut self, choice: Choice) -> Self {
        self.choice = choice;
        self
    }

    /// Checks every setting against its range.
    ///
    /// # Errors
    /// [`ModelError::InvalidMetacognition`] names the setting, its value and the range.
    pub fn validate(&self) -> Result<()> {
        if self.units > 1 << 16 {
            let (got, expected) = (self.units.to_string(), "at most 65536");
            return Err(ModelError::InvalidMetacognition { field: "units", got, expected });
        }
        self.kinds.validate()?;
        self.choice.validate()
    }
}

/// What a model is known by: a head that was trained for one is of no use for another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseModel {
    /// Width of its hidden states.
    pub hidden_size: usize,
    /// Rows of its embedding.
    pub vocab_size: usize,
    /// Of its configuration, weights and adapters: [`fingerprint`](super::fingerprint).
    pub fingerprint: String,
}

impl BaseModel {
    /// Of a model.
    ///
    /// # Errors
    /// A device that fails.
    pub fn of(model: &VesperLM) -> Result<Self> {
        let config = model.config();
        Ok(Self {
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
            fingerprint: super::fingerprint(model)?,
        })
    }
}
