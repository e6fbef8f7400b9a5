//! The embedding look-up on CUDA.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr, LaunchConfig};
use candle_core::{CpuStorage, CudaDevice, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

use super::launch::{
    Element, Held, Module, aligned, allocate, blocks, by_dtype, is_empty, is_wide, launch, name, not_here,
    size, tensor, view, wrap, zeros,
};

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

/// Rows of a table, (n, d); table: (vocab, d), ids: (n).
pub(in crate::ops) fn gather(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    if is_empty(&[table, ids]) {
        let (_, d) = table.dims2()?;
        return zeros(table.device(), (ids.elem_count(), d), table.dtype());
    }
    aligned(table)?.apply_op2(&ids.to_dtype(DType::U32)?.contiguous()?, Gather)
}

struct Gather;

impl Gather {
    fn forward<T: Element>(
        (table, lt): (&CudaStorage, &Layout),
        (ids, li): (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let (device, (vocab, d), n) = (table.device(), lt.shape().dims2()?, li.shape().elem_count());
        let mut rows = allocate::<T>(device, n * d)?;
        let params = Params { n: n as u64, vocab: size(vocab)?, d: size(d)? };
        let wide = is_wide::<T>(d, &[lt]);
        let vectors = n * d / if wide { T::WIDE } else { 1 };
        let config = blocks(vectors.div_ceil(256).min(1 << 24), 256)?;
        let name = name::<T>("embedding_forward", wide);
        let (table, ids) = (view::<T>(table, lt)?, view::<u32>(ids, li)?);
        launch!(device, Module::Embedding, &name, config, &table, &ids, &mut rows, &params);
        Ok(wrap(rows, device))
    }

    fn backward<T: Element>(table: &Tensor, ids: &Tensor, drows: &Tensor) -> Result<Tensor> {
        let ((vocab, d), n) = (table.dims2()?, ids.elem_count());
        let (held, drows) = (Held::new(ids), Held::new(drows));
        let device = held.device()?;
        let (places, first) = sort(device, &held, n, vocab, d)?;
        let params = Params { n: n as u64, vocab: size(vocab)?, d: size(d)? };
        let wide = is_wide::<T>(d, &[drows.layout()]);
        let columns = GROUP * 32 * if wide { T::WIDE } else { 1 };
        let config = LaunchConfig {
            grid_dim: (size(vocab.div_ceil(ROWS))?, size(d.div_ceil(columns))?, 1),
            block_dim: (32 * ROWS as u32, 1, 1),
            shared_mem_bytes: 0,
        };
        let name = name::<T>("embedding_backward", wide);
        let mut dtable = allocate::<T>(device, vocab * d)?;
        let drows = drows.view::<T>()?;
        launch!(device, Module::Embedding, &name, config, &drows, &places, &first, &mut dtable, &params);
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
        let rows = by_dtype!(table.dtype(), T => Self::forward::<T>((table, lt), (ids, li))?);
        Ok((rows, (li.shape().elem_count(), d).into()))
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
        let dtable = by_dtype!(table.dtype(), T => Self::backward::<T>(table, ids, &drows)?);
        Ok((Some(dtable), None))
    }
}
