//! Update rules: each is one file that says what happens to one parameter in one step.
//!
//! A rule's file holds its options (public), the coefficients of one step (made from the options and the step's
//! scalars), the loop over slices for the CPU, and the same formula in candle operations, which is the specification.
//! Back ends know nothing about learning rates or bias correction.

mod adamw;
mod elements;
mod lion;
mod measure;
mod newton_schulz;
mod orthogonal;
mod real;
mod sgd;

pub use lion::Lion;
pub use newton_schulz::newton_schulz;
pub use orthogonal::{Orthogonal, RowMoment};
pub use sgd::Sgd;

pub(crate) use adamw::Adam;
pub(crate) use elements::{Element, Elements, Run};
pub(crate) use orthogonal::OrthogonalStep;
pub(crate) use real::Real;

use crate::config::VelvetConfig;
use crate::error::Result;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The update rule of a parameter.
///
/// | rule | state arrays of the parameter's size | for |
/// |---|---|---|
/// | [`Rule::AdamW`] | 2 | everything; embeddings, heads, norms and biases |
/// | [`Rule::Orthogonal`] | 1 | hidden matrices |
/// | [`Rule::Sgd`] | 1 | comparison, and models that want it |
/// | [`Rule::Lion`] | 1 | comparison, and large batches |
///
/// # Examples
/// ```
/// use velvet_optim::{Lion, Orthogonal, ParamGroup, Rule, VelvetConfig};
/// // Lion for everything, Muon for hidden matrices, AdamW for the head.
/// let config = VelvetConfig::default()
///     .with_rule(Rule::Lion(Lion::default()))
///     .with_hidden_matrices(Rule::Orthogonal(Orthogonal::default()))
///     .with_group(ParamGroup { rule: Some(Rule::AdamW), ..ParamGroup::of(["lm_head.*"]) });
/// assert!(config.validate().is_ok());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Rule {
    /// Adam with decoupled decay; its settings are those of [`VelvetConfig`] itself (`beta1`, `beta2`, `eps`,
    /// `momentum`, `cautious_update`).
    #[default]
    AdamW,
    /// Orthogonalised momentum, for matrices.
    Orthogonal(Orthogonal),
    /// Stochastic gradient descent with momentum.
    Sgd(Sgd),
    /// The sign of an interpolated momentum.
    Lion(Lion),
}

impl Rule {
    /// The rule's name in a state file.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::AdamW => adamw::NAME,
            Self::Orthogonal(_) => orthogonal::NAME,
            Self::Sgd(_) => sgd::NAME,
            Self::Lion(_) => lion::NAME,
        }
    }

    /// The state arrays of a parameter of this shape.
    pub(crate) fn slots(&self, shape: &[usize]) -> Vec<SlotSpec> {
        match self {
            Self::AdamW => adamw::slots(shape),
            Self::Orthogonal(options) => options.slots(shape),
            Self::Sgd(_) => sgd::slots(shape),
            Self::Lion(_) => lion::slots(shape),
        }
    }

    /// How many state arrays that is, whatever the shape: a step asks for every parameter, so nothing is allocated.
    pub(crate) fn arrays(&self) -> usize {
        match self {
            Self::AdamW => 2,
            Self::Orthogonal(options) => 1 + usize::from(options.row_moment != RowMoment::Off),
            Self::Sgd(_) | Self::Lion(_) => 1,
        }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        match self {
            Self::AdamW => Ok(()),
            Self::Orthogonal(options) => options.validate(),
            Self::Sgd(options) => options.validate(),
            Self::Lion(options) => options.validate(),
        }
    }

    /// The decay rates of the averages that a step with these scalars applies: what bias corrections are made from.
    pub(crate) fn betas(&self, s: &StepScalars) -> [f64; 2] {
        match self {
            Self::AdamW => [s.beta1, s.beta2],
            Self::Orthogonal(options) => [options.momentum(s), options.row_decay()],
            Self::Sgd(options) => [options.momentum, 0.0],
            Self::Lion(options) => [options.beta2, 0.0],
        }
    }

    /// One parameter's step; `products` are those of the betas up to and with this step.
    pub(crate) fn step(&self, s: &StepScalars, decay: Decay, products: [f64; 2]) -> Step {
        match self {
            Self::AdamW => Step::AdamW(Adam::new(s, decay, products)),
            Self::Orthogonal(options) => Step::Orthogonal(OrthogonalStep::new(*options, s, decay, products)),
            Self::Sgd(options) => Step::Sgd(sgd::SgdStep::new(*options, s, decay, products)),
            Self::Lion(options) => Step::Lion(lion::LionStep::new(*options, s, decay)),
        }
    }
}

/// What a state array is for, which decides how it may be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotKind {
    /// An average of gradients: of either sign, one element each.
    Signed,
    /// An average of squares: never negative, one element each.
    Unsigned,
    /// Anything else; always kept in full precision.
    Other,
}

/// One state array of a parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SlotSpec {
    pub(crate) name: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) kind: SlotKind,
}

impl SlotSpec {
    fn new(name: &'static str, shape: &[usize], kind: SlotKind) -> Self {
        Self { name, shape: shape.to_vec(), kind }
    }
}

/// The scalars of a step, before a parameter's own scales.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepScalars {
    pub(crate) clip_scale: f64,
    pub(crate) lr: f64,
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) eps: f64,
    /// How far perplexity-guided momentum has come, where it is on and a loss was observed.
    pub(crate) progress: Option<f64>,
    pub(crate) options: AdamOptions,
}

/// The choices of the Adam family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AdamOptions {
    pub(crate) nesterov: bool,
    pub(crate) cautious: bool,
}

impl AdamOptions {
    pub(crate) fn of(config: &VelvetConfig) -> Self {
        Self {
            nesterov: config.momentum == crate::options::Momentum::Nesterov,
            cautious: config.cautious_update == crate::options::CautiousUpdate::Aligned,
        }
    }
}

/// Decoupled weight decay of one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Decay {
    pub(crate) rate: f64,
    /// Only where the update and the weight have one sign.
    pub(crate) cautious: bool,
}

/// One parameter's step: a rule with all its coefficients.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    AdamW(Adam),
    Orthogonal(OrthogonalStep),
    Sgd(sgd::SgdStep),
    Lion(lion::LionStep),
}

impl Step {
    /// The step as a loop over elements; `None` for rules that need the whole matrix.
    pub(crate) fn elementwise(&self) -> Option<&dyn Elementwise> {
        match self {
            Self::AdamW(step) => Some(step),
            Self::Sgd(step) => Some(step),
            Self::Lion(step) => Some(step),
            Self::Orthogonal(_) => None,
        }
    }

    /// Whether the step must be told how many of the elements that it moves have the sign of their gradient.
    pub(crate) fn wants_alignment(&self) -> bool {
        matches!(self, Self::AdamW(step) if step.cautious)
    }

    /// Tells it.
    pub(crate) fn set_alignment(&mut self, aligned: u64, moving: u64) {
        if let Self::AdamW(step) = self {
            step.set_alignment(aligned as f64, moving as f64);
        }
    }
}

/// One parameter's step under a rule whose elements do not depend on each other.
///
/// State arrays are of the state's element type (f64 for f64 parameters, f32 for all others), in the order of the
/// rule's slots.
pub(crate) trait Elementwise: Sync {
    /// Updates a run of elements in place.
    fn update(&self, run: Run<'_, '_>);

    /// The same in candle operations: returns the new parameter and replaces the slots. All tensors are of the state's
    /// element type.
    fn update_plain(&self, p: &Tensor, g: &Tensor, slots: &mut [Tensor]) -> candle_core::Result<Tensor>;

    /// How many elements of the update that this step would make have the sign of their gradient.
    fn aligned_f32(&self, _g: &[f32], _slots: &[&[f32]]) -> u64 {
        0
    }

    /// The same in f64.
    fn aligned_f64(&self, _g: &[f64], _slots: &[&[f64]]) -> u64 {
        0
    }

    /// The same in candle operations.
    fn aligned_plain(&self, _g: &Tensor, _slots: &[Tensor]) -> candle_core::Result<u64> {
        Ok(0)
    }
}

/// `p * keep`, or only where update and weight have one sign: `keep` is `1 - lr * decay`.
pub(crate) fn decayed_plain(
    p: &Tensor,
    update: &Tensor,
    keep: f64,
    cautious: bool,
) -> candle_core::Result<Tensor> {
    if !cautious {
        return p * keep;
    }
    let same = (p * update)?.gt(0.0)?.to_dtype(p.dtype())?; // 1 where they have one sign
    p * same.affine(keep - 1.0, 1.0)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_state_arrays_are_counted_as_there_are() {
        let rows_off = Orthogonal { row_moment: RowMoment::Off, ..Orthogonal::default() };
        for rule in [
            Rule::AdamW,
            Rule::Orthogonal(Orthogonal::default()),
            Rule::Orthogonal(rows_off),
            Rule::Sgd(Sgd::default()),
            Rule::Lion(Lion::default()),
        ] {
            assert_eq!(rule.arrays(), rule.slots(&[3, 4]).len(), "{rule:?}");
        }
    }
}
