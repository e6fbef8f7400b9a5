//! Adapters of any kind on a model that is there already: attached, saved, loaded, merged.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use flylora::files::{AdapterFile, PeftConfig};
use flylora::{Adapter, AdapterKind, Error, FrozenLinear, Merge, Place, Targets, save_adapters};

use super::VesperLM;
use super::projection::is_matrix;
use crate::quantized::Weight;
use crate::{Projection, Result};

/// The path of a projection's module, as Hugging Face names it.
fn module(block: usize, projection: Projection) -> String {
    format!("model.layers.{block}.{}", projection.path())
}

impl VesperLM {
    /// Freezes the model and puts a new adapter beside every projection that `targets` selects by its Hugging Face name
    /// (`model.layers.0.self_attn.q_proj` and so on); the adapters' variables are f32.
    ///
    /// Only the adapters are to be trained then: [`VesperLM::adapters`] has them.
    ///
    /// # Errors
    /// Targets that select nothing, a configuration that does not fit a projection. The model is then as it was.
    ///
    /// # Examples
    /// ```
    /// use vesper_model::candle_core::{DType, Device};
    /// use vesper_model::candle_nn::VarMap;
    /// use vesper_model::flylora::{AdapterKind, FlyLoraConfig, Targets};
    /// use vesper_model::{VesperConfig, VesperLM};
    ///
    /// let config = VesperConfig::preset("nano")?.with_vocab(64);
    /// let mut model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
    /// let kind = AdapterKind::FlyLora(FlyLoraConfig::default());
    /// model.attach(&kind, &Targets::names(["q_proj", "v_proj"]))?;
    /// assert_eq!(model.adapters().len(), 2 * config.num_hidden_layers);
    /// # Ok::<(), vesper_model::ModelError>(())
    /// ```
    pub fn attach(&mut self, kind: &AdapterKind, targets: &Targets) -> Result<()> {
        self.attach_config(&PeftConfig::new(kind.clone(), targets.clone()))
    }

    /// As [`VesperLM::attach`], with the kind, the targets and the ranks and alphas of single projections (PEFT's
    /// `rank_pattern` and `alpha_pattern`) of a configuration.
    ///
    /// # Errors
    /// As [`VesperLM::attach`], and a configuration that trains parameters of the model itself, too (PEFT's
    /// `modules_to_save`). The model is then as it was.
    ///
    /// # Examples
    /// ```
    /// use vesper_model::candle_core::{DType, Device};
    /// use vesper_model::candle_nn::VarMap;
    /// use vesper_model::flylora::files::PeftConfig;
    /// use vesper_model::flylora::{AdapterKind, LoraConfig, Targets};
    /// use vesper_model::{VesperConfig, VesperLM};
    ///
    /// let config = VesperConfig::preset("nano")?.with_vocab(64);
    /// let mut model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
    /// let lora = AdapterKind::Lora(LoraConfig::default().with_r(8));
    /// let adapters = PeftConfig::new(lora, Targets::all_linear()).with_rank_pattern([("down_proj", 32)])?;
    /// model.attach_config(&adapters)?;
    /// let sizes = |path: &str| {
    ///     let (_, adapter) = model.adapters().into_iter().find(|(p, _)| p == path).unwrap();
    ///     adapter.parameters()[0].1.dims().to_vec() // lora_A.weight: (r, in)
    /// };
    /// assert_eq!(sizes("model.layers.0.mlp.down_proj"), [32, config.intermediate_size]);
    /// assert_eq!(sizes("model.layers.0.mlp.up_proj"), [8, config.hidden_size]);
    /// # Ok::<(), vesper_model::ModelError>(())
    /// ```
    pub fn attach_config(&mut self, config: &PeftConfig) -> Result<()> {
        if let Some(name) = config.modules_to_save().first() {
            let message = format!(
                "modules_to_save: {name} is a module of the model itself, which is not trained beside adapters"
            );
            return Err(Error::Adapters { message }.into());
        }
        let device = self.device().clone();
        self.attach_each(|path, layer| {
            if !config.targets().selects(path) {
                return Ok(None);
            }
            Ok(Some(config.kind(path)?.build(layer, &Place::alone(path, DType::F32, &device))?))
        })
    }

    /// Freezes the model and puts the adapters of a directory beside its projections: those that
    /// [`VesperLM::save_adapters`] wrote, or that PEFT trained on the same model.
    ///
    /// # Errors
    /// What is wrong with which file, an adapter of a module that is no projection here, and a parameter of the model
    /// itself beside them (PEFT's `modules_to_save`). The model is then as it was.
    ///
    /// # Examples
    /// ```
    /// use vesper_model::candle_core::{DType, Device};
    /// use vesper_model::candle_nn::VarMap;
    /// use vesper_model::flylora::{AdapterKind, LoraConfig, Targets};
    /// use vesper_model::{VesperConfig, VesperLM};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let config = VesperConfig::preset("nano")?.with_vocab(64);
    /// let base = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
    /// let mut model = base.clone();
    /// model.attach(&AdapterKind::Lora(LoraConfig::default()), &Targets::names(["q_proj", "v_proj"]))?;
    /// let dir = tempfile::tempdir()?;
    /// model.save_adapters(dir.path())?;
    ///
    /// let mut model = base;
    /// model.attach_from(dir.path())?;
    /// assert_eq!(model.adapters().len(), 2 * config.num_hidden_layers);
    /// let merged = model.merged()?.ok_or("LoRA can be merged")?;
    /// assert!(merged.adapters().is_empty());
    /// # Ok(())
    /// # }
    /// ```
    pub fn attach_from(&mut self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        let file = AdapterFile::read(dir)?;
        if let Some((name, _)) = file.saved_parameters().first() {
            let message = format!(
                "{}: beside adapters a parameter of the model itself, {name}, which is not taken",
                dir.display()
            );
            return Err(Error::Adapters { message }.into());
        }
        let modules = file.modules();
        let projections = |i| Projection::ALL.map(|projection| module(i, projection));
        let known: Vec<String> = (0..self.blocks.len()).flat_map(projections).collect();
        if let Some(other) = modules.iter().find(|module| !known.iter().any(|name| name == *module)) {
            let message = format!(
                "{}: adapters of another model: this one has no projection named {other}",
                dir.display()
            );
            return Err(Error::Adapters { message }.into());
        }
        self.attach_each(|path, layer| {
            if !modules.contains(&path) {
                return Ok(None);
            }
            Ok(Some(file.adapter(path, layer, DType::F32)?))
        })
    }

    /// The adapters by the Hugging Face names of their projections, in the order of the forward pass.
    pub fn adapters(&self) -> Vec<(String, Arc<dyn Adapter>)> {
        let blocks = self.blocks.iter().enumerate();
        blocks
            .flat_map(|(i, block)| {
                let of = move |(projection, adapter): (Projection, &Arc<dyn Adapter>)| {
                    (module(i, projection), Arc::clone(adapter))
                };
                block.packs().into_iter().flat_map(super::projection::Packed::adapters).map(of)
            })
            .collect()
    }

    /// Writes the adapters as a directory that PEFT reads (kinds that PEFT has) and [`VesperLM::attach_from`].
    ///
    /// # Errors
    /// A model without adapters, a full disk: names the file.
    pub fn save_adapters(&self, dir: impl AsRef<Path>) -> Result<()> {
        let adapters = self.adapters();
        let adapters: Vec<(&str, &Arc<dyn Adapter>)> =
            adapters.iter().map(|(p, a)| (p.as_str(), a)).collect();
        Ok(save_adapters(dir, &adapters)?)
    }

    /// The model with its adapters in the weights, and without adapters; none where one of them chooses by its input, so
    /// that no weight does what it does, or has a bias, which the model's layers have not. A weight in blocks that has an adapter becomes one in f32.
    ///
    /// # Errors
    /// A device that is out of memory.
    pub fn merged(&self) -> Result<Option<Self>> {
        let mut model = self.clone();
        for block in &mut model.blocks {
            for pack in block.packs_mut() {
                match pack.merged()? {
                    Some(merged) => *pack = merged,
                    None => return Ok(None),
                }
            }
        }
        model.config.adapter = None;
        Ok(Some(model))
    }

    /// What merging the adapters does to the outputs: [`Merge::Exact`] or [`Merge::Unsupported`].
    pub fn merge_quality(&self) -> Merge {
        let exact = self.adapters().iter().all(|(_, adapter)| is_matrix(adapter));
        if exact { Merge::Exact } else { Merge::Unsupported }
    }

    /// The parameters without adapters by the names of [`VesperConfig::parameters`](crate::VesperConfig::parameters), as
    /// [`hf::save`](crate::hf::save) takes them. Those in blocks are not among them: see [`VesperLM::dequantized`].
    pub fn weights(&self) -> HashMap<String, Tensor> {
        let tensor = |(name, weight): (String, &Weight)| Some((name, weight.plain()?.detach()));
        let mut weights: HashMap<String, Tensor> = self.matrices().into_iter().filter_map(tensor).collect();
        weights.extend(self.norms().into_iter().map(|(name, weight)| (name, weight.detach())));
        weights
    }

    fn attach_each(
        &mut self,
        mut make: impl FnMut(&str, &FrozenLinear) -> Result<Option<Arc<dyn Adapter>>>,
    ) -> Result<()> {
        let mut model = self.detach();
        for (i, block) in model.blocks.iter_mut().enumerate() {
            for pack in block.packs_mut() {
                pack.attach(&mut |projection, layer| make(&module(i, projection), layer))?;
            }
        }
        if model.adapters().is_empty() {
            let message = "the targets select none of the model's projections".into();
            return Err(Error::Adapters { message }.into());
        }
        *self = model;
        Ok(())
    }
}
