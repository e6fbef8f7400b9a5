use std::sync::Arc;

use candle_core::{DType, Result, Tensor, Var};
use candle_nn::{Linear, VarBuilder};

use crate::{Adapter, AdapterKind, Error, FrozenLinear, LoraAdapter, LoraConfig, Merge, Place, merge};

/// A frozen linear layer with an adapter of some kind beside it.
///
/// ```text
/// y = W x + b + delta(x)
/// ```
///
/// Gradients reach x and the adapter's variables; `W` and `b` get none, and no memory is spent on theirs.
#[derive(Clone, Debug)]
pub struct AdapterLinear<A> {
    base: FrozenLinear,
    adapter: A,
    merged: Option<FrozenLinear>,
    enabled: bool,
}

/// A frozen linear layer with an adapter of a kind that is chosen at run time.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use flylora::{AdapterKind, AnyLinear, FlyLoraConfig, FrozenLinear, Merge, Place};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let base = FrozenLinear::new(Tensor::randn(0f32, 0.1, (48, 64), &Device::Cpu)?, None)?;
/// let kind = AdapterKind::FlyLora(FlyLoraConfig::default());
/// let mut layer = AnyLinear::build(base, &kind, &Place::alone("q_proj", DType::F32, &Device::Cpu))?;
/// // Routing is no constant weight, so nothing is merged, and the layer says so.
/// assert_eq!(layer.merge()?, Merge::Unsupported);
/// assert!(!layer.is_merged());
/// # Ok(())
/// # }
/// ```
pub type AnyLinear = AdapterLinear<Arc<dyn Adapter>>;

/// A frozen linear layer with a [`LoraAdapter`]: `y = W x + b + (alpha / r) B (A x)`.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Linear, Module, VarBuilder, VarMap};
/// use flylora::{LoraConfig, LoraLinear};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let base = Linear::new(Tensor::randn(0f32, 0.1, (6, 12), &Device::Cpu)?, None);
/// let variables = VarMap::new();
/// let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
/// let mut layer = LoraLinear::new(base.clone(), &LoraConfig::default().with_r(4), vb.pp("q_proj"))?;
///
/// // B is 0 at first: the layer is its base.
/// let x = Tensor::randn(0f32, 1.0, (3, 12), &Device::Cpu)?;
/// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, base.forward(&x)?.to_vec2::<f32>()?);
///
/// layer.merge()?; // for inference: one product, no adapter
/// assert!(layer.is_merged());
/// layer.unmerge(); // and the old weight is back, bit for bit
/// # Ok(())
/// # }
/// ```
pub type LoraLinear = AdapterLinear<LoraAdapter>;

impl AdapterLinear<LoraAdapter> {
    /// Freezes `base` and puts a LoRA adapter beside it, whose variables are made under the prefix of `vb`.
    ///
    /// # Errors
    ///
    /// Those of [`FrozenLinear::new`] and [`LoraAdapter::over`].
    #[expect(clippy::needless_pass_by_value, reason = "by value, as the constructors of candle-nn")]
    pub fn new(base: Linear, config: &LoraConfig, vb: VarBuilder<'_>) -> crate::Result<Self> {
        let base = FrozenLinear::try_from(&base)?;
        let adapter = LoraAdapter::over(&base, config, &Place::from(vb))?;
        Self::from_parts(base, adapter)
    }

    /// As [`new`](Self::new), with variables outside of any `VarMap`, in f32 (f64 for an f64 base).
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    #[expect(clippy::needless_pass_by_value, reason = "by value, as the constructors of candle-nn")]
    pub fn seeded(base: Linear, config: &LoraConfig, name: &str) -> crate::Result<Self> {
        let base = FrozenLinear::try_from(&base)?;
        let place = Place::alone(name, at_least_f32(base.dtype()), &base.device());
        let adapter = LoraAdapter::over(&base, config, &place)?;
        Self::from_parts(base, adapter)
    }
}

impl AnyLinear {
    /// Puts an adapter of any kind beside a frozen layer.
    ///
    /// # Errors
    ///
    /// Those of [`AdapterKind::build`].
    pub fn build(base: FrozenLinear, kind: &AdapterKind, place: &Place<'_>) -> crate::Result<Self> {
        let adapter = kind.build(&base, place)?;
        Self::from_parts(base, adapter)
    }
}

pub(crate) fn at_least_f32(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// `y * row`, in f32 at least, in the dtype of y. candle adds up the rows of a gradient in their own dtype, and in half types a
/// sum stops growing.
pub(crate) fn times_row(y: &Tensor, row: &Tensor) -> Result<Tensor> {
    let wide = at_least_f32(y.dtype());
    y.to_dtype(wide)?.broadcast_mul(&row.to_dtype(wide)?)?.to_dtype(y.dtype())
}

/// `weight + delta`, computed in f32 at least.
pub(crate) fn added(weight: &Tensor, delta: &Tensor) -> Result<Tensor> {
    let dtype = match (at_least_f32(weight.dtype()), at_least_f32(delta.dtype())) {
        (DType::F32, DType::F32) => DType::F32,
        _ => DType::F64,
    };
    weight.to_dtype(dtype)? + delta.to_dtype(dtype)?
}

/// Whether a tensor is without NaN and infinities.
pub(crate) fn is_finite(tensor: &Tensor) -> Result<bool> {
    if !tensor.dtype().is_float() || tensor.elem_count() == 0 {
        return Ok(true);
    }
    let wide = tensor.to_dtype(at_least_f32(tensor.dtype()))?;
    // 0 times anything else is NaN, and so is a sum with it.
    Ok((wide * 0.0)?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()? == 0.0)
}

/// That nothing has become infinite where a sum was rounded to the dtype of a weight.
pub(crate) fn check_merged(weight: &Tensor) -> crate::Result<()> {
    if is_finite(weight)? {
        return Ok(());
    }
    let message = format!("the merged layer has values that are not finite in {:?}", weight.dtype());
    Err(Error::Adapters { message })
}

/// That an adapter is of the size of its layer.
pub(crate) fn check_size(base: &FrozenLinear, adapter: &dyn Adapter) -> crate::Result<()> {
    let expected = vec![base.out_features(), base.in_features()];
    let got = vec![adapter.out_features(), adapter.in_features()];
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { name: "adapter (out, in)".into(), expected, got })
}

impl<A: Adapter> AdapterLinear<A> {
    /// Puts an adapter beside a frozen layer.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] where the two are not of one size.
    pub fn from_parts(base: FrozenLinear, adapter: A) -> crate::Result<Self> {
        check_size(&base, &adapter)?;
        Ok(Self { base, adapter, merged: None, enabled: true })
    }

    /// Applies the layer; x: (..., in), returns (..., out).
    ///
    /// # Errors
    ///
    /// Those of [`FrozenLinear::forward`] and [`Adapter::delta`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(nothing) = crate::cuda::nothing(x, self.base.out_features())? {
            return Ok(nothing);
        }
        match &self.merged {
            Some(merged) if self.enabled => merged.forward(x),
            _ if !self.enabled => self.base.forward(x),
            _ => {
                self.base.check_outputs(x)?;
                if let Some(y) = self.adapter.layer(&self.base, x)? {
                    return Ok(y);
                }
                let y = self.base.forward(x)?;
                &y + self.adapter.delta_beside(x, &y, self.base.bias())?
            }
        }
    }

    /// The frozen layer, without the adapter.
    pub fn base(&self) -> &FrozenLinear {
        &self.base
    }

    /// The adapter.
    pub fn adapter(&self) -> &A {
        &self.adapter
    }

    /// The trained variables by name, sorted by name.
    pub fn parameters(&self) -> Vec<(String, Var)> {
        self.adapter.parameters()
    }

    /// The trained variables, in the order of their names, as an optimizer takes them.
    pub fn vars(&self) -> Vec<Var> {
        self.adapter.parameters().into_iter().map(|(_, var)| var).collect()
    }

    /// Says what the forward passes from now on are, for dropout: see [`Adapter::set_training`].
    pub fn set_training(&self, pass: Option<u64>) {
        self.adapter.set_training(pass);
    }

    /// Switches the adapter on or off; off, the layer is its base, merged or not.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// Whether the adapter is on.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Adds the adapter to the weight: `W' = W + scale B A`, computed in f32 at least and rounded once to the dtype of
    /// the base; a bias of the adapter goes into the layer's bias, which it gets where it has none. Until [`unmerge`](Self::unmerge) the layer is one product, and the adapter gets no gradient.
    ///
    /// A merged layer stays as it is; variables that changed since are taken up by unmerging and merging again.
    /// Nothing is merged, and [`Merge::Unsupported`] returned, where no weight gives the same outputs: for kinds that
    /// choose by the input, and over a quantised base. [`merge_for`](Self::merge_for) merges those too.
    ///
    /// # Errors
    ///
    /// [`Error::Adapters`] for a sum that is not finite in the dtype of the base, and candle's own; the layer is then not
    /// merged.
    pub fn merge(&mut self) -> crate::Result<Merge> {
        if !merge::is_exact(&self.base, &self.weighted()) {
            return Ok(Merge::Unsupported);
        }
        if self.merged.is_none() {
            self.merged = Some(merge::exact(&self.base, &self.weighted())?);
        }
        Ok(Merge::Exact)
    }

    /// As [`merge`](Self::merge), where that is exact; else merges the weight that is nearest for inputs like
    /// `sample`, and measures on it how far the outputs are off; training's dropout is switched off for that. A quantised
    /// weight is quantised again.
    ///
    /// # Errors
    ///
    /// Those of [`merge`](Self::merge), [`Error::Shape`] for a sample that does not fit, and [`Error::Adapters`] for one without
    /// rows; the layer is then not merged.
    pub fn merge_for(&mut self, sample: &Tensor) -> crate::Result<Merge> {
        if let Merge::Exact = self.merge()? {
            return Ok(Merge::Exact);
        }
        let (merged, relative_error) = merge::nearest(&self.base, &self.weighted(), sample)?;
        self.merged = Some(merged);
        Ok(Merge::Approximate { relative_error })
    }

    fn weighted(&self) -> [(&dyn Adapter, f64); 1] {
        [(&self.adapter, 1.0)]
    }

    /// Goes back to the original weight, which was kept: the same bits, no arithmetic.
    pub fn unmerge(&mut self) {
        self.merged = None;
    }

    /// Whether the adapter is in the weight.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// The layer with its adapter in the weight, as a plain layer of candle-nn: merged already, or now.
    ///
    /// # Errors
    ///
    /// Those of [`merge`](Self::merge), and [`Error::Adapters`] where that is not supported and
    /// [`merge_for`](Self::merge_for) has not been called.
    pub fn into_merged(mut self) -> crate::Result<Linear> {
        if self.merged.is_none() && self.merge()? == Merge::Unsupported {
            let message = format!("no weight does the same as {} here: see merge_for", self.adapter.kind());
            return Err(Error::Adapters { message });
        }
        let layer = self.merged.unwrap_or(self.base);
        Ok(Linear::new(layer.weight()?, layer.bias().cloned()))
    }
}

impl<A: Adapter> candle_nn::Module for AdapterLinear<A> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        AdapterLinear::forward(self, x)
    }
}
