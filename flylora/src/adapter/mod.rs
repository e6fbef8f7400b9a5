//! The adapter kinds, one file each, and what they have in common.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

use crate::FrozenLinear;
use crate::files::StateSource;

mod ada_lora;
mod budget;
mod dora;
mod fly_config;
mod fly_lora;
mod kind;
mod lora;
mod masked_lora;

pub use ada_lora::{AdaLoraAdapter, AdaLoraConfig};
pub use budget::{RankBudget, RankBudgetConfig};
pub use dora::DoraAdapter;
pub(crate) use dora::{MAGNITUDE, roots};
pub use fly_config::{FlyLoraConfig, Routing};
pub use fly_lora::FlyLoraAdapter;
pub use kind::AdapterKind;
pub use lora::LoraAdapter;
pub(crate) use lora::{B, BIAS, check_factors};
pub use masked_lora::{MaskSelection, MaskedLoraAdapter, MaskedLoraConfig};

/// A change of an adapter that is ready to be made.
pub type Change<'a> = Box<dyn FnOnce() -> crate::Result<()> + 'a>;

/// Where a training run stands, for what adapters do between its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The number of steps taken, this one included: from 1 to `total`.
    pub index: u64,
    /// The number of steps of the run.
    pub total: u64,
}

/// A trained change to a linear layer: what is added to its output.
///
/// A new kind of adapter is a type with this trait and a variant of [`AdapterKind`];
/// [`AdapterLinear`](crate::AdapterLinear) and [`MultiLinear`](crate::MultiLinear) do the rest.
pub trait Adapter: Debug + Send + Sync {
    /// The kind and its configuration.
    fn kind(&self) -> AdapterKind;

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

    /// As [`delta`](Self::delta), where the layer's output y = `W x + b` is at hand already: kinds that need it take it
    /// instead of computing it again.
    ///
    /// # Errors
    ///
    /// As [`delta`](Self::delta).
    fn delta_beside(&self, x: &Tensor, y: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let _ = (y, bias);
        self.delta(x)
    }

    /// The layer's whole output, `W x + b + delta(x)`, where the kind has a cheaper way to it than by
    /// [`delta`](Self::delta); else `None`, as by default. x: (..., in), returns (..., out).
    ///
    /// # Errors
    ///
    /// As [`delta`](Self::delta).
    fn layer(&self, base: &FrozenLinear, x: &Tensor) -> Result<Option<Tensor>> {
        let _ = (base, x);
        Ok(None)
    }

    /// What merging adds to the layer's weight: (out, in), in the dtype of the adapter.
    ///
    /// # Errors
    ///
    /// candle's own.
    fn delta_weight(&self) -> Result<Tensor>;

    /// The constant weight (out, in) that is nearest to the adapter for inputs like `sample` (rows, in); where merging
    /// is exact, [`delta_weight`](Self::delta_weight).
    ///
    /// # Errors
    ///
    /// candle's own.
    fn delta_weight_for(&self, sample: &Tensor) -> Result<Tensor> {
        let _ = sample;
        self.delta_weight()
    }

    /// What merging adds to the layer's bias: (out), in the dtype of the adapter; nothing by default.
    ///
    /// # Errors
    ///
    /// candle's own.
    fn delta_bias(&self) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// What merging by [`delta_weight`](Self::delta_weight) does to the outputs: [`Merge::Exact`], or
    /// [`Merge::Unsupported`] where no constant weight does what the adapter does.
    fn merge_quality(&self) -> Merge;

    /// The trained variables by name, sorted by name.
    fn parameters(&self) -> Vec<(String, Var)>;

    /// The number of trained values that one row of the input makes use of; all of them by default.
    fn active_parameters(&self) -> usize {
        self.parameters().iter().map(|(_, var)| var.elem_count()).sum()
    }

    /// Says what the forward passes from now on are: with a number, those of training under that number, whose dropout is
    /// drawn from the seed, the layer's name and the number; with `None`, as at first, evaluation, where nothing is
    /// dropped. Passes of one number drop the same, so give each batch its own. Nothing for kinds without dropout.
    fn set_training(&self, pass: Option<u64>) {
        let _ = pass;
    }

    /// What has to be added to the loss, where the kind asks for that.
    ///
    /// # Errors
    ///
    /// candle's own.
    fn penalty(&self) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// What the kind does after each step of the optimizer, with the gradients of that step. For a training loop, right
    /// after the optimizer: never called outside of training.
    ///
    /// # Errors
    ///
    /// candle's own.
    fn after_step(&self, step: Step, grads: &GradStore) -> crate::Result<()> {
        let _ = (step, grads);
        Ok(())
    }

    /// All that a file has to hold, by name.
    ///
    /// # Errors
    ///
    /// candle's own.
    fn state(&self) -> crate::Result<Vec<(String, Tensor)>> {
        Ok(self.parameters().into_iter().map(|(name, var)| (name, var.as_detached_tensor())).collect())
    }

    /// Takes what [`state`](Self::state) gave from a file. Everything is read and checked here; nothing changes before
    /// the changes are made.
    ///
    /// # Errors
    ///
    /// Those of [`StateSource`].
    fn load_state<'a>(&'a self, source: &mut StateSource<'_>) -> crate::Result<Vec<Change<'a>>> {
        self.parameters()
            .into_iter()
            .map(|(name, var)| {
                let value = source.like(&name, &var)?;
                Ok(Box::new(move || Ok(var.set(&value)?)) as Change<'a>)
            })
            .collect()
    }

    /// The adapter as AdaLoRA, whose ranks are allocated across layers.
    fn as_ada_lora(&self) -> Option<&AdaLoraAdapter> {
        None
    }

    /// The adapter as LoRA, whose factors can be combined with those of others.
    fn as_lora(&self) -> Option<&LoraAdapter> {
        None
    }
}

macro_rules! through_a_pointer {
    ($pointer:ident) => {
        impl<T: Adapter + ?Sized> Adapter for $pointer<T> {
            fn kind(&self) -> AdapterKind {
                (**self).kind()
            }

            fn in_features(&self) -> usize {
                (**self).in_features()
            }

            fn out_features(&self) -> usize {
                (**self).out_features()
            }

            fn delta(&self, x: &Tensor) -> Result<Tensor> {
                (**self).delta(x)
            }

            fn delta_beside(&self, x: &Tensor, y: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
                (**self).delta_beside(x, y, bias)
            }

            fn layer(&self, base: &FrozenLinear, x: &Tensor) -> Result<Option<Tensor>> {
                (**self).layer(base, x)
            }

            fn delta_weight(&self) -> Result<Tensor> {
                (**self).delta_weight()
            }

            fn delta_weight_for(&self, sample: &Tensor) -> Result<Tensor> {
                (**self).delta_weight_for(sample)
            }

            fn delta_bias(&self) -> Result<Option<Tensor>> {
                (**self).delta_bias()
            }

            fn merge_quality(&self) -> Merge {
                (**self).merge_quality()
            }

            fn parameters(&self) -> Vec<(String, Var)> {
                (**self).parameters()
            }

            fn active_parameters(&self) -> usize {
                (**self).active_parameters()
            }

            fn set_training(&self, pass: Option<u64>) {
                (**self).set_training(pass);
            }

            fn penalty(&self) -> Result<Option<Tensor>> {
                (**self).penalty()
            }

            fn after_step(&self, step: Step, grads: &GradStore) -> crate::Result<()> {
                (**self).after_step(step, grads)
            }

            fn state(&self) -> crate::Result<Vec<(String, Tensor)>> {
                (**self).state()
            }

            fn load_state<'a>(&'a self, source: &mut StateSource<'_>) -> crate::Result<Vec<Change<'a>>> {
                (**self).load_state(source)
            }

            fn as_ada_lora(&self) -> Option<&AdaLoraAdapter> {
                (**self).as_ada_lora()
            }

            fn as_lora(&self) -> Option<&LoraAdapter> {
                (**self).as_lora()
            }
        }
    };
}

through_a_pointer!(Arc);
through_a_pointer!(Box);

/// What merging an adapter into its layer does to the layer's outputs.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Merge {
    /// They stay the same, up to the rounding of the merged weight.
    Exact,
    /// They change.
    Approximate {
        /// The measured change over the sample, relative to what the adapter adds:
        /// `|merged(x) - layer(x)| / |layer(x) - base(x)|`, Euclidean norms.
        relative_error: f64,
    },
    /// No constant weight gives them, so nothing was merged.
    Unsupported,
}

/// The mean of what the adapters ask to be added to the loss; `None` where none does.
///
/// # Errors
///
/// candle's own.
pub fn penalty<'a, A: Adapter + ?Sized + 'a>(
    adapters: impl IntoIterator<Item = &'a A>,
) -> Result<Option<Tensor>> {
    let mut parts = Vec::new();
    for adapter in adapters {
        parts.extend(adapter.penalty()?);
    }
    if parts.is_empty() {
        return Ok(None);
    }
    Tensor::stack(&parts, 0)?.mean_all().map(Some)
}
