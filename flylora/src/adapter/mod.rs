//! The adapter kinds, one file each, and what they have in common.

use candle_core::{Result, Tensor, Var};

mod lora;

pub use lora::LoraAdapter;

/// A trained change to a linear layer: what is added to its output.
///
/// A new kind of adapter is a type with this trait; [`AdapterLinear`](crate::AdapterLinear) does the rest.
pub trait Adapter {
    /// The size of the last dimension of the input.
    fn in_features(&self) -> usize;

    /// The size of the last dimension of the output.
    fn out_features(&self) -> usize;

    /// What the adapter adds to the layer's output; x: (..., in), returns (..., out) in the dtype of x.
    ///
    /// # Errors
    ///
    /// Where x does not fit, and candle's own errors.
    fn delta(&self, x: &Tensor) -> Result<Tensor>;

    /// What merging adds to the layer's weight: (out, in), in the dtype of the adapter.
    ///
    /// # Errors
    ///
    /// candle's own.
    fn delta_weight(&self) -> Result<Tensor>;

    /// What merging by [`delta_weight`](Self::delta_weight) does to the outputs.
    fn merge_quality(&self) -> Merge;

    /// The trained variables by name, sorted by name.
    fn parameters(&self) -> Vec<(String, Var)>;
}

/// What merging an adapter into its layer does to the layer's outputs.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Merge {
    /// They stay the same, up to the rounding of the merged weight.
    Exact,
}
