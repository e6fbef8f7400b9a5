use std::collections::BTreeSet;
use std::path::Path;

use super::{AdapterFile, StateSource, Stored, check_paths};
use crate::{Error, Result};

/// Reads adapters that [`save_adapters`](super::save_adapters) or PEFT wrote into adapters of the same kind, size and
/// scale. ([`AdapterFile`] makes them from the file instead.)
///
/// A file that holds parameters of the model itself too ([`AdapterFile::saved_parameters`]) is refused by their names: they
/// would be lost.
///
/// Every tensor is checked before the first variable is changed: after an error all adapters are as they were. Weights
/// of another float dtype are converted.
///
/// # Errors
///
/// [`Error::Io`] and [`Error::Format`] for files that are missing, truncated or something else;
/// [`Error::Unsupported`] for a field of the configuration that asks for what is not there; [`Error::Mismatch`] for
/// another kind, rank or scale; [`Error::MissingKey`], [`Error::UnexpectedKey`] and [`Error::FileShape`] for the
/// tensors; [`Error::Adapters`] where an adapter is merged, which would go on with the old weights.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Linear;
/// use flylora::{Error, LoraConfig, LoraLinear, load_adapters, save_adapters};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let base = Linear::new(Tensor::randn(0f32, 0.1, (6, 12), &Device::Cpu)?, None);
/// let layer = LoraLinear::seeded(base.clone(), &LoraConfig::default().with_r(4), "q_proj")?;
/// let dir = tempfile::tempdir()?;
/// save_adapters(dir.path(), &[("layers.0.q_proj", &layer)])?;
/// load_adapters(dir.path(), &[("layers.0.q_proj", &layer)])?;
///
/// let wider = LoraLinear::seeded(base, &LoraConfig::default().with_r(5), "q_proj")?; // not that of the file
/// assert!(matches!(load_adapters(dir.path(), &[("layers.0.q_proj", &wider)]), Err(Error::Mismatch { .. })));
/// # Ok(())
/// # }
/// ```
pub fn load_adapters<S: Stored + ?Sized>(dir: impl AsRef<Path>, adapters: &[(&str, &S)]) -> Result<()> {
    check_paths(adapters)?;
    if let Some((path, _)) = adapters.iter().find(|(_, s)| s.is_merged()) {
        return Err(Error::Adapters { message: format!("{path} is merged: unmerge it before loading") });
    }
    let file = AdapterFile::read(dir)?;
    for (path, adapter) in adapters {
        file.config().check(path, &adapter.kind().as_stored())?;
    }
    let mut used = BTreeSet::new();
    let mut changes = Vec::new();
    for (path, adapter) in adapters {
        changes.extend(adapter.load_state(&mut StateSource::new(&file, path, &mut used))?);
    }
    file.check_used(&used, |_| true)?;
    changes.into_iter().try_for_each(|change| change())
}
