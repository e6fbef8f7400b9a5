//! Telling models apart by their content.

use candle_core::{DType, Device, Tensor};
use half::bf16;
use sha2::{Digest, Sha256};

use crate::{Result, VesperLM};

/// SHA-256 over a model's configuration, weights and adapters, in hexadecimal.
///
/// Weights count as rounded to bf16, so that a checkpoint has the same fingerprint whether it is loaded in f32 or in bf16.
/// (In f16 it may have another.) It reads every weight once.
///
/// # Errors
/// A device that fails.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::VarMap;
/// use vesper_model::metacognition::fingerprint;
/// use vesper_model::{VesperConfig, VesperLM};
///
/// let config = VesperConfig::preset("nano")?.with_vocab(64);
/// let model = |seed| VesperLM::initialize(&config, &VarMap::new(), seed, DType::F32, &Device::Cpu);
/// assert_eq!(fingerprint(&model(0)?)?, fingerprint(&model(0)?)?);
/// assert_ne!(fingerprint(&model(0)?)?, fingerprint(&model(1)?)?);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
pub fn fingerprint(model: &VesperLM) -> Result<String> {
    let mut tensors: Vec<(String, Tensor)> = model.dequantized()?.weights().into_iter().collect();
    for (module, adapter) in model.adapters() {
        let state = adapter.state()?;
        tensors.extend(state.into_iter().map(|(name, tensor)| (format!("{module}.{name}"), tensor)));
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));

    let mut hash = Sha256::new();
    let config = serde_json::to_vec(model.config()).map_err(candle_core::Error::wrap)?;
    part(&mut hash, &config);
    for (name, tensor) in tensors {
        part(&mut hash, name.as_bytes());
        part(&mut hash, format!("{:?}", tensor.dims()).as_bytes());
        let values =
            tensor.to_device(&Device::Cpu)?.to_dtype(DType::BF16)?.flatten_all()?.to_vec1::<bf16>()?;
        let bytes: Vec<u8> = values.into_iter().flat_map(bf16::to_le_bytes).collect();
        part(&mut hash, &bytes);
    }
    Ok(hexadecimal(&hash.finalize()))
}

/// With its length before it, so that parts cannot run into each other.
fn part(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}
