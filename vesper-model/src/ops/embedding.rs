//! The embedding look-up, with a backward that adds in f32 and in a fixed order.

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor, bail};

use super::backward::deliver_onto;
use super::filled::filled;
use super::real::{self, Real};
use super::{Backend, Path, as_ids, check_float, check_sizes, sizes};

/// Rows of a gradient that one task fills.
const ROWS: usize = 64;

/// Rows of a table.
///
/// ```text
/// table: (vocab, d)    ids: any shape, u32, u8 or i64    result: (ids.., d)
/// result[i] = table[ids[i]]        dtable[v] = sum of dresult[i] over ids[i] = v
/// ```
///
/// The table: f32, f64, bf16 or f16. An id in i64 that is negative or over `u32::MAX` counts as `u32::MAX`.
///
/// The backward adds in f32 (f64 for f64) whatever the dtype, and in the order of the ids, so that it gives the same
/// bits at any number of threads. Saves the ids.
///
/// # Errors
/// An id outside the table, ids that are not u32, u8 or i64, or a table that is no matrix of those dtypes. On CUDA
/// an id outside the table gives a row of NaN instead, because the host would have to wait for the answer.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use vesper_model::ops::{Path, embedding};
/// let table = Var::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let ids = Tensor::new(&[1u32, 1, 0], &Device::Cpu)?;
/// let rows = embedding(table.as_tensor(), &ids, Path::Fused)?;
/// assert_eq!(rows.to_vec2::<f32>()?, [[3., 4.], [3., 4.], [1., 2.]]);
/// let grads = rows.sum_all()?.backward()?;
/// assert_eq!(grads.get(&table).unwrap().to_vec2::<f32>()?, [[1., 1.], [2., 2.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn embedding(table: &Tensor, ids: &Tensor, path: Path) -> Result<Tensor> {
    embedding_in(table, ids, table.dtype(), path)
}

/// As [`embedding`], with the rows in another dtype: the activations' beside a table in f32 (mixed precision).
///
/// ```text
/// result[i] = table[ids[i]] in `dtype`        dtable[v] = sum of dresult[i] over ids[i] = v, in the table's dtype
/// ```
///
/// From an f32 table on CUDA and on the CPU it is one operation, and the sum is not rounded on the way; elsewhere it is the
/// look-up and a conversion.
///
/// # Errors
/// As [`embedding`]; a `dtype` that is none of f32, f64, bf16 and f16.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use vesper_model::ops::{Path, embedding_in};
/// let table = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let ids = Tensor::new(&[1u32, 0], &Device::Cpu)?;
/// let rows = embedding_in(&table, &ids, DType::BF16, Path::Fused)?;
/// assert_eq!((rows.dtype(), rows.dims()), (DType::BF16, &[2, 2][..]));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn embedding_in(table: &Tensor, ids: &Tensor, dtype: DType, path: Path) -> Result<Tensor> {
    let [_, d] = sizes("embedding", "the table", table)?;
    check_float("embedding", "the table", table.dtype())?;
    check_float("embedding", "rows", dtype)?;
    let shape = rows_of(ids.dims(), d);
    check_sizes("embedding", &[table.dims(), ids.dims(), shape.dims()])?;
    let (table, ids) = (table.contiguous()?, as_ids("embedding", ids)?);
    // As where the table is empty, see `Path`.
    let path = if ids.elem_count() == 0 { Path::Fused } else { path };
    let rows = match path.backend(&table) {
        Backend::Cpu => table.apply_op2(&ids.contiguous()?, Gather { dtype })?,
        #[cfg(feature = "cuda")]
        Backend::Cuda if table.dtype() == DType::F32 && super::cuda::has_kernels(dtype) => {
            super::cuda::embedding::gather(&table, &ids, dtype)?
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda => super::cuda::embedding::gather(&table, &ids, table.dtype())?,
        Backend::Reference => {
            if ids.device().is_cpu() {
                // candle's look-up takes the largest u32 for a padding.
                check_ids(&real::ids_of(&ids)?, table.dim(0)?)?;
            }
            table.index_select(&ids.flatten_all()?, 0)?.reshape(shape)?
        }
    };
    super::cast(&rows, dtype)
}

fn check_ids(ids: &[usize], vocab: usize) -> Result<()> {
    match ids.iter().find(|&&id| id >= vocab) {
        Some(id) => bail!("token id {id} is outside an embedding of {vocab} rows"),
        None => Ok(()),
    }
}

/// The shape of the rows of ids.
pub(super) fn rows_of(ids: &[usize], d: usize) -> Shape {
    [ids, &[d]].concat().into()
}

/// The look-up on the CPU. Rows of an f32 table in `dtype`, if that is bf16 or f16.
struct Gather {
    dtype: DType,
}

impl CustomOp2 for Gather {
    fn name(&self) -> &'static str {
        "vesper-embedding"
    }

    fn cpu_fwd(
        &self,
        table: &CpuStorage,
        lt: &Layout,
        ids: &CpuStorage,
        li: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (vocab, d) = lt.shape().dims2()?;
        let ids = real::ids(ids, li)?;
        check_ids(&ids, vocab)?;
        let rows = match table {
            CpuStorage::F32(data) => {
                let dtype =
                    if matches!(self.dtype, DType::BF16 | DType::F16) { self.dtype } else { DType::F32 };
                f32::store(gather(real::range(data, lt)?, d, &ids), dtype)?
            }
            CpuStorage::F64(data) => CpuStorage::F64(gather(real::range(data, lt)?, d, &ids)),
            CpuStorage::BF16(data) => CpuStorage::BF16(gather(real::range(data, lt)?, d, &ids)),
            CpuStorage::F16(data) => CpuStorage::F16(gather(real::range(data, lt)?, d, &ids)),
            _ => bail!("an embedding table must be floating point"),
        };
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
        let drows = drows.contiguous()?;
        let dtable = deliver_onto(table, |before| match table.dtype() {
            DType::F64 => scatter::<f64>(table, ids, &drows, before),
            _ => scatter::<f32>(table, ids, &drows, before),
        })?;
        Ok((dtable, None))
    }
}

/// Rows `ids`, each below the number of rows, of a matrix.
fn gather<T: Copy>(data: &[T], d: usize, ids: &[usize]) -> Vec<T> {
    let mut rows = Vec::with_capacity(ids.len() * d);
    for id in ids {
        rows.extend_from_slice(&data[id * d..(id + 1) * d]);
    }
    rows
}

/// The gradient of the table, added to one from `before`, of a head that is the same table.
fn scatter<T: Real>(table: &Tensor, ids: &Tensor, drows: &Tensor, before: Option<&Tensor>) -> Result<Tensor> {
    let (vocab, d) = table.dims2()?;
    let ids = real::ids_of(ids)?;
    // The positions of each id, in order (a counting sort): every row of the result has one writer.
    let mut first = vec![0usize; vocab + 1];
    for &id in &ids {
        first[id + 1] += 1;
    }
    for v in 0..vocab {
        first[v + 1] += first[v];
    }
    let mut next = first.clone();
    let mut order = vec![0usize; ids.len()];
    for (position, &id) in ids.iter().enumerate() {
        order[next[id]] = position;
        next[id] += 1;
    }
    let sum = |before: Option<&[T]>| {
        real::with_values::<T, _>(drows, |drows| {
            let ([dtable], _) = filled(vocab * d, ROWS * d, |range, [rows]| {
                for (v, row) in (range.start / d..).zip(rows.chunks_exact_mut(d)) {
                    for &position in &order[first[v]..first[v + 1]] {
                        add(row, &drows[position * d..(position + 1) * d]);
                    }
                    if let Some(before) = before {
                        add(row, &before[v * d..(v + 1) * d]);
                    }
                }
            });
            Ok(dtable)
        })
    };
    debug_assert_eq!(drows.dim(D::Minus1)?, d);
    match before {
        Some(before) if before.dtype() == T::DTYPE => {
            let dtable = real::with_values::<T, _>(&before.contiguous()?, |before| sum(Some(before)))?;
            real::tensor(dtable, (vocab, d), T::DTYPE)
        }
        // In a dtype that is added in f32 both are rounded before they are added, as candle has them.
        Some(before) => before + real::tensor(sum(None)?, (vocab, d), table.dtype())?,
        None => real::tensor(sum(None)?, (vocab, d), table.dtype()),
    }
}

fn add<T: Real>(sums: &mut [T], values: &[T]) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum += value;
    }
}
