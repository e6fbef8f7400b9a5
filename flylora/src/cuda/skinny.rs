//! Products with a matrix of few ranks, by the kernels of `skinny.cu`, or on tensor cores by those of `tensor.cu`, `pair.cu`
//! and `tensor_f32.cu`.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Tensor, bail};

use super::launch::{
    Element, Held, Module, allocate, by_dtype, config, launch, multiprocessors, size, tensor, view, wrap,
};

/// The largest rank that there are kernels for.
pub(crate) const MOST_RANKS: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    rows: u64,
    columns: u32,
    r: u32,
    stride_j: u64,
    stride_c: u64,
    scale: f32,
    wide: u32,
    parts: u32,
    band: u32,
    adds: u32,
    unused: u32,
}

const _: () = assert!(size_of::<Params>() == 56);
// SAFETY: plain numbers in the layout of `SkinnyParams`.
unsafe impl DeviceRepr for Params {}

/// How a matrix of few ranks lies in memory.
#[derive(Clone, Copy, Debug)]
pub(super) enum Side {
    /// (r, columns), as `A`.
    Ranks,
    /// (columns, r), as `B`.
    Columns,
}

impl Side {
    pub(super) fn strides(self, r: usize, columns: usize) -> (u64, u64) {
        match self {
            Self::Ranks => (columns as u64, 1),
            Self::Columns => (1, r as u64),
        }
    }
}

/// A matrix of few ranks: contiguous, f32.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    pub(super) parts: (&'a CudaStorage, &'a Layout),
    pub(super) side: Side,
}

impl Factor<'_> {
    /// Ranks and columns.
    pub(super) fn dims(&self) -> Result<(usize, usize)> {
        let (first, second) = self.parts.1.shape().dims2()?;
        Ok(match self.side {
            Side::Ranks => (first, second),
            Side::Columns => (second, first),
        })
    }
}

/// The rank that the kernel for rank `r` is compiled for.
pub(super) fn compiled(r: usize) -> Result<usize> {
    match [8, 16, 32, MOST_RANKS].into_iter().find(|compiled| r <= *compiled) {
        Some(compiled) => Ok(compiled),
        None => bail!("no CUDA kernel for rank {r}, only up to {MOST_RANKS}"),
    }
}

fn params<T: Element>(rows: usize, (r, columns): (usize, usize), side: Side, scale: f64) -> Result<Params> {
    let (stride_j, stride_c) = side.strides(r, columns);
    Ok(Params {
        rows: rows as u64,
        columns: size(columns)?,
        r: size(r)?,
        stride_j,
        stride_c,
        scale: scale as f32,
        wide: columns.is_multiple_of(T::WIDE).into(),
        parts: 0,
        band: 0,
        adds: 0,
        unused: 0,
    })
}

/// The file of a kernel for a dtype, and the kernel's name.
fn kernel<T: Element>(what: &str, compiled: usize) -> (Module, String) {
    (T::TENSOR.unwrap_or(Module::Skinny), format!("{what}_{}_{compiled}", T::NAME))
}

/// Bytes of shared memory for the steps that a kernel of `tensor_f32.cu` asks for ahead: four, of 16 rows of so many columns.
fn in_flight(columns: usize) -> usize {
    4 * 16 * columns * size_of::<f32>()
}

/// Columns that a thread keeps, as in the kernels of `skinny.cu`.
fn kept<T: Element>(compiled: usize) -> usize {
    match compiled {
        64 => 2,
        32 => 4,
        _ => T::WIDE,
    }
}

/// Threads for so many columns: on tensor cores a warp takes 32.
fn vectors<T: Element>(columns: usize, compiled: usize) -> usize {
    match T::TENSOR {
        Some(_) => columns.next_multiple_of(32),
        None => columns.div_ceil(kept::<T>(compiled)),
    }
}

/// Blocks over the columns, of how many threads: of few idle ones.
fn over_columns(vectors: usize) -> (usize, usize) {
    let idle = |x: &usize| (vectors.next_multiple_of(*x), usize::MAX - x);
    let threads = (1..=8).map(|warps| 32 * warps).min_by_key(idle).unwrap_or(256);
    (vectors.div_ceil(threads).max(1), threads)
}

/// Rows of a band, a multiple of `step`, for about `blocks` blocks in all; and the number of bands.
fn bands(rows: usize, blocks: usize, columns: usize, step: usize) -> (usize, usize) {
    let least = rows.div_ceil(65_535);
    let band = (rows * columns).div_ceil(blocks).max(least).next_multiple_of(step).max(step);
    (band, rows.div_ceil(band).max(1))
}

/// `scale x M^T` for x (rows, columns): (rows, r), f32; 0 where `mask`, (rows, 32-bit words), has no bit.
pub(super) fn project(
    x: (&CudaStorage, &Layout),
    rows: usize,
    factor: Factor<'_>,
    mask: Option<(&CudaStorage, &Layout)>,
    scale: f64,
) -> Result<Tensor> {
    let h = projected(x, rows, factor, mask, scale)?;
    Ok(tensor(wrap(h, x.0.device()), (rows, factor.dims()?.0)))
}

/// The elements of what [`project`] gives.
pub(super) fn projected(
    (x, layout): (&CudaStorage, &Layout),
    rows: usize,
    factor: Factor<'_>,
    mask: Option<(&CudaStorage, &Layout)>,
    scale: f64,
) -> Result<CudaSlice<f32>> {
    fn run<T: Element>(
        (x, layout): (&CudaStorage, &Layout),
        rows: usize,
        factor: Factor<'_>,
        mask: Option<(&CudaStorage, &Layout)>,
        scale: f64,
    ) -> Result<CudaSlice<f32>> {
        let (device, dims) = (x.device(), factor.dims()?);
        let compiled = compiled(dims.0)?;
        let params = params::<T>(rows, dims, factor.side, scale)?;
        let of_a_warp = match compiled {
            _ if T::TENSOR.is_some() => 16,
            64 => 2,
            _ => 4,
        };
        let (module, name) = kernel::<T>("project", compiled);
        let shared = if module == Module::TensorF32 { 8 * in_flight(32) } else { 0 };
        let config = config((rows.div_ceil(8 * of_a_warp), 1), (256, 1), shared)?;
        let (x, m) = (view::<T>(x, layout)?, view::<f32>(factor.parts.0, factor.parts.1)?);
        let mut h = allocate::<f32>(device, rows * dims.0)?;
        match mask {
            Some((mask, layout)) => {
                let mask = view::<u32>(mask, layout)?;
                launch!(device, module, &name, config, &x, &m, &mask, &mut h, &params);
            }
            None => launch!(device, module, &name, config, &x, &m, &0u64, &mut h, &params),
        }
        Ok(h)
    }
    by_dtype!(x.dtype(), T => run::<T>((x, layout), rows, factor, mask, scale))
}

/// What [`expand`] adds to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Base {
    Nothing,
    /// What is in the output, from its first element on.
    Output,
}

/// `y = base + scale h M` in place; h: (rows, r), f32, y: (rows, columns).
pub(super) fn expand(
    y: &mut CudaStorage,
    base: Base,
    h: &Tensor,
    factor: Factor<'_>,
    scale: f64,
) -> Result<()> {
    expand_times(y, base, h, factor, scale, None)
}

/// As [`expand`], times `ratio`, where there is one: one number for each column, f32.
pub(super) fn expand_times(
    y: &mut CudaStorage,
    base: Base,
    h: &Tensor,
    factor: Factor<'_>,
    scale: f64,
    ratio: Option<&Tensor>,
) -> Result<()> {
    fn run<T: Element>(
        y: &mut CudaStorage,
        base: Base,
        h: &Tensor,
        factor: Factor<'_>,
        scale: f64,
        ratio: Option<&Tensor>,
    ) -> Result<()> {
        let (device, (rows, r)) = (y.device().clone(), h.dims2()?);
        let dims = factor.dims()?;
        let compiled = compiled(r)?;
        let (across, threads) = over_columns(vectors::<T>(dims.1, compiled));
        let (band, down) = bands(rows, 512, across, if T::TENSOR.is_some() { 32 } else { 4 });
        let params = Params {
            band: size(band)?,
            adds: (base == Base::Output).into(),
            ..params::<T>(rows, dims, factor.side, scale)?
        };
        let y = y.as_cuda_slice_mut::<T>()?;
        if dims.0 != r || y.len() < rows * dims.1 {
            bail!("{r} ranks of {rows} rows do not fit {dims:?} and an output of {} elements", y.len());
        }
        let config = config((across, down), (threads, 1), 0)?;
        let (module, name) = kernel::<T>("expand", compiled);
        let h = Held::new(h);
        let (h, layout) = h.parts()?;
        let (h, m) = (view::<f32>(h, layout)?, view::<f32>(factor.parts.0, factor.parts.1)?);
        let ratio = ratio.map(Held::new);
        let ratio = match &ratio {
            None => None,
            Some(ratio) => {
                let (ratio, layout) = ratio.parts()?;
                Some(view::<f32>(ratio, layout)?)
            }
        };
        match &ratio {
            None => launch!(device, module, &name, config, &h, &m, &0u64, y, &params),
            Some(ratio) => launch!(device, module, &name, config, &h, &m, ratio, y, &params),
        }
        Ok(())
    }
    by_dtype!(y.dtype(), T => run::<T>(y, base, h, factor, scale, ratio))
}

/// A new matrix `base + scale h M`, or without a base: (rows, columns) in the dtype of `like`.
pub(super) fn expanded(
    like: &CudaStorage,
    base: Base,
    h: &Tensor,
    factor: Factor<'_>,
    scale: f64,
) -> Result<CudaStorage> {
    let (device, rows, (_, columns)) = (like.device(), h.dim(0)?, factor.dims()?);
    let mut y = by_dtype!(like.dtype(), T => wrap(allocate::<T>(device, rows * columns)?, device));
    expand(&mut y, base, h, factor, scale)?;
    Ok(y)
}

/// `scale h^T x`, the gradient of a factor: h (rows, r) in f32, x (rows, columns); f32, as `side` says.
pub(super) fn outer(
    (x, layout): (&CudaStorage, &Layout),
    h: &Tensor,
    columns: usize,
    side: Side,
    scale: f64,
) -> Result<Tensor> {
    fn run<T: Element>(
        (x, layout): (&CudaStorage, &Layout),
        h: &Tensor,
        columns: usize,
        side: Side,
        scale: f64,
    ) -> Result<Tensor> {
        let (device, (rows, r)) = (x.device(), h.dims2()?);
        let compiled = compiled(r)?;
        let (across, threads) = over_columns(vectors::<T>(columns, compiled));
        let (module, name) = kernel::<T>("outer", compiled);
        let (blocks, shared) = match module {
            Module::TensorF32 => {
                (2 * multiprocessors(device)?, in_flight(compiled) + threads / 32 * in_flight(32))
            }
            _ => (400, 0),
        };
        let (band, parts) = bands(rows, blocks, across, 32);
        let params = Params { band: size(band)?, ..params::<T>(rows, (r, columns), side, scale)? };
        let (x, h) = (view::<T>(x, layout)?, Held::new(h));
        let (h, lh) = h.parts()?;
        let h = view::<f32>(h, lh)?;
        let mut partial = allocate::<f32>(device, parts * r * columns)?;
        let by_bands = config((across, parts), (threads, 1), shared)?;
        launch!(device, module, &name, by_bands, &x, &h, &mut partial, &params);
        reduced(device, &partial, parts, (r, columns), side, scale)
    }
    if super::pair::takes(x.dtype()) {
        return super::pair::single((x, layout), h, columns, side, scale);
    }
    by_dtype!(x.dtype(), T => run::<T>((x, layout), h, columns, side, scale))
}

/// `W + scale B A` for W (out, in), a (r, in) and b (out, r), all f32, contiguous and aligned.
pub(super) fn effective(weight: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    const SIDE: usize = 64;
    let ((outputs, inputs), r) = (weight.dims2()?, a.dim(0)?);
    if r > MOST_RANKS || a.dims() != [r, inputs] || b.dims() != [outputs, r] {
        bail!("factors of {:?} and {:?} for a weight of {:?}", a.dims(), b.dims(), weight.dims());
    }
    let params = params::<f32>(outputs, (r, inputs), Side::Ranks, scale)?;
    let (hw, ha, hb) = (Held::new(weight), Held::new(a), Held::new(b));
    let ((w, lw), (a, la), (b, lb)) = (hw.parts()?, ha.parts()?, hb.parts()?);
    let device = w.device();
    let (w, a, b) = (view::<f32>(w, lw)?, view::<f32>(a, la)?, view::<f32>(b, lb)?);
    let mut out = allocate::<f32>(device, outputs * inputs)?;
    let grid = config((inputs.div_ceil(SIDE), outputs.div_ceil(SIDE)), (256, 1), 0)?;
    launch!(device, Module::Skinny, "effective", grid, &w, &a, &b, &mut out, &params);
    Ok(tensor(wrap(out, device), (outputs, inputs)))
}

/// The norms of the rows of `W + scale B A`, from the squares of those of `W` (out): (out), f32; W (out, in) contiguous,
/// a (r, in), b (out, r) and the squares f32.
pub(super) fn norms(weight: &Tensor, a: &Tensor, b: &Tensor, squares: &Tensor, scale: f64) -> Result<Tensor> {
    fn run<T: Element>(w: &Tensor, a: &Tensor, b: &Tensor, squares: &Tensor, scale: f64) -> Result<Tensor> {
        let ((outputs, inputs), r) = (w.dims2()?, a.dim(0)?);
        let params = params::<T>(outputs, (r, inputs), Side::Ranks, scale)?;
        let (hw, ha, hb, hs) = (Held::new(w), Held::new(a), Held::new(b), Held::new(squares));
        let ((w, lw), (a, la), (b, lb), (s, ls)) = (hw.parts()?, ha.parts()?, hb.parts()?, hs.parts()?);
        let device = w.device();
        let (w, a) = (view::<T>(w, lw)?, view::<f32>(a, la)?);
        let (b, s) = (view::<f32>(b, lb)?, view::<f32>(s, ls)?);
        let mut out = allocate::<f32>(device, outputs)?;
        let config = config((outputs, 1), (256, 1), 0)?;
        launch!(
            device,
            Module::Skinny,
            &format!("norms_{}", T::NAME),
            config,
            &w,
            &a,
            &b,
            &s,
            &mut out,
            &params
        );
        Ok(tensor(wrap(out, device), outputs))
    }
    by_dtype!(weight.dtype(), T => run::<T>(weight, a, b, squares, scale))
}

/// `scale` times the sum of (parts, r, columns) over the parts, as `side` says.
pub(super) fn reduced(
    device: &CudaDevice,
    partial: &CudaSlice<f32>,
    parts: usize,
    (r, columns): (usize, usize),
    side: Side,
    scale: f64,
) -> Result<Tensor> {
    let params = Params { parts: size(parts)?, ..params::<f32>(0, (r, columns), side, scale)? };
    let mut out = allocate::<f32>(device, r * columns)?;
    let by_values = config(((r * columns).div_ceil(32), 1), (32, 16), 0)?;
    launch!(device, Module::Skinny, "reduce", by_values, partial, &mut out, &params);
    let shape = match side {
        Side::Ranks => (r, columns),
        Side::Columns => (columns, r),
    };
    Ok(tensor(wrap(out, device), shape))
}

/// The sum over the rows of `a * b`, both (rows, columns) of one dtype: (columns, 1), f32.
pub(super) fn dot(
    (a, la): (&CudaStorage, &Layout),
    (b, lb): (&CudaStorage, &Layout),
    (rows, columns): (usize, usize),
) -> Result<Tensor> {
    fn run<T: Element>(
        (a, la): (&CudaStorage, &Layout),
        (b, lb): (&CudaStorage, &Layout),
        (rows, columns): (usize, usize),
    ) -> Result<Tensor> {
        let device = a.device();
        let (across, threads) = over_columns(columns.div_ceil(T::WIDE));
        let (band, parts) = bands(rows, 528, across, 4);
        let params = Params { band: size(band)?, ..params::<T>(rows, (1, columns), Side::Columns, 1.0)? };
        let (a, b) = (view::<T>(a, la)?, view::<T>(b, lb)?);
        let mut partial = allocate::<f32>(device, parts * columns)?;
        let config = config((across, parts), (threads, 1), 0)?;
        launch!(device, Module::Skinny, &format!("dot_{}", T::NAME), config, &a, &b, &mut partial, &params);
        reduced(device, &partial, parts, (1, columns), Side::Columns, 1.0)
    }
    by_dtype!(a.dtype(), T => run::<T>((a, la), (b, lb), (rows, columns)))
}
