//! Decoding with a key-value cache.

use candle_core::{DType, Tensor};

use super::VesperLM;
use super::cache::LayerCache;
use crate::generate::NextLogits;
use crate::ops::embedding;
use crate::{ModelError, Result};

/// One sequence being decoded: the model and the keys and values of what it has read.
///
/// # Examples
/// ```
/// use vesper_model::candle_core::{DType, Device};
/// use vesper_model::candle_nn::VarMap;
/// use vesper_model::generate::NextLogits;
/// use vesper_model::{VesperConfig, VesperLM};
///
/// let config = VesperConfig::preset("nano")?.with_vocab(64);
/// let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
/// let mut session = model.session(16)?;
/// let logits = session.append(&[1, 2, 3])?; // reads a prompt
/// assert_eq!(logits.len(), 64);
/// session.append(&[4])?; // costs one row
/// assert_eq!(session.remaining(), 12);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
#[derive(Debug)]
pub struct Session {
    /// Without gradients.
    model: VesperLM,
    layers: Vec<LayerCache>,
    len: usize,
    capacity: usize,
    /// (1, 1, hidden), after the last norm.
    last_hidden: Option<Tensor>,
}

impl Session {
    pub(super) fn new(model: &VesperLM, capacity: usize) -> Result<Self> {
        let capacity = capacity.min(model.rope.positions());
        let layers = model
            .blocks
            .iter()
            .map(|_| LayerCache::new(1, capacity, model.heads(), model.compute, model.device()))
            .collect::<candle_core::Result<_>>()?;
        Ok(Self { model: model.detach(), layers, len: 0, capacity, last_hidden: None })
    }

    /// The hidden state of the last token that was read, after the last norm: what the output layer scores. `(1, 1,
    /// hidden)`, in the dtype of the computation; `None` before the first token.
    pub fn last_hidden(&self) -> Option<&Tensor> {
        self.last_hidden.as_ref()
    }
}

impl NextLogits for Session {
    fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let model = &self.model;
        let vocab = model.config.vocab_size;
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(ModelError::TokenOutOfRange { id, vocab });
        }
        if ids.len() > self.remaining() {
            return Err(ModelError::SequenceTooLong { got: self.len + ids.len(), limit: self.capacity });
        }
        if ids.is_empty() {
            return Err(ModelError::EmptyPrompt);
        }
        let ids = Tensor::new(ids, model.device())?.unsqueeze(0)?;
        let mut h = embedding(&model.embed, &ids, model.path)?.to_dtype(model.compute)?;
        for (block, cache) in model.blocks.iter().zip(&mut self.layers) {
            h = block.forward_cached(&h, &model.rope, cache, model.path)?;
        }
        let t = h.dim(1)?;
        self.len += t;
        let last = model.last_norm(&h.narrow(1, t - 1, 1)?)?;
        let logits = model.logits(&last)?.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
        self.last_hidden = Some(last);
        Ok(logits)
    }

    fn remaining(&self) -> usize {
        self.capacity - self.len
    }

    fn vocab_size(&self) -> usize {
        self.model.config.vocab_size
    }
}
