//! Both gradients of a low-rank change in one pass over x and dy, by `sweep.cu`.

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, sys};
use candle_core::{CudaDevice, Result, Tensor};

use super::launch::{Held, Module, allocate, attribute, config, launch, multiprocessors, size, view};
use super::skinny::{Side, reduced};

/// As in the kernel: ranks of a block, rows of a tile, and columns of a thread.
const RANKS: usize = 8;
const ROWS: usize = 4;
const COLUMNS: usize = 8;
const MOST_THREADS: usize = 384;

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    rows: u64,
    inputs: u32,
    outputs: u32,
    r: u32,
    threads: u32,
    band: u64,
}

const _: () = assert!(size_of::<Params>() == 32);
// SAFETY: plain numbers in the layout of `SweepParams`.
unsafe impl DeviceRepr for Params {}

/// How many threads have columns of x and of dy, and the bytes of shared memory of a block; `None` where the kernel does
/// not take such a layer.
fn shape(device: &CudaDevice, inputs: usize, outputs: usize) -> Result<Option<(usize, usize, usize)>> {
    if !inputs.is_multiple_of(4) || !outputs.is_multiple_of(4) {
        return Ok(None);
    }
    let threads = |columns: usize| columns.div_ceil(COLUMNS).next_multiple_of(32);
    let (of_x, of_dy) = (threads(inputs), threads(outputs));
    let bytes = size_of::<f32>() * (RANKS + 2 * ROWS) * COLUMNS * (of_x + of_dy);
    let most =
        attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    // Beside it the kernel has less than 5 KiB that the compiler lays out.
    let fits = of_x + of_dy <= MOST_THREADS && bytes + 5 * 1024 <= most;
    Ok(fits.then_some((of_x, of_dy, bytes)))
}

/// `dA` (r, in) and `dB` (out, r) of `scale B A`, for x (m, in), dy (m, out), a (r, in) and b (out, r), all f32,
/// contiguous and aligned; `None` where the kernel does not take such a layer.
pub(super) fn sweep(
    x: &Tensor,
    dy: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<Option<(Tensor, Tensor)>> {
    let device = x.device().as_cuda_device()?;
    let ((rows, inputs), (outputs, r)) = (x.dims2()?, b.dims2()?);
    let Some((of_x, of_dy, bytes)) = shape(device, inputs, outputs)? else { return Ok(None) };
    let groups = r.div_ceil(RANKS);
    // As many blocks as the device holds at once.
    let processors = multiprocessors(device)?;
    let resident =
        if of_x + of_dy <= MOST_THREADS / 2 && 2 * (bytes + 6 * 1024) <= held(device)? { 2 } else { 1 };
    let blocks = (resident * processors / groups).max(1);
    let band = rows.div_ceil(blocks).next_multiple_of(ROWS);
    let parts = rows.div_ceil(band).max(1);
    let params = Params {
        rows: rows as u64,
        inputs: size(inputs)?,
        outputs: size(outputs)?,
        r: size(r)?,
        threads: size(of_x)?,
        band: band as u64,
    };
    let mut partial_a = allocate::<f32>(device, parts * r * inputs)?;
    let mut partial_b = allocate::<f32>(device, parts * r * outputs)?;
    let (hx, hy, ha, hb) = (Held::new(x), Held::new(dy), Held::new(a), Held::new(b));
    let ((x, lx), (dy, ly), (a, la), (b, lb)) = (hx.parts()?, hy.parts()?, ha.parts()?, hb.parts()?);
    let (x, dy) = (view::<f32>(x, lx)?, view::<f32>(dy, ly)?);
    let (a, b) = (view::<f32>(a, la)?, view::<f32>(b, lb)?);
    let config = config((parts, groups), (of_x + of_dy, 1), bytes)?;
    launch!(device, Module::Sweep, "sweep", config, &x, &dy, &a, &b, &mut partial_a, &mut partial_b, &params);
    let da = reduced(device, &partial_a, parts, (r, inputs), Side::Ranks, scale)?;
    let db = reduced(device, &partial_b, parts, (r, outputs), Side::Columns, scale)?;
    Ok(Some((da, db)))
}

/// Bytes of shared memory that a multiprocessor holds.
fn held(device: &CudaDevice) -> Result<usize> {
    attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)
}
