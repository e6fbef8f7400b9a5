use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use super::AdapterFile;
use crate::adapter::{self, Adapter, AdapterKind, Merge};
use crate::linear::{added, at_least_f32, check_merged};
use crate::{Error, FrozenLinear};

/// The weights of a model with adapters merged into them as they are read, for models whose code one cannot change.
///
/// A model of candle-transformers that loads from a `VarBuilder` runs with the adapters and knows nothing of them. Each
/// weight is computed in f32 and rounded once. Where a model uses its embedding table as its output layer too, an adapter of
/// the table, or a table that the file holds in full, changes both, as PEFT does with `ensure_weight_tying`. Where the file
/// holds the table or the output layer below an adapter too (`base_layer.weight`, as PEFT saves them, which a resized vocabulary
/// makes others than the model's), it stands for the model's own. Afterwards [`check_all_used`](Self::check_all_used) tells whether every
/// adapter found its weight.
///
/// # Examples
///
/// ```
/// use std::collections::HashMap;
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder};
/// use flylora::files::{AdapterFile, MergedWeights};
/// use flylora::{FrozenLinear, LoraAdapter, LoraConfig, save_adapters};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // A model's weights, and an adapter for one of them, as PEFT would have saved it.
/// let weights = HashMap::from([("q_proj.weight".to_owned(), Tensor::randn(0f32, 1.0, (6, 12), &Device::Cpu)?)]);
/// let dir = tempfile::tempdir()?;
/// let config = LoraConfig::default().with_r(2);
/// let adapter = LoraAdapter::seeded(12, 6, &config, "q_proj", DType::F32, &Device::Cpu)?;
/// save_adapters(dir.path(), &[("q_proj", &adapter)])?;
///
/// let plain = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
/// let merged = MergedWeights::new(plain, AdapterFile::read(dir.path())?)?;
/// let model = candle_nn::linear_no_bias(12, 6, merged.var_builder().pp("q_proj"))?; // any model that takes one
/// merged.check_all_used()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct MergedWeights {
    inner: Arc<Inner>,
    dtype: DType,
    device: Device,
}

struct Inner {
    weights: VarBuilder<'static>,
    file: AdapterFile,
    modules: BTreeSet<String>,
    /// What is added to biases of the model, by their names: those of the adapters themselves, scaled.
    biases: BTreeMap<String, Tensor>,
    /// Parameters that stand for the model's own.
    saved: BTreeMap<String, Tensor>,
    /// Of the modules, the biases and the parameters.
    used: Mutex<BTreeSet<String>>,
}

impl MergedWeights {
    /// Puts the adapters of `file` over the weights of `weights`, whose names are those of the adapters' modules with
    /// `.weight`.
    ///
    /// # Errors
    ///
    /// [`Error::Adapters`] where the file holds no adapter, or one with a bias of its own (PEFT's `lora_bias`) for a module
    /// that has none to add it to.
    pub fn new(weights: VarBuilder<'static>, file: AdapterFile) -> crate::Result<Self> {
        let modules: BTreeSet<String> = file.modules().into_iter().map(str::to_owned).collect();
        let saved: BTreeMap<String, Tensor> =
            file.saved_parameters().into_iter().map(|(name, tensor)| (name, tensor.clone())).collect();
        if modules.is_empty() && saved.is_empty() {
            let message = format!("{}: there is no adapter in it", file.weights_path().display());
            return Err(Error::Adapters { message });
        }
        let mut biases = BTreeMap::new();
        for module in &modules {
            let own = file.tensor(&super::key(module, adapter::BIAS));
            if let (AdapterKind::Lora(config), Some(own)) = (file.config().kind(module)?, own) {
                let name = format!("{module}.bias");
                if !weights.contains_tensor(&name) && !saved.contains_key(&name) {
                    let message =
                        format!("the adapter of {module} has a bias, and the model no {name} to add it to");
                    return Err(Error::Adapters { message });
                }
                biases.insert(name, (own.to_dtype(at_least_f32(own.dtype()))? * config.scale())?);
            }
        }
        let (dtype, device) = (weights.dtype(), weights.device().clone());
        let inner = Inner { weights, file, modules, biases, saved, used: Mutex::default() };
        Ok(Self { inner: Arc::new(inner), dtype, device })
    }

    /// What to load the model from.
    pub fn var_builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), self.dtype, self.device.clone())
    }

    /// That every adapter has been merged into a weight, and every parameter of the file read; to be called when the model is
    /// loaded.
    ///
    /// # Errors
    ///
    /// [`Error::Adapters`] names the first that has not: its model calls that weight by another name, or reads it as
    /// part of another.
    pub fn check_all_used(&self) -> crate::Result<()> {
        let used = self.inner.used.lock().unwrap_or_else(PoisonError::into_inner);
        let mut unused = self.inner.modules.iter().filter(|module| !used.contains(*module));
        let Some(first) = unused.next() else {
            if let Some(name) = self.inner.biases.keys().find(|name| !used.contains(*name)) {
                let message = format!("the bias of the adapter was not used: nothing read {name}");
                return Err(Error::Adapters { message });
            }
            return match self.inner.saved.keys().find(|name| !used.contains(*name)) {
                None => Ok(()),
                Some(name) => Err(Error::Adapters {
                    message: format!("{name} of the adapter's file was not used: nothing read it"),
                }),
            };
        };
        let more = match unused.count() {
            0 => String::new(),
            n => format!(" (and those of {n} more)"),
        };
        let message = format!("the adapter of {first}{more} was not used: nothing read {first}.weight");
        Err(Error::Adapters { message })
    }
}

impl Inner {
    /// The module whose weight this is, if it has an adapter.
    fn module<'a>(&self, name: &'a str) -> Option<&'a str> {
        name.strip_suffix(".weight").filter(|module| self.modules.contains(*module))
    }

    /// The parameter of the file that stands for the model's own, if there is one of that name.
    fn saved(&self, name: &str, dtype: DType, device: &Device) -> Option<Result<Tensor>> {
        let tensor = self.saved.get(name)?;
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        Some(tensor.to_device(device).and_then(|t| t.to_dtype(dtype)))
    }

    /// The weight below the adapter of a module, where the file has it.
    fn below(&self, module: &str) -> Option<&Tensor> {
        self.file.tensor(&super::key(module, "base_layer.weight"))
    }

    /// Whether the weight is (in, out), as Conv1D keeps it: by the sizes of the adapter's factors, since PEFT goes by the
    /// module and lets the configuration be wrong; by the configuration where in and out are equal.
    fn is_turned(&self, module: &str, weight: &Tensor) -> bool {
        let size = |names: [&str; 2], first: bool| {
            let of = |name: &str| self.file.tensor(&super::key(module, name)).map(Tensor::dims);
            let dims = names.iter().find_map(|name| of(name))?;
            if first { dims.first().copied() } else { dims.last().copied() }
        };
        let inputs = size(["lora_A.weight", "lora_A"], false);
        let outputs = size(["lora_B.weight", "lora_B"], true);
        match (weight.dims(), inputs, outputs) {
            (&[rows, columns], Some(inputs), Some(outputs)) if inputs != outputs => {
                (rows, columns) == (inputs, outputs)
            }
            _ => self.file.config().fan_in_fan_out(),
        }
    }

    /// A bias of the model, in the dtype asked for, with that of an adapter added where there is one. `bias` gives the model's
    /// own in a dtype.
    fn bias(&self, name: &str, dtype: DType, bias: impl FnOnce(DType) -> Result<Tensor>) -> Result<Tensor> {
        let Some(own) = self.biases.get(name) else { return bias(dtype) };
        let bias = bias(at_least_f32(dtype))?;
        if own.shape() != bias.shape() {
            let msg = format!("{name}: the bias of its adapter");
            let (expected, got) = (bias.shape().clone(), own.shape().clone());
            return Err(candle_core::Error::UnexpectedShape { msg, expected, got }.bt());
        }
        let merged = added(&bias, &own.to_device(bias.device())?)?.to_dtype(dtype)?;
        check_named(name, &merged)?;
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        Ok(merged)
    }

    fn merge(&self, module: &str, weight: &Tensor, dtype: DType) -> crate::Result<Tensor> {
        let wide = at_least_f32(weight.dtype());
        let weight = weight.to_dtype(wide)?;
        let merged = if self.file.is_embedding(module) {
            let embedding = self.file.embedding(module, weight.clone(), wide)?;
            added(&weight, &embedding.delta_table()?)?
        } else {
            let turned = self.is_turned(module, &weight);
            let base = if turned {
                FrozenLinear::conv1d(weight.clone(), None)?
            } else {
                FrozenLinear::new(weight.clone(), None)?
            };
            let adapter = self.file.adapter(module, &base, wide)?;
            if adapter.merge_quality() != Merge::Exact {
                let message = format!("{module}: {} cannot be merged into a weight", adapter.kind());
                return Err(Error::Adapters { message });
            }
            let delta = adapter.delta_weight()?;
            added(&weight, &if turned { delta.t()? } else { delta })?
        };
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(module.to_owned());
        let merged = merged.to_dtype(dtype)?.contiguous()?;
        check_named(module, &merged)?;
        Ok(merged)
    }
}

/// As [`check_merged`], with a name in the message.
fn check_named(name: &str, merged: &Tensor) -> crate::Result<()> {
    check_merged(merged).map_err(|e| Error::Adapters { message: format!("{name}: {e}") })
}

impl SimpleBackend for MergedWeights {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let inner = &self.inner;
        let weights = inner.weights.clone().set_device(device.clone());
        if let Some(module) = inner.module(name).filter(|_| !inner.saved.contains_key(name)) {
            let wide = at_least_f32(dtype);
            let weight = match inner.below(module) {
                Some(own) if *own.shape() == shape => own.to_device(device)?.to_dtype(wide)?,
                Some(own) => {
                    let msg = format!("{module}.base_layer.weight of the adapter's file");
                    let got = own.shape().clone();
                    return Err(candle_core::Error::UnexpectedShape { msg, expected: shape, got }.bt());
                }
                None => weights.get_with_hints_dtype(shape, name, init, wide)?,
            };
            return Ok(inner.merge(module, &weight, dtype)?);
        }
        inner.bias(name, dtype, |dtype| {
            let Some(saved) = inner.saved(name, dtype, device).transpose()? else {
                return weights.get_with_hints_dtype(shape, name, init, dtype);
            };
            if *saved.shape() != shape {
                let msg = format!("{name} of the adapter's file");
                let got = saved.shape().clone();
                return Err(candle_core::Error::UnexpectedShape { msg, expected: shape, got }.bt());
            }
            Ok(saved)
        })
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let inner = &self.inner;
        let weights = inner.weights.clone().set_device(device.clone());
        if let Some(module) = inner.module(name).filter(|_| !inner.saved.contains_key(name)) {
            let wide = at_least_f32(dtype);
            let weight = match inner.below(module) {
                Some(own) => own.to_device(device)?.to_dtype(wide)?,
                None => weights.get_unchecked_dtype(name, wide)?,
            };
            return Ok(inner.merge(module, &weight, dtype)?);
        }
        inner.bias(name, dtype, |dtype| match inner.saved(name, dtype, device) {
            Some(saved) => saved,
            None => weights.get_unchecked_dtype(name, dtype),
        })
    }

    fn contains_tensor(&self, name: &str) -> bool {
        let below = self.inner.module(name).is_some_and(|module| self.inner.below(module).is_some());
        below || self.inner.saved.contains_key(name) || self.inner.weights.contains_tensor(name)
    }
}
