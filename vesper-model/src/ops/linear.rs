//! A linear layer whose backward computes what is needed and no more.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, D, Layout, MetalStorage, Result, Shape, Tensor};

use super::Path;

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
/// Shapes that do not fit, or two different dtypes.
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
        candle_core::bail!("linear: x {:?} does not end in the {input} columns of w {:?}", x.shape(), w.shape());
    }
    let mut dims = x.dims().to_vec();
    let rows: usize = dims[..dims.len() - 1].iter().product();
    let x = x.reshape((rows, input))?;
    if let Some(last) = dims.last_mut() {
        *last = out;
    }
    let y = match path {
        Path::Fused => x.apply_op2(w, Linear)?,
        Path::Reference => x.matmul(&w.t()?)?,
    };
    y.reshape(dims)
}

struct Linear;

impl Linear {
    fn run<S: BackendStorage>(x: &S, lx: &Layout, w: &S, lw: &Layout) -> Result<(S, Shape)> {
        let (rows, input) = lx.shape().dims2()?;
        let (out, _) = lw.shape().dims2()?;
        let y = x.matmul(w, (1, rows, out, input), lx, &lw.transpose(0, 1)?)?;
        Ok((y, (rows, out).into()))
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
        let dx = x.track_op().then(|| dy.matmul(&w.detach())).transpose()?;
        let dw = w.track_op().then(|| dy.t()?.matmul(&x.detach())).transpose()?;
        Ok((dx, dw))
    }
}
