//! What became of each tensor.

use serde::Serialize;

use super::BlockType;

/// What became of one tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorReport {
    /// Its Hugging Face name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The type that the policy asked for; none for what is never quantised.
    pub asked: Option<BlockType>,
    /// The type that it has.
    pub got: BlockType,
    /// Bytes of its values before.
    pub bytes_before: usize,
    /// Bytes of its blocks.
    pub bytes: usize,
    /// Root of the mean squared difference to the original, divided by that of the original.
    pub error: f64,
}

impl TensorReport {
    /// Why the tensor is not of the type that was asked for.
    pub fn reason(&self) -> Option<String> {
        let columns = self.shape.last().copied().unwrap_or(0);
        match self.asked {
            None => Some("a norm stays as it is".into()),
            Some(asked) if asked != self.got => {
                Some(format!("rows of {columns} do not divide into blocks of {}", asked.block_size()))
            }
            Some(_) => None,
        }
    }
}

/// What became of each tensor of a model, in the order of the forward pass.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Of each tensor.
    pub tensors: Vec<TensorReport>,
}

impl Report {
    /// Bytes of all tensors before.
    pub fn bytes_before(&self) -> usize {
        self.tensors.iter().map(|t| t.bytes_before).sum()
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.tensors.iter().map(|t| t.bytes).sum()
    }
}
