use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Init, VarBuilder};

use super::{Adapter, Merge};
use crate::frozen::{check_input, rows};
use crate::init::kaiming_uniform;
use crate::{Error, LoraConfig};

/// The name of `A` below the name of the layer.
pub(crate) const A: &str = "lora_A.weight";
/// The name of `B` below the name of the layer.
pub(crate) const B: &str = "lora_B.weight";

/// The low-rank update of LoRA on its own, without the layer that it belongs to.
///
/// ```text
/// delta(x) = scale B (A x)        A: (r, in), B: (out, r), scale = alpha / r
/// ```
///
/// `B` is 0 at first, so a new adapter adds nothing. `A` is drawn from the seed of the configuration and the name of
/// the layer. The input is converted to the dtype of the variables and the result back, as PEFT does: an f32 adapter
/// over a bf16 layer trains in f32.
///
/// # References
///
/// Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685)
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use flylora::{Adapter, LoraAdapter, LoraConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let variables = VarMap::new();
/// let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
/// let adapter = LoraAdapter::new(12, 6, &LoraConfig::default().with_r(2), vb.pp("q_proj"))?;
/// let x = Tensor::ones((3, 12), DType::F32, &Device::Cpu)?; // (batch, in)
/// assert_eq!(adapter.delta(&x)?.dims(), [3, 6]); // (batch, out)
/// assert_eq!(variables.all_vars().len(), 2);
/// let names: Vec<String> = adapter.parameters().into_iter().map(|(name, _)| name).collect();
/// assert_eq!(names, ["lora_A.weight", "lora_B.weight"]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct LoraAdapter {
    a: Var,
    b: Var,
    config: LoraConfig,
}

impl LoraAdapter {
    /// Makes the variables `lora_A.weight` and `lora_B.weight` under the builder's prefix, in its dtype.
    ///
    /// Where the builder has both already, as after loading a checkpoint into a `VarMap`, they are taken as they are.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] where the configuration does not fit the layer, [`Error::DType`] where the builder's dtype is
    /// not one of floats, and candle's own where the builder has no such variables and makes none.
    #[expect(clippy::needless_pass_by_value, reason = "by value, as the constructors of candle-nn")]
    pub fn new(
        in_features: usize,
        out_features: usize,
        config: &LoraConfig,
        vb: VarBuilder<'_>,
    ) -> crate::Result<Self> {
        config.validate_for(in_features, out_features)?;
        check_dtype(vb.dtype())?;
        let there = vb.contains_tensor(A);
        let a = vb.get_with_hints((config.r, in_features), A, Init::Const(0.0))?;
        let b = vb.get_with_hints((out_features, config.r), B, Init::Const(0.0))?;
        let (a, b) = (Var::from_tensor(&a)?, Var::from_tensor(&b)?);
        if !there {
            a.set(&kaiming_uniform(
                (config.r, in_features),
                config.seed,
                &vb.prefix(),
                a.dtype(),
                a.device(),
            )?)?;
        }
        Ok(Self { a, b, config: config.clone() })
    }

    /// Makes the adapter with variables of its own, outside of any `VarMap`; `name` is part of the seed.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn seeded(
        in_features: usize,
        out_features: usize,
        config: &LoraConfig,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> crate::Result<Self> {
        config.validate_for(in_features, out_features)?;
        check_dtype(dtype)?;
        let a = kaiming_uniform((config.r, in_features), config.seed, name, dtype, device)?;
        let b = Var::zeros((out_features, config.r), dtype, device)?;
        Ok(Self { a: Var::from_tensor(&a)?, b, config: config.clone() })
    }

    /// `A`: (r, in).
    pub fn a(&self) -> &Var {
        &self.a
    }

    /// `B`: (out, r).
    pub fn b(&self) -> &Var {
        &self.b
    }

    /// The configuration that the adapter was made with.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// What the product `B A` is multiplied by.
    pub fn scale(&self) -> f64 {
        self.config.scale()
    }

    /// What the adapter adds to the layer's output; x: (..., in), returns (..., out) in the dtype of x.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] where x does not fit, inside a [`candle_core::Error`], and candle's own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.delta(x)
    }
}

fn check_dtype(got: DType) -> crate::Result<()> {
    match got {
        DType::F32 | DType::F64 | DType::BF16 | DType::F16 => Ok(()),
        _ => Err(Error::DType { name: "adapter".into(), expected: "f32, f64, bf16 or f16".into(), got }),
    }
}

impl Adapter for LoraAdapter {
    fn in_features(&self) -> usize {
        self.a.dims().last().copied().unwrap_or(0)
    }

    fn out_features(&self) -> usize {
        self.b.dims().first().copied().unwrap_or(0)
    }

    fn delta(&self, x: &Tensor) -> Result<Tensor> {
        check_input(x, self.in_features())?;
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.out_features();
        }
        // One matrix of rows: candle's matmul over batches would repeat A and B for each.
        let flat = x.reshape((rows(x.shape()), self.in_features()))?.to_dtype(self.a.dtype())?; // (m, in)
        let low = (flat.matmul(&self.a.t()?)? * self.scale())?; // (m, r), the cheapest place to scale
        low.matmul(&self.b.t()?)?.reshape(dims)?.to_dtype(x.dtype())
    }

    fn delta_weight(&self) -> Result<Tensor> {
        let (a, b) = (self.a.as_detached_tensor(), self.b.as_detached_tensor());
        b.matmul(&(a * self.scale())?)
    }

    fn merge_quality(&self) -> Merge {
        Merge::Exact
    }

    fn parameters(&self) -> Vec<(String, Var)> {
        vec![(A.to_owned(), self.a.clone()), (B.to_owned(), self.b.clone())]
    }
}

impl candle_nn::Module for LoraAdapter {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.delta(x)
    }
}
