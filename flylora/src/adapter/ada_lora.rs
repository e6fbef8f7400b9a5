use std::sync::{Arc, PoisonError, RwLock};

use candle_core::{D, Device, Result, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::{Adapter, AdapterKind, Change, Merge};
use crate::config::is_default;
use crate::dropout::{Dropout, check_rate};
use crate::effective::LowRank;
use crate::files::StateSource;
use crate::frozen::{check_input, rows, with_last};
use crate::init::{generator, normal};
use crate::linear::times_row;
use crate::{Error, FrozenLinear, Place};

pub(super) const A: &str = "lora_A";
pub(super) const B: &str = "lora_B";
pub(super) const E: &str = "lora_E";

/// How an adapter of the AdaLoRA kind is made. How the ranks are allocated is
/// [`RankBudgetConfig`](super::RankBudgetConfig)'s matter.
///
/// # Examples
///
/// ```
/// use flylora::AdaLoraConfig;
///
/// let config = AdaLoraConfig::default().with_init_r(16).with_alpha(16.0);
/// assert!(config.validate().is_ok());
/// assert!(config.with_init_r(0).validate().is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdaLoraConfig {
    /// The rank that the adapter starts with: at least 1, 12 by default. It may be larger than the layer, as in PEFT.
    pub init_r: usize,
    /// The numerator of the scale, which is `alpha / (init_r + 1e-5)` as in PEFT: finite and over 0, 8 by default.
    pub alpha: f64,
    /// The weight of the penalty that keeps the factors orthogonal: 0 or more, 0.5 by default.
    pub orthogonality: f64,
    /// What the initial factors are drawn from, together with the name of the layer; 0 by default.
    pub seed: u64,
    /// The share of the adapter's input that is dropped in training, as
    /// [`LoraConfig::dropout`](crate::LoraConfig::dropout): 0 by default.
    #[serde(skip_serializing_if = "is_default")]
    pub dropout: f64,
}

impl Default for AdaLoraConfig {
    fn default() -> Self {
        Self { init_r: 12, alpha: 8.0, orthogonality: 0.5, seed: 0, dropout: 0.0 }
    }
}

impl AdaLoraConfig {
    /// Sets the rank that the adapter starts with.
    pub fn with_init_r(mut self, init_r: usize) -> Self {
        self.init_r = init_r;
        self
    }

    /// Sets the numerator of the scale.
    pub fn with_alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }

    /// Sets the weight of the penalty.
    pub fn with_orthogonality(mut self, weight: f64) -> Self {
        self.orthogonality = weight;
        self
    }

    /// Sets the seed.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the share of the input that is dropped in training.
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.dropout = dropout;
        self
    }

    /// What the product is multiplied by.
    pub fn scale(&self) -> f64 {
        self.alpha / (self.init_r as f64 + 1e-5)
    }

    /// Checks all that can be checked without a layer.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] names the first field that is not in its range.
    pub fn validate(&self) -> crate::Result<()> {
        let fail =
            |field, expected: &str, got: String| Err(Error::Config { field, expected: expected.into(), got });
        if self.init_r == 0 {
            return fail("init_r", "at least 1", self.init_r.to_string());
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            return fail("alpha", "finite and over 0", self.alpha.to_string());
        }
        if !self.orthogonality.is_finite() || self.orthogonality < 0.0 {
            return fail("orthogonality", "0 or more", self.orthogonality.to_string());
        }
        check_rate(self.dropout)
    }
}

/// AdaLoRA: the change in the form of a singular value decomposition, whose rank is allocated during training.
///
/// ```text
/// delta(x) = scale B (E * (A x))      A: (r, in), E: (r, 1), B: (out, r)
/// penalty  = weight (|A A^T - 1| + |B^T B - 1|) / 2          Frobenius norms
/// ```
///
/// `E` is 0 at first, `A` and `B` are normal with deviation 0.02. Add [`penalty`](super::penalty) to the loss and call
/// [`RankBudget::update`](super::RankBudget::update) after each step of the optimizer: it takes ranks away by setting
/// values of `E` to 0. [`rank`](Self::rank) tells how many are left.
///
/// # References
///
/// Zhang et al., Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning,
/// [arXiv 2303.10512](https://arxiv.org/abs/2303.10512)
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use flylora::{AdaLoraAdapter, AdaLoraConfig, Adapter, Place};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let place = Place::alone("q_proj", DType::F32, &Device::Cpu);
/// let adapter = AdaLoraAdapter::new(12, 6, &AdaLoraConfig::default().with_init_r(4), &place)?;
/// let x = Tensor::ones((3, 12), DType::F32, &Device::Cpu)?;
/// assert_eq!(adapter.delta(&x)?.sqr()?.sum_all()?.to_scalar::<f32>()?, 0.0);
/// assert!(adapter.penalty()?.is_some());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct AdaLoraAdapter {
    a: Var,
    b: Var,
    e: Var,
    config: AdaLoraConfig,
    /// Which ranks the budget leaves; shared by clones, as the variables are.
    kept: Arc<RwLock<Vec<bool>>>,
    /// Shared by clones too.
    dropout: Arc<Dropout>,
}

impl AdaLoraAdapter {
    /// Makes the adapter for a layer of the given size, with variables in `place`.
    ///
    /// # Errors
    ///
    /// [`Error::Config`], [`Error::DType`], and candle's own.
    pub fn new(
        in_features: usize,
        out_features: usize,
        config: &AdaLoraConfig,
        place: &Place<'_>,
    ) -> crate::Result<Self> {
        Self::with_rank(in_features, out_features, config.init_r, config, place)
    }

    /// As [`new`](Self::new), with the rank that a file has left; the scale stays that of `init_r`.
    pub(crate) fn with_rank(
        in_features: usize,
        out_features: usize,
        r: usize,
        config: &AdaLoraConfig,
        place: &Place<'_>,
    ) -> crate::Result<Self> {
        config.validate()?;
        place.check_dtype()?;
        let mut rng = generator(config.seed, place.name());
        let (shape_a, shape_b) = ((r, in_features), (out_features, r));
        let (first_a, first_b) = (normal(shape_a, 0.02, &mut rng)?, normal(shape_b, 0.02, &mut rng)?);
        Ok(Self {
            a: place.var(shape_a, A, || Ok(first_a))?,
            b: place.var(shape_b, B, || Ok(first_b))?,
            e: place.constant((r, 1), E, 0.0)?,
            config: config.clone(),
            kept: Arc::new(RwLock::new(vec![true; r])),
            dropout: Arc::new(Dropout::new(config.dropout, config.seed, place.name())),
        })
    }

    /// `A`: (r, in).
    pub fn a(&self) -> &Var {
        &self.a
    }

    /// `B`: (out, r).
    pub fn b(&self) -> &Var {
        &self.b
    }

    /// `E`, the singular values: (r, 1).
    pub fn e(&self) -> &Var {
        &self.e
    }

    /// The configuration that the adapter was made with.
    pub fn config(&self) -> &AdaLoraConfig {
        &self.config
    }

    /// The number of ranks that the budget leaves.
    pub fn rank(&self) -> usize {
        self.kept().iter().filter(|kept| **kept).count()
    }

    /// Which ranks the budget leaves, of all that there are.
    pub fn kept(&self) -> Vec<bool> {
        self.kept.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The change, with gradients for the factors: E on the smaller side of A.
    fn low_rank(&self) -> Result<LowRank> {
        let (a, b) = (self.a.broadcast_mul(&self.e)?, self.b.as_tensor().clone());
        Ok(LowRank { a, b, scale: self.config.scale(), origin: None, mask: None, ratio: None })
    }

    /// Sets the values of `E` to 0 where `kept` is false.
    pub(super) fn keep(&self, kept: Vec<bool>) -> Result<()> {
        let mask: Vec<f32> = kept.iter().map(|kept| f32::from(u8::from(*kept))).collect();
        let mask = Tensor::from_vec(mask, self.e.shape(), &Device::Cpu)?;
        let mask = mask.to_device(self.e.device())?.to_dtype(self.e.dtype())?;
        self.e.set(&(self.e.as_detached_tensor() * mask)?)?;
        *self.kept.write().unwrap_or_else(PoisonError::into_inner) = kept;
        Ok(())
    }
}

/// `|M M^T - 1|` for M (r, n).
fn distance_from_orthogonal(m: &Tensor) -> Result<Tensor> {
    let gram = m.matmul(&m.t()?)?; // (r, r)
    let one = Tensor::eye(gram.dim(0)?, gram.dtype(), gram.device())?;
    // The root has no slope at 0.
    ((gram - one)?.sqr()?.sum_all()? + 1e-12)?.sqrt()
}

impl Adapter for AdaLoraAdapter {
    fn kind(&self) -> AdapterKind {
        AdapterKind::AdaLora(self.config.clone())
    }

    fn in_features(&self) -> usize {
        self.a.dims().last().copied().unwrap_or(0)
    }

    fn out_features(&self) -> usize {
        self.b.dims().first().copied().unwrap_or(0)
    }

    fn delta(&self, x: &Tensor) -> Result<Tensor> {
        check_input(x, self.in_features())?;
        let flat = x.reshape((rows(x.shape()), self.in_features()))?; // (m, in)
        #[cfg(feature = "cuda")]
        if let Some(delta) = self.low_rank()?.by_kernels(&self.dropout.apply(&flat)?)? {
            return delta.reshape(with_last(x.shape(), self.out_features()));
        }
        let flat = flat.to_dtype(self.a.dtype())?;
        let weights = (self.e.squeeze(D::Minus1)? * self.config.scale())?; // (r)
        let flat = self.dropout.apply(&flat)?;
        let low = times_row(&flat.matmul(&self.a.t()?)?, &weights)?; // (m, r)
        low.matmul(&self.b.t()?)?.reshape(with_last(x.shape(), self.out_features()))?.to_dtype(x.dtype())
    }

    fn layer(&self, base: &FrozenLinear, x: &Tensor) -> Result<Option<Tensor>> {
        if self.dropout.is_on() {
            return Ok(None); // the layer and its change read different inputs
        }
        self.low_rank()?.layer(base, x)
    }

    fn delta_weight(&self) -> Result<Tensor> {
        let (a, b, e) = (&self.a, &self.b, &self.e);
        let scaled =
            a.as_detached_tensor().broadcast_mul(&(e.as_detached_tensor() * self.config.scale())?)?;
        b.as_detached_tensor().matmul(&scaled)
    }

    fn merge_quality(&self) -> Merge {
        Merge::Exact
    }

    fn parameters(&self) -> Vec<(String, Var)> {
        vec![(A.to_owned(), self.a.clone()), (B.to_owned(), self.b.clone()), (E.to_owned(), self.e.clone())]
    }

    fn active_parameters(&self) -> usize {
        self.rank() * (self.in_features() + self.out_features() + 1)
    }

    fn set_training(&self, pass: Option<u64>) {
        self.dropout.set_pass(pass);
    }

    fn penalty(&self) -> Result<Option<Tensor>> {
        if self.config.orthogonality == 0.0 {
            return Ok(None);
        }
        let sum = (distance_from_orthogonal(&self.a)? + distance_from_orthogonal(&self.b.t()?)?)?;
        (sum * (0.5 * self.config.orthogonality))?.to_dtype(candle_core::DType::F32).map(Some)
    }

    fn load_state<'a>(&'a self, source: &mut StateSource<'_>) -> crate::Result<Vec<Change<'a>>> {
        let (a, b, e) = (source.like(A, &self.a)?, source.like(B, &self.b)?, source.like(E, &self.e)?);
        // A file does not name the ranks that it has given up: their value is 0 there.
        let values = e.flatten_all()?.to_dtype(candle_core::DType::F64)?.to_vec1::<f64>()?;
        let some = values.iter().any(|value| *value != 0.0);
        Ok(vec![Box::new(move || {
            self.a.set(&a)?;
            self.b.set(&b)?;
            self.e.set(&e)?;
            let kept = values.iter().map(|value| !some || *value != 0.0).collect();
            *self.kept.write().unwrap_or_else(PoisonError::into_inner) = kept;
            Ok(())
        })])
    }

    fn as_ada_lora(&self) -> Option<&AdaLoraAdapter> {
        Some(self)
    }
}
