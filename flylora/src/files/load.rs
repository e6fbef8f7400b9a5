use std::collections::BTreeSet;
use std::path::Path;

use candle_core::safetensors::Load;
use safetensors::{Dtype, SafeTensors};

use super::{PeftConfig, Stored, WEIGHTS_FILE, check_paths, key};
use crate::adapter::Adapter;
use crate::{Error, Result};

/// Reads adapters that [`save_adapters`](super::save_adapters) or PEFT wrote into adapters of the same size and scale.
///
/// Every tensor is checked before the first variable is changed: after an error all adapters are as they were. Weights
/// of another float dtype are converted. [`PeftConfig`] tells the configuration that the adapters must have.
///
/// # Errors
///
/// [`Error::Io`] and [`Error::Format`] for files that are missing, truncated or something else;
/// [`Error::Unsupported`] for a field of the configuration that asks for more than LoRA; [`Error::Mismatch`] for
/// another rank or scale; [`Error::MissingKey`], [`Error::UnexpectedKey`] and [`Error::FileShape`] for the tensors;
/// [`Error::Adapters`] where an adapter is merged, which would go on with the old weights.
pub fn load_adapters<S: Stored>(dir: impl AsRef<Path>, adapters: &[(&str, &S)]) -> Result<()> {
    let dir = dir.as_ref();
    check_paths(adapters)?;
    if let Some((path, _)) = adapters.iter().find(|(_, s)| s.is_merged()) {
        return Err(Error::Adapters { message: format!("{path} is merged: unmerge it before loading") });
    }
    let config = PeftConfig::read(dir)?;
    for (path, adapter) in adapters {
        config.check(path, adapter.stored().config())?;
    }

    let file = dir.join(WEIGHTS_FILE);
    let bytes = std::fs::read(&file).map_err(|source| Error::Io { path: file.clone(), source })?;
    let format = |message: String| Error::Format { path: file.clone(), message };
    let tensors = SafeTensors::deserialize(&bytes)
        .map_err(|e| format(format!("not a complete safetensors file: {e}")))?;
    let mut left: BTreeSet<&str> = tensors.names().into_iter().collect();
    let mut changes = Vec::with_capacity(2 * adapters.len());
    for (path, adapter) in adapters {
        for (name, var) in adapter.stored().parameters() {
            let key = key(path, &name);
            let Ok(view) = tensors.tensor(&key) else {
                return Err(Error::MissingKey { path: file, key });
            };
            left.remove(key.as_str());
            if view.shape() != var.dims() {
                let (expected, got) = (var.dims().to_vec(), view.shape().to_vec());
                return Err(Error::FileShape { path: file, key, expected, got });
            }
            if !matches!(view.dtype(), Dtype::F32 | Dtype::F64 | Dtype::BF16 | Dtype::F16) {
                return Err(format(format!(
                    "{key}: expected dtype F32, F64, BF16 or F16, got {:?}",
                    view.dtype()
                )));
            }
            let value = view.load(var.device())?.to_dtype(var.dtype())?;
            changes.push((var, value));
        }
    }
    if let Some(key) = left.first() {
        return Err(Error::UnexpectedKey {
            path: file.clone(),
            key: (*key).to_owned(),
            others: left.len() - 1,
        });
    }
    for (var, value) in changes {
        var.set(&value)?;
    }
    Ok(())
}
