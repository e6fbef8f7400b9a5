//! The CUDA back end: an optimizer whose parameters are all on one CUDA device.
//!
//! Learning rate, averages, counters, products of betas and the clip scale live in device memory beside the state
//! arrays. A step launches kernels and reads nothing back, so the host never waits for the device, and a step can be
//! captured in a CUDA graph. What the kernels compute are the formulas of `adaptive`, `step` and `rule`; in f32 the
//! updates have the bits of the CPU's pass, but where a rate follows what was measured of an update, which each back
//! end sums in its own order.
//!
//! | file | holds |
//! |---|---|
//! | `control` | what is observed, what a step is to do, and what it did |
//! | `elementwise` | updates of AdamW, SGD and Lion, and the passes over gradients; `blockwise.cu` is for 8-bit state |
//! | `orthogonal` | orthogonalised updates |
//! | `plan` | what does not change from step to step |
//! | `layout`, `launch` | structs of the kernels, and how they are launched |
#![allow(unsafe_code, reason = "kernels are launched on addresses; each block says why that is sound")]

mod control;
mod elementwise;
mod launch;
mod layout;
mod orthogonal;
mod plan;

use super::Snapshot;
use crate::config::VelvetConfig;
use crate::error::Result;
use crate::parameter::Parameter;
use candle_core::{CudaDevice, DType, Tensor};
use control::ControlBlock;
use elementwise::{Entry, Gradients};
use layout::Settings;
use orthogonal::Workspace;
use plan::Plan;

/// A step that was left out because of NaN or infinity and is to be reported.
pub(crate) struct Failure {
    pub(crate) step: u64,
    pub(crate) norm: f64,
    /// Positions of the parameters whose gradient is not finite.
    pub(crate) positions: Vec<usize>,
}

/// The part of an optimizer that lives on a CUDA device.
pub(crate) struct Resident {
    // The first field goes first: dropping it waits for the device.
    control: ControlBlock,
    device: CudaDevice,
    plan: Plan,
    workspace: Workspace,
    /// State arrays were replaced, so their addresses have changed.
    stale: bool,
    /// The base learning rate on the device.
    lr: f64,
    /// Parameters whose weights were measured for the trust region.
    weighed: Vec<bool>,
    has_observed: bool,
}

impl Resident {
    /// The device's part of these parameters, with nothing in it yet; `None` where another back end updates them.
    pub(crate) fn new(parameters: &[Parameter], config: &VelvetConfig) -> Result<Option<Self>> {
        let Some(device) = plan::device_of(parameters, config) else { return Ok(None) };
        let plan = Plan::new(&device, parameters, config)?;
        Ok(Some(Self {
            control: ControlBlock::new(&device, parameters.len(), plan.chunks())?,
            workspace: Workspace::default(),
            stale: false,
            lr: f64::NAN,
            weighed: vec![false; parameters.len()],
            has_observed: false,
            device,
            plan,
        }))
    }

    /// Replaces everything by what the host knows.
    pub(crate) fn push(&mut self, parameters: &[Parameter], lr: f64, from: &Snapshot) -> Result<()> {
        self.control.write(lr, from)?;
        self.lr = lr;
        self.weighed = from.sizes.iter().map(Option::is_some).collect();
        self.has_observed = from.averages.iter().any(Option::is_some);
        self.stale = false;
        self.plan.refresh(&self.device, parameters)
    }

    /// What the host would know if it had made the steps. Waits for the device.
    pub(crate) fn snapshot(&self) -> Result<Snapshot> {
        self.control.read()
    }

    /// The step that failed and was not reported yet, which is then reported; with `wait` false only what can be known
    /// without waiting for the device.
    pub(crate) fn failure(&self, wait: bool) -> Result<Option<Failure>> {
        self.control.failure(wait)
    }

    /// State arrays were replaced.
    pub(crate) fn invalidate(&mut self) {
        self.stale = true;
    }

    /// Whether a loss was observed since the start.
    pub(crate) fn has_observed(&self) -> bool {
        self.has_observed
    }

    /// Whether a number can be observed where it lies.
    pub(crate) fn holds(&self, tensor: &Tensor) -> bool {
        matches!(tensor.device(), candle_core::Device::Cuda(device) if device.id() == self.device.id())
            && matches!(tensor.dtype(), DType::F32 | DType::F64 | DType::BF16 | DType::F16)
    }

    /// Takes a loss, and an entropy where there is one, in: both of one element and on this device.
    pub(crate) fn observe(
        &mut self,
        config: &VelvetConfig,
        loss: &Tensor,
        entropy: Option<&Tensor>,
    ) -> Result<()> {
        self.has_observed = true;
        let stream = self.device.cuda_stream();
        let loss = control::number(loss, &stream)?;
        let entropy =
            entropy.map(|entropy| control::number(entropy, &stream)).transpose()?.unwrap_or_default();
        self.control.observe(&self.settings(config)?, loss, entropy)
    }

    /// The same for numbers on the host.
    pub(crate) fn observe_values(
        &mut self,
        config: &VelvetConfig,
        loss: f64,
        entropy: Option<f64>,
    ) -> Result<()> {
        self.has_observed |= loss.is_finite();
        let entropy = entropy.map(layout::Number::value).unwrap_or_default();
        self.control.observe(&self.settings(config)?, layout::Number::value(loss), entropy)
    }

    /// Sets the base learning rate of the steps after this call, those of captured graphs too.
    pub(crate) fn set_learning_rate(&mut self, lr: f64) -> Result<()> {
        if self.lr.to_bits() != lr.to_bits() {
            self.control.set_learning_rate(lr)?;
            self.lr = lr;
        }
        Ok(())
    }

    fn settings(&self, config: &VelvetConfig) -> Result<Settings> {
        Ok(Settings::new(config, launch::size(self.plan.len())?))
    }

    /// Launches one step with the gradients of these parameters.
    pub(crate) fn step(
        &mut self,
        parameters: &[Parameter],
        config: &VelvetConfig,
        found: &[(usize, Tensor)],
    ) -> Result<()> {
        if self.stale {
            self.plan.refresh(&self.device, parameters)?;
            self.stale = false;
        }
        self.set_learning_rate(config.lr)?;
        let settings = self.settings(config)?;
        let gradients = Gradients::new(&self.device, &self.plan, parameters, found)?;
        let positions: Vec<usize> = found.iter().map(|&(at, _)| at).collect();
        let Self { control, plan, workspace, weighed, .. } = self;
        if settings.has_trust_region() {
            let unknown: Vec<Entry> = gradients
                .entries()
                .filter(|entry| !weighed.get(entry.position).copied().unwrap_or(true))
                .map(Entry::of_weights)
                .collect();
            elementwise::squares(control, plan, unknown.iter())?;
            let unknown: Vec<usize> =
                positions.iter().copied().filter(|&at| !weighed.get(at).copied().unwrap_or(true)).collect();
            control.finish_weights(plan, &unknown)?;
            for at in unknown {
                if let Some(weighed) = weighed.get_mut(at) {
                    *weighed = true;
                }
            }
        }
        if settings.needs_sums() {
            elementwise::squares(control, plan, gradients.entries())?;
            control.finish_sums(plan, &positions)?;
        }
        control.begin(&settings)?;
        control.coefficients(&settings, plan, &positions)?;
        elementwise::rows(control, plan, &gradients)?;
        elementwise::align(control, plan, &gradients, &positions)?;
        elementwise::update(control, plan, &gradients, settings.measures())?;
        orthogonal::update(control, plan, workspace, &gradients, settings.measures())?;
        if settings.measures() {
            control.finish_measured(plan, &positions)?;
            control.end(&settings)?;
        }
        gradients.finish(&self.device, parameters)
    }
}
