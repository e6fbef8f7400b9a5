//! What does not change from step to step: the parameters' rules, sizes, and the addresses of their state.

use super::control::Buffer;
use super::launch;
use super::layout::{self, CHUNK, Param, ROW_BYTES};
use crate::config::VelvetConfig;
use crate::error::Result;
use crate::group::Training;
use crate::options::{BackendChoice, CautiousUpdate, HalfParameters, Momentum, SparseRows};
use crate::parameter::Parameter;
use crate::quantised;
use crate::rule::{Orthogonal, RowMoment, Rule};
use crate::state::{Data, MASTER, Slot};
use candle_core::{CudaDevice, DType, Device, Tensor};

/// The device that all trained parameters are on, where this back end has kernels for all of them.
pub(super) fn device_of(parameters: &[Parameter], config: &VelvetConfig) -> Option<CudaDevice> {
    if config.backend != BackendChoice::Auto {
        return None;
    }
    let mut trained = parameters.iter().filter(|parameter| parameter.plan.training == Training::On);
    let fits = |parameter: &Parameter| {
        let on_device = |slot: &Slot| match &slot.data {
            Data::Tensor(t) => t.dtype() == DType::F32,
            Data::TensorBlocks(_) => true,
            Data::F32(_) | Data::F64(_) | Data::Blockwise(_) => false,
        };
        launch::name(parameter.var.dtype()).is_some()
            && parameter.var.is_contiguous()
            && parameter.slots.iter().all(on_device)
    };
    let first = trained.next().filter(|first| fits(first))?;
    let Device::Cuda(device) = first.var.device() else { return None };
    let same = |parameter: &Parameter| parameter.var.device().same_device(first.var.device());
    trained.all(|parameter| same(parameter) && fits(parameter)).then(|| device.clone())
}

/// What the host has to know of a parameter to launch its update.
#[derive(Clone, Copy)]
#[allow(clippy::struct_excessive_bools, reason = "each is a question of its own")]
pub(super) struct Planned {
    pub(super) rule: u32,
    pub(super) dtype: DType,
    pub(super) elements: usize,
    /// Elements of a row, where rows are looked at.
    pub(super) row: usize,
    pub(super) cautious: bool,
    /// Rows without a gradient are left out.
    pub(super) sparse: bool,
    /// The update does more than the plain one.
    pub(super) full: bool,
    /// The state is in blocks of 8 bits.
    pub(super) blockwise: bool,
    pub(super) orthogonal: Option<Orthogonal>,
}

impl Planned {
    fn new(parameter: &Parameter, config: &VelvetConfig) -> Self {
        let (var, plan) = (&parameter.var, &parameter.plan);
        let elements = var.elem_count();
        let row = elements / var.dims().first().copied().unwrap_or(1).max(1);
        let half = matches!(var.dtype(), DType::BF16 | DType::F16);
        let sparse = plan.sparse_rows == SparseRows::Skip && row > 0;
        let orthogonal = if let Rule::Orthogonal(options) = plan.rule { Some(options) } else { None };
        Self {
            rule: match plan.rule {
                Rule::AdamW => layout::ADAMW,
                Rule::Sgd(_) => layout::SGD,
                Rule::Lion(_) => layout::LION,
                Rule::Orthogonal(_) => layout::ORTHOGONAL,
            },
            dtype: var.dtype(),
            elements,
            row: if sparse || orthogonal.is_some() { row } else { 0 },
            cautious: plan.rule == Rule::AdamW && config.cautious_update == CautiousUpdate::Aligned,
            sparse,
            full: sparse || half && config.half_parameters != HalfParameters::Nearest,
            blockwise: parameter.slots.iter().any(|slot| matches!(slot.data, Data::TensorBlocks(_))),
            orthogonal,
        }
    }

    pub(super) fn chunks(&self) -> usize {
        self.elements.div_ceil(CHUNK)
    }

    pub(super) fn rows(&self) -> usize {
        self.elements.checked_div(self.row).unwrap_or(0)
    }

    /// The memory that is kept for its rows, in whole 16 bytes.
    fn row_bytes(&self) -> usize {
        match self.orthogonal {
            Some(_) => self.rows() * ROW_BYTES,
            None if self.sparse => self.rows().next_multiple_of(ROW_BYTES),
            None => 0,
        }
    }
}

/// The plan of all parameters, here and on the device.
pub(super) struct Plan {
    pub(super) planned: Vec<Planned>,
    fixed: Vec<Param>,
    params: Buffer<Param>,
    codes: Buffer<f32>,
    /// What [`Param::rows`] points to; only kernels read it.
    _rows: Buffer<u8>,
    /// The state arrays whose addresses are on the device: they must not go while a kernel may use them.
    kept: Vec<Tensor>,
}

impl Plan {
    pub(super) fn new(device: &CudaDevice, parameters: &[Parameter], config: &VelvetConfig) -> Result<Self> {
        let planned: Vec<Planned> =
            parameters.iter().map(|parameter| Planned::new(parameter, config)).collect();
        let rows = Buffer::zeros(device, planned.iter().map(Planned::row_bytes).sum())?;
        let (mut fixed, mut chunk, mut row_address) = (Vec::new(), 0, rows.address);
        for (parameter, planned) in parameters.iter().zip(&planned) {
            fixed.push(Param {
                elements: planned.elements as u64,
                row: launch::size(planned.row)?.max(1),
                chunk: launch::size(chunk)?,
                rows: if planned.row_bytes() > 0 { row_address } else { 0 },
                ..param(parameter, config)
            });
            chunk += planned.chunks();
            row_address += planned.row_bytes() as u64;
        }
        let params = Buffer::zeros(device, planned.len())?;
        let tables = [quantised::code_tables(true), quantised::code_tables(false)].concat();
        let mut codes = Buffer::zeros(device, tables.len())?;
        codes.write(device, &tables)?;
        let mut plan = Self { planned, fixed, params, codes, _rows: rows, kept: Vec::new() };
        plan.refresh(device, parameters)?;
        Ok(plan)
    }

    pub(super) fn len(&self) -> usize {
        self.planned.len()
    }

    pub(super) fn chunks(&self) -> usize {
        self.planned.iter().map(Planned::chunks).sum()
    }

    /// The address of the parameters' array.
    pub(super) fn params(&self) -> u64 {
        self.params.address
    }

    /// The address of what kernels know of 8-bit codes.
    pub(super) fn codes(&self) -> u64 {
        self.codes.address
    }

    /// Takes the addresses of the state arrays as they are now.
    pub(super) fn refresh(&mut self, device: &CudaDevice, parameters: &[Parameter]) -> Result<()> {
        let (stream, mut kept) = (device.cuda_stream(), Vec::new());
        for (parameter, fixed) in parameters.iter().zip(&mut self.fixed) {
            (fixed.state, fixed.scales, fixed.master) = ([0; 2], [0; 2], 0);
            let mut state = fixed.state.iter_mut().zip(&mut fixed.scales);
            let mut take = |tensor: &Tensor| {
                kept.push(tensor.clone());
                launch::address_mut(tensor, &stream)
            };
            for slot in &parameter.slots {
                match &slot.data {
                    Data::Tensor(tensor) if tensor.elem_count() == 0 => {}
                    Data::Tensor(tensor) if slot.spec.name == MASTER => fixed.master = take(tensor)?,
                    Data::Tensor(tensor) => {
                        if let Some((state, _)) = state.next() {
                            *state = take(tensor)?;
                        }
                    }
                    Data::TensorBlocks(blocks) => {
                        if let Some((state, scales)) = state.next() {
                            (*state, *scales) = (take(&blocks.codes)?, take(&blocks.scales)?);
                        }
                    }
                    Data::F32(_) | Data::F64(_) | Data::Blockwise(_) => {}
                }
            }
        }
        self.params.write(device, &self.fixed)?;
        self.kept = kept;
        Ok(())
    }
}

/// The rule of a parameter as the kernels take it.
fn param(parameter: &Parameter, config: &VelvetConfig) -> Param {
    let (plan, var) = (&parameter.plan, &parameter.var);
    let mut options = 0;
    if plan.decay.cautious && plan.decay.rate > 0.0 {
        options |= layout::CAUTIOUS_DECAY;
    }
    let half = matches!(var.dtype(), DType::BF16 | DType::F16);
    if half && matches!(config.half_parameters, HalfParameters::Stochastic { .. }) {
        options |= layout::STOCHASTIC;
    }
    let (rule, rule_settings) = match plan.rule {
        Rule::AdamW => {
            if config.momentum == Momentum::Nesterov {
                options |= layout::NESTEROV;
            }
            if config.cautious_update == CautiousUpdate::Aligned {
                options |= layout::CAUTIOUS;
            }
            (layout::ADAMW, [0.0; 4])
        }
        Rule::Sgd(sgd) => {
            if sgd.form == Momentum::Nesterov {
                options |= layout::NESTEROV;
            }
            (layout::SGD, [sgd.momentum, 0.0, 0.0, 0.0])
        }
        Rule::Lion(lion) => (layout::LION, [lion.beta1, lion.beta2, 0.0, 0.0]),
        Rule::Orthogonal(orthogonal) => {
            if orthogonal.form == Momentum::Nesterov {
                options |= layout::NESTEROV;
            }
            let rows = var.dims().first().copied().unwrap_or(1);
            let cols = var.elem_count() / rows.max(1);
            let (decay, size) = match orthogonal.row_moment {
                RowMoment::Off => (0.0, rows.max(cols) as f64),
                RowMoment::Average { decay } => {
                    options |= layout::ROW_MOMENT;
                    (decay, (rows * cols) as f64)
                }
            };
            let settings =
                [orthogonal.momentum, orthogonal.early_momentum, decay, orthogonal.scale * size.sqrt()];
            (layout::ORTHOGONAL, settings)
        }
    };
    Param {
        rule,
        options,
        rule_settings,
        lr_scale: plan.lr_scale,
        decay: plan.decay.rate,
        ..Param::default()
    }
}
