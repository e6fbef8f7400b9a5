//! FlyLoRA on CUDA: the low products and the routing in one kernel, the rest by those for few ranks.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::{CpuStorage, CudaDevice, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

use super::launch::{
    Element, Held, Module, aligned, allocate, by_dtype, config, launch, not_here, size, tensor, view, wrap,
};
use super::lora::{through, with_change};
use super::skinny::{Base, Factor, Side, expanded, outer, project};
use crate::FrozenLinear;
use crate::frozen::{rows, with_last};
use crate::sparse::SparseMatrix;

/// Rows of x that a block takes, and columns that it takes at a time.
const TILE: usize = 128;
const CHUNK: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    rows: u64,
    columns: u32,
    r: u32,
    k: u32,
    magnitude: u32,
    wide: u32,
    unused: u32,
}

const _: () = assert!(size_of::<Params>() == 32);
// SAFETY: plain numbers in the layout of `FlyParams`.
unsafe impl DeviceRepr for Params {}

/// A sparse matrix on a device.
#[derive(Debug)]
pub(crate) struct Sparse {
    /// Column in its chunk, and value in the upper half; by chunks of columns, then by rows.
    entries: CudaSlice<u64>,
    /// Where the entries of each row of each chunk begin, and the end.
    starts: CudaSlice<u32>,
    /// Entries of a chunk, at most.
    most: usize,
    /// With its zeros: (r, columns), f32.
    dense: Tensor,
    columns: usize,
}

impl Sparse {
    pub(crate) fn new(matrix: &SparseMatrix, like: &Tensor) -> Result<Self> {
        let device = like.device().as_cuda_device()?;
        let chunks = matrix.columns.div_ceil(CHUNK);
        let place = |row: u32, column: u32| column as usize / CHUNK * matrix.rows + row as usize;
        let mut starts = vec![0u32; chunks * matrix.rows + 1];
        for (row, column, _) in matrix.entries() {
            if let Some(count) = starts.get_mut(place(row, column) + 1) {
                *count += 1;
            }
        }
        for i in 1..starts.len() {
            starts[i] += starts[i - 1];
        }
        let mut next = starts.clone();
        let mut entries = vec![0u64; matrix.values.len()];
        for (row, column, value) in matrix.entries() {
            if let Some(at) = next.get_mut(place(row, column)) {
                if let Some(entry) = entries.get_mut(*at as usize) {
                    *entry = u64::from(column % CHUNK as u32) | u64::from(value.to_bits()) << 32;
                }
                *at += 1;
            }
        }
        let ends = starts.iter().step_by(matrix.rows);
        let most = ends.clone().zip(ends.skip(1)).map(|(start, end)| end - start).max().unwrap_or(0) as usize;
        Ok(Self {
            entries: device.clone_htod(&entries)?,
            starts: device.clone_htod(&starts)?,
            most,
            dense: matrix.dense(DType::F32, like.device())?,
            columns: matrix.columns,
        })
    }
}

/// What the routing of some rows gave, for the backward pass and for the balance.
struct Low {
    /// (m, r), f32; 0 for ranks that a row makes no use of
    values: Tensor,
    /// (m, words), u32: a bit for each rank that it makes use of
    mask: Tensor,
    /// (r), u32: how many rows make use of each
    counts: Tensor,
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

fn low((x, layout): (&CudaStorage, &Layout), sparse: &Sparse, how: &Routed) -> Result<Low> {
    fn run<T: Element>((x, layout): (&CudaStorage, &Layout), sparse: &Sparse, how: &Routed) -> Result<Low> {
        let (device, m): (&CudaDevice, usize) = (x.device(), rows(layout.shape()));
        let (r, words) = (how.balance.elem_count(), how.balance.elem_count().div_ceil(32));
        let params = Params {
            rows: m as u64,
            columns: size(sparse.columns)?,
            r: size(r)?,
            k: size(how.k)?,
            magnitude: how.magnitude.into(),
            wide: sparse.columns.is_multiple_of(T::WIDE).into(),
            unused: 0,
        };
        let held = (TILE * CHUNK).max(TILE * (r + 1)).next_multiple_of(4);
        let config = config((m.div_ceil(TILE), 1), (256, 1), 4 * held + 8 * sparse.most)?;
        let name = format!("low_{}_{}", T::NAME, if r <= 32 { 4 } else { 8 });
        let (x, balance) = (view::<T>(x, layout)?, Held::new(&how.balance));
        let (balance, lb) = balance.parts()?;
        let balance = view::<f32>(balance, lb)?;
        let mut values = allocate::<f32>(device, m * r)?;
        let mut mask = allocate::<u32>(device, m * words)?;
        let mut counts = device.alloc_zeros::<u32>(r)?;
        launch!(
            device,
            Module::Fly,
            &name,
            config,
            &x,
            &sparse.entries,
            &sparse.starts,
            &balance,
            &mut values,
            &mut mask,
            &mut counts,
            &params
        );
        Ok(Low {
            values: tensor(wrap(values, device), (m, r)),
            mask: tensor(wrap(mask, device), (m, words)),
            counts: tensor(wrap(counts, device), r),
        })
    }
    by_dtype!(x.dtype(), T => run::<T>((x, layout), sparse, how))
}

/// The values of the ranks that the rows of x (m, in) make use of, 0 elsewhere: (m, r), f32, outside of any graph.
pub(crate) fn used(x: &Tensor, sparse: &Sparse, how: &Routed) -> Result<Tensor> {
    let x = aligned(x)?;
    Ok(low(Held::new(&x).parts()?, sparse, how)?.values)
}

/// What FlyLoRA adds for x (..., in), with the layer itself or, without a base, alone; and how many rows make use of each
/// rank: (r), u32. b: (out, r).
pub(crate) fn routed_layer(
    base: Option<&FrozenLinear>,
    x: &Tensor,
    b: &Tensor,
    sparse: Arc<Sparse>,
    how: Routed,
) -> Result<(Tensor, Tensor)> {
    let b = aligned(&b.to_dtype(DType::F32)?)?;
    let state = Arc::new(Mutex::new(None));
    let op = Layer { base: base.cloned(), sparse, how, state: Arc::clone(&state) };
    let y = aligned(x)?.apply_op2(&b, op)?;
    let counts =
        state.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|low: &Low| low.counts.clone());
    match counts {
        Some(counts) => Ok((y, counts)),
        None => not_here("routed-layer-cuda"),
    }
}

struct Layer {
    base: Option<FrozenLinear>,
    sparse: Arc<Sparse>,
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
        let low = low((x, lx), &self.sparse, &self.how)?;
        let factor = Factor { parts: (b, lb), side: Side::Columns };
        let (y, shape) = match &self.base {
            Some(base) => with_change(base, (x, lx), &low.values, factor, self.how.scale)?,
            None => {
                let y = expanded(x, Base::Nothing, &low.values, factor, self.how.scale)?;
                (y, with_last(lx.shape(), lb.shape().dims2()?.0).into())
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
        let (ds, fb, mask, dense) =
            (Held::new(&dy), Held::new(b), Held::new(&low.mask), Held::new(&self.sparse.dense));
        let db = outer(ds.parts()?, &low.values, outputs, Side::Columns, self.how.scale)?;
        if !x.track_op() {
            return Ok((None, Some(db)));
        }
        let factor = Factor { parts: fb.parts()?, side: Side::Columns };
        let back = project(ds.parts()?, m, factor, Some(mask.parts()?), self.how.scale)?; // (m, r)
        let a = Factor { parts: dense.parts()?, side: Side::Ranks };
        let dx = match &self.base {
            Some(base) => through(base, &ds, m, &back, a, 1.0)?,
            None => expanded(ds.storage()?, Base::Nothing, &back, a, 1.0)?,
        };
        Ok((Some(tensor(dx, x.shape())), Some(db)))
    }
}
