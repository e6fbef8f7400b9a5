//! Decoding several sequences of unequal length at once.

use candle_core::Tensor;

use super::VesperLM;
use super::decoding::{DecodeStep, Decoding};
use crate::Result;
use crate::generate::BatchLogits;

/// Several sequences being decoded, one a row: the model and one cache for all.
///
/// Single tokens of several rows go through the model together, so that its weights are read once; longer pieces, as
/// prompts, row by row. Each row gets the logits that it would get alone.
///
/// # Examples
/// ```
/// use vesper_model::candle_core::{DType, Device};
/// use vesper_model::candle_nn::VarMap;
/// use vesper_model::generate::BatchLogits;
/// use vesper_model::{VesperConfig, VesperLM};
///
/// let config = VesperConfig::preset("nano")?.with_vocab(64);
/// let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
/// let mut session = model.batch_session(2, 16)?;
/// session.append(&[&[1, 2, 3], &[4]])?; // prompts
/// let logits = session.append(&[&[5], &[6]])?; // a token each, in one step
/// assert_eq!(logits[1].len(), 64);
/// assert_eq!([session.len(0), session.len(1)], [4, 2]);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
#[derive(Debug)]
pub struct BatchSession {
    decoding: Decoding,
    last_hidden: Vec<Option<Tensor>>,
}

impl BatchSession {
    pub(super) fn new(model: &VesperLM, rows: usize, capacity: usize) -> Result<Self> {
        Ok(Self { decoding: Decoding::new(model, rows, capacity)?, last_hidden: vec![None; rows] })
    }

    /// As [`Session::with_step`](super::Session::with_step).
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

    /// How many tokens a row has read; 0 of a row that is not there.
    pub fn len(&self, row: usize) -> usize {
        self.decoding.lens().get(row).copied().unwrap_or(0)
    }

    /// Whether a row has read none.
    pub fn is_empty(&self, row: usize) -> bool {
        self.len(row) == 0
    }

    /// Forgets all but the first `len` tokens of a row; nothing where there are no more.
    pub fn truncate(&mut self, row: usize, len: usize) {
        if self.decoding.truncate(row, len)
            && let Some(hidden) = self.last_hidden.get_mut(row)
        {
            *hidden = None;
        }
    }

    /// As [`Session::greedy`](super::Session::greedy), of several rows at once: for each row that has ids, reads them
    /// and then chooses the likeliest token `n` times; the others get none. A fused step on CUDA chooses by itself, and
    /// the host waits for the last token.
    ///
    /// # Errors
    /// What [`BatchLogits::append`] refuses; nothing is read where the tokens of a row do not fit.
    /// [`ModelError::InvalidLogits`](crate::ModelError::InvalidLogits) at the first token after which a logit of one of
    /// the rows is NaN or infinity, or all of a row are minus infinity; what was read until then stays read in all.
    ///
    /// # Examples
    /// ```
    /// use vesper_model::candle_core::{DType, Device};
    /// use vesper_model::candle_nn::VarMap;
    /// use vesper_model::{VesperConfig, VesperLM};
    ///
    /// let config = VesperConfig::preset("nano")?.with_vocab(64);
    /// let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
    /// let mut batch = model.batch_session(3, 16)?;
    /// let chosen = batch.greedy(&[&[1, 2, 3], &[], &[4]], 5)?;
    /// assert_eq!(chosen.iter().map(Vec::len).collect::<Vec<_>>(), [5, 0, 5]);
    /// assert_eq!((batch.len(0), batch.len(1), batch.len(2)), (7, 0, 5));
    /// # Ok::<(), vesper_model::ModelError>(())
    /// ```
    pub fn greedy(&mut self, ids: &[&[u32]], n: usize) -> Result<Vec<Vec<u32>>> {
        let before = self.decoding.lens().to_vec();
        let result = self.decoding.greedy(ids, n);
        if result.is_err() {
            let changed = before.iter().zip(self.decoding.lens()).map(|(before, now)| before != now);
            for (hidden, _) in self.last_hidden.iter_mut().zip(changed).filter(|(_, changed)| *changed) {
                *hidden = None;
            }
        }
        Ok(self.take(result?))
    }

    /// Keeps the hidden states of the rows that have read something; what else these have, nothing of the others.
    fn take<T>(&mut self, rows: Vec<Option<(Vec<T>, Tensor)>>) -> Vec<Vec<T>> {
        let each = self.last_hidden.iter_mut().zip(rows);
        let taken = each.map(|(own, row)| {
            row.map_or_else(Vec::new, |(values, hidden)| {
                *own = Some(hidden);
                values
            })
        });
        taken.collect()
    }

    /// As [`Session::last_hidden`](super::Session::last_hidden), of a row.
    pub fn last_hidden(&self, row: usize) -> Option<&Tensor> {
        self.last_hidden.get(row)?.as_ref()
    }
}

impl BatchLogits for BatchSession {
    fn rows(&self) -> usize {
        self.last_hidden.len()
    }

    fn append(&mut self, ids: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let last = self.decoding.append(ids)?;
        Ok(self.take(last))
    }

    fn reorder(&mut self, from: &[usize]) -> Result<()> {
        self.decoding.reorder(from)?;
        self.last_hidden = from.iter().map(|&row| self.last_hidden[row].clone()).collect();
        Ok(())
    }

    fn remaining(&self, row: usize) -> usize {
        self.decoding.remaining(row)
    }

    fn vocab_size(&self) -> usize {
        self.decoding.vocab_size()
    }
}
