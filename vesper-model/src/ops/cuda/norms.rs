//! What RMSNorm, LayerNorm and the residual sums with a norm share: one warp a row.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaView, DeviceRepr, LaunchConfig};
use candle_core::{CudaDevice, Layout, Result, Tensor};

use super::launch::{Element, Module, allocate, blocks, is_wide, launch, multiprocessors, size, tensor};

/// Warps, and so rows at a time, of a block.
const WARPS: usize = 4;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Params {
    rows: u64,
    d: u32,
    eps: f32,
}

const _: () = assert!(size_of::<Params>() == 16);
// SAFETY: plain numbers in the layout of `NormParams`.
unsafe impl DeviceRepr for Params {}

impl Params {
    /// For `elements / d` rows.
    pub(super) fn new(elements: usize, d: usize, eps: f64) -> Result<Self> {
        Ok(Self { rows: (elements / d) as u64, d: size(d)?, eps: eps as f32 })
    }
}

/// A kernel for rows of `d` elements.
pub(super) struct Kernel {
    pub(super) name: String,
    /// Whether a lane keeps its part of a row in registers, and with it that of sums over rows.
    keeps: bool,
}

/// Which kernel rows of `d` elements take: a lane keeps up to eight vectors of 16 bytes.
pub(super) fn kernel<T: Element>(kernel: &str, d: usize, layouts: &[&Layout]) -> Kernel {
    let vectors = match d.div_ceil(32 * T::WIDE) {
        _ if !is_wide::<T>(d, layouts) => "single",
        0..=1 => "wide1",
        2 => "wide2",
        3 => "wide3",
        4 => "wide4",
        5..=6 => "wide6",
        7..=8 => "wide8",
        _ => "wide",
    };
    let name = format!("{kernel}_{}_{vectors}", T::NAME);
    Kernel { name, keeps: !matches!(vectors, "single" | "wide") }
}

/// A warp for each row.
pub(super) fn a_warp_a_row(rows: usize) -> Result<LaunchConfig> {
    blocks(rows.div_ceil(WARPS), 32 * WARPS as u32)
}

/// Warps that stay and take row after row, as many as the device holds of this kernel, and how many parts of sums over rows
/// they leave: one a block, or one a warp where sums are not kept in registers.
pub(super) fn warps_that_stay(
    device: &CudaDevice,
    module: Module,
    kernel: &Kernel,
    rows: usize,
) -> Result<(LaunchConfig, usize)> {
    let threads = 32 * WARPS as u32;
    let function = device.get_or_load_custom_func(&kernel.name, module.name(), module.ptx())?;
    let resident = function.occupancy_max_active_blocks_per_multiprocessor(threads, 0, None).w()?;
    // One more block than fits would make the others wait for it at the end.
    let grid = rows.div_ceil(WARPS).min(resident.clamp(1, 4) as usize * multiprocessors(device)?);
    Ok((blocks(grid, threads)?, if kernel.keeps { grid } else { grid * WARPS }))
}

/// The sum over the first dimension of (parts, d), in a fixed order.
pub(super) fn reduce<T: Element>(
    device: &CudaDevice,
    partial: &CudaView<'_, f32>,
    parts: usize,
    d: usize,
) -> Result<Tensor> {
    let mut out = allocate::<T>(device, d)?;
    let name = format!("norms_reduce_{}", T::NAME);
    let config =
        LaunchConfig { grid_dim: (size(d.div_ceil(32))?, 1, 1), block_dim: (32, 32, 1), shared_mem_bytes: 0 };
    let (parts, columns) = (size(parts)?, size(d)?);
    launch!(device, Module::Norms, &name, config, partial, &mut out, &parts, &columns);
    Ok(tensor(out, device, d))
}
