//! A linear layer whose weight never gets a gradient.
//!
//! candle's `matmul` computes the gradients of both operands, and a detached weight makes no difference: the backward
//! pass allocates and fills a weight-sized tensor for every frozen layer. Here the layer is one op in `x` alone.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::op::Add;
use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, MetalStorage, Result, Shape, Storage, Tensor,
};

use crate::Error;

mod quantized;

/// `y = W x + b` with `W` and `b` fixed: the backward pass computes the gradient of `x` and nothing else.
///
/// x: (..., in), W: (out, in), b: (out), y: (..., out); all of one dtype. Runs on every device that candle has.
/// A weight in GGUF blocks ([`quantized`](Self::quantized)) takes x of any float dtype and computes in f32; its backward
/// pass dequantises a megabyte of rows at a time, so training over it takes no more memory than inference.
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
    weight: Weight,
    bias: Option<Tensor>,
}

#[derive(Clone, Debug)]
enum Weight {
    /// (out, in), itself or its transpose contiguous.
    Dense(Tensor),
    /// (out, in)
    Quantized(Arc<QTensor>),
}

impl FrozenLinear {
    /// Takes the weight (out, in) and the bias (out) of a layer; they are shared, not copied, unless the weight is a part of
    /// the columns or rows of another one.
    ///
    /// # Errors
    ///
    /// [`Error::WeightShape`], [`Error::Shape`] or [`Error::DType`] where the tensors are not those of a layer.
    #[expect(clippy::needless_pass_by_value, reason = "by value, as the constructors of candle-nn")]
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> crate::Result<Self> {
        let out_features = check_matrix(weight.dims())?;
        if !matches!(weight.dtype(), DType::F32 | DType::F64 | DType::BF16 | DType::F16) {
            let expected = "f32, f64, bf16 or f16".into();
            return Err(Error::DType { name: "frozen weight".into(), expected, got: weight.dtype() });
        }
        check_bias(bias.as_ref(), out_features, weight.dtype(), "that of the weight")?;
        // The devices' products take a matrix row after row or column after column.
        let weight = weight.detach();
        let plain = weight.is_contiguous() || weight.t()?.is_contiguous();
        let weight = if plain { weight } else { weight.contiguous()? };
        Ok(Self { weight: Weight::Dense(weight), bias: bias.map(|b| b.detach()) })
    }

    /// Takes the weight (in, out) of a layer that stores it the other way around, as GPT-2's `Conv1D` does.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    #[expect(clippy::needless_pass_by_value, reason = "by value, as the constructors of candle-nn")]
    pub fn conv1d(weight: Tensor, bias: Option<Tensor>) -> crate::Result<Self> {
        check_matrix(weight.dims())?;
        Self::new(weight.t()?, bias)
    }

    /// Takes a quantised weight (out, in) as candle-transformers' GGUF models hold it; the bias is f32.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn quantized(weight: QMatMul, bias: Option<Tensor>) -> crate::Result<Self> {
        match weight {
            QMatMul::QTensor(weight) => {
                let out_features = check_matrix(weight.shape().dims())?;
                check_bias(bias.as_ref(), out_features, DType::F32, "for a quantised weight")?;
                Ok(Self { weight: Weight::Quantized(weight), bias: bias.map(|b| b.detach()) })
            }
            QMatMul::Tensor(weight) | QMatMul::TensorF16(weight) => Self::new(weight, bias),
        }
    }

    /// The weight, (out, in); a quantised one is dequantised to f32.
    ///
    /// # Errors
    ///
    /// candle's own, in dequantising.
    pub fn weight(&self) -> Result<Tensor> {
        match &self.weight {
            Weight::Dense(weight) => Ok(weight.clone()),
            Weight::Quantized(weight) => weight.dequantize(&weight.device()),
        }
    }

    /// The quantised weight, where it is one.
    pub fn quantized_weight(&self) -> Option<&Arc<QTensor>> {
        match &self.weight {
            Weight::Dense(_) => None,
            Weight::Quantized(weight) => Some(weight),
        }
    }

    /// The bias, (out).
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The device of the weight.
    pub fn device(&self) -> Device {
        match &self.weight {
            Weight::Dense(weight) => weight.device().clone(),
            Weight::Quantized(weight) => weight.device(),
        }
    }

    /// The dtype that the layer computes in: that of the weight, f32 where it is quantised.
    pub fn dtype(&self) -> DType {
        match &self.weight {
            Weight::Dense(weight) => weight.dtype(),
            Weight::Quantized(_) => DType::F32,
        }
    }

    /// The size of the last dimension of the input.
    pub fn in_features(&self) -> usize {
        self.dims().last().copied().unwrap_or(0)
    }

    /// The size of the last dimension of the output.
    pub fn out_features(&self) -> usize {
        self.dims().first().copied().unwrap_or(0)
    }

    /// Applies the layer; x: (..., in), returns (..., out) in the dtype of x.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] or [`Error::DType`] where x does not fit, inside a [`candle_core::Error`], and candle's own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        check_input(x, self.in_features())?;
        self.check_outputs(x)?;
        #[cfg(feature = "cuda")]
        if let Some(nothing) = crate::cuda::nothing(x, self.out_features())? {
            return Ok(nothing);
        }
        match &self.weight {
            Weight::Dense(weight) if x.dtype() != weight.dtype() => {
                let expected = format!("{:?}, that of the frozen weight", weight.dtype());
                Err(Error::DType { name: "input".into(), expected, got: x.dtype() }.into())
            }
            Weight::Dense(_) => x.contiguous()?.apply_op1(Frozen(self.clone())),
            Weight::Quantized(_) => {
                let wide = x.to_dtype(DType::F32)?.contiguous()?;
                wide.apply_op1(Frozen(self.clone()))?.to_dtype(x.dtype())
            }
        }
    }

    /// That the result for x has no more elements than candle's kernels count on CUDA, in u32.
    pub(crate) fn check_outputs(&self, x: &Tensor) -> Result<()> {
        let outputs = rows(x.shape()).checked_mul(self.out_features());
        if x.elem_count() > 0 && outputs.is_none_or(|n| u32::try_from(n).is_err()) {
            candle_core::bail!(
                "a frozen layer of {} features: the result for an input of shape {:?} has more than the {} elements that \
                 are possible",
                self.out_features(),
                x.shape(),
                u32::MAX
            );
        }
        Ok(())
    }

    /// The same layer, `W x` alone.
    pub(crate) fn without_bias(&self) -> Self {
        Self { weight: self.weight.clone(), bias: None }
    }

    /// The same layer with another weight of the same shape, in the form of its own: dtype, or kind of blocks.
    pub(crate) fn with_weight(&self, weight: &Tensor) -> Result<Self> {
        let weight = match &self.weight {
            Weight::Dense(own) => Weight::Dense(weight.to_dtype(own.dtype())?.detach()),
            Weight::Quantized(own) => Weight::Quantized(Arc::new(QTensor::quantize(weight, own.dtype())?)),
        };
        Ok(Self { weight, bias: self.bias.clone() })
    }

    /// The same layer with another bias, in the dtype that it computes in.
    pub(crate) fn with_bias(&self, bias: Option<&Tensor>) -> Result<Self> {
        let bias = bias.map(|bias| bias.to_dtype(self.dtype())).transpose()?;
        Ok(Self { weight: self.weight.clone(), bias: bias.map(|bias| bias.detach()) })
    }

    fn dims(&self) -> &[usize] {
        match &self.weight {
            Weight::Dense(weight) => weight.dims(),
            Weight::Quantized(weight) => weight.shape().dims(),
        }
    }
}

impl TryFrom<&candle_nn::Linear> for FrozenLinear {
    type Error = Error;

    fn try_from(layer: &candle_nn::Linear) -> crate::Result<Self> {
        Self::new(layer.weight().clone(), layer.bias().cloned())
    }
}

impl candle_nn::Module for FrozenLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        FrozenLinear::forward(self, x)
    }
}

/// The number of rows of a matrix that is not empty.
fn check_matrix(dims: &[usize]) -> crate::Result<usize> {
    match *dims {
        [out_features, in_features] if out_features > 0 && in_features > 0 => Ok(out_features),
        _ => Err(Error::WeightShape { got: dims.to_vec() }),
    }
}

fn check_bias(bias: Option<&Tensor>, out_features: usize, dtype: DType, why: &str) -> crate::Result<()> {
    let Some(bias) = bias else { return Ok(()) };
    if bias.dims() != [out_features] {
        let (expected, got) = (vec![out_features], bias.dims().to_vec());
        return Err(Error::Shape { name: "frozen bias".into(), expected, got });
    }
    if bias.dtype() != dtype {
        let expected = format!("{dtype:?}, {why}");
        return Err(Error::DType { name: "frozen bias".into(), expected, got: bias.dtype() });
    }
    Ok(())
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

/// The dimensions with another last one.
pub(crate) fn with_last(shape: &Shape, last: usize) -> Vec<usize> {
    let mut dims = shape.dims().to_vec();
    if let Some(d) = dims.last_mut() {
        *d = last;
    }
    dims
}

/// The layer as an operation on x alone; x contiguous.
pub(crate) struct Frozen(pub(crate) FrozenLinear);

fn elsewhere() -> candle_core::Error {
    candle_core::Error::Msg("the input is on another device than the frozen weight".into())
}

impl Frozen {
    /// On the storage of `x` and those of the weight and the bias, all of one device. `blocks` is the product with a
    /// quantised weight for x (m, in).
    fn run<S: BackendStorage>(
        &self,
        x: &S,
        layout: &Layout,
        of: impl Fn(&Storage) -> Option<&S>,
        blocks: impl FnOnce(&QTensor, &S, &Layout) -> Result<(S, Shape)>,
    ) -> Result<(S, Shape)> {
        let (m, n, k) = (rows(layout.shape()), self.0.out_features(), self.0.in_features());
        // A part of nothing may begin behind its end.
        let start = if m == 0 { 0 } else { layout.start_offset() };
        let x_layout = Layout::contiguous_with_offset((m, k), start);
        let y = match &self.0.weight {
            Weight::Dense(weight) => {
                let (weight, weight_layout) = weight.storage_and_layout();
                let weight = of(&weight).ok_or_else(elsewhere)?;
                x.matmul(weight, (1, m, n, k), &x_layout, &weight_layout.transpose(0, 1)?)? // (m, n)
            }
            Weight::Quantized(weight) => blocks(weight, x, &x_layout)?.0, // (m, n)
        };
        let y = match &self.0.bias {
            None => y,
            Some(bias) => {
                let (bias, bias_layout) = bias.storage_and_layout();
                let bias = of(&bias).ok_or_else(elsewhere)?;
                y.binary_impl::<Add>(bias, &Layout::contiguous((m, n)), &bias_layout.broadcast_as((m, n))?)?
            }
        };
        Ok((y, Shape::from(with_last(layout.shape(), n))))
    }
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(x, layout, |s| if let Storage::Cpu(s) = s { Some(s) } else { None }, QTensor::cpu_fwd)
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.run(x, layout, |s| if let Storage::Cuda(s) = s { Some(s) } else { None }, QTensor::cuda_fwd)
    }

    fn metal_fwd(&self, x: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
        self.run(x, layout, |s| if let Storage::Metal(s) = s { Some(s) } else { None }, QTensor::metal_fwd)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        // Detached: the gradient of a gradient is not wanted, and a graph would keep every activation.
        let dy = dy.detach().reshape((rows(x.shape()), self.0.out_features()))?; // (m, out)
        let dx = match &self.0.weight {
            Weight::Dense(weight) => dy.matmul(weight)?,
            Weight::Quantized(weight) => quantized::product(&dy, weight, x.device())?,
        };
        dx.reshape(x.shape()).map(Some) // (m, in)
    }
}
