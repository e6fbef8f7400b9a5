//! The types that a weight can be stored in.

use std::fmt;
use std::str::FromStr;

use candle_core::quantized::GgmlDType;
use serde::{Deserialize, Serialize};

use crate::ModelError;

/// How a weight is stored: plain numbers, or blocks of small integers with a scale to each block.
///
/// | type | bits a weight | block | |
/// |---|---|---|---|
/// | `f32`, `f16`, `bf16` | 32, 16 | 1 | plain |
/// | `q8_0` | 8.5 | 32 | close to the original |
/// | `q6_k` | 6.56 | 256 | |
/// | `q5_0`, `q5_1`, `q5_k` | 5.5, 6, 5.5 | 32, 32, 256 | |
/// | `q4_0`, `q4_1`, `q4_k` | 4.5, 5, 4.5 | 32, 32, 256 | |
/// | `q3_k`, `q2_k` | 3.44, 2.63 | 256 | visibly worse |
///
/// A block lies in one row, so a row's length must divide by it: see [`BlockType::fitting`].
///
/// # Examples
/// ```
/// use vesper_model::quantized::BlockType;
/// assert_eq!("Q4_K".parse::<BlockType>()?, BlockType::Q4K);
/// assert_eq!(BlockType::Q4K.fitting(704), BlockType::Q5_0); // 704 = 22 * 32
/// assert_eq!(BlockType::Q8_0.bytes(32), 34);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[non_exhaustive]
#[allow(missing_docs)] // the table above
pub enum BlockType {
    #[serde(rename = "f32")]
    F32,
    #[serde(rename = "f16")]
    F16,
    #[serde(rename = "bf16")]
    Bf16,
    #[serde(rename = "q8_0")]
    Q8_0,
    #[serde(rename = "q6_k")]
    Q6K,
    #[serde(rename = "q5_k")]
    Q5K,
    #[serde(rename = "q5_1")]
    Q5_1,
    #[serde(rename = "q5_0")]
    Q5_0,
    #[serde(rename = "q4_k")]
    Q4K,
    #[serde(rename = "q4_1")]
    Q4_1,
    #[serde(rename = "q4_0")]
    Q4_0,
    #[serde(rename = "q3_k")]
    Q3K,
    #[serde(rename = "q2_k")]
    Q2K,
}

impl BlockType {
    /// Every type, from large to small.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q6K,
        Self::Q5_1,
        Self::Q5K,
        Self::Q5_0,
        Self::Q4_1,
        Self::Q4K,
        Self::Q4_0,
        Self::Q3K,
        Self::Q2K,
    ];

    /// Its name in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q6K => "q6_k",
            Self::Q5K => "q5_k",
            Self::Q5_1 => "q5_1",
            Self::Q5_0 => "q5_0",
            Self::Q4K => "q4_k",
            Self::Q4_1 => "q4_1",
            Self::Q4_0 => "q4_0",
            Self::Q3K => "q3_k",
            Self::Q2K => "q2_k",
        }
    }

    /// Whether it is plain numbers.
    pub const fn is_plain(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// candle's name for it.
    pub const fn ggml(self) -> GgmlDType {
        match self {
            Self::F32 => GgmlDType::F32,
            Self::F16 => GgmlDType::F16,
            Self::Bf16 => GgmlDType::BF16,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q6K => GgmlDType::Q6K,
            Self::Q5K => GgmlDType::Q5K,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q3K => GgmlDType::Q3K,
            Self::Q2K => GgmlDType::Q2K,
        }
    }

    /// Of candle's name; none for the types that only activations have.
    pub fn of(dtype: GgmlDType) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.ggml() == dtype)
    }

    /// Its number in a GGUF file.
    pub const fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Bf16 => 30,
        }
    }

    /// Of a number in a GGUF file.
    pub fn of_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.id() == id)
    }

    /// Weights that a block holds.
    pub fn block_size(self) -> usize {
        self.ggml().block_size()
    }

    /// Bytes of so many weights: a multiple of a block.
    pub fn bytes(self, weights: usize) -> usize {
        weights / self.block_size() * self.ggml().type_size()
    }

    /// This type, or the next best for rows of so many columns: blocks of 256 become blocks of 32 that are no smaller, and
    /// what does not divide by 32 stays in f16.
    pub fn fitting(self, columns: usize) -> Self {
        let fits = |t: Self| columns > 0 && columns.is_multiple_of(t.block_size());
        let small = match self {
            Self::Q6K => Self::Q8_0,
            Self::Q5K => Self::Q5_1,
            Self::Q4K => Self::Q5_0,
            Self::Q3K | Self::Q2K => Self::Q4_0,
            other => other,
        };
        [self, small].into_iter().find(|&t| fits(t)).unwrap_or(Self::F16)
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for BlockType {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self, ModelError> {
        let found = Self::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(name));
        found.ok_or_else(|| ModelError::UnknownBlockType {
            name: name.into(),
            known: Self::ALL.map(Self::name).join(", "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_lead_back() {
        for t in BlockType::ALL {
            assert_eq!(t.name().parse::<BlockType>().unwrap(), t);
            assert_eq!(BlockType::of_id(t.id()), Some(t));
            assert_eq!(BlockType::of(t.ggml()), Some(t));
            assert_eq!(serde_json::to_string(&t).unwrap(), format!("\"{t}\""));
        }
        let message = "q9_z".parse::<BlockType>().unwrap_err().to_string();
        assert!(message.contains("q9_z") && message.contains("q4_k"), "{message}");
        assert_eq!(BlockType::of_id(9), None);
    }

    #[test]
    fn what_does_not_divide_falls_back() {
        for t in BlockType::ALL {
            assert_eq!(t.fitting(512), t);
            let small = t.fitting(160);
            assert!(160 % small.block_size() == 0, "{t} {small}");
            assert!(small.bytes(320) * 256 >= t.bytes(256) * 320, "{t} became the smaller {small}");
            assert_eq!(t.fitting(33), if t.is_plain() { t } else { BlockType::F16 });
        }
        assert_eq!(BlockType::Q8_0.fitting(0), BlockType::F16);
    }
}
