//! Evaluation batches: every window once, in order.

use std::ops::Range;

use candle_core::Device;

use super::host::HostBatch;
use super::{Batch, check_batch, window_count};
use crate::error::Result;
use crate::tokens::Tokens;

/// All windows of a token stream, in order; the last batch holds what is left and may be smaller.
///
/// The windows are those of [`BatchSampler`](super::BatchSampler). Cloned, it starts again from where it is.
///
/// # Examples
///
/// ```
/// use candle_core::Device;
/// use vesper_data::{EvalBatches, Tokens};
///
/// let tokens = Tokens::from((0..51).collect::<Vec<u32>>());
/// let mut rows = Vec::new();
/// for batch in EvalBatches::new(tokens, 2, 10, &Device::Cpu)? {
///     rows.push(batch?.inputs.dims2()?.0);
/// }
/// assert_eq!(rows, [2, 2, 1]);
/// # Ok::<(), vesper_data::DataError>(())
/// ```
#[derive(Clone, Debug)]
pub struct EvalBatches {
    tokens: Tokens,
    batch: usize,
    seq: usize,
    device: Device,
    left: Range<usize>,
}

impl EvalBatches {
    /// Starts at the first window.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`](crate::DataError::Config) for a batch or a sequence of 0,
    /// [`DataError::TooFewTokens`](crate::DataError::TooFewTokens) where the data does not fill one window.
    pub fn new(tokens: Tokens, batch: usize, seq: usize, device: &Device) -> Result<Self> {
        check_batch(batch, seq)?;
        let windows = window_count(tokens.len(), seq)?;
        Ok(Self { tokens, batch, seq, device: device.clone(), left: 0..windows })
    }

    /// Keeps no more than the first `windows` windows.
    pub fn limit(mut self, windows: usize) -> Self {
        self.left.end = self.left.end.min(self.left.start.saturating_add(windows));
        self
    }

    /// The number of windows that are left.
    pub fn windows(&self) -> usize {
        self.left.len()
    }
}

impl Iterator for EvalBatches {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left.is_empty() {
            return None;
        }
        let end = self.left.start.saturating_add(self.batch).min(self.left.end);
        let indices: Vec<usize> = (self.left.start..end).collect();
        self.left.start = end;
        let batch = HostBatch::gather(&self.tokens, self.seq, &indices);
        Some(batch.and_then(|mut batch| batch.place(&self.device)))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let batches = self.left.len().div_ceil(self.batch);
        (batches, Some(batches))
    }
}

impl ExactSizeIterator for EvalBatches {}
