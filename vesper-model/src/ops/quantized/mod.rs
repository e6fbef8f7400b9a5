//! A linear layer whose weight is in GGUF blocks, on the CPU.

mod blocks;
#[cfg(all(test, target_arch = "x86_64"))]
mod check;
#[cfg(target_arch = "x86_64")]
mod q4_k_q5_k;
#[cfg(target_arch = "x86_64")]
mod q4_q5;
#[cfg(target_arch = "x86_64")]
mod q6_k;
#[cfg(target_arch = "x86_64")]
mod q8_0;
#[cfg(target_arch = "x86_64")]
mod vectors;

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{CpuStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Tensor, bail};
use flylora::FrozenLinear;

use super::gemm::Precision;
use super::matrix::{Matrix, Target, Threads, product};
use super::{as_ids, check_float, check_sizes, real};

/// Up to this many rows of x, the weight is multiplied as it is, and x is rounded to blocks of 8 bits; more rows are
/// multiplied in f32 with a weight that is converted a few rows at a time.
pub const QUANTIZED_ROWS: usize = 8;

/// Elements of the weight that are converted at a time: 1 MiB in f32, which a core's cache holds.
const TILE: usize = 1 << 18;

/// `y = x W^T` for a weight in GGUF blocks, which is not trained.
///
/// ```text
/// x: (.., in), f32, f64, bf16 or f16    W: (out, in), in blocks    y: (.., out), in the dtype of x
/// dx = dy W, computed in f32
/// ```
///
/// Up to [`QUANTIZED_ROWS`] rows, as in decoding, read the blocks as they are, which is quick because they are small: x is
/// rounded to 8 bits a value for it (not where the weight is in f16, bf16 or f32). More rows (a prompt, a training batch) are
/// exact in f32: rows of the weight are converted a megabyte at a time, forward and backward, so that there is never a whole
/// weight in f32.
///
/// On other devices than the CPU it is candle's product, which rounds x to 8 bits for any number of rows.
///
/// # Errors
/// Shapes that do not fit, another dtype, devices that are not the same.
///
/// # Examples
/// ```
/// use std::sync::Arc;
/// use candle_core::quantized::{GgmlDType, QTensor};
/// use candle_core::{Device, Tensor};
/// use vesper_model::ops::quantized_linear;
/// let weight = Tensor::ones((3, 32), candle_core::DType::F32, &Device::Cpu)?;
/// let weight = Arc::new(QTensor::quantize(&weight, GgmlDType::Q8_0)?);
/// let x = Tensor::ones((2, 32), candle_core::DType::F32, &Device::Cpu)?;
/// let y = quantized_linear(&x, &weight)?;
/// assert_eq!(y.dims(), [2, 3]);
/// assert!((y.sum_all()?.to_scalar::<f32>()? - 6. * 32.).abs() < 0.1);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn quantized_linear(x: &Tensor, weight: &Arc<QTensor>) -> Result<Tensor> {
    let (out, input) = weight.shape().dims2()?;
    if x.rank() == 0 || x.dim(D::Minus1)? != input {
        bail!("quantized_linear: x {:?} does not end in the {input} columns of the weight", x.shape());
    }
    check_float("quantized_linear", "x", x.dtype())?;
    let rows: &[usize] = &x.dims()[..x.rank() - 1];
    check_sizes("quantized_linear", &[x.dims(), weight.shape().dims(), &[rows, &[out]].concat()])?;
    if !(x.device().is_cpu() && weight.device().is_cpu()) {
        return elsewhere(x, weight);
    }
    let wide = x.to_dtype(DType::F32)?.contiguous()?;
    wide.apply_op1(QuantizedLinear(Arc::clone(weight)))?.to_dtype(x.dtype())
}

/// The product on another device than the CPU. candle has none for weights that are plain numbers there: they become
/// f32 for the product, and for as long as a graph holds it.
fn elsewhere(x: &Tensor, weight: &Arc<QTensor>) -> Result<Tensor> {
    if !matches!(weight.dtype(), GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16) {
        return FrozenLinear::quantized(QMatMul::QTensor(Arc::clone(weight)), None)?.forward(x);
    }
    let (out, _) = weight.shape().dims2()?;
    let numbers = weight.embedding(&Tensor::arange(0, out as u32, &weight.device())?)?;
    FrozenLinear::new(numbers, None)?.forward(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype())
}

/// Rows of a table in GGUF blocks, in f32; without a gradient.
///
/// ```text
/// table: (vocab, d), in blocks    ids: any shape, u32, u8 or i64    result: (ids.., d), f32
/// ```
///
/// An id in i64 that is negative or over `u32::MAX` counts as `u32::MAX`.
///
/// # Errors
/// An id outside the table, ids that are not u32, u8 or i64.
pub fn quantized_embedding(table: &QTensor, ids: &Tensor) -> Result<Tensor> {
    let (vocab, d) = table.shape().dims2()?;
    let mut shape = ids.dims().to_vec();
    shape.push(d);
    check_sizes("quantized_embedding", &[ids.dims(), &shape])?;
    let ids = as_ids("quantized_embedding", ids)?;
    if !(ids.device().is_cpu() && table.device().is_cpu()) {
        return table.embedding(&ids);
    }
    let ids = real::ids_of(&ids)?;
    if let Some(id) = ids.iter().find(|&&id| id >= vocab) {
        bail!("token id {id} is outside an embedding of {vocab} rows");
    }
    let mut rows = vec![0.0; ids.len() * d];
    blocks::gather(table, &ids, &mut rows)?;
    Tensor::from_vec(rows, shape, &Device::Cpu)
}

/// As [`quantized_linear`] for few rows, on the CPU: x (m, in), result (m, out).
pub(crate) fn quantized_product(x: &[f32], weight: &QTensor, m: usize) -> Result<Vec<f32>> {
    let (out, _) = weight.shape().dims2()?;
    let mut y = vec![0.0; m * out];
    blocks::multiply(weight, x, m, &mut y)?;
    Ok(y)
}

/// The product with x (.., in) in f32, contiguous, on the CPU.
struct QuantizedLinear(Arc<QTensor>);

/// The product of all dimensions but the last.
fn rows_of(shape: &Shape) -> usize {
    let dims = shape.dims();
    dims[..dims.len().saturating_sub(1)].iter().product()
}

/// The dimensions with another last one.
fn with_last(shape: &Shape, last: usize) -> Vec<usize> {
    let mut dims = shape.dims().to_vec();
    if let Some(d) = dims.last_mut() {
        *d = last;
    }
    dims
}

impl QuantizedLinear {
    /// Runs `f` on the weight in f32, some rows at a time: (first row, number of rows, values).
    fn tiles(&self, mut f: impl FnMut(usize, usize, &[f32]) -> Result<()>) -> Result<()> {
        let (out, input) = self.0.shape().dims2()?;
        let step = (TILE / input.max(1)).clamp(1, out.max(1));
        let mut tile = vec![0.0; step * input];
        for start in (0..out).step_by(step) {
            let rows = step.min(out - start);
            let values = &mut tile[..rows * input];
            blocks::widen(&self.0, start, values)?;
            f(start, rows, values)?;
        }
        Ok(())
    }
}

impl CustomOp1 for QuantizedLinear {
    fn name(&self) -> &'static str {
        "vesper-quantized-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (out, input) = self.0.shape().dims2()?;
        let m = rows_of(layout.shape());
        let CpuStorage::F32(values) = x else { bail!("quantized_linear: x is not f32") };
        let x = real::range(values, layout)?;
        let mut y = vec![0.0; m * out];
        if m <= QUANTIZED_ROWS {
            blocks::multiply(&self.0, x, m, &mut y)?;
        } else {
            let x = Matrix::new(x, m, input, input)?;
            self.tiles(|first, rows, w| {
                let w = Matrix::new(w, rows, input, input)?.t();
                product(Target::overwrite(&mut y[first..], out), x, w, Precision::Full, Threads::All)
            })?;
        }
        Ok((CpuStorage::F32(y), with_last(layout.shape(), out).into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (out, input) = self.0.shape().dims2()?;
        let m = rows_of(x.shape());
        // Detached: the gradient of a gradient is not wanted, and a graph would keep every activation.
        let dy = dy.detach().contiguous()?;
        let dx = real::with_values::<f32, _>(&dy, |dy| {
            let mut dx = vec![0.0; m * input];
            let mut first = true;
            self.tiles(|start, rows, w| {
                let dy = Matrix::new(&dy[start.min(dy.len())..], m, rows, out)?;
                let w = Matrix::new(w, rows, input, input)?;
                let dst = if std::mem::take(&mut first) {
                    Target::overwrite(&mut dx, input)
                } else {
                    Target::add(&mut dx, input)
                };
                product(dst, dy, w, Precision::Full, Threads::All)
            })?;
            Ok(dx)
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
