//! Both gradients of a low-rank change in one pass over x and dy, by `sweep.cu`, or on tensor cores by
//! `sweep_tensor.cu`.

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, sys};
use candle_core::{CudaDevice, Result, Tensor};

use super::launch::{Held, Module, allocate, attribute, config, launch, multiprocessors, size, view};
use super::skinny::{Side, reduced};

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

/// One of the kernels.
struct Kernel {
    module: Module,
    name: &'static str,
    /// Ranks of a block, rows of a tile, columns of a warp, and warps of the largest block.
    ranks: usize,
    rows: usize,
    columns: usize,
    most_warps: usize,
    /// What each row in shared memory is longer by than the columns that it holds, and what the compiler lays out beside.
    more: usize,
    beside: usize,
}

const PLAIN: Kernel = Kernel {
    module: Module::Sweep,
    name: "sweep",
    ranks: 8,
    rows: 4,
    columns: 256,
    most_warps: 12,
    more: 0,
    beside: 5 * 1024,
};

const EIGHT: Kernel = Kernel {
    module: Module::SweepTensor,
    name: "sweep_8",
    rows: 8,
    columns: 128,
    most_warps: 16,
    more: 4,
    beside: 9 * 1024,
    ..PLAIN
};

const SIXTEEN: Kernel = Kernel { name: "sweep_16", ranks: 16, most_warps: 12, beside: 17 * 1024, ..EIGHT };

/// How a kernel takes a layer.
struct Shape {
    /// Warps that have columns of x, and of dy.
    of_x: usize,
    of_dy: usize,
    /// Shared memory of a block.
    bytes: usize,
    /// Blocks that a multiprocessor holds.
    resident: usize,
}

impl Kernel {
    /// `None` where the kernel does not take such a layer.
    fn shape(&self, device: &CudaDevice, inputs: usize, outputs: usize) -> Result<Option<Shape>> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as OF_BLOCK,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR as OF_PROCESSOR,
        };
        let (of_x, of_dy) = (inputs.div_ceil(self.columns), outputs.div_ceil(self.columns));
        let warps = of_x + of_dy;
        let bytes = size_of::<f32>() * (self.ranks + 2 * self.rows) * (self.columns * warps + self.more);
        let own = bytes + self.beside;
        if warps > self.most_warps || own > attribute(device, OF_BLOCK)? {
            return Ok(None);
        }
        let two = warps <= self.most_warps / 2 && 2 * (own + 1024) <= attribute(device, OF_PROCESSOR)?;
        Ok(Some(Shape { of_x, of_dy, bytes, resident: if two { 2 } else { 1 } }))
    }
}

/// `dA` (r, in) and `dB` (out, r) of `scale B A`, for x (m, in), dy (m, out), a (r, in) and b (out, r), all f32,
/// contiguous and aligned; `None` where no kernel takes such a layer.
pub(super) fn sweep(
    x: &Tensor,
    dy: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<Option<(Tensor, Tensor)>> {
    let device = x.device().as_cuda_device()?;
    let ((rows, inputs), (outputs, r)) = (x.dims2()?, b.dims2()?);
    if !inputs.is_multiple_of(4) || !outputs.is_multiple_of(4) {
        return Ok(None);
    }
    let first = if r <= EIGHT.ranks { EIGHT } else { SIXTEEN };
    let mut chosen = None;
    for kernel in [first, PLAIN] {
        if chosen.is_none() && (kernel.module == Module::Sweep || cfg!(tensor_cores)) {
            chosen = kernel.shape(device, inputs, outputs)?.map(|shape| (kernel, shape));
        }
    }
    let Some((kernel, shape)) = chosen else { return Ok(None) };
    let groups = r.div_ceil(kernel.ranks);
    // As many blocks as the device holds at once.
    let blocks = (shape.resident * multiprocessors(device)? / groups).max(1);
    let band = rows.div_ceil(blocks).next_multiple_of(kernel.rows);
    let parts = rows.div_ceil(band).max(1);
    let params = Params {
        rows: rows as u64,
        inputs: size(inputs)?,
        outputs: size(outputs)?,
        r: size(r)?,
        threads: size(32 * shape.of_x)?,
        band: band as u64,
    };
    let mut partial_a = allocate::<f32>(device, parts * r * inputs)?;
    let mut partial_b = allocate::<f32>(device, parts * r * outputs)?;
    let (hx, hy, ha, hb) = (Held::new(x), Held::new(dy), Held::new(a), Held::new(b));
    let ((x, lx), (dy, ly), (a, la), (b, lb)) = (hx.parts()?, hy.parts()?, ha.parts()?, hb.parts()?);
    let (x, dy) = (view::<f32>(x, lx)?, view::<f32>(dy, ly)?);
    let (a, b) = (view::<f32>(a, la)?, view::<f32>(b, lb)?);
    let grid = config((parts, groups), (32 * (shape.of_x + shape.of_dy), 1), shape.bytes)?;
    let (module, name) = (kernel.module, kernel.name);
    launch!(device, module, name, grid, &x, &dy, &a, &b, &mut partial_a, &mut partial_b, &params);
    let da = reduced(device, &partial_a, parts, (r, inputs), Side::Ranks, scale)?;
    let db = reduced(device, &partial_b, parts, (r, outputs), Side::Columns, scale)?;
    Ok(Some((da, db)))
}
