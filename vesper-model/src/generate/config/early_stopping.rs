//! When beam search has found enough.

use serde::{Deserialize, Serialize};

/// When beam search ends, once `num_beams` continuations are complete. Stored as Hugging Face's `early_stopping`.
///
/// # Examples
/// ```
/// use vesper_model::generate::{EarlyStopping, GenerationConfig};
///
/// let config: GenerationConfig = serde_json::from_str(r#"{"num_beams": 4, "early_stopping": "never"}"#)?;
/// assert_eq!(config.early_stopping, EarlyStopping::WhenImpossible);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub enum EarlyStopping {
    /// At once. Stored as `true`.
    WhenFull,
    /// When the likeliest beam as it is would not be among the complete ones. It may still become better where
    /// `length_penalty` is over 0. Stored as `false`, the default.
    #[default]
    WhenUnlikely,
    /// When the likeliest beam could not be among them at its greatest length either. Stored as `"never"`.
    WhenImpossible,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "early_stopping must be true, false or \"never\"")]
enum Stored {
    Flag(bool),
    Word(String),
}

impl TryFrom<Stored> for EarlyStopping {
    type Error = String;

    fn try_from(stored: Stored) -> Result<Self, String> {
        match stored {
            Stored::Flag(true) => Ok(Self::WhenFull),
            Stored::Flag(false) => Ok(Self::WhenUnlikely),
            Stored::Word(word) if word == "never" => Ok(Self::WhenImpossible),
            Stored::Word(word) => {
                Err(format!("early_stopping is {word:?}, expected true, false or \"never\""))
            }
        }
    }
}

impl From<EarlyStopping> for Stored {
    fn from(early_stopping: EarlyStopping) -> Self {
        match early_stopping {
            EarlyStopping::WhenFull => Self::Flag(true),
            EarlyStopping::WhenUnlikely => Self::Flag(false),
            EarlyStopping::WhenImpossible => Self::Word("never".into()),
        }
    }
}
