use std::fmt;

use serde::Serialize;

use crate::{Adapter, AdapterLinear, LoraEmbedding};

/// How many parameters adapters train, and what that is compared with.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use flylora::{AdapterKind, Baseline, FlyLoraConfig, FrozenLinear, ParameterReport, Place};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let base = FrozenLinear::new(Tensor::zeros((512, 512), DType::F32, &Device::Cpu)?, None)?;
/// let kind = AdapterKind::FlyLora(FlyLoraConfig::default()); // 32 ranks, of which a token makes use of 8
/// let adapter = kind.build(&base, &Place::alone("q_proj", DType::F32, &Device::Cpu))?;
/// let report = ParameterReport::new([("q_proj", &adapter)], Some(512 * 512), Some(Baseline::lora(32)));
/// assert_eq!(report.trainable, 32 * 512);
/// assert_eq!(report.active_per_token, 8 * 512);
/// // LoRA of rank 32 would train A too: twice as much.
/// assert_eq!(report.fewer_than_baseline(), Some(50.0));
/// println!("{report}");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ParameterReport {
    /// Each adapter, in the order given.
    pub adapters: Vec<AdapterReport>,
    /// Values that training changes.
    pub trainable: usize,
    /// Of these, what one token makes use of.
    pub active_per_token: usize,
    /// Values of the frozen model, where that is known.
    pub frozen: Option<usize>,
    /// What the trainable values are compared with.
    pub baseline: Option<BaselineReport>,
}

/// What a [`ParameterReport`] counts: an [`Adapter`], an [`AdapterLinear`] or a [`LoraEmbedding`].
pub trait Counted {
    /// The numbers.
    fn counted(&self) -> Counts;
}

/// The numbers of one adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    /// The name of its kind.
    pub kind: String,
    /// The rows and columns of the weight that it is beside: (out, in), or (vocab, dim).
    pub weight: (usize, usize),
    /// Values that training changes.
    pub trainable: usize,
    /// Of these, what one token makes use of.
    pub active_per_token: usize,
}

impl<A: Adapter + ?Sized> Counted for A {
    fn counted(&self) -> Counts {
        Counts {
            kind: self.kind().to_string(),
            weight: (self.out_features(), self.in_features()),
            trainable: self.parameters().iter().map(|(_, var)| var.elem_count()).sum(),
            active_per_token: self.active_parameters(),
        }
    }
}

impl<A: Adapter> Counted for AdapterLinear<A> {
    fn counted(&self) -> Counts {
        self.adapter().counted()
    }
}

impl Counted for LoraEmbedding {
    /// A token makes use of one column of `A`, and of all else.
    fn counted(&self) -> Counts {
        let trainable = self.parameters().iter().map(|(_, var)| var.elem_count()).sum();
        let weight = self.table().dims2().unwrap_or_default();
        let active_per_token = trainable - self.a().elem_count() + self.config().r;
        Counts { kind: self.kind().to_string(), weight, trainable, active_per_token }
    }
}

/// One adapter of a [`ParameterReport`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AdapterReport {
    /// The path of its module.
    pub module: String,
    /// The name of its kind.
    pub kind: String,
    /// Values that training changes.
    pub trainable: usize,
    /// Of these, what one token makes use of.
    pub active_per_token: usize,
}

/// What the number of trainable parameters is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Baseline {
    /// LoRA of that rank on the same modules.
    Lora {
        /// The rank.
        r: usize,
    },
    /// Training the weights of the same modules.
    FullWeights,
}

impl Baseline {
    /// LoRA of that rank on the same modules.
    pub fn lora(r: usize) -> Self {
        Self::Lora { r }
    }
}

/// A [`Baseline`] with its number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BaselineReport {
    /// What it is, in words.
    pub name: String,
    /// Values that it would train.
    pub trainable: usize,
}

impl ParameterReport {
    /// Counts; `frozen` is the number of parameters of the frozen model. Layers and embeddings together are given as
    /// `&dyn Counted`.
    pub fn new<'a, A: Counted + ?Sized + 'a, S: Into<String>>(
        adapters: impl IntoIterator<Item = (S, &'a A)>,
        frozen: Option<usize>,
        baseline: Option<Baseline>,
    ) -> Self {
        let mut sizes = 0;
        let adapters: Vec<AdapterReport> = adapters
            .into_iter()
            .map(|(module, adapter)| {
                let Counts { kind, weight: (rows, columns), trainable, active_per_token } = adapter.counted();
                sizes += match baseline {
                    Some(Baseline::Lora { r }) => r * (rows + columns),
                    Some(Baseline::FullWeights) => rows * columns,
                    None => 0,
                };
                AdapterReport { module: module.into(), kind, trainable, active_per_token }
            })
            .collect();
        let name = baseline.map(|baseline| match baseline {
            Baseline::Lora { r } => format!("LoRA of rank {r} on the same modules"),
            Baseline::FullWeights => "training the weights of the same modules".to_owned(),
        });
        Self {
            trainable: adapters.iter().map(|a| a.trainable).sum(),
            active_per_token: adapters.iter().map(|a| a.active_per_token).sum(),
            adapters,
            frozen,
            baseline: name.map(|name| BaselineReport { name, trainable: sizes }),
        }
    }

    /// The share of all parameters, frozen and trained, that is trained: in percent; none of no parameters.
    pub fn percent(&self) -> Option<f64> {
        let all = self.frozen.map(|frozen| frozen + self.trainable).filter(|all| *all > 0)?;
        Some(100.0 * self.trainable as f64 / all as f64)
    }

    /// By how many percent fewer parameters are trained than by the baseline; less than 0 where there are more.
    pub fn fewer_than_baseline(&self) -> Option<f64> {
        let baseline = self.baseline.as_ref().filter(|b| b.trainable > 0)?;
        Some(100.0 * (1.0 - self.trainable as f64 / baseline.trainable as f64))
    }
}

impl fmt::Display for ParameterReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.adapters.iter().map(|a| a.module.chars().count()).max().unwrap_or(0).max(6);
        writeln!(f, "{:width$}  {:14} {:>12} {:>12}", "module", "kind", "trainable", "per token")?;
        for a in &self.adapters {
            let (module, kind) = (&a.module, &a.kind);
            writeln!(f, "{module:width$}  {kind:14} {:>12} {:>12}", a.trainable, a.active_per_token)?;
        }
        write!(f, "{:width$}  {:14} {:>12} {:>12}", "total", "", self.trainable, self.active_per_token)?;
        if let (Some(percent), Some(frozen)) = (self.percent(), self.frozen) {
            write!(f, "\n{percent:.3} % of {} parameters", frozen + self.trainable)?;
        }
        if let (Some(fewer), Some(baseline)) = (self.fewer_than_baseline(), &self.baseline) {
            let (size, way) = if fewer < 0.0 { (-fewer, "more") } else { (fewer, "fewer") };
            write!(f, "\n{size:.1} % {way} than {}, which trains {}", baseline.name, baseline.trainable)?;
        }
        Ok(())
    }
}
