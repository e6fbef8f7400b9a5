//! The header of a state file.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    pub(super) format: u64,
    pub(super) step: u64,
    pub(super) skipped: u64,
    pub(super) ignored_losses: u64,
    pub(super) lr: Bits,
    /// The averages kept by the adaptive parts that have seen something.
    pub(super) averages: Averages,
    /// Figures of the last step, so that statistics read the same after a resume.
    pub(super) last: Last,
    pub(super) naming: Naming,
    pub(super) parameters: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Averages {
    pub(super) entropy_lr: Option<Bits>,
    pub(super) perplexity_momentum: Option<Bits>,
    pub(super) brake: Option<Bits>,
    pub(super) polyak_loss: Option<Bits>,
    pub(super) polyak_rate: Option<Bits>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Last {
    pub(super) grad_norm: Option<Bits>,
    pub(super) clip_scale: Bits,
    pub(super) lr: Bits,
    pub(super) beta1: Bits,
    pub(super) progress: Option<Bits>,
    pub(super) update_ratio: Option<Bits>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Naming {
    Named,
    Positional,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) dtype: String,
    pub(super) rule: String,
    /// The names of its state arrays; none where it was frozen from the start.
    pub(super) slots: Vec<String>,
    /// Of the parameter's values, for parameters without names.
    pub(super) fingerprint: Option<Bits>,
}

/// 64 bits as 16 hex digits: decimal JSON may lose the last bit of a float, and numbers above 2^53.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bits(pub(super) u64);

impl From<f64> for Bits {
    fn from(x: f64) -> Self {
        Self(x.to_bits())
    }
}

impl From<Bits> for f64 {
    fn from(bits: Bits) -> Self {
        Self::from_bits(bits.0)
    }
}

impl Serialize for Bits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:016x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Bits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        if text.len() != 16 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(de::Error::custom(format!("expected 16 hex digits, got `{text}`")));
        }
        u64::from_str_radix(&text, 16).map(Self).map_err(de::Error::custom)
    }
}
