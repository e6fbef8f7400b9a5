use std::sync::{Arc, PoisonError, RwLock};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;

use super::{Adapter, AdapterKind, Change, Merge};
use crate::dropout::Dropout;
use crate::effective::LowRank;
use crate::files::StateSource;
use crate::frozen::{check_input, rows, with_last};
use crate::init::{generator, kaiming_uniform, normal};
use crate::{Error, FrozenLinear, LoraConfig, LoraInit, Place, svd};

/// The name of `A` below the name of the layer.
pub(crate) const A: &str = "lora_A.weight";
/// The name of `B` below the name of the layer.
pub(crate) const B: &str = "lora_B.weight";
/// The name of the bias of `B` below the name of the layer.
pub(crate) const BIAS: &str = "lora_B.bias";

/// The low-rank update of LoRA on its own, without the layer that it belongs to.
///
/// ```text
/// delta(x) = scale B (A x)        A: (r, in), B: (out, r), scale = alpha / r
/// ```
///
/// With [`LoraConfig::bias`], `scale (B (A x) + b)`, where b: (out) is 0 at first too.
///
/// `B` is 0 at first, so a new adapter adds nothing; [`LoraInit`] has other starts, with the same effect. `A` is drawn
/// from the seed of the configuration and the name of the layer. The input is converted to the dtype of the variables
/// and the result back, as PEFT does: an f32 adapter over a bf16 layer trains in f32.
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
    /// (out)
    bias: Option<Var>,
    config: LoraConfig,
    /// What the product starts at, where that is not 0; taken off again.
    origin: Option<Arc<RwLock<Origin>>>,
    /// Shared by clones, as the variables are.
    dropout: Arc<Dropout>,
}

/// The start of a PiSSA adapter: `A0` and `B0`, without gradients.
#[derive(Clone, Debug)]
struct Origin {
    a: FrozenLinear,
    b: FrozenLinear,
}

impl Origin {
    fn new(a: Tensor, b: Tensor) -> crate::Result<Self> {
        Ok(Self { a: FrozenLinear::new(a, None)?, b: FrozenLinear::new(b, None)? })
    }
}

impl LoraAdapter {
    /// Makes the variables `lora_A.weight` and `lora_B.weight` under the builder's prefix, in its dtype.
    ///
    /// Where the builder has both already, as after loading a checkpoint into a `VarMap`, they are taken as they are.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] where the configuration does not fit the layer, or starts from the weight
    /// ([`over`](Self::over) takes one); [`Error::DType`] where the builder's dtype is not one of floats; and candle's
    /// own where the builder has no such variables and makes none.
    pub fn new(
        in_features: usize,
        out_features: usize,
        config: &LoraConfig,
        vb: VarBuilder<'_>,
    ) -> crate::Result<Self> {
        Self::build((out_features, in_features), None, config, &Place::from(vb))
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
        Self::build((out_features, in_features), None, config, &Place::alone(name, dtype, device))
    }

    /// Makes the adapter for a layer, which may be what it starts from.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and [`Error::Decomposition`] for a weight that has no singular values.
    pub fn over(base: &FrozenLinear, config: &LoraConfig, place: &Place<'_>) -> crate::Result<Self> {
        Self::build((base.out_features(), base.in_features()), Some(base), config, place)
    }

    /// Makes an adapter of the factors A (r, in) and B (out, r); `r` of the configuration is set to theirs. A bias is 0.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] where the two do not fit each other, [`Error::DType`] where they are not of one float dtype, and those
    /// of [`LoraConfig::validate`].
    pub fn from_factors(a: &Tensor, b: &Tensor, config: &LoraConfig) -> crate::Result<Self> {
        let (r, _) = a.dims2()?;
        let (out_features, width) = b.dims2()?;
        if width != r {
            let (expected, got) = (vec![out_features, r], vec![out_features, width]);
            return Err(Error::Shape { name: B.into(), expected, got });
        }
        check_factors([(A, a), (B, b)])?;
        let config = LoraConfig { r, init: LoraInit::default(), ..config.clone() };
        config.validate()?;
        let dropout = Arc::new(Dropout::new(config.dropout, config.seed, ""));
        let (a, b) = (Var::from_tensor(a)?, Var::from_tensor(b)?);
        let zeros = || Var::zeros(out_features, b.dtype(), b.device());
        let bias = config.bias.then(zeros).transpose()?;
        Ok(Self { a, b, bias, config, origin: None, dropout })
    }

    fn build(
        (out_features, in_features): (usize, usize),
        base: Option<&FrozenLinear>,
        config: &LoraConfig,
        place: &Place<'_>,
    ) -> crate::Result<Self> {
        config.validate_for(in_features, out_features)?;
        place.check_dtype()?;
        let (r, shape_a, shape_b) = (config.r, (config.r, in_features), (out_features, config.r));
        let mut rng = generator(config.seed, place.name());
        let cpu = Device::Cpu;
        let mut origin = None;
        let (a, b) = match config.init {
            LoraInit::KaimingUniform => {
                let a = || Ok(kaiming_uniform(shape_a, config.seed, place.name(), DType::F32, &cpu)?);
                (place.var(shape_a, A, a)?, place.constant(shape_b, B, 0.0)?)
            }
            LoraInit::Gaussian => {
                let a = || Ok(normal(shape_a, 1.0 / r as f64, &mut rng)?);
                (place.var(shape_a, A, a)?, place.constant(shape_b, B, 0.0)?)
            }
            LoraInit::Orthogonal => {
                let q = svd::orthonormal(&normal((r, r), 1.0, &mut rng)?)?.reshape((r / 2, 2, r))?;
                let half = |i: usize| q.narrow(1, i, 1)?.squeeze(1)?.contiguous(); // (r / 2, r)
                let a = normal((in_features, r / 2), 0.1, &mut rng)?.matmul(&half(0)?)?.t()?;
                let b = normal((out_features, r / 2), 0.1, &mut rng)?.matmul(&half(1)?)?;
                (place.var(shape_a, A, || Ok(a))?, place.var(shape_b, B, || Ok(b))?)
            }
            LoraInit::Pissa { iterations } => {
                let Some(base) = base else {
                    let expected = "a start that needs no weight: there is none here".into();
                    return Err(Error::Config { field: "init", expected, got: "pissa".into() });
                };
                let weight = base.weight()?;
                let triplets = match iterations {
                    None => svd::truncated(svd::to_matrix(&weight)?, r)?,
                    Some(n) => svd::randomised(&weight, r, n, &mut rng)?,
                };
                let (b, a) = triplets.balanced()?;
                let root = config.scale().abs().sqrt();
                let like_variables =
                    |t: Tensor| (t / root)?.to_device(place.device())?.to_dtype(place.dtype());
                let (a, b) = (like_variables(a)?, like_variables(b)?);
                origin = Some(Arc::new(RwLock::new(Origin::new(a.clone(), b.clone())?)));
                (place.var(shape_a, A, || Ok(a))?, place.var(shape_b, B, || Ok(b))?)
            }
        };
        let bias = config.bias.then(|| place.constant(out_features, BIAS, 0.0)).transpose()?;
        let dropout = Arc::new(Dropout::new(config.dropout, config.seed, place.name()));
        Ok(Self { a, b, bias, config: config.clone(), origin, dropout })
    }

    /// `A`: (r, in).
    pub fn a(&self) -> &Var {
        &self.a
    }

    /// `B`: (out, r).
    pub fn b(&self) -> &Var {
        &self.b
    }

    /// The bias of `B`, where it has one: (out).
    pub fn bias(&self) -> Option<&Var> {
        self.bias.as_ref()
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

    /// The factors of the change without gradients, `delta = scale B A`: (r, in) and (out, r), or twice the rank where
    /// the adapter has a start to take off.
    pub(crate) fn factors(&self) -> Result<(Tensor, Tensor)> {
        let (a, b) = (self.a.as_detached_tensor(), self.b.as_detached_tensor());
        match self.origin() {
            None => Ok((a, b)),
            Some(origin) => {
                let (a0, b0) = (origin.a.weight()?, origin.b.weight()?);
                Ok((Tensor::cat(&[a, a0], 0)?, Tensor::cat(&[b, b0.neg()?], 1)?))
            }
        }
    }

    /// What drops elements of the input, where it is on.
    pub(super) fn dropout(&self) -> &Dropout {
        &self.dropout
    }

    /// The change in the dtype of the variables, without dropout; x: (m, in) in that dtype, returns (m, out).
    pub(super) fn product(&self, x: &Tensor) -> Result<Tensor> {
        let low = (x.matmul(&self.a.t()?)? * self.scale())?; // (m, r), the cheapest place to scale
        let delta = low.matmul(&self.b.t()?)?;
        match self.origin() {
            None => Ok(delta),
            Some(origin) => delta - origin.b.forward(&(origin.a.forward(x)? * self.scale())?)?,
        }
    }

    /// `y` and what the bias adds to it, y: (..., out).
    fn with_bias(&self, y: Tensor) -> Result<Tensor> {
        let Some(bias) = &self.bias else { return Ok(y) };
        let bias = (bias.as_tensor() * self.scale())?.to_dtype(y.dtype())?;
        if !matches!(y.dtype(), DType::BF16 | DType::F16) || y.elem_count() == 0 {
            return y.broadcast_add(&bias);
        }
        // candle adds up the rows of a gradient in the half type, where a sum stops growing at 256; a product adds in f32.
        let ones = (Tensor::zeros((rows(y.shape()), 1), y.dtype(), y.device())? + 1.0)?;
        &y + ones.matmul(&bias.unsqueeze(0)?)?.reshape(y.shape())?
    }

    /// The change, with gradients for the factors.
    pub(super) fn low_rank(&self) -> Result<LowRank> {
        let origin = match self.origin() {
            None => None,
            Some(origin) => Some((origin.a.weight()?, origin.b.weight()?)),
        };
        let (a, b) = (self.a.as_tensor().clone(), self.b.as_tensor().clone());
        Ok(LowRank { a, b, scale: self.scale(), origin, mask: None, ratio: None })
    }

    fn origin(&self) -> Option<Origin> {
        self.origin.as_ref().map(|origin| origin.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// That two factors, with their names, are of one float dtype.
pub(crate) fn check_factors([(name_a, a), (name_b, b)]: [(&str, &Tensor); 2]) -> crate::Result<()> {
    let fail = |name: &str, expected: String, got| Err(Error::DType { name: name.into(), expected, got });
    if !matches!(a.dtype(), DType::F32 | DType::F64 | DType::BF16 | DType::F16) {
        return fail(name_a, "f32, f64, bf16 or f16".into(), a.dtype());
    }
    if b.dtype() != a.dtype() {
        return fail(name_b, format!("{}, as the other factor has", a.dtype().as_str()), b.dtype());
    }
    Ok(())
}

impl Adapter for LoraAdapter {
    fn kind(&self) -> AdapterKind {
        AdapterKind::Lora(self.config.clone())
    }

    fn in_features(&self) -> usize {
        self.a.dims().last().copied().unwrap_or(0)
    }

    fn out_features(&self) -> usize {
        self.b.dims().first().copied().unwrap_or(0)
    }

    fn delta(&self, x: &Tensor) -> Result<Tensor> {
        check_input(x, self.in_features())?;
        // One matrix of rows: candle's matmul over batches would repeat A and B for each.
        let flat = x.reshape((rows(x.shape()), self.in_features()))?; // (m, in)
        #[cfg(feature = "cuda")]
        if let Some(delta) = self.low_rank()?.by_kernels(&self.dropout.apply(&flat)?)? {
            return self.with_bias(delta.reshape(with_last(x.shape(), self.out_features()))?);
        }
        let flat = flat.to_dtype(self.a.dtype())?;
        self.with_bias(self.product(&self.dropout.apply(&flat)?)?)?
            .reshape(with_last(x.shape(), self.out_features()))?
            .to_dtype(x.dtype())
    }

    fn layer(&self, base: &FrozenLinear, x: &Tensor) -> Result<Option<Tensor>> {
        if self.dropout.is_on() {
            return Ok(None); // the layer and its change read different inputs
        }
        self.low_rank()?.layer(base, x)?.map(|y| self.with_bias(y)).transpose()
    }

    fn delta_weight(&self) -> Result<Tensor> {
        let (a, b) = self.factors()?;
        b.matmul(&(a * self.scale())?)
    }

    fn delta_bias(&self) -> Result<Option<Tensor>> {
        self.bias.as_ref().map(|bias| bias.as_detached_tensor() * self.scale()).transpose()
    }

    fn merge_quality(&self) -> Merge {
        Merge::Exact
    }

    fn parameters(&self) -> Vec<(String, Var)> {
        let mut parameters = vec![(A.to_owned(), self.a.clone())];
        parameters.extend(self.bias.clone().map(|bias| (BIAS.to_owned(), bias)));
        parameters.push((B.to_owned(), self.b.clone()));
        parameters
    }

    fn set_training(&self, pass: Option<u64>) {
        self.dropout.set_pass(pass);
    }

    fn state(&self) -> crate::Result<Vec<(String, Tensor)>> {
        let (a, b) = self.factors()?;
        let mut state = vec![(A.to_owned(), a), (B.to_owned(), b)];
        state.extend(self.bias.as_ref().map(|bias| (BIAS.to_owned(), bias.as_detached_tensor())));
        Ok(state)
    }

    fn load_state<'a>(&'a self, source: &mut StateSource<'_>) -> crate::Result<Vec<Change<'a>>> {
        let (a, b) = self.factors()?;
        let (a, b) = (source.like(A, &a)?, source.like(B, &b)?);
        let r = self.config.r;
        let change: Change<'a> = match &self.origin {
            None => Box::new(move || Ok(self.a.set(&a).and_then(|()| self.b.set(&b))?)),
            Some(origin) => {
                let start =
                    Origin::new(a.narrow(0, r, r)?.contiguous()?, b.narrow(1, r, r)?.neg()?.contiguous()?)?;
                let (a, b) = (a.narrow(0, 0, r)?.contiguous()?, b.narrow(1, 0, r)?.contiguous()?);
                Box::new(move || {
                    self.a.set(&a).and_then(|()| self.b.set(&b))?;
                    *origin.write().unwrap_or_else(PoisonError::into_inner) = start;
                    Ok(())
                })
            }
        };
        let mut changes = vec![change];
        if let Some(bias) = &self.bias {
            let value = source.like(BIAS, bias)?;
            changes.push(Box::new(move || Ok(bias.set(&value)?)));
        }
        Ok(changes)
    }

    fn as_lora(&self) -> Option<&LoraAdapter> {
        Some(self)
    }
}

impl candle_nn::Module for LoraAdapter {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.delta(x)
    }
}
