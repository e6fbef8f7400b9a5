use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;

use super::{PREFIX, PeftConfig, StateSource, WEIGHTS_FILE};
use crate::adapter::{self, AdaLoraAdapter, Adapter, AdapterKind, Change, FlyLoraConfig, MaskedLoraConfig};
use crate::embedding::LoraEmbedding;
use crate::linear::is_finite;
use crate::{Error, FrozenLinear, LoraConfig, Place, Result, embedding};

/// A directory of adapters, read: its configuration, its modules and their tensors.
///
/// # Examples
///
/// ```no_run
/// use candle_core::{DType, Device, Tensor};
/// use flylora::{AdapterLinear, FrozenLinear};
/// use flylora::files::AdapterFile;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let file = AdapterFile::read("adapters/french")?;
/// for module in file.modules() {
///     println!("{module}: {}", file.config().kind(module)?);
/// }
/// let base = FrozenLinear::new(Tensor::zeros((64, 64), DType::F32, &Device::Cpu)?, None)?;
/// let adapter = file.adapter("model.layers.0.self_attn.q_proj", &base, DType::F32)?;
/// let layer = AdapterLinear::from_parts(base, adapter)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct AdapterFile {
    dir: PathBuf,
    config: PeftConfig,
    tensors: BTreeMap<String, Tensor>,
}

impl AdapterFile {
    /// Reads `adapter_config.json` and `adapter_model.safetensors` in `dir`.
    ///
    /// # Errors
    ///
    /// Those of [`PeftConfig::read`], and [`Error::Io`] and [`Error::Format`] for the weights: missing, truncated or
    /// something else; [`Error::UnexpectedKey`] for a tensor that is no part of an adapter. The embedding table or output
    /// layer that PEFT puts below its adapter (`base_layer.weight`) is passed over: [`MergedWeights`](super::MergedWeights)
    /// alone takes it, and [`tensor`](Self::tensor) gives it.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref().to_owned();
        let config = PeftConfig::read(&dir)?;
        let path = dir.join(WEIGHTS_FILE);
        let bytes = std::fs::read(&path).map_err(|source| missing(&dir, path.clone(), source))?;
        let format = |message: String| Error::Format { path: path.clone(), message };
        let views = SafeTensors::deserialize(&bytes)
            .map_err(|e| format(format!("not a complete safetensors file: {e}")))?;
        let mut tensors = BTreeMap::new();
        for (key, view) in views.iter() {
            let tensor = view.load(&Device::Cpu).map_err(|e| format(format!("{key}: {e}")))?;
            if !is_finite(&tensor)? {
                return Err(format(format!("{key}: it has values that are not finite")));
            }
            tensors.insert(key.to_owned(), tensor);
        }
        let file = Self { dir, config, tensors };
        let known = |key: &str| module_of(key).is_some() || file.config.saved().parameter(key).is_some();
        file.check_used(&BTreeSet::new(), |key| !known(key))?;
        Ok(file)
    }

    /// What the configuration says.
    pub fn config(&self) -> &PeftConfig {
        &self.config
    }

    /// The paths of the modules that have an adapter, sorted.
    pub fn modules(&self) -> Vec<&str> {
        let mut modules: Vec<&str> =
            self.tensors.keys().filter_map(|key| module_of(key)).map(|(m, _)| m).collect();
        modules.sort_unstable();
        modules.dedup();
        modules
    }

    /// Whether the adapter of a module is one of an embedding table.
    pub fn is_embedding(&self, module: &str) -> bool {
        self.tensors.contains_key(&super::key(module, embedding::A))
    }

    /// The parameters of the model itself that the file holds, in full, by their names in the model (`score.weight`), sorted:
    /// those of the `modules_to_save`, the biases where the configuration says so, and the tables of a resized vocabulary. They stand
    /// for the model's own.
    pub fn saved_parameters(&self) -> Vec<(String, &Tensor)> {
        let others = self.tensors.iter().filter(|(key, _)| module_of(key).is_none());
        others.filter_map(|(key, tensor)| Some((self.config.saved().parameter(key)?, tensor))).collect()
    }

    /// Makes the adapter of a module, over its layer, with variables of its own in `dtype` on the layer's device.
    ///
    /// # Errors
    ///
    /// [`Error::MissingKey`] and [`Error::FileShape`] where the file has no such module or one of another size, and
    /// those of the kind's own constructor.
    pub fn adapter(&self, module: &str, base: &FrozenLinear, dtype: DType) -> Result<Arc<dyn Adapter>> {
        let place = Place::alone(module, dtype, &base.device());
        let kind = self.config.kind(module)?;
        let adapter: Arc<dyn Adapter> = match &kind {
            // Ranks that were given up are not in the file.
            AdapterKind::AdaLora(config) => {
                let key = super::key(module, "lora_E");
                let r = match self.tensors.get(&key) {
                    Some(e) => e.dims().first().copied().unwrap_or(0),
                    None => return Err(Error::MissingKey { path: self.weights_path(), key }),
                };
                Arc::new(AdaLoraAdapter::with_rank(
                    base.in_features(),
                    base.out_features(),
                    r,
                    config,
                    &place,
                )?)
            }
            AdapterKind::Lora(LoraConfig { r, .. })
            | AdapterKind::Dora(LoraConfig { r, .. })
            | AdapterKind::MaskedLora(MaskedLoraConfig { lora: LoraConfig { r, .. }, .. })
            | AdapterKind::FlyLora(FlyLoraConfig { r, .. }) => {
                // Before anything of that rank is made: nothing else is a bound.
                let shape = [base.out_features(), *r];
                StateSource::new(self, module, &mut BTreeSet::new()).check(adapter::B, &shape)?;
                kind.build(base, &place)?
            }
        };
        let mut used = BTreeSet::new();
        let changes = adapter.load_state(&mut StateSource::new(self, module, &mut used))?;
        make(changes)?;
        self.check_used(&used, |key| module_of(key).is_some_and(|(m, _)| m == module))?;
        Ok(adapter)
    }

    /// Makes the adapter of an embedding table (vocab, dim), with variables of its own in `dtype` on the table's device.
    ///
    /// # Errors
    ///
    /// As [`adapter`](Self::adapter), and [`Error::Adapters`] for kinds other than LoRA and DoRA.
    pub fn embedding(&self, module: &str, table: Tensor, dtype: DType) -> Result<LoraEmbedding> {
        let place = Place::alone(module, dtype, table.device());
        let kind = self.config.kind(module)?;
        let (AdapterKind::Lora(config) | AdapterKind::Dora(config)) = &kind else {
            return Err(Error::Adapters { message: format!("{module}: there is no {kind} of an embedding") });
        };
        let mut used = BTreeSet::new();
        let mut source = StateSource::new(self, module, &mut used);
        source.check(embedding::A, &[config.r, table.dims().first().copied().unwrap_or(0)])?;
        let embedding = match &kind {
            AdapterKind::Dora(_) => LoraEmbedding::dora(table, config, &place)?,
            _ => LoraEmbedding::new(table, config, &place)?,
        };
        let changes = super::Stored::load_state(&embedding, &mut source)?;
        make(changes)?;
        self.check_used(&used, |key| module_of(key).is_some_and(|(m, _)| m == module))?;
        Ok(embedding)
    }

    /// A tensor of the file, by its full name, on the CPU.
    pub fn tensor(&self, key: &str) -> Option<&Tensor> {
        self.tensors.get(key)
    }

    pub(crate) fn weights_path(&self) -> PathBuf {
        self.dir.join(WEIGHTS_FILE)
    }

    /// That every tensor in question was read.
    pub(super) fn check_used(
        &self,
        used: &BTreeSet<String>,
        in_question: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let copy = |key: &str| key.ends_with(".base_layer.weight") || key.ends_with(".base_layer.bias");
        let mut left =
            self.tensors.keys().filter(|key| in_question(key) && !used.contains(*key) && !copy(key));
        match left.next() {
            None => Ok(()),
            Some(key) => Err(Error::UnexpectedKey {
                path: self.weights_path(),
                key: key.clone(),
                others: left.count(),
            }),
        }
    }
}

/// The error that the weights cannot be read; in a form that is not read here they may be beside.
fn missing(dir: &Path, path: PathBuf, source: std::io::Error) -> Error {
    let pickled = dir.join("adapter_model.bin");
    if source.kind() == std::io::ErrorKind::NotFound && pickled.exists() {
        let message = format!(
            "pickled weights are not read: save the adapter again with a PEFT that writes {WEIGHTS_FILE}"
        );
        return Error::Format { path: pickled, message };
    }
    Error::Io { path, source }
}

fn make(changes: Vec<Change<'_>>) -> Result<()> {
    changes.into_iter().try_for_each(|change| change())
}

/// The module and the name below it of a key that belongs to an adapter.
pub(super) fn module_of(key: &str) -> Option<(&str, &str)> {
    let path = key.strip_prefix(PREFIX)?;
    // The last dot before `lora_` or `fly_`: names of modules may contain those.
    let at = [".lora_", ".fly_"].iter().filter_map(|mark| path.rfind(mark)).max()?;
    Some((path.get(..at)?, path.get(at + 1..)?))
}
