//! The embedding look-up on CUDA.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, LaunchConfig};
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail,
};

use super::launch::{
    Element, Held, Module, aligned, allocate, blocks, by_dtype, is_empty, launch, name, not_here, size,
    tensor, view, wrap, zeros,
};
use crate::ops::backward::deliver_onto;
use crate::ops::embedding::rows_of;

/// Ids that one block sorts.
const CHUNK: usize = 1024;
/// Values of a digit.
const DIGITS: usize = 256;
/// Rows of the table that one block of the backward owns.
const ROWS: usize = 8;
/// Vectors of a row that one lane of the backward owns.
const GROUP: usize = 3;

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    n: u64,
    vocab: u32,
    d: u32,
}

const _: () = assert!(size_of::<Params>() == 16);
// SAFETY: plain numbers in the layout of `EmbeddingParams`.
unsafe impl DeviceRepr for Params {}

/// Rows of a table in `dtype`, (.., d); table: (vocab, d), ids: (..). The dtype is the table's, or the table is in f32.
pub(in crate::ops) fn gather(table: &Tensor, ids: &Tensor, dtype: DType) -> Result<Tensor> {
    if is_empty(&[table, ids]) {
        let (_, d) = table.dims2()?;
        return zeros(table.device(), rows_of(ids.dims(), d), dtype);
    }
    aligned(table)?.apply_op2(&ids.to_dtype(DType::U32)?.contiguous()?, Gather { dtype })
}

struct Gather {
    /// Of the rows.
    dtype: DType,
}

/// Elements of a vector that is read from or written to the table and the rows: none of them over 16 bytes.
fn vector<S: Element, T: Element>(wide: bool) -> usize {
    if wide { S::WIDE.min(T::WIDE) } else { 1 }
}

/// The name of a kernel from a table of `S` to rows of `T`, or back.
fn kernel<S: Element, T: Element>(pass: &str, wide: bool) -> String {
    format!("embedding_{pass}_{}", name::<T>(S::NAME, wide))
}

/// Runs generic code for the dtypes of a table and of its rows.
macro_rules! by_dtypes {
    ($table:expr, $rows:expr, $S:ident, $T:ident => $body:expr) => {
        if $table == $rows {
            by_dtype!($table, $T => {
                type $S = $T;
                $body
            })
        } else if $table == DType::F32 {
            type $S = f32;
            by_dtype!($rows, $T => $body)
        } else {
            bail!("no CUDA kernel for an embedding from {:?} to {:?}", $table, $rows)
        }
    };
}

impl Gather {
    fn forward<S: Element, T: Element>(
        (table, lt): (&CudaStorage, &Layout),
        (ids, li): (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let (device, (vocab, d), n) = (table.device(), lt.shape().dims2()?, li.shape().elem_count());
        let mut rows = allocate::<T>(device, n * d)?;
        let params = Params { n: n as u64, vocab: size(vocab)?, d: size(d)? };
        let wide = d.is_multiple_of(vector::<S, T>(true)); // the table starts at a multiple of 16 bytes
        let vectors = n * d / vector::<S, T>(wide);
        let config = blocks(vectors.div_ceil(256).min(1 << 24), 256)?;
        let name = kernel::<S, T>("forward", wide);
        let (table, ids) = (view::<S>(table, lt)?, view::<u32>(ids, li)?);
        launch!(device, Module::Embedding, &name, config, &table, &ids, &mut rows, &params);
        Ok(wrap(rows, device))
    }

    /// The gradient of the table, added to one from `before`, of a head that is the same table.
    fn backward<S: Element, T: Element>(
        table: &Tensor,
        ids: &Tensor,
        drows: &Tensor,
        before: Option<&Tensor>,
    ) -> Result<Tensor> {
        let ((vocab, d), n) = (table.dims2()?, ids.elem_count());
        let (ids, drows) = (Held::new(ids), Held::new(drows));
        let device = ids.device()?;
        let (places, first) = sort(device, &ids, n, vocab, d)?;
        let params = Params { n: n as u64, vocab: size(vocab)?, d: size(d)? };
        let wide = d.is_multiple_of(vector::<S, T>(true)); // drows starts at a multiple of 16 bytes
        let columns = GROUP * 32 * vector::<S, T>(wide);
        let config = LaunchConfig {
            grid_dim: (size(vocab.div_ceil(ROWS))?, size(d.div_ceil(columns))?, 1),
            block_dim: (32 * ROWS as u32, 1, 1),
            shared_mem_bytes: 0,
        };
        let name = kernel::<S, T>("backward", wide);
        let mut dtable = allocate::<S>(device, vocab * d)?;
        let drows = drows.view::<T>()?;
        let held = before.map(Held::new);
        let before = held.as_ref().map(Held::view::<S>).transpose()?;
        let stream = device.cuda_stream();
        let guarded = before.as_ref().map(|before| before.device_ptr(&stream));
        let at_before = guarded.as_ref().map_or(0, |guarded| guarded.0);
        launch!(
            device,
            Module::Embedding,
            &name,
            config,
            &drows,
            &places,
            &first,
            &at_before,
            &mut dtable,
            &params
        );
        drop(guarded);
        Ok(tensor(dtable, device, (vocab, d)))
    }
}

/// The places 0 .. n by their id, equal ids in order, and for each id from 0 to `vocab` how many are below it.
fn sort(
    device: &CudaDevice,
    ids: &Held<'_>,
    n: usize,
    vocab: usize,
    d: usize,
) -> Result<(CudaSlice<u32>, CudaSlice<u32>)> {
    let chunks = n.div_ceil(CHUNK);
    let config = blocks(chunks, CHUNK as u32)?;
    let entries = size(DIGITS * chunks)?;
    let (count, ids) = (size(n)?, ids.view::<u32>()?);
    let mut starts = allocate::<u32>(device, DIGITS * chunks)?;
    let mut sorted: Option<(CudaSlice<u32>, CudaSlice<u32>)> = None;
    // Ids past the vocabulary are sorted as `limit`, so its digits are all there are.
    let limit = size(vocab)?;
    let mut shift = 0u32;
    while shift < u32::BITS {
        let mut keys = allocate::<u32>(device, n)?;
        let mut places = allocate::<u32>(device, n)?;
        let none = 0u64;
        match &sorted {
            None => {
                launch!(
                    device,
                    Module::Embedding,
                    "embedding_count",
                    config,
                    &ids,
                    &mut starts,
                    &count,
                    &limit,
                    &shift
                );
            }
            Some((from, _)) => {
                launch!(
                    device,
                    Module::Embedding,
                    "embedding_count",
                    config,
                    from,
                    &mut starts,
                    &count,
                    &limit,
                    &shift
                );
            }
        }
        launch!(device, Module::Embedding, "embedding_scan", blocks(1, CHUNK as u32)?, &mut starts, &entries);
        match &sorted {
            None => launch!(
                device,
                Module::Embedding,
                "embedding_scatter",
                config,
                &ids,
                &none,
                &starts,
                &mut keys,
                &mut places,
                &count,
                &limit,
                &shift,
            ),
            Some((from, order)) => launch!(
                device,
                Module::Embedding,
                "embedding_scatter",
                config,
                from,
                order,
                &starts,
                &mut keys,
                &mut places,
                &count,
                &limit,
                &shift,
            ),
        }
        sorted = Some((keys, places));
        shift += 8;
        if shift < u32::BITS && vocab >> shift == 0 {
            break;
        }
    }
    let Some((keys, places)) = sorted else { candle_core::bail!("nothing to sort") };
    let mut first = allocate::<u32>(device, vocab + 1)?;
    let params = Params { n: n as u64, vocab: limit, d: size(d)? };
    launch!(
        device,
        Module::Embedding,
        "embedding_bounds",
        blocks((vocab + 1).div_ceil(256), 256)?,
        &keys,
        &mut first,
        &params
    );
    Ok((places, first))
}

impl CustomOp2 for Gather {
    fn name(&self) -> &'static str {
        "vesper-embedding-cuda"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        not_here(self.name())
    }

    fn cuda_fwd(
        &self,
        table: &CudaStorage,
        lt: &Layout,
        ids: &CudaStorage,
        li: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (_, d) = lt.shape().dims2()?;
        let rows =
            by_dtypes!(table.dtype(), self.dtype, S, T => Self::forward::<S, T>((table, lt), (ids, li))?);
        Ok((rows, rows_of(li.dims(), d)))
    }

    fn bwd(
        &self,
        table: &Tensor,
        ids: &Tensor,
        _rows: &Tensor,
        drows: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        if !table.track_op() {
            return Ok((None, None));
        }
        let drows = aligned(drows)?;
        let dtable = deliver_onto(table, |before| {
            let before = before.map(aligned).transpose()?;
            by_dtypes!(table.dtype(), self.dtype, S, T => {
                Self::backward::<S, T>(table, ids, &drows, before.as_ref())
            })
        })?;
        Ok((dtable, None))
    }
}
