use candle_core::{D, DType, Result, Tensor, Var};
use half::f16;

use super::{Adapter, AdapterKind, Change, LoraAdapter, Merge};
use crate::effective::LowRank;
use crate::files::StateSource;
use crate::frozen::{check_input, rows, with_last};
use crate::linear::{added, at_least_f32, times_row};
use crate::{Error, FrozenLinear, LoraConfig, LoraInit, Place};

/// The name of the magnitudes below the name of the layer.
pub(crate) const MAGNITUDE: &str = "lora_magnitude_vector";

/// DoRA: the weight split into a direction, which LoRA changes, and a magnitude of each row, which is trained itself.
///
/// ```text
/// V = W + scale B A,   W' = m V / |V|,   m: (out), |V|: (out), the norm of each row
/// delta(x) = (m / |V| - 1) W x + (m / |V|) scale B (A x)
/// ```
///
/// `m` starts at the norms of `W`, so a new adapter adds nothing. As in the paper and in PEFT, `|V|` is treated as a
/// constant in the backward pass. With dropout both terms of the change read the x that has lost elements, as in PEFT. `|V|`
/// is computed from `W A^T` and products of size r, without ever making `V`.
///
/// # References
///
/// Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, [arXiv 2402.09353](https://arxiv.org/abs/2402.09353)
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use flylora::{Adapter, AdapterLinear, DoraAdapter, FrozenLinear, LoraConfig, Place};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let base = FrozenLinear::new(Tensor::randn(0f32, 0.1, (6, 12), &Device::Cpu)?, None)?;
/// let place = Place::alone("q_proj", DType::F32, &Device::Cpu);
/// let adapter = DoraAdapter::over(&base, &LoraConfig::default().with_r(2), &place)?;
/// assert_eq!(adapter.magnitude().dims(), [6]);
/// let layer = AdapterLinear::from_parts(base, adapter)?;
/// assert_eq!(layer.parameters().len(), 3);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DoraAdapter {
    lora: LoraAdapter,
    magnitude: Var,
    /// `W`, without the bias of the layer.
    base: FrozenLinear,
    /// The squared norms of the rows of `W`: (out), in f32 (f64 for variables of f64).
    squares: Tensor,
}

impl DoraAdapter {
    /// Makes the adapter for a layer, with variables in `place`.
    ///
    /// # Errors
    ///
    /// Those of [`LoraAdapter::over`], and [`Error::Config`] for a bias, or a start other than Kaiming's or the Gaussian one.
    pub fn over(base: &FrozenLinear, config: &LoraConfig, place: &Place<'_>) -> crate::Result<Self> {
        if !matches!(config.init, LoraInit::KaimingUniform | LoraInit::Gaussian) {
            let expected = "kaiming_uniform or gaussian for DoRA".into();
            return Err(Error::Config { field: "init", expected, got: format!("{:?}", config.init) });
        }
        config.check_no_bias("DoRA")?;
        let lora = LoraAdapter::over(base, config, place)?;
        let base = base.without_bias();
        let squares = row_squares(&base, at_least_f32(place.dtype()))?;
        let magnitude = place.var(base.out_features(), MAGNITUDE, || {
            // As |V| will be computed, so that their ratio is 1 to the bit.
            Ok(squares.sqrt()?)
        })?;
        Ok(Self { lora, magnitude, base, squares })
    }

    /// The magnitudes `m`: (out).
    pub fn magnitude(&self) -> &Var {
        &self.magnitude
    }

    /// The change of the direction.
    pub fn lora(&self) -> &LoraAdapter {
        &self.lora
    }

    /// The norms of the rows of `W + scale B A`, without gradients: (out).
    fn norms(&self) -> Result<Tensor> {
        let (a, b) = (self.lora.a().as_detached_tensor(), self.lora.b().as_detached_tensor());
        let s = self.lora.scale();
        #[cfg(feature = "cuda")]
        if let Some(norms) = crate::cuda::norms(&self.base, &a, &b, &self.squares, s)? {
            return Ok(norms);
        }
        let wide = self.squares.dtype();
        // |w + s A^T b|^2 = |w|^2 + 2 s b . (A w) + s^2 b . (A A^T) b for each row w of W and b of B.
        let wa = self.base.forward(&a.to_dtype(self.base.dtype())?)?.t()?.to_dtype(wide)?; // (out, r)
        let (a, b, dtype) = (a.to_dtype(wide)?, b.to_dtype(wide)?, a.dtype());
        let ba = b.matmul(&a.matmul(&a.t()?)?)?; // (out, r)
        let cross = ((wa * (2.0 * s))? + (ba * (s * s))?)?;
        let squares = (&self.squares + (cross * b)?.sum(D::Minus1)?)?;
        roots(&squares, dtype)
    }

    /// The change, from `W x`: (m, out), without the bias, and x: (m, in), both in the dtype of the variables.
    fn change(&self, x: &Tensor, wx: &Tensor) -> Result<Tensor> {
        let ratio = self.magnitude.div(&self.norms()?)?; // (out)
        times_row(wx, &(&ratio - 1.0)?)? + times_row(&self.lora.product(x)?, &ratio)?
    }
}

/// Norms in a dtype, from their squares in f32 at least; never 0, to be divided by.
pub(crate) fn roots(squares: &Tensor, dtype: DType) -> Result<Tensor> {
    // Rounding may take a square below 0 where the update cancels the weight.
    let norms = squares.maximum(f32::MIN_POSITIVE)?.sqrt()?.to_dtype(dtype)?;
    // The root of the smallest f32 is 0 in f16.
    if dtype == DType::F16 { norms.maximum(f16::MIN_POSITIVE_SUBNORMAL.to_f64()) } else { Ok(norms) }
}

/// The squared norm of each row in f32 or f64, a few rows at a time.
fn row_squares(base: &FrozenLinear, wide: DType) -> Result<Tensor> {
    let weight = base.weight()?;
    let rows = weight.dim(0)?;
    let step = ((1 << 20) / weight.dim(1)?).clamp(1, rows);
    let mut parts = Vec::with_capacity(rows.div_ceil(step));
    for start in (0..rows).step_by(step) {
        let part = weight.narrow(0, start, step.min(rows - start))?.to_dtype(wide)?;
        parts.push(part.sqr()?.sum(D::Minus1)?);
    }
    Tensor::cat(&parts, 0)
}

impl Adapter for DoraAdapter {
    fn kind(&self) -> AdapterKind {
        AdapterKind::Dora(self.lora.config().clone())
    }

    fn in_features(&self) -> usize {
        self.base.in_features()
    }

    fn out_features(&self) -> usize {
        self.base.out_features()
    }

    fn delta(&self, x: &Tensor) -> Result<Tensor> {
        check_input(x, self.in_features())?;
        let dtype = self.magnitude.dtype();
        let flat = x.reshape((rows(x.shape()), self.in_features()))?.to_dtype(dtype)?; // (m, in)
        let flat = self.lora.dropout().apply(&flat)?;
        let wx = self.base.forward(&flat.to_dtype(self.base.dtype())?)?.to_dtype(dtype)?; // (m, out)
        let delta = self.change(&flat, &wx)?;
        delta.reshape(with_last(x.shape(), self.out_features()))?.to_dtype(x.dtype())
    }

    fn delta_beside(&self, x: &Tensor, y: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        check_input(x, self.in_features())?;
        if self.lora.dropout().is_on() {
            return self.delta(x); // y is of the whole of x
        }
        let m = rows(x.shape());
        let dtype = self.magnitude.dtype();
        let flat = x.reshape((m, self.in_features()))?.to_dtype(dtype)?; // (m, in)
        let wx = y.reshape((m, self.out_features()))?.to_dtype(dtype)?; // (m, out)
        let wx = match bias {
            None => wx,
            Some(bias) => wx.broadcast_sub(&bias.to_dtype(dtype)?)?,
        };
        let delta = self.change(&flat, &wx)?;
        delta.reshape(with_last(x.shape(), self.out_features()))?.to_dtype(x.dtype())
    }

    fn layer(&self, base: &FrozenLinear, x: &Tensor) -> Result<Option<Tensor>> {
        if self.lora.dropout().is_on() {
            return Ok(None); // the layer and its change read different inputs
        }
        let ratio = Some(self.magnitude.div(&self.norms()?)?.unsqueeze(1)?); // (out, 1)
        let scaled = LowRank { ratio, ..self.lora.low_rank()? }.layer(&base.without_bias(), x)?;
        let Some(scaled) = scaled else { return Ok(None) };
        Ok(Some(match base.bias() {
            None => scaled,
            Some(bias) => scaled.broadcast_add(bias)?,
        }))
    }

    fn delta_weight(&self) -> Result<Tensor> {
        let weight = self.base.weight()?;
        let ratio = self.magnitude.as_detached_tensor().div(&self.norms()?)?.unsqueeze(1)?; // (out, 1)
        let changed = added(&weight, &self.lora.delta_weight()?)?;
        let changed = changed.broadcast_mul(&ratio.to_dtype(changed.dtype())?)?;
        (&changed - weight.to_dtype(changed.dtype())?)?.to_dtype(self.magnitude.dtype())
    }

    fn merge_quality(&self) -> Merge {
        Merge::Exact
    }

    fn parameters(&self) -> Vec<(String, Var)> {
        let mut parameters = self.lora.parameters();
        parameters.push((MAGNITUDE.to_owned(), self.magnitude.clone()));
        parameters
    }

    fn set_training(&self, pass: Option<u64>) {
        self.lora.set_training(pass);
    }

    fn load_state<'a>(&'a self, source: &mut StateSource<'_>) -> crate::Result<Vec<Change<'a>>> {
        let mut changes = self.lora.load_state(source)?;
        let magnitude = source.like(MAGNITUDE, &self.magnitude)?;
        changes.push(Box::new(move || Ok(self.magnitude.set(&magnitude)?)));
        Ok(changes)
    }
}
