//! The gradients of both factors of a low-rank change in one pass over x and dy, by `pair.cu`: bf16, on tensor cores.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaView, DeviceRepr};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Tensor, bail};
use half::bf16;

use super::launch::{
    Element, Held, Module, allocate, config, launch, multiprocessors, size, tensor, view, wrap,
};
use super::skinny::{Side, compiled};

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    rows: u64,
    a_rank: u64,
    a_column: u64,
    b_rank: u64,
    b_column: u64,
    inputs: u32,
    outputs: u32,
    r: u32,
    parts: u32,
    scale: f32,
    unused: u32,
}

const _: () = assert!(size_of::<Params>() == 64);
// SAFETY: plain numbers in the layout of `PairParams`.
unsafe impl DeviceRepr for Params {}

/// As in the kernel: columns of a warp, warps of a block, and rows of a product.
const COLUMNS: usize = 64;
const WARPS: usize = 8;
const ROWS: usize = 16;

/// Whether there is a kernel for the dtype.
pub(super) fn takes(dtype: DType) -> bool {
    dtype == DType::BF16 && bf16::TENSOR.is_some()
}

/// `dA = scale g^T x` (r, in) and `dB = scale dy^T h` (out, r), both f32, for x (m, in), dy (m, out), g and h (m, r) in f32.
pub(super) fn pair(
    x: (&CudaStorage, &Layout),
    back: &Tensor,
    dy: (&CudaStorage, &Layout),
    low: &Tensor,
    scale: f64,
) -> Result<(Tensor, Tensor)> {
    let (m, r) = low.dims2()?;
    if m == 0 || back.dims() != low.dims() {
        bail!("gradients of {r} ranks for {m} rows, and {:?}", back.dims());
    }
    let (inputs, outputs) = (x.1.shape().elem_count() / m, dy.1.shape().elem_count() / m);
    let device = x.0.device();
    let (hb, hl) = (Held::new(back), Held::new(low));
    let ((back, lb), (low, ll)) = (hb.parts()?, hl.parts()?);
    let of_x = Half { matrix: view(x.0, x.1)?, columns: inputs, low: view(back, lb)?, side: Side::Ranks };
    let of_dy =
        Half { matrix: view(dy.0, dy.1)?, columns: outputs, low: view(low, ll)?, side: Side::Columns };
    let (da, db) = run(device, (m, r), &of_x, Some(&of_dy), scale)?;
    match db {
        Some(db) => Ok((da, db)),
        None => bail!("only one of two gradients"),
    }
}

/// `scale h^T x`, the gradient of one factor, for x (m, columns) and h (m, r); f32, as `side` says.
pub(super) fn single(
    (x, layout): (&CudaStorage, &Layout),
    h: &Tensor,
    columns: usize,
    side: Side,
    scale: f64,
) -> Result<Tensor> {
    let held = Held::new(h);
    let (low, ll) = held.parts()?;
    let half = Half { matrix: view(x, layout)?, columns, low: view(low, ll)?, side };
    Ok(run(x.device(), h.dims2()?, &half, None, scale)?.0)
}

/// What one gradient is made of: `low^T matrix`.
struct Half<'a> {
    /// (m, columns)
    matrix: CudaView<'a, bf16>,
    columns: usize,
    /// (m, r)
    low: CudaView<'a, f32>,
    side: Side,
}

impl Half<'_> {
    fn shape(&self, r: usize) -> (usize, usize) {
        match self.side {
            Side::Ranks => (r, self.columns),
            Side::Columns => (self.columns, r),
        }
    }
}

fn run(
    device: &CudaDevice,
    (m, r): (usize, usize),
    first: &Half<'_>,
    second: Option<&Half<'_>>,
    scale: f64,
) -> Result<(Tensor, Option<Tensor>)> {
    let compiled = compiled(r)?;
    let outputs = second.map_or(0, |half| half.columns);
    let warps = first.columns.div_ceil(COLUMNS) + outputs.div_ceil(COLUMNS);
    let across = warps.div_ceil(WARPS).max(1);
    // As many blocks as the device holds at once.
    let resident = if compiled <= 16 { 2 } else { 1 };
    let parts = (resident * multiprocessors(device)? / across).clamp(1, m.div_ceil(ROWS).clamp(1, 65_535));
    let (a_rank, a_column) = first.side.strides(r, first.columns);
    let (b_rank, b_column) = second.map_or((0, 0), |half| half.side.strides(r, half.columns));
    let params = Params {
        rows: m as u64,
        a_rank,
        a_column,
        b_rank,
        b_column,
        inputs: size(first.columns)?,
        outputs: size(outputs)?,
        r: size(r)?,
        parts: size(parts)?,
        scale: scale as f32,
        unused: 0,
    };
    let mut partial_a = allocate::<f32>(device, parts * r * first.columns)?;
    let mut partial_b = allocate::<f32>(device, parts * r * outputs)?;
    let mut da = allocate::<f32>(device, r * first.columns)?;
    let mut db = allocate::<f32>(device, r * outputs)?;
    let wide = first.columns.is_multiple_of(8) && outputs.is_multiple_of(8);
    let name = format!("{}_{compiled}", if wide { "pair" } else { "pair_narrow" });
    let grid = config((across, parts), (32 * WARPS, 1), 0)?;
    // The other matrix is not read where it has no columns.
    let other = second.unwrap_or(first);
    let (x, g, dy, h) = (&first.matrix, &first.low, &other.matrix, &other.low);
    launch!(device, Module::Pair, &name, grid, x, dy, h, g, &mut partial_a, &mut partial_b, &params);
    let grid = config(((r * (first.columns + outputs)).div_ceil(32), 1), (32, 16), 0)?;
    launch!(device, Module::Pair, "pair_reduce", grid, &partial_a, &partial_b, &mut da, &mut db, &params);
    let da = tensor(wrap(da, device), first.shape(r));
    let db = second.map(|half| tensor(wrap(db, device), half.shape(r)));
    Ok((da, db))
}
