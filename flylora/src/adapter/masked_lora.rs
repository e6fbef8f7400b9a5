use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use rand_chacha::rand_core::RngCore;
use serde::{Deserialize, Serialize};

use super::{Adapter, AdapterKind, Change, LoraAdapter, Merge, Step};
use crate::effective::{LowRank, Mask, Wanted};
use crate::files::StateSource;
use crate::frozen::{check_input, rows, with_last};
use crate::init::generator;
use crate::{Error, FrozenLinear, LoraConfig, LoraInit, Place};

const MASK: &str = "fly_mask";

/// How the mask of a [`MaskedLoraAdapter`] is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MaskSelection {
    /// In every forward pass the largest entries of `|B A|`; the gradient goes straight through to all entries, so those
    /// that are masked go on learning and may come back.
    #[default]
    StraightThrough,
    /// A fixed random mask at first; every so many steps the largest entries of `|B A|`.
    Magnitude {
        /// Steps from one selection to the next: at least 1.
        every: u64,
    },
    /// A fixed random mask at first; every so many steps a share of it, the smallest entries of `|B A|`, gives way to
    /// the masked entries with the largest gradient. The share shrinks like a cosine and ends at three quarters of the
    /// run (RigL, [arXiv 1911.11134](https://arxiv.org/abs/1911.11134)).
    MagnitudeGradient {
        /// Steps from one selection to the next: at least 1.
        every: u64,
        /// The share that is exchanged at first: over 0 and at most 1; 0.3 is usual.
        fraction: f64,
    },
}

/// How an adapter of the masked kind is made.
///
/// # Examples
///
/// ```
/// use flylora::{LoraConfig, MaskSelection, MaskedLoraConfig};
///
/// let config = MaskedLoraConfig::default()
///     .with_lora(LoraConfig::default().with_r(4))
///     .with_sparsity(0.9)
///     .with_selection(MaskSelection::Magnitude { every: 100 });
/// assert!(config.validate().is_ok());
/// assert!(config.with_sparsity(1.0).validate().is_err()); // nothing would be left
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MaskedLoraConfig {
    /// The rank, scale and start of the factors.
    pub lora: LoraConfig,
    /// The share of the update that is 0: from 0 up to, not including, 1; 0.75 by default.
    pub sparsity: f64,
    /// How the mask is found.
    pub selection: MaskSelection,
}

impl Default for MaskedLoraConfig {
    fn default() -> Self {
        Self { lora: LoraConfig::default(), sparsity: 0.75, selection: MaskSelection::default() }
    }
}

impl MaskedLoraConfig {
    /// Sets the rank, scale and start of the factors.
    pub fn with_lora(mut self, lora: LoraConfig) -> Self {
        self.lora = lora;
        self
    }

    /// Sets the share of the update that is 0.
    pub fn with_sparsity(mut self, sparsity: f64) -> Self {
        self.sparsity = sparsity;
        self
    }

    /// Sets how the mask is found.
    pub fn with_selection(mut self, selection: MaskSelection) -> Self {
        self.selection = selection;
        self
    }

    /// Checks that every field is in its range.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] names the first one that is not.
    pub fn validate(&self) -> crate::Result<()> {
        let fail =
            |field, expected: &str, got: String| Err(Error::Config { field, expected: expected.into(), got });
        self.lora.validate()?;
        self.lora.check_no_bias("a masked adapter")?;
        if !matches!(self.lora.init, LoraInit::KaimingUniform | LoraInit::Gaussian) {
            // B A must be 0 at first, whatever the mask.
            let expected = "kaiming_uniform or gaussian for a masked adapter";
            return fail("init", expected, format!("{:?}", self.lora.init));
        }
        if !(self.sparsity >= 0.0 && self.sparsity < 1.0) {
            return fail("sparsity", "from 0 up to 1, without it", self.sparsity.to_string());
        }
        match self.selection {
            MaskSelection::Magnitude { every: 0 } | MaskSelection::MagnitudeGradient { every: 0, .. } => {
                fail("every", "at least 1", "0".into())
            }
            MaskSelection::MagnitudeGradient { fraction, .. } if !(fraction > 0.0 && fraction <= 1.0) => {
                fail("fraction", "over 0 and at most 1", fraction.to_string())
            }
            _ => Ok(()),
        }
    }
}

/// The sparse update of Vesper's description, which it calls FlyLoRA too: LoRA's, most of whose entries are 0.
///
/// ```text
/// W' = W + scale M * (B A)      M: (out, in), of zeros and ones, 75 % zeros by default
/// ```
///
/// The mask is learned: see [`MaskSelection`]. What is masked is exactly 0 in the outputs, in the merged weight and in
/// the file. It makes the update sparse, not cheap: a masked product has no low rank, so forward and backward make an update
/// of the size of the weight, and a mask through which the gradient does not go straight makes a gradient of that size too.
/// The trained values are those of LoRA.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use flylora::{Adapter, MaskedLoraAdapter, MaskedLoraConfig, Place};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let place = Place::alone("q_proj", DType::F32, &Device::Cpu);
/// let config = MaskedLoraConfig::default();
/// let adapter = MaskedLoraAdapter::new(16, 12, &config, &place)?;
/// adapter.lora().b().set(&Tensor::randn(0f32, 1.0, (12, 8), &Device::Cpu)?)?;
/// let update = adapter.delta_weight()?.flatten_all()?.to_vec1::<f32>()?;
/// assert_eq!(update.iter().filter(|v| **v == 0.0).count(), 12 * 16 * 3 / 4);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct MaskedLoraAdapter {
    lora: LoraAdapter,
    config: MaskedLoraConfig,
    state: Arc<State>,
}

/// What is not trained by gradients; shared by clones, as the variables are.
#[derive(Debug)]
struct State {
    /// (out, in), of zeros and ones, in the dtype of the variables. Not used where the selection is made each time.
    mask: RwLock<Tensor>,
    /// The gradient of `B A`, for the next selection.
    wanted: Arc<Wanted>,
}

impl MaskedLoraAdapter {
    /// Makes the adapter for a layer of the given size, with variables in `place`.
    ///
    /// # Errors
    ///
    /// [`Error::Config`], [`Error::DType`], and candle's own.
    pub fn new(
        in_features: usize,
        out_features: usize,
        config: &MaskedLoraConfig,
        place: &Place<'_>,
    ) -> crate::Result<Self> {
        config.validate()?;
        let weight = Tensor::zeros((out_features, in_features), DType::F32, &Device::Cpu)?;
        let lora = LoraAdapter::over(&FrozenLinear::new(weight, None)?, &config.lora, place)?;
        let n = out_features * in_features;
        let mut rng = generator(config.lora.seed, &format!("{}.{MASK}", place.name()));
        let order: Vec<f32> = (0..n).map(|_| (rng.next_u32() >> 8) as f32).collect();
        let order = Tensor::from_vec(order, (out_features, in_features), &Device::Cpu)?;
        let mask = largest(&order, kept(n, config.sparsity))?;
        let every = match config.selection {
            MaskSelection::MagnitudeGradient { every, .. } => every,
            _ => 0,
        };
        Ok(Self {
            lora,
            config: config.clone(),
            state: Arc::new(State {
                mask: RwLock::new(mask.to_device(place.device())?.to_dtype(place.dtype())?),
                wanted: Arc::new(Wanted { wanted: (every == 1).into(), ..Wanted::default() }),
            }),
        })
    }

    /// The factors.
    pub fn lora(&self) -> &LoraAdapter {
        &self.lora
    }

    /// The configuration that the adapter was made with.
    pub fn config(&self) -> &MaskedLoraConfig {
        &self.config
    }

    /// The mask, zeros and ones: (out, in).
    ///
    /// # Errors
    ///
    /// candle's own.
    pub fn mask(&self) -> Result<Tensor> {
        self.mask_of(&self.product()?)
    }

    fn mask_of(&self, product: &Tensor) -> Result<Tensor> {
        match self.config.selection {
            MaskSelection::StraightThrough => self.by_magnitude(product),
            _ => Ok(self.state.mask.read().unwrap_or_else(PoisonError::into_inner).clone()),
        }
    }

    /// The mask of the largest entries.
    fn by_magnitude(&self, product: &Tensor) -> Result<Tensor> {
        largest(&product.abs()?, kept(product.elem_count(), self.config.sparsity))
    }

    fn product(&self) -> Result<Tensor> {
        self.lora.b().as_detached_tensor().matmul(&self.lora.a().as_detached_tensor())
    }

    fn set_mask(&self, mask: Tensor) {
        *self.state.mask.write().unwrap_or_else(PoisonError::into_inner) = mask;
    }

    /// RigL's exchange of the share `fraction` of the mask.
    fn exchange(&self, fraction: f64, gradient: &Tensor) -> Result<()> {
        let product = self.product()?;
        let mask = self.mask_of(&product)?;
        let (size, slope) = (product.abs()?.to_dtype(DType::F32)?, gradient.abs()?.to_dtype(DType::F32)?);
        let ones = mask.ne(0.0)?.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()? as usize;
        let moved = (fraction * ones as f64) as usize;
        // Below any size where it is masked, so that what is kept comes from the mask.
        let none = (size.ones_like()? * -1.0)?;
        let stays = largest(&mask.ne(0.0)?.where_cond(&size, &none)?, ones - moved)?;
        let grown = largest(&stays.ne(0.0)?.where_cond(&none, &slope)?, moved)?;
        self.set_mask((stays + grown)?.to_dtype(mask.dtype())?);
        Ok(())
    }

    fn low_rank(&self) -> Result<LowRank> {
        let mask = Mask {
            ones: self.mask()?,
            through: self.config.selection == MaskSelection::StraightThrough,
            wanted: Arc::clone(&self.state.wanted),
        };
        Ok(LowRank { mask: Some(mask), ..self.lora.low_rank()? })
    }
}

fn kept(n: usize, sparsity: f64) -> usize {
    n - (sparsity * n as f64).round() as usize
}

fn to_vec(t: &Tensor) -> Result<Vec<f32>> {
    t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// 1 for the `n` largest values, else 0; equal values are taken in a scattered order that is always the same.
fn largest(values: &Tensor, n: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if values.device().is_cuda() && values.dtype() != DType::F64 {
        return crate::cuda::largest(&values.to_dtype(DType::F32)?, n)?.to_dtype(values.dtype());
    }
    let (shape, device) = (values.shape(), values.device());
    Tensor::from_vec(largest_of(&to_vec(values)?, n), shape, device)?.to_dtype(values.dtype())
}

fn largest_of(values: &[f32], n: usize) -> Vec<f32> {
    let scattered = |i: u32| i.wrapping_mul(0x9e37_79b1);
    let value = |i: u32| values.get(i as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    if n > 0 && n < order.len() {
        order.select_nth_unstable_by(n - 1, |a, b| {
            value(*b).total_cmp(&value(*a)).then(scattered(*a).cmp(&scattered(*b)))
        });
    }
    let mut mask = vec![0f32; values.len()];
    for i in order.iter().take(n) {
        if let Some(m) = mask.get_mut(*i as usize) {
            *m = 1.0;
        }
    }
    mask
}

impl Adapter for MaskedLoraAdapter {
    fn kind(&self) -> AdapterKind {
        AdapterKind::MaskedLora(self.config.clone())
    }

    fn in_features(&self) -> usize {
        self.lora.in_features()
    }

    fn out_features(&self) -> usize {
        self.lora.out_features()
    }

    fn delta(&self, x: &Tensor) -> Result<Tensor> {
        check_input(x, self.in_features())?;
        let dtype = match x.dtype() {
            // A weight of the change alone in a half type, as products of it would be rounded anyway.
            DType::BF16 | DType::F16 if x.device().is_cuda() => x.dtype(),
            _ => self.lora.a().dtype(),
        };
        let flat = x.reshape((rows(x.shape()), self.in_features()))?.to_dtype(dtype)?; // (m, in)
        let delta = self.low_rank()?.alone(&self.lora.dropout().apply(&flat)?)?;
        delta.reshape(with_last(x.shape(), self.out_features()))?.to_dtype(x.dtype())
    }

    fn layer(&self, base: &FrozenLinear, x: &Tensor) -> Result<Option<Tensor>> {
        if self.lora.dropout().is_on() {
            return Ok(None); // the layer and its change read different inputs
        }
        self.low_rank()?.layer(base, x)
    }

    fn delta_weight(&self) -> Result<Tensor> {
        let product = self.product()?;
        (&product * self.mask_of(&product)?)? * self.lora.scale()
    }

    fn merge_quality(&self) -> Merge {
        Merge::Exact
    }

    fn parameters(&self) -> Vec<(String, Var)> {
        self.lora.parameters()
    }

    fn set_training(&self, pass: Option<u64>) {
        self.lora.set_training(pass);
    }

    fn after_step(&self, step: Step, _: &GradStore) -> crate::Result<()> {
        let due = |every: u64| step.index.is_multiple_of(every);
        match self.config.selection {
            MaskSelection::Magnitude { every } if due(every) => {
                let mask = self.by_magnitude(&self.product()?)?;
                self.set_mask(mask);
            }
            MaskSelection::MagnitudeGradient { every, fraction } => {
                self.state.wanted.wanted.store((step.index + 1).is_multiple_of(every), Ordering::Relaxed);
                let gradient =
                    self.state.wanted.gradient.lock().unwrap_or_else(PoisonError::into_inner).take();
                let end = 0.75 * step.total as f64;
                if let Some(gradient) = gradient.filter(|_| due(every) && (step.index as f64) < end) {
                    let share = 0.5 * (1.0 + (std::f64::consts::PI * step.index as f64 / end).cos());
                    self.exchange(fraction * share, &gradient)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn state(&self) -> crate::Result<Vec<(String, Tensor)>> {
        let mut state = self.lora.state()?;
        let (out_features, in_features) = (self.out_features(), self.in_features());
        let bytes: Vec<u8> = to_vec(&self.mask()?)?
            .chunks(in_features)
            .flat_map(|row| row.chunks(8))
            .map(|bits| bits.iter().enumerate().fold(0, |byte, (i, bit)| byte | (u8::from(*bit != 0.0) << i)))
            .collect();
        let packed = Tensor::from_vec(bytes, (out_features, in_features.div_ceil(8)), &Device::Cpu)?;
        state.push((MASK.to_owned(), packed));
        Ok(state)
    }

    fn load_state<'a>(&'a self, source: &mut StateSource<'_>) -> crate::Result<Vec<Change<'a>>> {
        let mut changes = self.lora.load_state(source)?;
        let (out_features, in_features) = (self.out_features(), self.in_features());
        let packed = source.raw(MASK, &[out_features, in_features.div_ceil(8)], DType::U8)?;
        let bits: Vec<f32> = packed
            .to_vec2::<u8>()?
            .iter()
            .flat_map(|row| (0..in_features).map(|i| f32::from((row[i / 8] >> (i % 8)) & 1)))
            .collect();
        let a = self.lora.a();
        let mask = Tensor::from_vec(bits, (out_features, in_features), &Device::Cpu)?
            .to_device(a.device())?
            .to_dtype(a.dtype())?;
        changes.push(Box::new(move || {
            self.set_mask(mask);
            Ok(())
        }));
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_chosen_and_ties_are_scattered_but_always_the_same() {
        assert_eq!(largest_of(&[0.5, 3.0, -1.0, 2.0], 2), [0.0, 1.0, 0.0, 1.0]);
        let ties = largest_of(&[0.0; 1000], 250);
        assert_eq!(ties.iter().sum::<f32>(), 250.0);
        assert_eq!(ties, largest_of(&[0.0; 1000], 250));
        for part in ties.chunks(250) {
            assert!((30.0..100.0).contains(&part.iter().sum::<f32>()));
        }
        assert_eq!(largest_of(&[1.0, 2.0], 0), [0.0, 0.0]);
        assert_eq!(largest_of(&[1.0, 2.0], 2), [1.0, 1.0]);
    }
}
