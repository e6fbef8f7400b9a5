//! A linear layer whose weight never gets a gradient.
//!
//! candle's `matmul` computes the gradients of both operands, and a detached weight makes no difference: the backward
//! pass allocates and fills a weight-sized tensor for every frozen layer. Here the layer is one op in `x` alone.

use candle_core::backend::BackendStorage;
use candle_core::op::Add;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, MetalStorage, Result, Shape, Storage, Tensor,
};

use crate::Error;

/// `y = W x + b` with `W` and `b` fixed: the backward pass computes the gradient of `x` and nothing else.
///
/// x: (..., in), W: (out, in), b: (out), y: (..., out); all of one dtype. Runs on every device that candle has.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use flylora::FrozenLinear;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let w = Var::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu)?; // (out, in) = (3, 2)
/// let layer = FrozenLinear::new(w.as_tensor().clone(), None)?;
/// let x = Var::new(&[[10f32, 100.0]], &Device::Cpu)?;
/// let y = layer.forward(&x)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[210.0, 430.0, 650.0]]);
/// let grads = y.sum_all()?.backward()?;
/// assert_eq!(grads.get(&x).unwrap().to_vec2::<f32>()?, [[9.0, 12.0]]);
/// assert!(grads.get(&w).is_none());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct FrozenLinear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl FrozenLinear {
    /// Takes the weight (out, in) and the bias (out) of a layer; they are shared, not copied.
    ///
    /// # Errors
    ///
    /// [`Error::WeightShape`], [`Error::Shape`] or [`Error::DType`] where the tensors are not those of a layer.
    #[expect(clippy::needless_pass_by_value, reason = "by value, as the constructors of candle-nn")]
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> crate::Result<Self> {
        let out_features = match *weight.dims() {
            [out_features, in_features] if out_features > 0 && in_features > 0 => out_features,
            _ => return Err(Error::WeightShape { got: weight.dims().to_vec() }),
        };
        if !matches!(weight.dtype(), DType::F32 | DType::F64 | DType::BF16 | DType::F16) {
            let expected = "f32, f64, bf16 or f16".into();
            return Err(Error::DType { name: "frozen weight".into(), expected, got: weight.dtype() });
        }
        if let Some(bias) = &bias {
            if bias.dims() != [out_features] {
                let (expected, got) = (vec![out_features], bias.dims().to_vec());
                return Err(Error::Shape { name: "frozen bias".into(), expected, got });
            }
            if bias.dtype() != weight.dtype() {
                let expected = format!("{:?}, that of the weight", weight.dtype());
                return Err(Error::DType { name: "frozen bias".into(), expected, got: bias.dtype() });
            }
        }
        Ok(Self { weight: weight.detach(), bias: bias.map(|b| b.detach()) })
    }

    /// The weight, (out, in).
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, (out).
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The size of the last dimension of the input.
    pub fn in_features(&self) -> usize {
        self.weight.dims().last().copied().unwrap_or(0)
    }

    /// The size of the last dimension of the output.
    pub fn out_features(&self) -> usize {
        self.weight.dims().first().copied().unwrap_or(0)
    }

    /// Applies the layer; x: (..., in), returns (..., out).
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] or [`Error::DType`] where x does not fit, inside a [`candle_core::Error`], and candle's own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        check_input(x, self.in_features())?;
        if x.dtype() != self.weight.dtype() {
            let expected = format!("{:?}, that of the frozen weight", self.weight.dtype());
            return Err(Error::DType { name: "input".into(), expected, got: x.dtype() }.into());
        }
        x.contiguous()?.apply_op1(Frozen(self.clone()))
    }

    /// The same layer with another weight of the same shape and dtype.
    pub(crate) fn with_weight(&self, weight: &Tensor) -> Self {
        Self { weight: weight.detach(), bias: self.bias.clone() }
    }
}

impl candle_nn::Module for FrozenLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        FrozenLinear::forward(self, x)
    }
}

/// That the last dimension of `x` is `in_features`.
pub(crate) fn check_input(x: &Tensor, in_features: usize) -> Result<()> {
    if x.dims().last() == Some(&in_features) {
        return Ok(());
    }
    let mut expected = x.dims().to_vec();
    expected.pop();
    expected.push(in_features);
    Err(Error::Shape { name: "input".into(), expected, got: x.dims().to_vec() }.into())
}

/// Number of rows of (..., last).
pub(crate) fn rows(shape: &Shape) -> usize {
    let dims = shape.dims();
    dims.iter().take(dims.len().saturating_sub(1)).product()
}

struct Frozen(FrozenLinear);

impl Frozen {
    /// On the storage of `x` and those of the weight and the bias, all of one device.
    fn run<S: BackendStorage>(
        &self,
        x: &S,
        layout: &Layout,
        of: impl Fn(&Storage) -> Option<&S>,
    ) -> Result<(S, Shape)> {
        let (m, n, k) = (rows(layout.shape()), self.0.out_features(), self.0.in_features());
        let elsewhere =
            || candle_core::Error::Msg("the input is on another device than the frozen weight".into());
        let y = {
            let (weight, weight_layout) = self.0.weight.storage_and_layout();
            let weight = of(&weight).ok_or_else(elsewhere)?;
            let x_layout = Layout::contiguous_with_offset((m, k), layout.start_offset());
            x.matmul(weight, (1, m, n, k), &x_layout, &weight_layout.transpose(0, 1)?)? // (m, n)
        };
        let y = match &self.0.bias {
            None => y,
            Some(bias) => {
                let (bias, bias_layout) = bias.storage_and_layout();
                let bias = of(&bias).ok_or_else(elsewhere)?;
                y.binary_impl::<Add>(bias, &Layout::contiguous((m, n)), &bias_layout.broadcast_as((m, n))?)?
            }
        };
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = n;
        }
        Ok((y, Shape::from(dims)))
    }
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(x, layout, |s| if let Storage::Cpu(s) = s { Some(s) } else { None })
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.run(x, layout, |s| if let Storage::Cuda(s) = s { Some(s) } else { None })
    }

    fn metal_fwd(&self, x: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
        self.run(x, layout, |s| if let Storage::Metal(s) = s { Some(s) } else { None })
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        // Detached: the gradient of a gradient is not wanted, and a graph would keep every activation.
        let dy = dy.detach().reshape((rows(x.shape()), self.0.out_features()))?; // (m, out)
        dy.matmul(&self.0.weight)?.reshape(x.shape()).map(Some) // (m, in)
    }
}
