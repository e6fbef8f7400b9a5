//! Back ends: where the update of a parameter runs. This file is the only one that looks at a device.

mod element;
mod fused;
mod plain;
mod slots;

pub(crate) use slots::Slots;

use crate::options::BackendChoice;
use crate::rule::Rule;
use candle_core::{DType, Device, Result, Tensor, Var};

/// One parameter's share of a step. The gradient has the parameter's shape and device, is contiguous, and shares
/// no storage with a parameter.
pub(crate) struct Job<'a> {
    pub(crate) param: &'a Var,
    pub(crate) grad: Tensor,
    pub(crate) rule: &'a dyn Rule,
    pub(crate) slots: &'a mut Slots,
}

/// The element type of the state of a parameter.
pub(crate) fn state_dtype(param: DType) -> DType {
    if param == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Whether parameters and gradients of this type can be updated.
pub(crate) fn supports(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64 | DType::BF16 | DType::F16)
}

fn is_fused(device: &Device, choice: BackendChoice) -> bool {
    match choice {
        BackendChoice::Auto => device.is_cpu(),
        BackendChoice::Plain => false,
    }
}

/// Empty state for a parameter, on the device where its update runs.
pub(crate) fn zero_slots(param: &Var, count: usize, choice: BackendChoice) -> Result<Slots> {
    if is_fused(param.device(), choice) {
        Ok(Slots::zeros_on_host(state_dtype(param.dtype()), count, param.elem_count()))
    } else {
        plain::zero_slots(param, count).map(Slots::OnDevice)
    }
}

/// The sum of squares of each gradient, in f64, in the order given.
pub(crate) fn sums_of_squares(grads: &[&Tensor]) -> Result<Vec<f64>> {
    let (host, elsewhere): (Vec<_>, Vec<_>) = (0..grads.len()).partition(|&i| grads[i].device().is_cpu());
    let pick = |indices: &[usize]| indices.iter().map(|&i| grads[i]).collect::<Vec<_>>();
    let mut sums = vec![0.0; grads.len()];
    for (indices, values) in [
        (&host, fused::sums_of_squares(&pick(&host))?),
        (&elsewhere, plain::sums_of_squares(&pick(&elsewhere))?),
    ] {
        for (&i, value) in indices.iter().zip(values) {
            sums[i] = value;
        }
    }
    Ok(sums)
}

/// Runs all updates of a step.
pub(crate) fn update(jobs: Vec<Job<'_>>) -> Result<()> {
    let (host, elsewhere): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|job| job.slots.is_on_host());
    fused::update(host)?;
    plain::update(elsewhere)
}

/// An address that two tensors share exactly when they share storage.
pub(crate) fn storage_address(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref(&*storage).addr()
}
