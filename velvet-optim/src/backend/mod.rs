//! Back ends: where the update of a parameter runs. This file is the only one that looks at a device.

#[cfg(not(feature = "cuda"))]
mod absent;
mod chunk;
#[cfg(feature = "cuda")]
mod cuda;
mod element;
mod fused;
mod plain;
mod sums;

#[cfg(not(feature = "cuda"))]
pub(crate) use absent::{Failure, Resident};
#[cfg(feature = "cuda")]
pub(crate) use cuda::{Failure, Resident};

use crate::config::VelvetConfig;
use crate::error::Result;
use crate::group::Plan;
use crate::options::{BackendChoice, HalfParameters, SparseRows, StateFormat};
use crate::resident::Snapshot;
use crate::rule::{Rule, SlotKind, SlotSpec, Step};
use crate::state::{MASTER, Place, Slot};
use candle_core::{DType, Device, Tensor, Var};

/// One parameter's share of a step. The gradient has the parameter's shape and device, is contiguous, and shares
/// no storage with a parameter.
pub(crate) struct Job<'a> {
    pub(crate) param: &'a Var,
    pub(crate) grad: Tensor,
    pub(crate) step: Step,
    pub(crate) slots: &'a mut [Slot],
    /// The length of a row, where rows without a gradient are left out.
    pub(crate) sparse_row: Option<usize>,
    pub(crate) rounding: Rounding,
    pub(crate) measure: bool,
}

/// How a parameter of less precision than its update is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    Nearest,
    /// The key of a counter-based generator: of the seed, the step and the parameter.
    Stochastic {
        key: u32,
    },
}

/// What an update did, in sums over a parameter's elements.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Measured {
    /// Of the squares of the change.
    pub(crate) change_sq: f64,
    /// Of the squares of the weights before it.
    pub(crate) weight_sq: f64,
    /// Of gradient times change, positive where the change goes downhill.
    pub(crate) descent: f64,
}

impl std::ops::AddAssign for Measured {
    fn add_assign(&mut self, other: Self) {
        self.change_sq += other.change_sq;
        self.weight_sq += other.weight_sq;
        self.descent += other.descent;
    }
}

/// Whether parameters and gradients of this type can be updated.
pub(crate) fn supports(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64 | DType::BF16 | DType::F16)
}

fn is_fused(device: &Device, rule: Rule, choice: BackendChoice) -> bool {
    match choice {
        // The products of an orthogonalisation are candle's.
        BackendChoice::Auto => device.is_cpu() && !matches!(rule, Rule::Orthogonal(_)),
        BackendChoice::Plain => false,
    }
}

/// Whether there are kernels for updates over elements, as far as the device goes.
fn has_kernels(device: &Device, rule: Rule, choice: BackendChoice) -> bool {
    cfg!(feature = "cuda")
        && choice == BackendChoice::Auto
        && device.is_cuda()
        && !matches!(rule, Rule::Orthogonal(_))
}

/// How the products of orthogonalisations run on a device.
struct Products {
    dtype: DType,
    /// All matrices of one shape together.
    batched: bool,
}

fn products(device: &Device, state: DType) -> Products {
    match device {
        // candle multiplies the matrices of a batch one by one.
        Device::Cpu => Products { dtype: state, batched: false },
        // Tensor cores; the iteration forgives the rounding.
        Device::Cuda(_) if state == DType::F32 => Products { dtype: DType::BF16, batched: true },
        _ => Products { dtype: state, batched: true },
    }
}

/// The type that sums are made in: Metal has no f64.
fn widest(device: &Device) -> DType {
    if device.is_metal() { DType::F32 } else { DType::F64 }
}

/// The state arrays of a parameter, empty, on the device where its update runs.
pub(crate) fn empty_state(param: &Var, plan: &Plan, config: &VelvetConfig) -> Result<Vec<Slot>> {
    let mut specs = plan.rule.slots(param.dims());
    let half = matches!(param.dtype(), DType::BF16 | DType::F16);
    if half && config.half_parameters == HalfParameters::Master {
        specs.push(SlotSpec { name: MASTER, shape: param.dims().to_vec(), kind: SlotKind::Other });
    }
    let place = place(param, plan, config);
    specs.into_iter().map(|spec| Slot::new(spec, param, place)).collect()
}

/// Brings state arrays to the format in which the configuration keeps those of such a parameter.
pub(crate) fn reformat(slots: &mut [Slot], param: &Var, plan: &Plan, config: &VelvetConfig) -> Result<()> {
    let place = place(param, plan, config);
    slots.iter_mut().try_for_each(|slot| slot.reformat(param, place))
}

fn place(param: &Var, plan: &Plan, config: &VelvetConfig) -> Place {
    let sparse = plan.sparse_rows == SparseRows::Skip; // rows do not begin where blocks do
    let format = if sparse { StateFormat::Full } else { config.state_format };
    if is_fused(param.device(), plan.rule, config.backend) {
        Place::Host(format)
    } else if has_kernels(param.device(), plan.rule, config.backend) {
        Place::Tensors(format)
    } else {
        Place::Tensors(StateFormat::Full)
    }
}

/// The sum of squares of each tensor, in f64, in the order given.
pub(crate) fn sums_of_squares(tensors: &[&Tensor]) -> Result<Vec<f64>> {
    let (host, elsewhere): (Vec<_>, Vec<_>) = (0..tensors.len()).partition(|&i| tensors[i].device().is_cpu());
    let pick = |indices: &[usize]| indices.iter().map(|&i| tensors[i]).collect::<Vec<_>>();
    let mut sums = vec![0.0; tensors.len()];
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

/// Runs all updates of a step; what is measured is in the order of the jobs.
pub(crate) fn update(jobs: Vec<Job<'_>>) -> Result<Vec<Measured>> {
    let mut measured = vec![Measured::default(); jobs.len()];
    let (host, elsewhere): (Vec<_>, Vec<_>) =
        jobs.into_iter().enumerate().partition(|(_, job)| job.slots.iter().all(Slot::is_on_host));
    fused::update(host, &mut measured)?;
    plain::update(elsewhere, &mut measured)?;
    Ok(measured)
}

/// An address that two tensors share exactly when they share storage.
pub(crate) fn storage_address(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref(&*storage).addr()
}
