//! A linear layer whose backward computes what is needed and no more.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, DType, Layout, MetalStorage, Result, Shape, Storage, Tensor, bail,
};

use super::backward::deliver;
use super::gemm::Precision;
use super::matrix::{Matrix, new};
use super::real::{self, Real};
use super::{Backend, Path, check_dtypes, check_sizes, sizes, width};

/// `y = x W^T`.
///
/// ```text
/// x: (.., in)    w: (out, in)    y: (.., out)
/// dx = dy W      dw = dy^T x
/// ```
///
/// candle's own `x.matmul(&w.t()?)` computes the gradient of `w` even where `w` is frozen, and adds it, transposed, to
/// a zeroed tensor; here a `w` that is not tracked gets no gradient at all, so a frozen layer costs no weight-sized
/// memory. On the CPU bf16 is multiplied in bf16 where the processor does that, and added in f32; on CUDA the product is
/// cuBLAS's, through candle.
///
/// x: f32, f64, bf16 or f16, of any strides; w: the same, or f32 beside bf16 and f16. Saves its inputs (a copy of them
/// where the device's product does not take their strides or dtype) and allocates y, nothing else.
///
/// # Errors
/// Shapes that do not fit, or dtypes that do not go together.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use vesper_model::ops::{Path, linear};
/// let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let w = Var::new(&[[3f32, 4.], [5., 6.], [7., 8.]], &Device::Cpu)?;
/// let y = linear(&x, w.as_tensor(), Path::Fused)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[11., 17., 23.]]);
/// let grads = y.sum_all()?.backward()?;
/// assert_eq!(grads.get(&w).unwrap().to_vec2::<f32>()?, [[1., 2.], [1., 2.], [1., 2.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear(x: &Tensor, w: &Tensor, path: Path) -> Result<Tensor> {
    let [out, input] = sizes("linear", "w", w)?;
    if width("linear", "x", x)? != input {
        bail!("linear: x {:?} does not end in the {input} columns of w {:?}", x.shape(), w.shape());
    }
    check_dtypes("linear", x, &[("weight", w)])?;
    let rows: &[usize] = &x.dims()[..x.rank() - 1];
    check_sizes("linear", &[x.dims(), w.dims(), &[rows, &[out]].concat()])?;
    if path == Path::Reference {
        let (rows, mut dims) = flat(x.shape());
        let y = plain(&x.reshape((rows, input))?)?.matmul(&plain(&w.to_dtype(x.dtype())?)?.t()?)?;
        if let Some(last) = dims.last_mut() {
            *last = out;
        }
        return y.reshape(dims);
    }
    // A matrix may have any strides; the rows of more dimensions must follow each other.
    let matrix = if x.rank() == 2 { x.clone() } else { x.contiguous()? };
    if path.backend(x) != Backend::Cpu {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() && (x.elem_count() == 0 || w.elem_count() == 0) {
            return super::cuda::zeros(x.device(), [rows, &[out]].concat(), x.dtype());
        }
        return plain(&matrix)?.apply_op2(&plain(&w.to_dtype(x.dtype())?)?, Linear);
    }
    if x.dtype() == DType::F16 {
        // f16 is converted as a whole.
        return matrix.contiguous()?.apply_op2(&w.contiguous()?, LinearCpu);
    }
    matrix.apply_op2(w, LinearCpu)
}

/// The same matrix as the devices' products take it: row after row, or column after column.
pub(super) fn plain(x: &Tensor) -> Result<Tensor> {
    if x.is_contiguous() || (x.rank() == 2 && x.t()?.is_contiguous()) {
        Ok(x.clone())
    } else {
        x.contiguous()
    }
}

/// The product of all dimensions but the last, and the dimensions.
fn flat(shape: &Shape) -> (usize, Vec<usize>) {
    let dims = shape.dims();
    (dims[..dims.len().saturating_sub(1)].iter().product(), dims.to_vec())
}

/// By the products of this crate.
struct LinearCpu;

/// Runs `f` on a matrix of any strides; f16 must be contiguous.
fn with_matrix<T: Real, R>(
    storage: &CpuStorage,
    layout: &Layout,
    f: impl FnOnce(Matrix<'_, T>) -> Result<R>,
) -> Result<R> {
    let (rows, cols) = layout.shape().dims2()?;
    match T::values(storage) {
        Some(values) => f(Matrix::of_layout(values, layout)?),
        None => f(Matrix::new(&*T::read(storage, layout)?, rows, cols, cols)?),
    }
}

/// As [`with_matrix`], of a tensor.
fn with_tensor<T: Real, R>(tensor: &Tensor, f: impl FnOnce(Matrix<'_, T>) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => with_matrix(storage, layout, f),
        _ => bail!("a CPU kernel got a tensor on {:?}", tensor.device().location()),
    }
}

/// The layout of a matrix, or of all rows after each other.
fn matrix(layout: &Layout) -> Layout {
    if layout.shape().rank() == 2 {
        return layout.clone();
    }
    let (rows, dims) = flat(layout.shape());
    let width = dims.last().copied().unwrap_or(1);
    Layout::contiguous_with_offset((rows, width), layout.start_offset())
}

impl LinearCpu {
    fn forward<T: Real>(
        (x, lx): (&CpuStorage, &Layout),
        (w, lw): (&CpuStorage, &Layout),
        dtype: DType,
    ) -> Result<CpuStorage> {
        let y = with_matrix::<T, _>(x, &matrix(lx), |x| {
            with_matrix(w, lw, |w| new(x, w.t(), Precision::of(dtype)))
        })?;
        T::store(y, dtype)
    }

    fn backward<T: Real>(x: &Tensor, w: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let precision = Precision::of(x.dtype());
        let (rows, dims) = flat(x.shape());
        let (out, input) = w.dims2()?;
        with_tensor::<T, _>(&dy.reshape((rows, out))?, |dy| {
            let dx = if x.track_op() {
                let dx = with_tensor(w, |w| new(dy, w, precision))?;
                Some(real::tensor(dx, dims, x.dtype())?)
            } else {
                None
            };
            let dw = if w.track_op() {
                let x = x.reshape((rows, input))?;
                let dw = with_tensor(&x, |x| new(dy.t(), x, precision))?;
                Some(real::tensor(dw, (out, input), w.dtype())?)
            } else {
                None
            };
            Ok((dx, deliver(w, dw)?))
        })
    }
}

impl CustomOp2 for LinearCpu {
    fn name(&self) -> &'static str {
        "vesper-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (out, _) = lw.shape().dims2()?;
        let (_, mut dims) = flat(lx.shape());
        if let Some(last) = dims.last_mut() {
            *last = out;
        }
        let y = match x.dtype() {
            DType::F64 => Self::forward::<f64>((x, lx), (w, lw), DType::F64)?,
            dtype => Self::forward::<f32>((x, lx), (w, lw), dtype)?,
        };
        Ok((y, dims.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        match x.dtype() {
            DType::F64 => Self::backward::<f64>(x, w, &dy),
            _ => Self::backward::<f32>(x, w, &dy),
        }
    }
}

/// By the products of the device.
struct Linear;

impl Linear {
    fn run<S: BackendStorage>(x: &S, lx: &Layout, w: &S, lw: &Layout) -> Result<(S, Shape)> {
        let (out, input) = lw.shape().dims2()?;
        let (rows, mut dims) = flat(lx.shape());
        let y = x.matmul(w, (1, rows, out, input), &matrix(lx), &lw.transpose(0, 1)?)?;
        if let Some(last) = dims.last_mut() {
            *last = out;
        }
        Ok((y, dims.into()))
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "vesper-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Self::run(x, lx, w, lw)
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Self::run(x, lx, w, lw)
    }

    fn metal_fwd(
        &self,
        x: &MetalStorage,
        lx: &Layout,
        w: &MetalStorage,
        lw: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        Self::run(x, lx, w, lw)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (out, input) = w.dims2()?;
        let (rows, dims) = flat(x.shape());
        let dy = dy.reshape((rows, out))?;
        let dx = if x.track_op() { Some(dy.matmul(&w.detach())?.reshape(dims)?) } else { None };
        let dw = if w.track_op() { Some(dy.t()?.matmul(&x.detach().reshape((rows, input))?)?) } else { None };
        Ok((dx, deliver(w, dw)?))
    }
}
