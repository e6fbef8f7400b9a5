//! Update rules: each is one file that says what happens to one parameter in one step.
//!
//! A rule is given every scalar it needs when it is made (a [`Rule`] value is one parameter's step), so that back
//! ends know nothing about learning rates or bias correction. It has two forms of the same formula: plain candle
//! operations, the specification, and a loop over slices for the CPU.

mod adamw;

pub(crate) use adamw::{AdamW, StepScalars};

use candle_core::Tensor;

/// One parameter's step under some rule.
///
/// A rule keeps `slots` arrays of the parameter's shape in the state's element type (f64 for f64 parameters, f32
/// for all others).
pub(crate) trait Rule: Sync {
    /// Updates a run of f32 elements in place; `slots` are in the order of the rule's `SLOTS`.
    fn update_f32(&self, p: &mut [f32], g: &[f32], slots: &mut [&mut [f32]]);

    /// Updates a run of f64 elements in place.
    fn update_f64(&self, p: &mut [f64], g: &[f64], slots: &mut [&mut [f64]]);

    /// The same in candle operations: returns the new parameter and replaces the slots.
    /// All tensors are of the state's element type.
    fn update_plain(&self, p: &Tensor, g: &Tensor, slots: &mut [Tensor]) -> candle_core::Result<Tensor>;
}

/// The arithmetic a rule's loop needs of f32 and f64.
pub(crate) trait Real:
    Copy
    + Send
    + Sync
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
{
    /// Rounds a coefficient, which is computed in f64, to the element type.
    fn coefficient(x: f64) -> Self;
    fn sqrt(self) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn coefficient(x: f64) -> Self {
        x as Self
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }
}

impl Real for f64 {
    #[inline(always)]
    fn coefficient(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }
}
