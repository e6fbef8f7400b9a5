//! Several LoRA adapters of one layer, or of one embedding table, made into one.

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;

use crate::adapter::{Adapter, LoraAdapter};
use crate::init::{generator, unit};
use crate::{AdapterKind, Error, LoraConfig, LoraEmbedding, Result, svd};

/// What sparse rules work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Over {
    /// On the factors `A` and `B`, each by itself, as PEFT's `ties`, `dare_linear` and so on do. All ranks must be equal.
    Factors,
    /// On the products `B A`, then brought to a rank by singular values: PEFT's `ties_svd` and so on. Exact up to what
    /// the rank leaves out, at the cost of a decomposition of the size of the weight.
    Product {
        /// The rank of the result; no more than the layer's smaller side.
        rank: usize,
    },
}

/// Whose sign counts where adapters disagree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum MajoritySign {
    /// The sign of the sum.
    #[default]
    Total,
    /// The sign that more of them have.
    Frequency,
}

/// How adapters are combined; the names are PEFT's.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Combination {
    /// The weighted sum of the changes, exactly, by putting the factors side by side: the rank is the sum of the ranks.
    Cat,
    /// The weighted sum of the changes, brought to a rank by its largest singular values. Exact where the rank is the
    /// sum of the ranks, else the nearest there is.
    Svd {
        /// The rank of the result; no more than the adapters have together.
        rank: usize,
    },
    /// The weighted sums of the factors by themselves. The product of sums is not the sum of products, so the result has
    /// terms that mix the adapters: a rough approximation. All ranks must be equal.
    Linear,
    /// The weighted sum of what is left of each after its smallest values are dropped.
    MagnitudePrune {
        /// The share of the values that is kept: from 0 to 1.
        density: f64,
        /// What is dropped from.
        over: Over,
    },
    /// As `MagnitudePrune`, but each value is the mean over the adapters that have the majority's sign there
    /// ([arXiv 2306.01708](https://arxiv.org/abs/2306.01708)).
    Ties {
        /// The share of the values that is kept: from 0 to 1.
        density: f64,
        /// Whose sign counts.
        sign: MajoritySign,
        /// What is dropped from.
        over: Over,
    },
    /// The weighted sum of what is left of each after values at random are dropped, scaled up by as much
    /// ([arXiv 2311.03099](https://arxiv.org/abs/2311.03099)).
    DareLinear {
        /// The share of the values that is kept: over 0 and at most 1.
        density: f64,
        /// What is dropped is drawn from this.
        seed: u64,
        /// What is dropped from.
        over: Over,
    },
    /// As `DareLinear`, with the mean of `Ties`.
    DareTies {
        /// The share of the values that is kept: over 0 and at most 1.
        density: f64,
        /// What is dropped is drawn from this.
        seed: u64,
        /// Whose sign counts.
        sign: MajoritySign,
        /// What is dropped from.
        over: Over,
    },
}

/// Makes one adapter of several of the same layer, each with a weight that may be negative; its scale is 1. Biases of the
/// adapters ([`LoraConfig::bias`]) are added up by weight where the combination is a sum.
///
/// # Errors
///
/// [`Error::Adapters`] where there is none, or they do not go together; [`Error::Config`] for a weight or a field of the
/// combination that is not in its range; and candle's own.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use flylora::{Adapter, Combination, LoraAdapter, LoraConfig, combine};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let make = |name: &str| -> Result<LoraAdapter, Box<dyn std::error::Error>> {
///     let config = LoraConfig::default().with_r(2);
///     let adapter = LoraAdapter::seeded(12, 6, &config, name, DType::F32, &Device::Cpu)?;
///     adapter.b().set(&Tensor::randn(0f32, 1.0, (6, 2), &Device::Cpu)?)?;
///     Ok(adapter)
/// };
/// let (french, verse) = (make("french")?, make("verse")?);
/// let both = combine(&[(&french, 0.5), (&verse, 0.5)], Combination::Cat)?;
/// let want = ((french.delta_weight()? + verse.delta_weight()?)? * 0.5)?;
/// let error = (both.delta_weight()? - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(error < 1e-5);
/// assert_eq!(both.config().r, 4);
/// # Ok(())
/// # }
/// ```
pub fn combine(adapters: &[(&LoraAdapter, f64)], how: Combination) -> Result<LoraAdapter> {
    let parts = adapters
        .iter()
        .map(|(adapter, weight)| Part::new(adapter.factors()?, adapter.scale(), *weight))
        .collect::<Result<Vec<_>>>()?;
    let (first, _) = adapters.first().ok_or_else(none)?;
    let (a, b, config) = combined(&parts, how, first.a())?;
    let bias = bias(adapters, how)?;
    let combined = LoraAdapter::from_factors(&a, &b, &config.with_bias(bias.is_some()))?;
    if let (Some(own), Some(bias)) = (combined.bias(), bias) {
        own.set(&bias.to_device(own.device())?.to_dtype(own.dtype())?)?;
    }
    Ok(combined)
}

/// The weighted sum of the biases of the adapters, where there are any.
fn bias(adapters: &[(&LoraAdapter, f64)], how: Combination) -> Result<Option<Tensor>> {
    let mut sum: Option<Tensor> = None;
    for (adapter, weight) in adapters {
        let Some(bias) = adapter.delta_bias()? else { continue };
        let bias = (bias.to_device(&Device::Cpu)?.to_dtype(DType::F64)? * *weight)?;
        sum = Some(match sum {
            None => bias,
            Some(sum) => (sum + bias)?,
        });
    }
    let is_sum = matches!(how, Combination::Cat | Combination::Svd { .. } | Combination::Linear);
    if sum.is_some() && !is_sum {
        let message = "adapters with a bias are combined by Cat, Svd or Linear: others have no rule for it";
        return Err(Error::Adapters { message: message.into() });
    }
    Ok(sum)
}

/// Makes one embedding of several with adapters over the same table, each with a weight that may be negative, as
/// [`combine`] does for layers; its scale is 1. The table is that of the first.
///
/// # Errors
///
/// As [`combine`], and [`Error::Adapters`] for an embedding with DoRA, whose magnitudes cannot be combined.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use flylora::{Combination, LoraConfig, LoraEmbedding, Place, combine_embeddings};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let table = Tensor::randn(0f32, 1.0, (100, 16), &Device::Cpu)?; // (vocab, dim)
/// let make = |name: &str| {
///     let place = Place::alone(name, DType::F32, &Device::Cpu);
///     LoraEmbedding::new(table.clone(), &LoraConfig::default().with_r(2), &place)
/// };
/// let (french, verse) = (make("french")?, make("verse")?);
/// let both = combine_embeddings(&[(&french, 0.5), (&verse, 0.5)], Combination::Svd { rank: 3 })?;
/// assert_eq!(both.config().r, 3);
/// # Ok(())
/// # }
/// ```
pub fn combine_embeddings(adapters: &[(&LoraEmbedding, f64)], how: Combination) -> Result<LoraEmbedding> {
    let (first, _) = adapters.first().ok_or_else(none)?;
    let parts = adapters
        .iter()
        .map(|(embedding, weight)| {
            let kind = embedding.kind();
            if !matches!(kind, AdapterKind::Lora(_)) {
                return Err(Error::Adapters {
                    message: format!("{kind} of an embedding cannot be combined"),
                });
            }
            let factors = (embedding.a().as_detached_tensor(), embedding.b().as_detached_tensor());
            Part::new(factors, embedding.config().scale(), *weight)
        })
        .collect::<Result<Vec<_>>>()?;
    let (a, b, config) = combined(&parts, how, first.a())?;
    LoraEmbedding::from_factors(first.table().clone(), &a, &b, &config)
}

/// `A` and `B` of the combination, in the dtype and on the device of `like`, and their configuration, of scale 1.
fn combined(parts: &[Part], how: Combination, like: &Tensor) -> Result<(Tensor, Tensor, LoraConfig)> {
    check(parts)?;
    let (b, a) = match how {
        Combination::Cat => side_by_side(parts)?,
        Combination::Svd { rank } => {
            check_rank(rank)?;
            let (b, a) = side_by_side(parts)?;
            svd::of_product(&b, &a, rank)?.balanced()?
        }
        Combination::Linear => {
            over_factors(parts, &Rule { density: 1.0, drop: Drop::Smallest, elect: None })?
        }
        Combination::MagnitudePrune { density, over } => {
            Rule { density, drop: Drop::Smallest, elect: None }.run(parts, over)?
        }
        Combination::Ties { density, sign, over } => {
            Rule { density, drop: Drop::Smallest, elect: Some(sign) }.run(parts, over)?
        }
        Combination::DareLinear { density, seed, over } => {
            Rule { density, drop: Drop::Random(seed), elect: None }.run(parts, over)?
        }
        Combination::DareTies { density, seed, sign, over } => {
            Rule { density, drop: Drop::Random(seed), elect: Some(sign) }.run(parts, over)?
        }
    };
    let as_like = |t: Tensor| t.to_device(like.device())?.to_dtype(like.dtype());
    let (a, b) = (as_like(a)?, as_like(b)?);
    let r = a.dim(0)?;
    Ok((a, b, LoraConfig::default().with_r(r).with_alpha(r as f64)))
}

/// An adapter's factors, in f64 on the CPU since those of others may be of another dtype or elsewhere, its change
/// `scale B A`, and what that counts for.
struct Part {
    a: Tensor,
    b: Tensor,
    scale: f64,
    weight: f64,
}

impl Part {
    fn new((a, b): (Tensor, Tensor), scale: f64, weight: f64) -> Result<Self> {
        let wide = |t: Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F64);
        Ok(Self { a: wide(a)?, b: wide(b)?, scale, weight })
    }

    /// What the product of the factors counts for.
    fn factor(&self) -> f64 {
        self.weight * self.scale
    }
}

fn none() -> Error {
    Error::Adapters { message: "there is no adapter to combine".into() }
}

/// That there are adapters, of one size, with weights that are numbers.
fn check(parts: &[Part]) -> Result<()> {
    let size = |part: &Part| -> Result<(usize, usize)> { Ok((part.b.dim(0)?, part.a.dim(1)?)) };
    let first = size(parts.first().ok_or_else(none)?)?;
    for part in parts {
        let got = size(part)?;
        if got != first {
            let message = format!("adapters of (out, in) = {first:?} and {got:?} are of different layers");
            return Err(Error::Adapters { message });
        }
        if !part.weight.is_finite() {
            let expected = "finite".into();
            return Err(Error::Config { field: "weight", expected, got: part.weight.to_string() });
        }
    }
    Ok(())
}

fn check_rank(rank: usize) -> Result<()> {
    if rank == 0 {
        return Err(Error::Config { field: "rank", expected: "at least 1".into(), got: "0".into() });
    }
    Ok(())
}

/// `(B, A)` with `B A` the weighted sum.
fn side_by_side(parts: &[Part]) -> Result<(Tensor, Tensor)> {
    let a = parts.iter().map(|p| &p.a * p.factor()).collect::<candle_core::Result<Vec<_>>>()?;
    let b: Vec<&Tensor> = parts.iter().map(|p| &p.b).collect();
    Ok((Tensor::cat(&b, 1)?, Tensor::cat(&a, 0)?))
}

enum Drop {
    Smallest,
    Random(u64),
}

struct Rule {
    density: f64,
    drop: Drop,
    elect: Option<MajoritySign>,
}

impl Rule {
    fn run(&self, parts: &[Part], over: Over) -> Result<(Tensor, Tensor)> {
        let least = if matches!(self.drop, Drop::Random(_)) { f64::MIN_POSITIVE } else { 0.0 };
        if !(self.density >= least && self.density <= 1.0) {
            let expected = "a share, at most 1".into();
            return Err(Error::Config { field: "density", expected, got: self.density.to_string() });
        }
        match over {
            Over::Factors => over_factors(parts, self),
            Over::Product { rank } => {
                check_rank(rank)?;
                // With their scales: whose sign counts is a matter of what the adapters do.
                let products: Vec<Vec<f64>> =
                    parts.iter().map(|p| values(&p.b.matmul(&(&p.a * p.scale)?)?)).collect::<Result<_>>()?;
                let weights: Vec<f64> = parts.iter().map(|p| p.weight).collect();
                let (b, a) = parts.first().map(|p| (&p.b, &p.a)).ok_or_else(none)?;
                let shape = (b.dim(0)?, a.dim(1)?);
                let sum = self.combine(&products, &weights, "product");
                svd::truncated(nalgebra::DMatrix::from_row_slice(shape.0, shape.1, &sum), rank)?.balanced()
            }
        }
    }

    /// The combination of lists of values of one length.
    fn combine(&self, tasks: &[Vec<f64>], weights: &[f64], name: &str) -> Vec<f64> {
        let pruned: Vec<Vec<f64>> = match self.drop {
            Drop::Smallest => tasks.iter().map(|t| largest(t, self.density)).collect(),
            Drop::Random(seed) => {
                let mut rng = generator(seed, name);
                tasks.iter().map(|t| random(t, self.density, &mut rng)).collect()
            }
        };
        let n = pruned.first().map_or(0, Vec::len);
        let at =
            |i: usize| pruned.iter().zip(weights).map(move |(t, w)| (t.get(i).copied().unwrap_or(0.0), *w));
        (0..n)
            .map(|i| match self.elect {
                None => at(i).map(|(v, w)| v * w).sum(),
                Some(sign) => elected(sign, at(i)),
            })
            .collect()
    }
}

/// The weighted sum over the values with the majority's sign, by their number.
fn elected(sign: MajoritySign, values: impl Iterator<Item = (f64, f64)> + Clone) -> f64 {
    let of = |v: f64| if v == 0.0 { 0.0 } else { v.signum() };
    let total: f64 = match sign {
        MajoritySign::Total => values.clone().map(|(v, _)| v).sum(),
        MajoritySign::Frequency => values.clone().map(|(v, _)| of(v)).sum(),
    };
    let majority = if total >= 0.0 { 1.0 } else { -1.0 };
    let (sum, count) = values
        .filter(|(v, _)| of(*v) == majority)
        .fold((0.0, 0usize), |(sum, count), (v, w)| (sum + v * w, count + 1));
    sum / count.max(1) as f64
}

/// The rule on `A` and `B` by themselves; the root of the weight goes into each, its sign into `A`.
fn over_factors(parts: &[Part], rule: &Rule) -> Result<(Tensor, Tensor)> {
    let ranks: Vec<usize> = parts.iter().map(|p| Ok(p.a.dim(0)?)).collect::<Result<_>>()?;
    if ranks.windows(2).any(|r| r.first() != r.last()) {
        let message = format!("the factors of adapters of ranks {ranks:?} cannot be added: use Cat or Svd");
        return Err(Error::Adapters { message });
    }
    let run = |of: fn(&Part) -> (&Tensor, f64), name: &str| -> Result<Tensor> {
        let tasks: Vec<Vec<f64>> = parts.iter().map(|p| values(of(p).0)).collect::<Result<_>>()?;
        let weights: Vec<f64> = parts.iter().map(|p| of(p).1).collect();
        let shape = of(parts.first().ok_or_else(none)?).0.shape().clone();
        Ok(Tensor::from_vec(rule.combine(&tasks, &weights, name), shape, &Device::Cpu)?)
    };
    let a = run(|p| (&p.a, p.factor().abs().sqrt().copysign(p.factor())), "A")?;
    let b = run(|p| (&p.b, p.factor().abs().sqrt()), "B")?;
    Ok((b, a))
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.flatten_all()?.to_vec1()?)
}

/// The share of values of largest size, else 0; of equal sizes the first.
fn largest(values: &[f64], density: f64) -> Vec<f64> {
    let keep = (density * values.len() as f64) as usize;
    let mut order: Vec<(usize, f64)> = values.iter().copied().enumerate().collect();
    order.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()).then(a.0.cmp(&b.0)));
    let mut kept = vec![0.0; values.len()];
    for (i, value) in order.into_iter().take(keep) {
        if let Some(k) = kept.get_mut(i) {
            *k = value;
        }
    }
    kept
}

/// A random share of the values, scaled up so that their sum stays the same on average.
fn random(values: &[f64], density: f64, rng: &mut ChaCha8Rng) -> Vec<f64> {
    values.iter().map(|v| if unit(rng) < density { v / density } else { 0.0 }).collect()
}
