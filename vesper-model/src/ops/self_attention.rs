//! Projection, causal attention and output projection in one operation.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

use super::attention::CausalAttention;
use super::backward::deliver;
use super::gemm::Precision;
use super::matrix::{times, times_transposed, transposed_times};
use super::real::{self, Operand, Real};
use super::{Backend, Heads, Path, Rope, causal_attention, check_dtypes, check_sizes, linear, sizes};

/// Causal self-attention with its two projections.
///
/// ```text
/// x: (batch, t, d)    qkv: ((query + 2 kv) dim, d)    out: (d_out, query dim)
/// y = causal_attention(x qkv^T) out^T: (batch, t, d_out)
/// ```
///
/// The same as [`linear`], [`causal_attention`], [`linear`] in one node of the graph: candle zeroes and adds a gradient
/// for every edge between nodes. Saves `x`, the packed projection (on CUDA rotated, with one number a row and head) and
/// the attention's output; the scores are computed again in the backward. Weights that are not tracked get no gradient.
///
/// x: f32, f64, bf16 or f16, of any strides; weights: the same, or f32 beside bf16 and f16. On the CPU what is saved is in
/// f32 for bf16 and f16 too: `4 (query + 2 kv) dim + 4 query dim` bytes a row.
///
/// # Errors
/// Shapes or dtypes that do not fit, or more rows than `positions` has.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use vesper_model::ops::{Heads, Path, self_attention};
/// let heads = Heads { query: 2, kv: 1, dim: 4 };
/// let x = Tensor::ones((1, 5, 6), DType::F32, &Device::Cpu)?;
/// let qkv = Tensor::ones((heads.packed(), 6), DType::F32, &Device::Cpu)?;
/// let out = Tensor::ones((6, 8), DType::F32, &Device::Cpu)?;
/// let y = self_attention(&x, &qkv, &out, heads, None, Path::Fused)?;
/// assert_eq!(y.dims(), [1, 5, 6]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn self_attention(
    x: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    heads: Heads,
    positions: Option<&Rope>,
    path: Path,
) -> Result<Tensor> {
    let [b, t, d] = sizes("self_attention", "x", x)?;
    let [packed, input] = sizes("self_attention", "qkv", qkv)?;
    let [columns, width] = sizes("self_attention", "out", out)?;
    if input != d || packed != heads.packed() || width != heads.query * heads.dim {
        bail!(
            "self_attention: x {:?}, qkv {:?} and out {:?} do not fit {heads:?}",
            x.shape(),
            qkv.shape(),
            out.shape()
        );
    }
    check_dtypes("self_attention", x, &[("packed projection", qkv), ("output projection", out)])?;
    let (inside, after) = ([b, t, packed], [b, t, columns]);
    check_sizes("self_attention", &[x.dims(), qkv.dims(), out.dims(), &inside, &after])?;
    let attention = CausalAttention::new(heads, positions, t)?;
    match path.backend(x) {
        Backend::Cpu => {
            let tracked = x.track_op() || qkv.track_op() || out.track_op();
            let precision = Precision::of(x.dtype());
            let op = SelfAttention::new(attention, precision, tracked);
            return x.contiguous()?.apply_op3(&qkv.contiguous()?, &out.contiguous()?, op);
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda => {
            if super::cuda::attention::supports(heads, x.dtype()) {
                let (qkv, out) = (qkv.to_dtype(x.dtype())?, out.to_dtype(x.dtype())?);
                return super::cuda::self_attention::self_attention(x, &qkv, &out, heads, positions);
            }
        }
        Backend::Reference => {}
    }
    let packed = linear(x, qkv, path)?;
    linear(&causal_attention(&packed, heads, positions, path)?, out, path)
}

/// On the CPU, of contiguous tensors.
pub(super) struct SelfAttention {
    attention: CausalAttention,
    precision: Precision,
    tracked: bool,
    /// Whether results stay in the type of the computation.
    unrounded: bool,
    /// The packed projection and the attention's output, in the dtype of the computation.
    saved: Arc<Mutex<Option<(Tensor, Tensor)>>>,
}

impl SelfAttention {
    /// Saves what the backward needs where it is `tracked`.
    pub(super) fn new(attention: CausalAttention, precision: Precision, tracked: bool) -> Self {
        Self { attention, precision, tracked, unrounded: false, saved: Arc::default() }
    }

    /// Leaves the result and the gradient of x in the type of the computation: what reads them rounds them.
    pub(super) fn unrounded(self) -> Self {
        Self { unrounded: true, ..self }
    }

    /// The dtype of the result and of the gradient of x.
    fn result<T: Real>(&self, dtype: DType) -> DType {
        if self.unrounded { T::DTYPE } else { dtype }
    }

    fn width(&self) -> usize {
        self.attention.heads.query * self.attention.heads.dim
    }

    fn forward<T: Real>(
        &self,
        (x, lx): (&CpuStorage, &Layout),
        (qkv, lq): (&CpuStorage, &Layout),
        (out, lo): (&CpuStorage, &Layout),
        dtype: DType,
    ) -> Result<(CpuStorage, Shape)> {
        let ((b, t, d), (packed, _), (columns, _)) =
            (lx.shape().dims3()?, lq.shape().dims2()?, lo.shape().dims2()?);
        let (rows, width) = (b * t, self.width());
        let (x, qkv, out) = (Operand::new(x, lx)?, Operand::new(qkv, lq)?, Operand::new(out, lo)?);
        let projected = times_transposed(x.values(), qkv.values(), (rows, d, packed), self.precision)?;
        let attended = self.attention.forward(&projected, b, t)?;
        let y = times_transposed(&attended, out.values(), (rows, width, columns), self.precision)?;
        if self.tracked {
            let projected = real::tensor(projected, (b, t, packed), T::DTYPE)?;
            let attended = real::tensor(attended, (b, t, width), T::DTYPE)?;
            *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some((projected, attended));
        }
        Ok((T::store(y, self.result::<T>(dtype))?, (b, t, columns).into()))
    }

    /// The gradients of x and of the weights, as far as they are wanted.
    pub(super) fn gradients(
        &self,
        inputs: [&Tensor; 3],
        dy: &Tensor,
        wanted: [bool; 3],
    ) -> Result<[Option<Tensor>; 3]> {
        match dy.dtype() {
            DType::F64 => self.backward::<f64>(inputs, dy, wanted),
            _ => self.backward::<f32>(inputs, dy, wanted),
        }
    }

    fn backward<T: Real>(
        &self,
        [x, qkv, out]: [&Tensor; 3],
        dy: &Tensor,
        [of_x, of_qkv, of_out]: [bool; 3],
    ) -> Result<[Option<Tensor>; 3]> {
        let ((b, t, d), (packed, _), (columns, width)) = (x.dims3()?, qkv.dims2()?, out.dims2()?);
        let rows = b * t;
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some((projected, attended)) = saved else { return Ok([None, None, None]) };
        let precision = self.precision;
        let (dattended, dout) = real::with_operand::<T, _>(dy, |dy| {
            let dattended = real::with_operand(out, |out| times(dy, out, (rows, columns, width), precision))?;
            let dout = if of_out {
                let dout = real::with_operand(&attended, |attended| {
                    transposed_times(dy, attended, (columns, rows, width), precision)
                })?;
                Some(real::tensor(dout, (columns, width), out.dtype())?)
            } else {
                None
            };
            Ok((dattended, dout))
        })?;
        let dprojected =
            real::with_values::<T, _>(&projected, |p| self.attention.backward(p, &dattended, b, t))?;
        let dx = if of_x {
            let dx = real::with_operand(qkv, |qkv| times(&dprojected, qkv, (rows, packed, d), precision))?;
            Some(real::tensor(dx, x.shape(), self.result::<T>(x.dtype()))?)
        } else {
            None
        };
        let dqkv = if of_qkv {
            let dqkv =
                real::with_operand(x, |x| transposed_times(&dprojected, x, (packed, rows, d), precision))?;
            Some(real::tensor(dqkv, (packed, d), qkv.dtype())?)
        } else {
            None
        };
        Ok([dx, dqkv, dout])
    }
}

impl CustomOp3 for SelfAttention {
    fn name(&self) -> &'static str {
        "vesper-self-attention"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        qkv: &CpuStorage,
        lq: &Layout,
        out: &CpuStorage,
        lo: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        match x.dtype() {
            DType::F64 => self.forward::<f64>((x, lx), (qkv, lq), (out, lo), DType::F64),
            dtype => self.forward::<f32>((x, lx), (qkv, lq), (out, lo), dtype),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        qkv: &Tensor,
        out: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let inputs = [x, qkv, out];
        let [dx, dqkv, dout] = self.gradients(inputs, &dy, inputs.map(Tensor::track_op))?;
        Ok((dx, deliver(qkv, dqkv)?, deliver(out, dout)?))
    }
}
