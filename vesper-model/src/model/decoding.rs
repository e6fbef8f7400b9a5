//! A model and a cache of several rows: what sessions of one sequence and of several are made of.

use candle_core::{DType, Tensor};

use super::VesperLM;
use super::cache::LayerCache;
use crate::generate::scores::argmax;
#[cfg(feature = "cuda")]
use crate::ops::CudaStep;
use crate::ops::{Place, StepWeights};
use crate::{ModelError, Result};

/// How a session takes single tokens through the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DecodeStep {
    /// As [`DecodeStep::Fused`], on CUDA too: [`DecodeStep::Captured`] asks that no other thread works on the device
    /// during the second token, which a session cannot see to. What that would save: `medium` in bf16 on an H100 takes
    /// 2830 tokens a second, each with its logits, as a graph and 2565 launched kernel by kernel.
    #[default]
    Auto,
    /// By the operations of [`ops`](crate::ops), which take every model.
    Composed,
    /// By a few kernels that read the weights and the cache once, with activations in f32: on the CPU for computation
    /// in f32 and bf16, on CUDA also in f16; for weights in blocks, in f32, or in the dtype of the computation, without
    /// adapters. Other models are composed, on CUDA also those whose gate and other half of the feed-forward are of two
    /// types, and those with rows that its shared memory has no room for.
    ///
    /// On CUDA the norms of a model in bf16 or f16 are turned into f32 when the session starts: it does not see what is
    /// written to those variables later.
    Fused,
    /// The same on CUDA, recorded as a graph that is replayed for each token; elsewhere as [`DecodeStep::Fused`]. The
    /// device must be one of [`cuda_device`](crate::ops::cuda_device), with no other thread at work on it during the
    /// second token.
    Captured,
}

/// What takes single tokens through the model.
#[derive(Debug)]
enum Stepper {
    Composed,
    Cpu(Box<StepWeights>),
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaStep>),
}

/// Logits of the last token of a row, and its hidden state (1, 1, hidden).
pub(super) type Last = (Vec<f32>, Tensor);

/// Tokens that a row chose, and its last hidden state (1, 1, hidden).
pub(super) type Greedy = (Vec<u32>, Tensor);

#[derive(Debug)]
pub(super) struct Decoding {
    /// Without gradients.
    model: VesperLM,
    layers: Vec<LayerCache>,
    /// How many tokens each row has read.
    lens: Vec<usize>,
    capacity: usize,
    stepper: Stepper,
}

impl Decoding {
    pub(super) fn new(model: &VesperLM, rows: usize, capacity: usize) -> Result<Self> {
        let capacity = capacity.min(model.rope.positions());
        let layers = model
            .blocks
            .iter()
            .map(|_| LayerCache::new(rows, capacity, model.heads(), model.compute, model.device()))
            .collect::<candle_core::Result<_>>()?;
        let (model, stepper) = (model.detach(), Stepper::Composed);
        let mut decoding = Self { model, layers, lens: vec![0; rows], capacity, stepper };
        decoding.set_step(DecodeStep::Auto)?;
        Ok(decoding)
    }

    #[cfg_attr(not(feature = "cuda"), expect(clippy::unnecessary_wraps, reason = "on CUDA it can fail"))]
    pub(super) fn set_step(&mut self, step: DecodeStep) -> Result<()> {
        self.stepper = Stepper::Composed;
        let wanted = match step {
            DecodeStep::Composed => false,
            DecodeStep::Auto | DecodeStep::Fused | DecodeStep::Captured => true,
        };
        if !wanted || self.capacity == 0 {
            return Ok(());
        }
        let Some(weights) = self.model.step_weights() else { return Ok(()) };
        if self.model.device().is_cpu() {
            if weights.takes(self.model.compute) {
                self.stepper = Stepper::Cpu(Box::new(weights));
            }
            return Ok(());
        }
        #[cfg(feature = "cuda")]
        {
            let caches: Vec<Tensor> = self.layers.iter().map(|layer| layer.tensor().clone()).collect();
            if let Some(cuda) = CudaStep::new(weights, &caches, step == DecodeStep::Captured)? {
                self.stepper = Stepper::Cuda(Box::new(cuda));
            }
        }
        Ok(())
    }

    /// Whether single tokens take a fused step.
    pub(super) fn is_fused(&self) -> bool {
        !matches!(self.stepper, Stepper::Composed)
    }

    pub(super) fn lens(&self) -> &[usize] {
        &self.lens
    }

    pub(super) fn remaining(&self, row: usize) -> usize {
        self.lens.get(row).map_or(0, |len| self.capacity - len)
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.model.config.vocab_size
    }

    /// Row `row` keeps its first `len` tokens. Whether that was fewer than it had.
    pub(super) fn truncate(&mut self, row: usize, len: usize) -> bool {
        match self.lens.get_mut(row) {
            Some(own) if len < *own => {
                *own = len;
                true
            }
            _ => false,
        }
    }

    /// Adds tokens to the rows that have any; the others get none.
    pub(super) fn append(&mut self, ids: &[&[u32]]) -> Result<Vec<Option<Last>>> {
        self.check(ids)?;
        let mut last: Vec<Option<Last>> = vec![None; ids.len()];
        let places: Vec<Place> = (0..ids.len())
            .filter(|&row| ids[row].len() == 1)
            .map(|row| Place { row, position: self.lens[row] })
            .collect();
        if !places.is_empty() {
            let singles: Vec<u32> = places.iter().map(|place| ids[place.row][0]).collect();
            for (place, done) in places.iter().zip(self.one_each(&singles, &places)?) {
                last[place.row] = Some(done);
            }
        }
        for (row, ids) in ids.iter().enumerate().filter(|(_, ids)| ids.len() > 1) {
            last[row] = Some(self.read(row, ids)?);
        }
        for (len, ids) in self.lens.iter_mut().zip(ids) {
            *len += ids.len();
        }
        Ok(last)
    }

    fn check(&self, ids: &[&[u32]]) -> Result<()> {
        let (rows, vocab) = (self.lens.len(), self.vocab_size());
        if ids.len() != rows {
            return Err(ModelError::Rows { got: ids.len(), expected: rows });
        }
        for (len, ids) in self.lens.iter().zip(ids) {
            if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab) {
                return Err(ModelError::TokenOutOfRange { id, vocab });
            }
            if ids.len() > self.capacity - len {
                return Err(ModelError::SequenceTooLong { got: len + ids.len(), limit: self.capacity });
            }
        }
        Ok(())
    }

    /// One token a place.
    fn one_each(&mut self, ids: &[u32], places: &[Place]) -> Result<Vec<Last>> {
        let (logits, hidden) = match &mut self.stepper {
            Stepper::Composed => {
                let ids = Tensor::new(ids, self.model.device())?.unsqueeze(1)?;
                return self.through(&ids, places);
            }
            Stepper::Cpu(weights) => {
                let caches: Vec<&Tensor> = self.layers.iter().map(LayerCache::tensor).collect();
                let out = weights.step(ids, places, &caches)?;
                (out.logits, Tensor::from_vec(out.hidden, (ids.len(), 1, ()), self.model.device())?)
            }
            #[cfg(feature = "cuda")]
            Stepper::Cuda(cuda) => cuda.step(ids, places)?,
        };
        let hidden = hidden.to_dtype(self.model.compute)?;
        let each = logits.into_iter().enumerate();
        each.map(|(i, logits)| Ok((logits, hidden.narrow(0, i, 1)?))).collect()
    }

    /// Reads the ids of their rows and chooses the likeliest token after them, `n` times: of each row that has ids what
    /// it chose, and its hidden state after all but the last of those. The rows have room, or nothing is read.
    pub(super) fn greedy(&mut self, ids: &[&[u32]], n: usize) -> Result<Vec<Option<Greedy>>> {
        self.check(ids)?;
        for (row, ids) in ids.iter().enumerate().filter(|(_, ids)| !ids.is_empty()) {
            let needed = ids.len().saturating_add(n.saturating_sub(1));
            if needed > self.remaining(row) {
                let got = self.lens[row].saturating_add(needed);
                return Err(ModelError::SequenceTooLong { got, limit: self.capacity });
            }
        }
        let mut rows = Vec::with_capacity(ids.len());
        for last in self.append(ids)? {
            rows.push(match last {
                Some((logits, hidden)) => Some((vec![argmax(&logits)?], hidden)),
                None => None,
            });
        }
        while let Some(done) =
            rows.iter().flatten().map(|(chosen, _)| chosen.len()).max().filter(|&len| len < n)
        {
            let next: Vec<(usize, u32)> = rows
                .iter()
                .enumerate()
                .filter_map(|(row, own)| Some((row, *own.as_ref()?.0.last()?)))
                .collect();
            for ((row, _), (more, hidden)) in next.iter().zip(self.likeliest(&next, n - done)?) {
                if let Some(own) = &mut rows[*row] {
                    own.0.extend(more);
                    own.1 = hidden;
                }
            }
        }
        Ok(rows.into_iter().map(|row| row.map(|(chosen, hidden)| (chosen[..n].to_vec(), hidden))).collect())
    }

    /// The likeliest tokens after one more token of each of these rows: `n` of them where the device chooses by itself,
    /// or one.
    fn likeliest(&mut self, next: &[(usize, u32)], n: usize) -> Result<Vec<Greedy>> {
        let places: Vec<Place> =
            next.iter().map(|&(row, _)| Place { row, position: self.lens[row] }).collect();
        let ids: Vec<u32> = next.iter().map(|&(_, id)| id).collect();
        #[cfg(feature = "cuda")]
        if let Stepper::Cuda(cuda) = &mut self.stepper {
            let (chosen, hidden) = cuda.greedy(&ids, &places, n)?;
            // The first row that could not choose ends the reading of all, after the token that it read last.
            let shortest = places.iter().zip(&chosen).min_by_key(|(_, chosen)| chosen.len());
            let read = shortest.map_or(n, |(_, chosen)| n.min(chosen.len() + 1));
            for place in &places {
                self.lens[place.row] += read;
            }
            if let Some((place, chosen)) = shortest
                && chosen.len() < n
            {
                let id = argmax(&cuda.logits(place.row)?)?;
                let reason = format!("the device finds none where token {id} is the likeliest");
                return Err(ModelError::InvalidLogits { reason });
            }
            let hidden = hidden.to_dtype(self.model.compute)?;
            let each = chosen.into_iter().enumerate();
            return each.map(|(i, chosen)| Ok((chosen, hidden.narrow(0, i, 1)?))).collect();
        }
        let _ = n;
        let last = self.one_each(&ids, &places)?;
        for place in &places {
            self.lens[place.row] += 1;
        }
        last.into_iter().map(|(logits, hidden)| Ok((vec![argmax(&logits)?], hidden))).collect()
    }

    /// Several tokens of one row.
    fn read(&self, row: usize, ids: &[u32]) -> Result<Last> {
        let tokens = Tensor::new(ids, self.model.device())?.unsqueeze(0)?;
        let mut last = self.through(&tokens, &[Place { row, position: self.lens[row] }])?;
        last.pop().ok_or(ModelError::EmptyPrompt)
    }

    /// ids (places, t) through the model's own operations.
    fn through(&self, ids: &Tensor, places: &[Place]) -> Result<Vec<Last>> {
        let model = &self.model;
        let mut h = model.embed_ids(ids)?;
        for (block, cache) in model.blocks.iter().zip(&self.layers) {
            h = block.forward_cached(&h, &model.rope, cache, places, model.path)?;
        }
        let hidden = model.last_norm(&h.narrow(1, h.dim(1)? - 1, 1)?.contiguous()?)?;
        let logits = model.logits(&hidden)?.squeeze(1)?.to_dtype(DType::F32)?.to_vec2()?;
        let each = logits.into_iter().enumerate();
        each.map(|(i, logits)| Ok((logits, hidden.narrow(0, i, 1)?))).collect()
    }

    /// Row i becomes what row `from[i]` is.
    pub(super) fn reorder(&mut self, from: &[usize]) -> Result<()> {
        let rows = self.lens.len();
        if from.len() != rows {
            return Err(ModelError::Rows { got: from.len(), expected: rows });
        }
        if let Some(&row) = from.iter().find(|&&row| row >= rows) {
            return Err(ModelError::NoRow { row, rows });
        }
        let longest = from.iter().map(|&row| self.lens[row]).max().unwrap_or(0);
        if longest > 0 && from.iter().enumerate().any(|(i, &row)| i != row) {
            let index: Vec<u32> = from.iter().map(|&row| row as u32).collect();
            let index = Tensor::new(index, self.model.device())?;
            for layer in &self.layers {
                layer.reorder(&index, longest)?;
            }
        }
        self.lens = from.iter().map(|&row| self.lens[row]).collect();
        Ok(())
    }
}
