//! The gated feed-forward of a transformer block in one operation.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use era_act::Activation;

use super::backward::deliver;
use super::gemm::Precision;
use super::matrix::{Values, times, times_transposed, transposed_times};
use super::real::{self, Operand, Real};
use super::{Backend, Path, check_dtypes, check_sizes, linear, sizes, width};

/// Gated feed-forward.
///
/// ```text
/// x: (.., d)    gate_up: (2 ffn, d), rows [gate | up]    down: (d, ffn)
/// y = (act(x gate^T) * (x up^T)) down^T
/// ```
///
/// One node of the graph instead of seven: candle zeroes and adds a gradient for every edge between nodes. Saves `x` and
/// the packed product `(.., 2 ffn)`; the activation is computed again in the backward. Weights that are not tracked
/// get no gradient. Computed in f32 for f32, bf16 and f16, in f64 for f64; the products of bf16 multiply in bf16 where
/// the processor does, and add in f32.
///
/// # Errors
/// Shapes or dtypes that do not fit.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use era_act::Activation;
/// use vesper_model::ops::{Path, gated_feed_forward};
/// let x = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
/// let gate_up = Tensor::ones((2 * 5, 3), DType::F32, &Device::Cpu)?;
/// let down = Tensor::ones((3, 5), DType::F32, &Device::Cpu)?;
/// let y = gated_feed_forward(&x, &gate_up, &down, Activation::Relu, Path::Fused)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[45.0; 3]; 2]); // 5 * relu(3) * 3
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
/// Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
pub fn gated_feed_forward(
    x: &Tensor,
    gate_up: &Tensor,
    down: &Tensor,
    activation: Activation,
    path: Path,
) -> Result<Tensor> {
    let [packed, d] = sizes("gated_feed_forward", "gate_up", gate_up)?;
    let [out, ffn] = sizes("gated_feed_forward", "down", down)?;
    if packed != 2 * ffn || width("gated_feed_forward", "x", x)? != d {
        bail!(
            "gated_feed_forward: x {:?}, gate_up {:?} and down {:?} do not fit together",
            x.shape(),
            gate_up.shape(),
            down.shape()
        );
    }
    check_dtypes("gated_feed_forward", x, &[("gate and up projection", gate_up), ("down projection", down)])?;
    let rows: &[usize] = &x.dims()[..x.rank() - 1];
    check_sizes("gated_feed_forward", &[x.dims(), gate_up.dims(), down.dims()])?;
    check_sizes("gated_feed_forward", &[&[rows, &[packed]].concat(), &[rows, &[out]].concat()])?;
    match path.backend(x) {
        Backend::Cpu => {
            let tracked = x.track_op() || gate_up.track_op() || down.track_op();
            let precision = Precision::of(x.dtype());
            let op = GatedFeedForward::new(activation, (d, ffn, out), precision, tracked);
            return x.contiguous()?.apply_op3(&gate_up.contiguous()?, &down.contiguous()?, op);
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda => {
            let (gate_up, down) = (gate_up.to_dtype(x.dtype())?, down.to_dtype(x.dtype())?);
            return super::cuda::feed_forward::gated_feed_forward(x, &gate_up, &down, activation);
        }
        Backend::Reference => {}
    }
    let packed = linear(x, gate_up, path)?;
    let inner = match path {
        Path::Fused => activation.gated(&packed)?,
        Path::Reference => era_act::reference::gated(&activation, &packed)?,
    };
    linear(&inner, down, path)
}

/// On the CPU, of contiguous tensors.
pub(super) struct GatedFeedForward {
    activation: Activation,
    d: usize,
    ffn: usize,
    out: usize,
    precision: Precision,
    tracked: bool,
    /// Whether results stay in the type of the computation.
    unrounded: bool,
    /// The packed product, (rows, 2 ffn), in the dtype of the computation.
    saved: Arc<Mutex<Option<Tensor>>>,
}

impl GatedFeedForward {
    /// Saves what the backward needs where it is `tracked`.
    pub(super) fn new(
        activation: Activation,
        (d, ffn, out): (usize, usize, usize),
        precision: Precision,
        tracked: bool,
    ) -> Self {
        Self { activation, d, ffn, out, precision, tracked, unrounded: false, saved: Arc::default() }
    }

    /// Leaves the result and the gradient of x in the type of the computation: what reads them rounds them.
    pub(super) fn unrounded(self) -> Self {
        Self { unrounded: true, ..self }
    }

    /// The dtype of the result and of the gradient of x.
    fn result<T: Real>(&self, dtype: DType) -> DType {
        if self.unrounded { T::DTYPE } else { dtype }
    }

    /// (rows, d) to (rows, 2 ffn)
    fn packed<T: Real>(&self, x: Values<'_, T>, gate_up: Values<'_, T>, rows: usize) -> Result<Tensor> {
        let width = 2 * self.ffn;
        let packed = times_transposed(x, gate_up, (rows, self.d, width), self.precision)?;
        real::tensor(packed, (rows, width), T::DTYPE)
    }

    fn forward<T: Real>(
        &self,
        (x, lx): (&CpuStorage, &Layout),
        (gate_up, lg): (&CpuStorage, &Layout),
        (down, ld): (&CpuStorage, &Layout),
        dtype: DType,
    ) -> Result<(CpuStorage, Shape)> {
        let mut dims = lx.shape().dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.out;
        }
        let rows: usize = dims[..dims.len() - 1].iter().product();
        let (x, gate_up, down) = (Operand::new(x, lx)?, Operand::new(gate_up, lg)?, Operand::new(down, ld)?);
        let packed = self.packed::<T>(x.values(), gate_up.values(), rows)?;
        let y = real::with_operand::<T, _>(&self.activation.gated(&packed)?, |inner| {
            times_transposed(inner, down.values(), (rows, self.ffn, self.out), self.precision)
        })?;
        if self.tracked {
            *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(packed);
        }
        Ok((T::store(y, self.result::<T>(dtype))?, dims.into()))
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
        [x, gate_up, down]: [&Tensor; 3],
        dy: &Tensor,
        [of_x, of_gate_up, of_down]: [bool; 3],
    ) -> Result<[Option<Tensor>; 3]> {
        let (d, ffn, out, width) = (self.d, self.ffn, self.out, 2 * self.ffn);
        let rows = x.dims().iter().rev().skip(1).product();
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let precision = self.precision;
        real::with_operand::<T, _>(x, |xs| {
            let packed = match saved {
                Some(packed) => packed,
                None => real::with_operand(gate_up, |gate_up| self.packed(xs, gate_up, rows))?,
            };
            let mut gradients = [None, None, None];
            let dinner = real::with_operand::<T, _>(dy, |dy| {
                if of_down {
                    let ddown = real::with_operand(&self.activation.gated(&packed)?, |inner| {
                        transposed_times(dy, inner, (out, rows, ffn), precision)
                    })?;
                    gradients[2] = Some(real::tensor(ddown, (out, ffn), down.dtype())?);
                }
                real::with_operand(down, |down| times(dy, down, (rows, out, ffn), precision))
            })?;
            let dinner = real::tensor(dinner, (rows, ffn), T::DTYPE)?;
            let dpacked = self.activation.gated_backward(&packed, &dinner)?;
            real::with_operand::<T, _>(&dpacked, |dpacked| {
                if of_x {
                    let dx = real::with_operand(gate_up, |gate_up| {
                        times(dpacked, gate_up, (rows, width, d), precision)
                    })?;
                    gradients[0] = Some(real::tensor(dx, x.shape(), self.result::<T>(x.dtype()))?);
                }
                if of_gate_up {
                    let dgate_up = transposed_times(dpacked, xs, (width, rows, d), precision)?;
                    gradients[1] = Some(real::tensor(dgate_up, (width, d), gate_up.dtype())?);
                }
                Ok(())
            })?;
            Ok(gradients)
        })
    }
}

impl CustomOp3 for GatedFeedForward {
    fn name(&self) -> &'static str {
        "vesper-gated-feed-forward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        gate_up: &CpuStorage,
        lg: &Layout,
        down: &CpuStorage,
        ld: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        match x.dtype() {
            DType::F64 => self.forward::<f64>((x, lx), (gate_up, lg), (down, ld), DType::F64),
            dtype => self.forward::<f32>((x, lx), (gate_up, lg), (down, ld), dtype),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        gate_up: &Tensor,
        down: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let inputs = [x, gate_up, down];
        let [dx, dgate_up, ddown] = self.gradients(inputs, &dy, inputs.map(Tensor::track_op))?;
        Ok((dx, deliver(gate_up, dgate_up)?, deliver(down, ddown)?))
    }
}
