//! FlyLoRA on CUDA: the routing in one kernel, the products by those for few ranks. These take A with its zeros: x is read
//! as a whole in any case, and on tensor cores the products with zeros take less time than to skip them.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CpuStorage, CudaDevice, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

use super::launch::{Held, Module, aligned, allocate, config, launch, not_here, size, tensor, view, wrap};
use super::layer::{self, Columns, Used, layer, view_of};
use super::lora::{through, with_change};
use super::onto::Way;
use super::skinny::{Base, Factor, Side, expanded, outer, project, projected};
use crate::FrozenLinear;
use crate::frozen::{rows, with_last};

/// As in the kernel: rows of a block, each of which has a thread.
const ROWS: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    rows: u64,
    r: u32,
    k: u32,
    magnitude: u32,
    unused: u32,
}

const _: () = assert!(size_of::<Params>() == 24);
// SAFETY: plain numbers in the layout of `RouteParams`.
unsafe impl DeviceRepr for Params {}

/// What rows have chosen.
pub(super) struct Routing {
    /// (m, words), u32: a bit for each rank that a row makes use of
    pub(super) mask: Tensor,
    /// (r), u32: how many rows make use of each
    pub(super) counts: Tensor,
}

impl Routing {
    /// For a kernel that writes the mask and adds to the counts.
    fn new(device: &CudaDevice, m: usize, r: usize) -> Result<Self> {
        let words = r.div_ceil(32);
        let mask = allocate::<u32>(device, m * words)?;
        let counts = device.alloc_zeros::<u32>(r)?;
        Ok(Self { mask: tensor(wrap(mask, device), (m, words)), counts: tensor(wrap(counts, device), r) })
    }
}

/// What the forward pass keeps for the backward one.
struct Low {
    /// (m, r), f32; 0 for ranks that a row makes no use of
    values: Tensor,
    routing: Routing,
}

/// How rows choose their ranks.
#[derive(Clone, Debug)]
pub(crate) struct Routed {
    pub(crate) k: usize,
    /// Whether scores are `|y| + balance`, or `y + balance`.
    pub(crate) magnitude: bool,
    /// (r), f32
    pub(crate) balance: Tensor,
    /// What the result is multiplied by.
    pub(crate) scale: f64,
}

/// For x (..., in) and a (r, in), f32, contiguous and aligned.
fn low((x, layout): (&CudaStorage, &Layout), a: &Tensor, how: &Routed) -> Result<Low> {
    let (device, m, r) = (x.device(), rows(layout.shape()), a.dim(0)?);
    let params =
        Params { rows: m as u64, r: size(r)?, k: size(how.k)?, magnitude: how.magnitude.into(), unused: 0 };
    let (a, balance) = (Held::new(a), Held::new(&how.balance));
    let factor = Factor { parts: a.parts()?, side: Side::Ranks };
    let mut values = projected((x, layout), m, factor, None, 1.0)?;
    let routing = Routing::new(device, m, r)?;
    {
        let (mask, counts) = (Held::new(&routing.mask), Held::new(&routing.counts));
        let (mask, counts) = (view_of::<u32>(&mask)?, view_of::<u32>(&counts)?);
        let (balance, layout) = balance.parts()?;
        let balance = view::<f32>(balance, layout)?;
        let grid = config((m.div_ceil(ROWS), 1), (ROWS, 1), 0)?;
        let name = format!("route_{}", r.div_ceil(32));
        launch!(device, Module::Route, &name, grid, &mut values, &balance, &mask, &counts, &params);
    }
    Ok(Low { values: tensor(wrap(values, device), (m, r)), routing })
}

/// The layer with its change and the routing in one kernel; `None` where there is none for it.
fn layer_and_low(
    base: &FrozenLinear,
    (x, layout): (&CudaStorage, &Layout),
    a: &Tensor,
    b: Factor<'_>,
    how: &Routed,
) -> Result<Option<(CudaStorage, Low)>> {
    let m = rows(layout.shape());
    let routing = Routing::new(x.device(), m, a.dim(0)?)?;
    let (a, weight) = (Held::new(a), base.weight()?);
    let of_a = Factor { parts: a.parts()?, side: Side::Ranks };
    let columns = Columns { bias: base.bias(), ratio: None };
    let used = Used::Routed(how, &routing);
    let way = (&weight, Way::Forward);
    let made = layer((x, layout), m, way, layer::Low::Of(of_a, used), b, how.scale, columns)?;
    Ok(made.map(|(y, values)| (y, Low { values, routing })))
}

/// The values of the ranks that the rows of x (m, in) make use of, 0 elsewhere: (m, r), f32, outside of any graph.
pub(crate) fn used(x: &Tensor, a: &Tensor, how: &Routed) -> Result<Tensor> {
    let x = aligned(x)?;
    Ok(low(Held::new(&x).parts()?, a, how)?.values)
}

/// What FlyLoRA adds for x (..., in), with the layer itself or, without a base, alone; and how many rows make use of each
/// rank: (r), u32. a: (r, in), f32, contiguous and aligned; b: (out, r).
pub(crate) fn routed_layer(
    base: Option<&FrozenLinear>,
    x: &Tensor,
    b: &Tensor,
    a: &Tensor,
    how: Routed,
) -> Result<(Tensor, Tensor)> {
    let b = aligned(&b.to_dtype(DType::F32)?)?;
    let state = Arc::new(Mutex::new(None));
    let op = Layer { base: base.cloned(), a: a.clone(), how, state: Arc::clone(&state) };
    let y = aligned(x)?.apply_op2(&b, op)?;
    let counts = state
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .as_ref()
        .map(|low: &Low| low.routing.counts.clone());
    match counts {
        Some(counts) => Ok((y, counts)),
        None => not_here("routed-layer-cuda"),
    }
}

struct Layer {
    base: Option<FrozenLinear>,
    /// With its zeros.
    a: Tensor,
    how: Routed,
    state: Arc<Mutex<Option<Low>>>,
}

impl CustomOp2 for Layer {
    fn name(&self) -> &'static str {
        "routed-layer-cuda"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        not_here(self.name())
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        b: &CudaStorage,
        lb: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let factor = Factor { parts: (b, lb), side: Side::Columns };
        let at_once = match &self.base {
            Some(base) => layer_and_low(base, (x, lx), &self.a, factor, &self.how)?,
            None => None,
        };
        let shape: Shape = with_last(lx.shape(), lb.shape().dims2()?.0).into();
        let (y, low) = match (at_once, &self.base) {
            (Some(both), _) => both,
            (None, Some(base)) => {
                let low = low((x, lx), &self.a, &self.how)?;
                (with_change(base, (x, lx), &low.values, factor, self.how.scale)?.0, low)
            }
            (None, None) => {
                let low = low((x, lx), &self.a, &self.how)?;
                (expanded(x, Base::Nothing, &low.values, factor, self.how.scale)?, low)
            }
        };
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(low);
        Ok((y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(low) = state.as_ref() else { return Ok((None, None)) };
        let (m, (outputs, _)) = (rows(x.shape()), b.dims2()?);
        let dy = aligned(&dy.detach())?.reshape((m, outputs))?;
        let (ds, fb, a) = (Held::new(&dy), Held::new(b), Held::new(&self.a));
        let db = outer(ds.parts()?, &low.values, outputs, Side::Columns, self.how.scale)?;
        if !x.track_op() {
            return Ok((None, Some(db)));
        }
        let mask = &low.routing.mask;
        let b = Factor { parts: fb.parts()?, side: Side::Columns };
        let a = Factor { parts: a.parts()?, side: Side::Ranks };
        if let Some(base) = &self.base {
            let (weight, used) = (base.weight()?, Used::Masked(mask));
            let (way, of_b) = ((&weight, Way::Backward), layer::Low::Of(b, used));
            if let Some((dx, _)) = layer(ds.parts()?, m, way, of_b, a, self.how.scale, Columns::default())? {
                return Ok((Some(tensor(dx, x.shape())), Some(db)));
            }
        }
        let mask = Held::new(mask);
        let back = project(ds.parts()?, m, b, Some(mask.parts()?), self.how.scale)?; // (m, r)
        let dx = match &self.base {
            Some(base) => through(base, &ds, m, &back, a, 1.0)?,
            None => expanded(ds.storage()?, Base::Nothing, &back, a, 1.0)?,
        };
        Ok((Some(tensor(dx, x.shape())), Some(db)))
    }
}
