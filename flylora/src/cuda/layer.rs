//! A frozen layer with its low-rank change as one product, by `layer.cu`: bf16, on Hopper. What the change adds to the layer
//! is then a few terms of each sum: nothing of the size of x or y is read or written once more.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
#[cfg(hopper)]
use candle_core::cuda_backend::WrapErr;
#[cfg(hopper)]
use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Tensor, bail};
use half::bf16;

use super::fly::{Routed, Routing};
use super::launch::{
    Held, Module, aligned, allocate, config, launch, multiprocessors, size, tensor, view, wrap,
};
use super::onto::{Way, by_rows};
use super::skinny::{Factor, compiled, project};

/// As in the kernel: rows and columns of a block's part of y, terms of a step, and up to which rank it makes h itself.
const ROWS: usize = 128;
const COLUMNS: usize = 256;
const DEPTH: usize = 64;
const MOST_OWN: usize = 32;

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    rows: u64,
    n: u32,
    k: u32,
    r: u32,
    span: u32,
    given: u32,
    chosen: u32,
    magnitude: u32,
    unused: u32,
}

const _: () = assert!(size_of::<Params>() == 40);
// SAFETY: plain numbers in the layout of `LayerParams`.
unsafe impl DeviceRepr for Params {}

#[repr(C)]
#[derive(Clone, Copy)]
struct FactorParams {
    p_rank: u64,
    p_column: u64,
    q_rank: u64,
    q_column: u64,
    n: u32,
    k: u32,
    r: u32,
    rounded: u32,
    wide: u32,
    scale: f32,
    given: u32,
    unused: u32,
}

const _: () = assert!(size_of::<FactorParams>() == 64);
// SAFETY: plain numbers in the layout of `FactorParams`.
unsafe impl DeviceRepr for FactorParams {}

/// A matrix in the device's memory as its copy engine knows it.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Map([u64; 16]);

// SAFETY: a plain block of bytes in the layout of `TensorMap`.
unsafe impl DeviceRepr for Map {}

/// What of the change is there already.
#[derive(Clone, Copy)]
pub(super) enum Low<'a> {
    /// Nothing: `h = x P^T` for this P, of which rows make use of some ranks.
    Of(Factor<'a>, Used<'a>),
    /// h (rows, r), f32.
    Given(&'a Tensor),
}

/// Which ranks of h a row makes use of; the others become 0.
#[derive(Clone, Copy)]
pub(super) enum Used<'a> {
    All,
    /// Those of a mask, as [`Routing`] has it.
    Masked(&'a Tensor),
    /// Those that the row's routing chooses, which is written down.
    Routed(&'a Routed, &'a Routing),
}

impl Used<'_> {
    fn mask(&self) -> Option<&Tensor> {
        match self {
            Self::All => None,
            Self::Masked(mask) => Some(mask),
            Self::Routed(_, routing) => Some(&routing.mask),
        }
    }
}

/// Numbers for each column of y: a bias in bf16, and what the rest is multiplied by in f32.
#[derive(Clone, Copy, Default)]
pub(super) struct Columns<'a> {
    pub(super) bias: Option<&'a Tensor>,
    pub(super) ratio: Option<&'a Tensor>,
}

/// `y = ratio (x W^T + scale h Q) + bias`, or `x W` as the way says, (rows, n) in bf16, and h (rows, r); `None` where the
/// kernel does not take such a layer. x: (rows, k), Q: the second factor.
pub(super) fn layer(
    (x, layout): (&CudaStorage, &Layout),
    rows: usize,
    (weight, way): (&Tensor, Way),
    low: Low<'_>,
    factor: Factor<'_>,
    scale: f64,
    columns: Columns<'_>,
) -> Result<Option<(CudaStorage, Tensor)>> {
    let (outputs, inputs) = weight.dims2()?;
    let (n, k) = match way {
        Way::Forward => (outputs, inputs),
        Way::Backward => (inputs, outputs),
    };
    let start = weight.layout().start_offset() * weight.dtype().size_in_bytes();
    // The copy engine takes rows of multiples of 16 bytes, and counts them in 32 bits. With few rows most of a block would
    // do nothing.
    let fits = cfg!(hopper)
        && weight.dtype() == DType::BF16
        && x.dtype() == DType::BF16
        && n.is_multiple_of(8)
        && k.is_multiple_of(8)
        && start.is_multiple_of(16)
        && rows >= ROWS / 2
        && i32::try_from(rows).is_ok()
        && layout.shape().elem_count() == rows * k;
    let Some(by_rows) = by_rows(weight).filter(|_| fits) else { return Ok(None) };
    let turned = by_rows == (way == Way::Backward);
    let (r, of_q) = factor.dims()?;
    let rounded = compiled(r)?;
    let (given, p, used) = match low {
        Low::Of(p, Used::All) if r > MOST_OWN => {
            (Some(project((x, layout), rows, p, None, 1.0)?), None, Used::All)
        }
        Low::Of(..) if r > MOST_OWN => return Ok(None),
        Low::Of(p, used) => (None, Some(p), used),
        Low::Given(h) => (Some(h.clone()), None, Used::All),
    };
    if of_q != n || p.is_some_and(|p| p.dims().ok() != Some((r, k))) {
        bail!("factors of {r} ranks and {of_q} columns for a layer from {k} to {n}");
    }
    let device = x.device();
    let factors = Factors::new(device, p, factor, (r, rounded), (n, k), scale)?;
    let h = match given {
        Some(h) => h,
        None => tensor(wrap(allocate::<f32>(device, rows * r)?, device), (rows, r)),
    };
    let mut y = allocate::<bf16>(device, rows * n)?;
    let span =
        span((rows.div_ceil(ROWS), n.div_ceil(COLUMNS)), multiprocessors(device)?, p.map_or(0, |_| rounded));
    let params = Params {
        rows: rows as u64,
        n: size(n)?,
        k: size(k)?,
        r: size(r)?,
        span: size(span)?,
        given: p.is_none().into(),
        chosen: if let Used::Routed(how, _) = used { size(how.k)? } else { 0 },
        magnitude: matches!(used, Used::Routed(how, _) if how.magnitude).into(),
        unused: 0,
    };
    let units = rows.div_ceil(ROWS) * n.div_ceil(COLUMNS).div_ceil(span);
    let grid = config((units.min(multiprocessors(device)?), 1), (384, 1), memory(rounded))?;
    let (held_w, held_h) = (Held::new(weight), Held::new(&h));
    let (bias, ratio) = (columns.bias.map(aligned).transpose()?, columns.ratio.map(aligned).transpose()?);
    let (held_bias, held_ratio) = (bias.as_ref().map(Held::new), ratio.as_ref().map(Held::new));
    let ((w, lw), (low, ll)) = (held_w.parts()?, held_h.parts()?);
    let Some(w) = w.as_cuda_slice::<bf16>()?.try_slice(lw.start_offset()..lw.start_offset() + n * k) else {
        bail!("layout {lw:?} reaches outside a storage")
    };
    let (x, low) = (view::<bf16>(x, layout)?, view::<f32>(low, ll)?);
    let bias = held_bias.as_ref().map(view_of::<bf16>).transpose()?;
    let ratio = held_ratio.as_ref().map(view_of::<f32>).transpose()?;
    let (balance, counts) = match used {
        Used::Routed(how, routing) => (Some(aligned(&how.balance)?), Some(&routing.counts)),
        _ => (None, None),
    };
    let (held_balance, held_mask, held_counts) =
        (balance.as_ref().map(Held::new), used.mask().map(Held::new), counts.map(Held::new));
    let balance = held_balance.as_ref().map(view_of::<f32>).transpose()?;
    let mask = held_mask.as_ref().map(view_of::<u32>).transpose()?;
    let counts = held_counts.as_ref().map(view_of::<u32>).transpose()?;
    {
        // The copy engine gets addresses; the guards beside them are held until the launch is done.
        let stream = device.cuda_stream();
        let ((at_x, _x), (at_w, _w)) = (x.device_ptr(&stream), w.device_ptr(&stream));
        let ((at_f, _f), (at_e, _e)) = (factors.f.device_ptr(&stream), factors.e.device_ptr(&stream));
        let ((at_h, _h), (at_y, _y)) = (low.device_ptr(&stream), y.device_ptr_mut(&stream));
        let (bias, ratio) =
            (bias.as_ref().map(|b| b.device_ptr(&stream)), ratio.as_ref().map(|r| r.device_ptr(&stream)));
        let at = |guarded: &Option<(u64, SyncOnDrop<'_>)>| guarded.as_ref().map_or(0, |g| g.0);
        let (at_bias, at_ratio) = (at(&bias), at(&ratio));
        let balance = balance.as_ref().map(|b| b.device_ptr(&stream));
        let (mask, counts) =
            (mask.as_ref().map(|m| m.device_ptr(&stream)), counts.as_ref().map(|c| c.device_ptr(&stream)));
        let (at_balance, at_mask, at_counts) = (at(&balance), at(&mask), at(&counts));
        let map_x = Map::new(at_x, (rows, k), (ROWS, DEPTH))?;
        let map_w = if turned {
            Map::new(at_w, (k, n), (DEPTH, DEPTH))?
        } else {
            Map::new(at_w, (n, k), (COLUMNS, DEPTH))?
        };
        let map_f = match p {
            Some(_) => Map::new(at_f, (2 * rounded, k), (2 * rounded, DEPTH))?,
            None => map_x, // which is not read then
        };
        let map_e = Map::new(at_e, (n, factors.wide), (COLUMNS, DEPTH))?;
        let name = format!("layer_{}_{rounded}", if turned { "columns" } else { "rows" });
        launch!(
            device,
            Module::Layer,
            &name,
            grid,
            &map_x,
            &map_w,
            &map_f,
            &map_e,
            &at_bias,
            &at_ratio,
            &at_balance,
            &at_mask,
            &at_counts,
            &at_h,
            &at_y,
            &params
        );
    }
    Ok(Some((wrap(y, device), h.clone())))
}

pub(super) fn view_of<'a, T: CudaDType>(held: &'a Held<'_>) -> Result<CudaView<'a, T>> {
    let (storage, layout) = held.parts()?;
    view::<T>(storage, layout)
}

/// Bytes of shared memory of a block, as the kernel lays them out.
fn memory(rounded: usize) -> usize {
    let stages = if rounded <= 16 { 4 } else { 3 };
    let of_f = if rounded <= MOST_OWN { 2 * rounded } else { 0 };
    let stage = size_of::<bf16>() * DEPTH * (ROWS + COLUMNS + of_f);
    1024 + stages * stage + size_of::<bf16>() * ROWS * DEPTH
}

/// How many parts of 256 columns a block takes one after the other, with one h: such that the blocks, which run at the same
/// time, are done soonest, or nearly: blocks side by side read the same x at the same time. `low`: ranks of an h that is
/// made.
fn span((down, across): (usize, usize), processors: usize, low: usize) -> usize {
    let cost = |span: usize| (down * across.div_ceil(span)).div_ceil(processors) * (COLUMNS * span + 3 * low);
    let least = (1..=across).map(cost).min().unwrap_or(0);
    (1..=across).find(|span| cost(*span) <= least + least / 10).unwrap_or(1)
}

/// The factors as the kernel takes them.
struct Factors {
    f: CudaSlice<bf16>,
    e: CudaSlice<bf16>,
    /// Columns of E.
    wide: usize,
}

impl Factors {
    fn new(
        device: &CudaDevice,
        p: Option<Factor<'_>>,
        q: Factor<'_>,
        (r, rounded): (usize, usize),
        (n, k): (usize, usize),
        scale: f64,
    ) -> Result<Self> {
        let wide = (3 * rounded).next_multiple_of(DEPTH);
        let first = p.unwrap_or(q);
        let ((p_rank, p_column), (q_rank, q_column)) = (first.side.strides(r, k), q.side.strides(r, n));
        let params = FactorParams {
            p_rank,
            p_column,
            q_rank,
            q_column,
            n: size(n)?,
            k: size(k)?,
            r: size(r)?,
            rounded: size(rounded)?,
            wide: size(wide)?,
            scale: scale as f32,
            given: p.is_none().into(),
            unused: 0,
        };
        let mut f = allocate::<bf16>(device, p.map_or(0, |_| 2 * rounded * k))?;
        let mut e = allocate::<bf16>(device, n * wide)?;
        let first = view::<f32>(first.parts.0, first.parts.1)?;
        let second = view::<f32>(q.parts.0, q.parts.1)?;
        let grid = config((n.max(k).div_ceil(128), rounded.max(wide - 2 * rounded)), (128, 1), 0)?;
        launch!(device, Module::Layer, "factors", grid, &first, &second, &mut f, &mut e, &params);
        Ok(Self { f, e, wide })
    }
}

impl Map {
    /// Of a matrix (rows, columns) of bf16, of which boxes (rows, columns) are copied.
    #[cfg(hopper)]
    fn new(at: u64, (rows, columns): (usize, usize), (down, across): (usize, usize)) -> Result<Self> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (sizes, strides) = ([columns as u64, rows as u64], [(size_of::<bf16>() * columns) as u64]);
        let (boxes, ones) = ([size(across)?, size(down)?], [1u32; 2]);
        // SAFETY: the arrays have the two entries, and the one, that a matrix has; the call reads no memory of the device.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                at as *mut std::ffi::c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                ones.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        result.result().w()?;
        Ok(Self(map.opaque))
    }

    #[cfg(not(hopper))]
    fn new(_: u64, _: (usize, usize), _: (usize, usize)) -> Result<Self> {
        bail!("the kernels were not built for Hopper")
    }
}
