//! A linear layer whose backward computes what is needed and no more.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, D, Layout, MetalStorage, Result, Shape, Tensor};

use super::{Path, check_dtypes, check_sizes};

/// `y = x W^T`.
///
/// ```text
/// x: (.., in)    w: (out, in)    y: (.., out)
/// dx = dy W      dw = dy^T x
/// ```
///
/// candle's own `x.matmul(&w.t()?)` computes the gradient of `w` even where `w` is frozen, and adds it, transposed, to
/// a zeroed tensor; here a `w` that is not tracked gets no gradient at all, so a frozen layer costs no weight-sized
/// memory. Runs on every device by candle's matrix product.
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
    let (out, input) = w.dims2()?;
    let width = x.dim(D::Minus1)?;
    if width != input {
        candle_core::bail!(
            "linear: x {:?} does not end in the {input} columns of w {:?}",
            x.shape(),
            w.shape()
        );
    }
    check_dtypes("linear", x, &[("weight", w)])?;
    let w = &w.to_dtype(x.dtype())?;
    let rows: &[usize] = &x.dims()[..x.rank() - 1];
    check_sizes("linear", &[x.dims(), w.dims(), &[rows, &[out]].concat()])?;
    match path {
        // A matrix may have any strides; the rows of more dimensions must follow each other.
        Path::Fused if x.rank() == 2 => x.apply_op2(w, Linear),
        Path::Fused => x.contiguous()?.apply_op2(w, Linear),
        Path::Reference => {
            let (rows, mut dims) = flat(x.shape());
            let y = x.reshape((rows, input))?.matmul(&w.t()?)?;
            if let Some(last) = dims.last_mut() {
                *last = out;
            }
            y.reshape(dims)
        }
    }
}

/// The product of all dimensions but the last, and the dimensions.
fn flat(shape: &Shape) -> (usize, Vec<usize>) {
    let dims = shape.dims();
    (dims[..dims.len().saturating_sub(1)].iter().product(), dims.to_vec())
}

struct Linear;

impl Linear {
    fn run<S: BackendStorage>(x: &S, lx: &Layout, w: &S, lw: &Layout) -> Result<(S, Shape)> {
        let (out, input) = lw.shape().dims2()?;
        let (rows, mut dims) = flat(lx.shape());
        let matrix = match lx.shape().rank() {
            2 => lx.clone(),
            _ => Layout::contiguous_with_offset((rows, input), lx.start_offset()),
        };
        let y = x.matmul(w, (1, rows, out, input), &matrix, &lw.transpose(0, 1)?)?;
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
        Ok((dx, dw))
    }
}
