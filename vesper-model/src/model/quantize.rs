//! A model with its matrices in blocks, and the other way around.

use candle_core::Tensor;

use super::VesperLM;
use crate::hf::layout::entries;
use crate::quantized::{Policy, Quantiser, Report, Weight};
use crate::{ModelError, Result};

impl VesperLM {
    /// The model with its matrices in blocks as `policy` says, without gradients, and what became of each tensor. Norms stay
    /// as they are.
    ///
    /// Such a model generates, is evaluated, and takes adapters ([`VesperLM::attach`]), which train over it; its own weights
    /// do not train any more. Plain types (f16) round the weights but keep the dtype that they are computed in.
    ///
    /// # Errors
    /// [`ModelError::NotQuantisable`] for a model that has blocks already or has adapters, for a pattern that fits no
    /// tensor, and for weights that are not finite.
    ///
    /// # Examples
    /// ```
    /// use vesper_model::candle_core::{DType, Device};
    /// use vesper_model::candle_nn::VarMap;
    /// use vesper_model::quantized::{BlockType, Policy};
    /// use vesper_model::{VesperConfig, VesperLM};
    ///
    /// let config = VesperConfig::preset("nano")?.with_vocab(64);
    /// let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
    /// let (small, report) = model.quantized(&Policy::new(BlockType::Q8_0))?;
    /// assert!(small.is_quantized() && report.bytes() * 3 < report.bytes_before());
    /// # Ok::<(), vesper_model::ModelError>(())
    /// ```
    pub fn quantized(&self, policy: &Policy) -> Result<(Self, Report)> {
        let wrong = |reason: &str| Err(ModelError::NotQuantisable { reason: reason.into() });
        if self.is_quantized() {
            return wrong("it is quantised already");
        }
        if !self.adapters().is_empty() {
            return wrong("it has adapters: merge them first, or attach them to the quantised model");
        }
        let mut quantiser = Quantiser::new(policy, self.config.tie_word_embeddings);
        let mut model = self.detach();
        let norms = self.norms();
        let mut matrices = model.matrices_mut();
        for entry in entries(&self.config) {
            if let Some((_, weight)) = matrices.iter_mut().find(|(name, _)| *name == entry.name) {
                **weight = quantiser.quantise(&entry, &weight.to_plain()?)?;
            } else if let Some((_, norm)) = norms.iter().find(|(name, _)| *name == entry.name) {
                quantiser.keep(&entry, norm);
            }
        }
        drop(matrices);
        Ok((model, quantiser.report()?))
    }

    /// Whether any of the weights is in blocks.
    pub fn is_quantized(&self) -> bool {
        self.matrices().iter().any(|(_, weight)| matches!(weight, Weight::Blocks(_)))
    }

    /// The same model with every matrix as numbers in f32; one that has no blocks is the same afterwards.
    ///
    /// # Errors
    /// A device that is out of memory.
    pub fn dequantized(&self) -> Result<Self> {
        let mut model = self.clone();
        for (_, weight) in model.matrices_mut() {
            if let Weight::Blocks(blocks) = weight {
                *weight = Weight::Plain(blocks.dequantized()?);
            }
        }
        Ok(model)
    }

    /// Every matrix by its name in memory, in the order of the forward pass.
    pub(crate) fn matrices(&self) -> Vec<(String, &Weight)> {
        let mut all = vec![("model.embed_tokens.weight".to_owned(), &self.embed)];
        for (i, block) in self.blocks.iter().enumerate() {
            let named = |(name, weight)| (format!("model.layers.{i}.{name}.weight"), weight);
            all.extend(block.matrices().into_iter().map(named));
        }
        all.extend(self.head.as_ref().map(|head| ("lm_head.weight".to_owned(), head)));
        all
    }

    fn matrices_mut(&mut self) -> Vec<(String, &mut Weight)> {
        let mut all = vec![("model.embed_tokens.weight".to_owned(), &mut self.embed)];
        for (i, block) in self.blocks.iter_mut().enumerate() {
            let named = |(name, weight)| (format!("model.layers.{i}.{name}.weight"), weight);
            all.extend(block.matrices_mut().into_iter().map(named));
        }
        all.extend(self.head.as_mut().map(|head| ("lm_head.weight".to_owned(), head)));
        all
    }

    /// The norms' weights by their names, in the order of the forward pass.
    pub(crate) fn norms(&self) -> Vec<(String, &Tensor)> {
        let mut all = Vec::new();
        for (i, block) in self.blocks.iter().enumerate() {
            let named = |(name, weight)| (format!("model.layers.{i}.{name}.weight"), weight);
            all.extend(block.norms().into_iter().map(named));
        }
        all.push(("model.norm.weight".to_owned(), &self.norm));
        all
    }
}
