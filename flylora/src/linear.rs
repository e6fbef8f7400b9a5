use candle_core::{DType, Result, Tensor, Var};
use candle_nn::{Linear, VarBuilder};

use crate::{Adapter, Error, FrozenLinear, LoraAdapter, LoraConfig, Merge};

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
}

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
    /// Those of [`FrozenLinear::new`] and [`LoraAdapter::new`].
    #[expect(clippy::needless_pass_by_value, reason = "by value, as the constructors of candle-nn")]
    pub fn new(base: Linear, config: &LoraConfig, vb: VarBuilder<'_>) -> crate::Result<Self> {
        let base = FrozenLinear::new(base.weight().clone(), base.bias().cloned())?;
        let adapter = LoraAdapter::new(base.in_features(), base.out_features(), config, vb)?;
        Self::from_parts(base, adapter)
    }

    /// As [`new`](Self::new), with variables outside of any `VarMap`, in f32 (f64 for an f64 base).
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    #[expect(clippy::needless_pass_by_value, reason = "by value, as the constructors of candle-nn")]
    pub fn seeded(base: Linear, config: &LoraConfig, name: &str) -> crate::Result<Self> {
        let base = FrozenLinear::new(base.weight().clone(), base.bias().cloned())?;
        let (inputs, outputs) = (base.in_features(), base.out_features());
        let (dtype, device) = (at_least_f32(base.weight().dtype()), base.weight().device().clone());
        let adapter = LoraAdapter::seeded(inputs, outputs, config, name, dtype, &device)?;
        Self::from_parts(base, adapter)
    }
}

fn at_least_f32(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

impl<A: Adapter> AdapterLinear<A> {
    /// Puts an adapter beside a frozen layer.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] where the two are not of one size.
    pub fn from_parts(base: FrozenLinear, adapter: A) -> crate::Result<Self> {
        let expected = vec![base.out_features(), base.in_features()];
        let got = vec![adapter.out_features(), adapter.in_features()];
        if got != expected {
            return Err(Error::Shape { name: "adapter (out, in)".into(), expected, got });
        }
        Ok(Self { base, adapter, merged: None })
    }

    /// Applies the layer; x: (..., in), returns (..., out).
    ///
    /// # Errors
    ///
    /// Those of [`FrozenLinear::forward`] and [`Adapter::delta`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.merged {
            Some(merged) => merged.forward(x),
            None => self.base.forward(x)? + self.adapter.delta(x)?,
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

    /// Adds the adapter to the weight: `W' = W + scale B A`, computed in f32 at least and rounded once to the dtype of
    /// the base. Until [`unmerge`](Self::unmerge) the layer is one product, and the adapter gets no gradient.
    ///
    /// A merged layer stays as it is; variables that changed since are taken up by unmerging and merging again.
    ///
    /// # Errors
    ///
    /// candle's own; the layer is then not merged.
    pub fn merge(&mut self) -> crate::Result<Merge> {
        if self.merged.is_none() {
            let weight = self.base.weight();
            let delta = self.adapter.delta_weight()?;
            let dtype = match (at_least_f32(weight.dtype()), at_least_f32(delta.dtype())) {
                (DType::F32, DType::F32) => DType::F32,
                _ => DType::F64,
            };
            let merged = (weight.to_dtype(dtype)? + delta.to_dtype(dtype)?)?.to_dtype(weight.dtype())?;
            self.merged = Some(self.base.with_weight(&merged));
        }
        Ok(self.adapter.merge_quality())
    }

    /// Goes back to the original weight, which was kept: the same bits, no arithmetic.
    pub fn unmerge(&mut self) {
        self.merged = None;
    }

    /// Whether the adapter is in the weight.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// The layer with its adapter in the weight, as a plain layer of candle-nn.
    ///
    /// # Errors
    ///
    /// Those of [`merge`](Self::merge).
    pub fn into_merged(mut self) -> crate::Result<Linear> {
        self.merge()?;
        let layer = self.merged.unwrap_or(self.base);
        Ok(Linear::new(layer.weight().clone(), layer.bias().cloned()))
    }
}

impl<A: Adapter> candle_nn::Module for AdapterLinear<A> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        AdapterLinear::forward(self, x)
    }
}
