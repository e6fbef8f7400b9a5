use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    AdaLoraAdapter, AdaLoraConfig, Adapter, DoraAdapter, FlyLoraAdapter, FlyLoraConfig, LoraAdapter,
    MaskedLoraAdapter, MaskedLoraConfig,
};
use crate::{FrozenLinear, LoraConfig, LoraInit, Place, Result, Scaling};

/// A kind of adapter with its configuration: what a layer's adapter is made from.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use flylora::{Adapter, AdapterKind, FlyLoraConfig, FrozenLinear, LoraConfig, Place};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let base = FrozenLinear::new(Tensor::randn(0f32, 0.1, (48, 64), &Device::Cpu)?, None)?;
/// for kind in [AdapterKind::Dora(LoraConfig::default()), AdapterKind::FlyLora(FlyLoraConfig::default())] {
///     let adapter = kind.build(&base, &Place::alone("q_proj", DType::F32, &Device::Cpu))?;
///     assert_eq!(adapter.kind(), kind);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum AdapterKind {
    /// [`LoraAdapter`]: LoRA, rank-stabilised LoRA, PiSSA.
    Lora(LoraConfig),
    /// [`DoraAdapter`].
    Dora(LoraConfig),
    /// [`AdaLoraAdapter`].
    AdaLora(AdaLoraConfig),
    /// [`FlyLoraAdapter`]: FlyLoRA of the paper.
    FlyLora(FlyLoraConfig),
    /// [`MaskedLoraAdapter`]: the masked update of Vesper's description.
    MaskedLora(MaskedLoraConfig),
}

impl AdapterKind {
    /// Makes an adapter of this kind for a layer, with variables in `place`.
    ///
    /// # Errors
    ///
    /// Those of the kind's own constructor.
    pub fn build(&self, base: &FrozenLinear, place: &Place<'_>) -> Result<Arc<dyn Adapter>> {
        let (inputs, outputs) = (base.in_features(), base.out_features());
        Ok(match self {
            Self::Lora(config) => Arc::new(LoraAdapter::over(base, config, place)?),
            Self::Dora(config) => Arc::new(DoraAdapter::over(base, config, place)?),
            Self::AdaLora(config) => Arc::new(AdaLoraAdapter::new(inputs, outputs, config, place)?),
            Self::FlyLora(config) => Arc::new(FlyLoraAdapter::new(inputs, outputs, config, place)?),
            Self::MaskedLora(config) => Arc::new(MaskedLoraAdapter::new(inputs, outputs, config, place)?),
        })
    }

    /// Checks all that can be checked without a layer.
    ///
    /// # Errors
    ///
    /// [`Error::Config`](crate::Error::Config) names the first field that is not in its range.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Lora(config) => config.validate(),
            Self::Dora(config) => config.validate().and_then(|()| config.check_no_bias("DoRA")),
            Self::AdaLora(config) => config.validate(),
            Self::FlyLora(config) => config.validate(),
            Self::MaskedLora(config) => config.validate(),
        }
    }

    /// What a file says of such an adapter: a PiSSA adapter is stored as the LoRA of twice the rank that it is equal to.
    pub(crate) fn as_stored(&self) -> Self {
        match self {
            Self::Lora(config) if matches!(config.init, LoraInit::Pissa { .. }) => {
                let alpha = match config.scaling {
                    Scaling::AlphaOverR => config.alpha * 2.0,
                    Scaling::AlphaOverSqrtR => config.alpha * std::f64::consts::SQRT_2,
                };
                let init = LoraInit::default();
                Self::Lora(LoraConfig { r: 2 * config.r, alpha, init, ..config.clone() })
            }
            other => other.clone(),
        }
    }
}

impl fmt::Display for AdapterKind {
    /// The kind's name, as people write it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lora(config) | Self::Dora(config) => match (self, config.init, config.scaling) {
                (Self::Dora(_), _, _) => "DoRA",
                (_, LoraInit::Pissa { .. }, _) => "PiSSA",
                (_, _, Scaling::AlphaOverSqrtR) => "rsLoRA",
                (_, _, Scaling::AlphaOverR) => "LoRA",
            },
            Self::AdaLora(_) => "AdaLoRA",
            Self::FlyLora(_) => "FlyLoRA",
            Self::MaskedLora(_) => "masked FlyLoRA",
        })
    }
}
