//! Decoding one sequence with a key-value cache.

use candle_core::Tensor;

use super::VesperLM;
use super::decoding::{DecodeStep, Decoding};
use crate::generate::NextLogits;
use crate::{ModelError, Result};

/// One sequence being decoded: the model and the keys and values of what it has read.
///
/// The first tokens, a prompt, are read at the speed of training; single tokens as [`DecodeStep`] says.
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
/// session.truncate(3); // back to the prompt
/// assert_eq!(session.remaining(), 13);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
#[derive(Debug)]
pub struct Session {
    decoding: Decoding,
    last_hidden: Option<Tensor>,
}

impl Session {
    pub(super) fn new(model: &VesperLM, capacity: usize) -> Result<Self> {
        Ok(Self { decoding: Decoding::new(model, 1, capacity)?, last_hidden: None })
    }

    /// Takes single tokens through the model in this way; the default is [`DecodeStep::Auto`].
    ///
    /// # Errors
    /// A device that is out of memory.
    pub fn with_step(mut self, step: DecodeStep) -> Result<Self> {
        self.decoding.set_step(step)?;
        Ok(self)
    }

    /// Whether single tokens take a fused step, rather than operation after operation.
    pub fn is_fused(&self) -> bool {
        self.decoding.is_fused()
    }

    /// The hidden state of the last token that was read, after the last norm: what the output layer scores. `(1, 1,
    /// hidden)`, in the dtype of the computation; `None` before the first token and after [`Session::truncate`].
    pub fn last_hidden(&self) -> Option<&Tensor> {
        self.last_hidden.as_ref()
    }

    /// How many tokens the session has read.
    pub fn len(&self) -> usize {
        self.decoding.lens().first().copied().unwrap_or(0)
    }

    /// Whether it has read none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all but the first `len` tokens; nothing where there are no more.
    pub fn truncate(&mut self, len: usize) {
        if self.decoding.truncate(0, len) {
            self.last_hidden = None;
        }
    }

    /// Reads `ids`, then chooses the likeliest token `n` times: those tokens, of which the session has read all but the
    /// last one.
    ///
    /// # Errors
    /// [`ModelError::EmptyPrompt`] without ids, and what [`NextLogits::append`] refuses; nothing is read where the
    /// tokens do not fit. [`ModelError::InvalidLogits`] at the first token after which a logit is NaN or infinity, or
    /// all are minus infinity; what was read until then stays read.
    ///
    /// # Examples
    /// ```
    /// use vesper_model::candle_core::{DType, Device};
    /// use vesper_model::candle_nn::VarMap;
    /// use vesper_model::{VesperConfig, VesperLM};
    ///
    /// let config = VesperConfig::preset("nano")?.with_vocab(64);
    /// let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
    /// let mut session = model.session(16)?;
    /// assert_eq!(session.greedy(&[1, 2, 3], 4)?.len(), 4);
    /// assert_eq!(session.len(), 6);
    /// # Ok::<(), vesper_model::ModelError>(())
    /// ```
    pub fn greedy(&mut self, ids: &[u32], n: usize) -> Result<Vec<u32>> {
        let before = self.len();
        let result = self.decoding.greedy(&[ids], n);
        if result.is_err() && self.len() != before {
            self.last_hidden = None;
        }
        match result?.pop().flatten() {
            Some((chosen, hidden)) => {
                self.last_hidden = Some(hidden);
                Ok(chosen)
            }
            None => Err(ModelError::EmptyPrompt),
        }
    }
}

impl NextLogits for Session {
    fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        match self.decoding.append(&[ids])?.pop().flatten() {
            Some((logits, hidden)) => {
                self.last_hidden = Some(hidden);
                Ok(logits)
            }
            None => Err(ModelError::EmptyPrompt),
        }
    }

    fn remaining(&self) -> usize {
        self.decoding.remaining(0)
    }

    fn vocab_size(&self) -> usize {
        self.decoding.vocab_size()
    }
}
