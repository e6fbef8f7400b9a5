//! Training batches of whole documents, which do not see each other.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::host::HostPackedBatch;
use super::order::ORDER;
use super::pack::{BLOCK_DOCUMENTS, Block, PACKING, Piece, Rows};
use super::prefetch::BatchSource;
use super::sampler::SamplerConfig;
use super::{check_names, check_numbers};
use crate::error::{DataError, Result};
use crate::tokens::Tokens;

/// Rows of documents, and which token is of which.
#[derive(Clone, Debug)]
pub struct PackedBatch {
    /// Token ids, `(batch, seq)`, u32; 0 in the padding at the end of a row.
    pub inputs: Tensor,
    /// The token of the same document after each input, `(batch, seq)`, u32;
    /// [`IGNORE`](crate::tokens::IGNORE) where that token is no target of the loss, and in the padding.
    pub targets: Tensor,
    /// The place of each input in its document, or in the piece of it, from 0, `(batch, seq)`, u32: what rotary
    /// embeddings turn by.
    pub positions: Tensor,
    /// Which document of its row each input is of, from 1, `(batch, seq)`, u32; 0 in the padding. A token may attend
    /// to those before it with the same number.
    pub segments: Tensor,
    /// The same for kernels of variable length (`cu_seqlens`): where each document begins in the rows put end to end,
    /// then `batch * seq`; `(documents + 1)`, u32. The padding of a row counts as one document.
    pub boundaries: Tensor,
    /// The most tokens between two boundaries.
    pub longest: usize,
    /// How many of the inputs are not padding.
    pub tokens: usize,
    /// How many targets count: the weight of the batch's mean loss in a mean over several batches.
    pub counted: usize,
}

impl PackedBatch {
    /// Which inputs each input may attend to: itself and those before it of its document. `(batch, seq, seq)`, u8,
    /// 1 where it may. Padding may attend to padding, so that no row of a softmax is empty.
    ///
    /// # Errors
    ///
    /// [`DataError::Candle`].
    pub fn attention_allowed(&self) -> Result<Tensor> {
        let (_, seq) = self.segments.dims2()?;
        let same = self.segments.unsqueeze(2)?.broadcast_eq(&self.segments.unsqueeze(1)?)?; // (batch, seq, seq)
        let places = Tensor::arange(0, seq as u32, self.segments.device())?;
        let causal = places.unsqueeze(1)?.broadcast_ge(&places.unsqueeze(0)?)?; // (seq, seq)
        Ok(same.broadcast_mul(&causal)?)
    }

    /// The same as what is added to the attention's scores: 0 where an input may attend, minus infinity elsewhere.
    /// `(batch, 1, seq, seq)`, for all heads.
    ///
    /// # Errors
    ///
    /// [`DataError::Candle`].
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use vesper_data::{PackedSampler, SamplerConfig, Tokens};
    ///
    /// // Two documents of two and one pairs of input and target, in a row of four.
    /// let tokens = Tokens::from_documents([Ok(vec![1, 2, 0]), Ok(vec![3, 0])])?;
    /// let config = SamplerConfig::default().with_batch(1).with_seq(4);
    /// let batch = PackedSampler::new(tokens, config)?.next_batch(&Device::Cpu)?;
    ///
    /// let mask = batch.attention_mask(DType::F32)?;
    /// assert_eq!(mask.dims(), [1, 1, 4, 4]);
    /// let allowed: Vec<usize> = mask.squeeze(0)?.squeeze(0)?.to_vec2::<f32>()?
    ///     .iter()
    ///     .map(|row| row.iter().filter(|score| **score == 0.0).count())
    ///     .collect();
    /// assert!(allowed == [1, 2, 1, 1] || allowed == [1, 1, 2, 1]); // whichever document is first; then padding
    /// # Ok::<(), vesper_data::DataError>(())
    /// ```
    pub fn attention_mask(&self, dtype: DType) -> Result<Tensor> {
        let allowed = self.attention_allowed()?;
        let zeros = Tensor::zeros(allowed.shape(), dtype, allowed.device())?;
        let never = Tensor::new(f32::NEG_INFINITY, allowed.device())?.to_dtype(dtype)?;
        Ok(allowed.where_cond(&zeros, &never.broadcast_as(allowed.shape())?)?.unsqueeze(1)?)
    }
}

/// Where a [`PackedSampler`] is: all that is needed to go on with the same rows, with any batch size and number of
/// ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedState {
    /// The algorithm of the shuffle, [`ORDER`](super::ORDER).
    pub order: String,
    /// The algorithm of the packing, [`PACKING`](super::PACKING).
    pub packing: String,
    /// The seed of the order.
    pub seed: u64,
    /// The epoch, from 0.
    pub epoch: u64,
    /// The block of the epoch's documents.
    pub block: u64,
    /// How many rows of the block were used, by all ranks.
    pub row: u64,
    /// Tokens a row.
    pub seq: u64,
    /// Documents an epoch.
    pub documents: u64,
    /// A digest of the data.
    pub data: u64,
}

/// Packs documents into rows and gives these out in a shuffled order.
///
/// ```text
/// document of n tokens -> n - 1 pairs: inputs tokens[0 .. n - 1], targets tokens[1 .. n]
/// more pairs than seq  -> pieces of seq pairs, and one of what is left
/// epoch                -> the documents in a shuffled order, in blocks of 4096
/// block                -> rows of seq pairs (first fit), in a shuffled order
/// ```
///
/// Each pair of neighbouring tokens of a document is in exactly one row an epoch; no target is of another document
/// than its input. A document longer than a row is cut: the pieces do not see each other, and positions begin at 0
/// in each. Documents of fewer than two tokens have nothing to predict. What is in a row depends on the documents'
/// lengths, the seed and the epoch alone; a block is packed when it is reached, and only its rows are in memory.
///
/// # Examples
///
/// ```
/// use candle_core::Device;
/// use vesper_data::{PackedSampler, SamplerConfig, Tokens};
///
/// let documents = (1..100_u32).map(|n| Ok(vec![n; n as usize % 7 + 2]));
/// let tokens = Tokens::from_documents(documents)?;
/// let config = SamplerConfig::default().with_batch(2).with_seq(16).with_seed(7);
/// let mut sampler = PackedSampler::new(tokens.clone(), config.clone())?;
/// let batch = sampler.next_batch(&Device::Cpu)?;
/// assert_eq!(batch.inputs.dims(), [2, 16]);
/// assert!(batch.tokens > 24); // of 32: the rest is padding
///
/// let state = sampler.state();
/// let next = sampler.next_batch(&Device::Cpu)?.inputs.to_vec2::<u32>()?;
/// let mut resumed = PackedSampler::new(tokens, config)?;
/// resumed.restore(&state)?;
/// assert_eq!(resumed.next_batch(&Device::Cpu)?.inputs.to_vec2::<u32>()?, next);
/// # Ok::<(), vesper_data::DataError>(())
/// ```
///
/// # References
///
/// Krell et al. 2021, <https://arxiv.org/abs/2107.02027> (packing without cross-contamination).
#[derive(Clone, Debug)]
pub struct PackedSampler {
    tokens: Tokens,
    config: SamplerConfig,
    data: u64,
    place: Place,
}

/// A row that there is.
#[derive(Clone, Debug)]
struct Place {
    epoch: u64,
    block: u64,
    row: usize,
    rows: Arc<Block>,
}

impl PackedSampler {
    /// Starts at the beginning of epoch 0.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] for a setting out of its range, [`DataError::TooFewTokens`] where no document has two
    /// tokens, [`DataError::CacheDamaged`].
    pub fn new(tokens: Tokens, config: SamplerConfig) -> Result<Self> {
        config.validate()?;
        let mut any = false;
        for document in tokens.documents() {
            if document?.len() > 1 {
                any = true;
                break;
            }
        }
        if !any {
            return Err(DataError::TooFewTokens { seq: config.seq, needed: 2, tokens: tokens.len() as u64 });
        }
        let data = tokens.digest()?;
        let place = Self::place(&tokens, &config, 0, 0)?;
        Ok(Self { tokens, config, data, place })
    }

    /// The configuration; its seed is the one of the state that was restored last, if any was.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// The epoch that the next row belongs to, from 0.
    pub fn epoch(&self) -> u64 {
        self.place.epoch
    }

    /// The first row at or after the beginning of a block.
    fn place(tokens: &Tokens, config: &SamplerConfig, mut epoch: u64, mut block: u64) -> Result<Place> {
        let blocks = tokens.document_count().div_ceil(BLOCK_DOCUMENTS) as u64;
        loop {
            if block >= blocks {
                (epoch, block) = (epoch.wrapping_add(1), 0);
            }
            let rows = Block::pack(tokens, config.seq, config.seed, epoch, block)?;
            // Some block of an epoch has a row: `new` has seen a document with a pair.
            if rows.len() > 0 {
                return Ok(Place { epoch, block, row: 0, rows: Arc::new(rows) });
            }
            block += 1;
        }
    }

    /// Moves `place` on by `count` rows; hands them to `f`.
    fn advance(&self, place: &mut Place, count: usize, mut f: impl FnMut(&[Piece])) -> Result<()> {
        for _ in 0..count {
            f(place.rows.row(place.row));
            place.row += 1;
            if place.row >= place.rows.len() {
                *place = Self::place(&self.tokens, &self.config, place.epoch, place.block + 1)?;
            }
        }
        Ok(())
    }

    /// The next batch of this rank, on `device`.
    ///
    /// # Errors
    ///
    /// [`DataError::CacheDamaged`], or [`DataError::Candle`] where the device cannot take the batch. The sampler then
    /// stays where it was.
    pub fn next_batch(&mut self, device: &Device) -> Result<PackedBatch> {
        let before = self.place.clone();
        let batch = self.prepare().and_then(|mut host| host.place(device));
        if batch.is_err() {
            self.place = before;
        }
        batch
    }

    /// Where the sampler is.
    pub fn state(&self) -> PackedState {
        PackedState {
            order: ORDER.to_owned(),
            packing: PACKING.to_owned(),
            seed: self.config.seed,
            epoch: self.place.epoch,
            block: self.place.block,
            row: self.place.row as u64,
            seq: self.config.seq as u64,
            documents: self.tokens.document_count() as u64,
            data: self.data,
        }
    }

    /// Goes to where a sampler of the same data was; its seed is taken over, the batch size and the ranks may differ.
    ///
    /// # Errors
    ///
    /// [`DataError::StateOrder`] where the state is of another shuffle or packing, [`DataError::State`] where it is
    /// of other data, of another sequence length, or was altered, [`DataError::CacheDamaged`]. The sampler then stays
    /// where it was.
    pub fn restore(&mut self, state: &PackedState) -> Result<()> {
        check_names(&[("the order", &state.order, ORDER), ("the packing", &state.packing, PACKING)])?;
        let now = self.state();
        check_numbers(&[
            ("seq", state.seq, now.seq),
            ("the number of documents", state.documents, now.documents),
            ("the digest of the data", state.data, now.data),
        ])?;
        let config = self.config.clone().with_seed(state.seed);
        let rows = Block::pack(&self.tokens, config.seq, config.seed, state.epoch, state.block)?;
        if state.row >= rows.len() as u64 {
            return Err(DataError::State {
                name: "the row of its block (below)",
                saved: state.row,
                now: rows.len() as u64,
            });
        }
        self.config = config;
        let (epoch, block, row) = (state.epoch, state.block, state.row as usize);
        self.place = Place { epoch, block, row, rows: Arc::new(rows) };
        Ok(())
    }
}

impl BatchSource for PackedSampler {
    type Host = HostPackedBatch;
    type Batch = PackedBatch;
    type State = PackedState;

    fn prepare(&mut self) -> Result<HostPackedBatch> {
        let (before, after) = self.config.others();
        let mut place = self.place.clone();
        let mut rows = Rows::default();
        self.advance(&mut place, before, |_| ())?;
        self.advance(&mut place, self.config.batch, |row| rows.push(row))?;
        self.advance(&mut place, after, |_| ())?;
        let host = HostPackedBatch::gather(&self.tokens, self.config.seq, &rows)?;
        self.place = place;
        Ok(host)
    }

    fn place(host: &mut HostPackedBatch, device: &Device) -> Result<PackedBatch> {
        host.place(device)
    }

    fn state(&self) -> PackedState {
        Self::state(self)
    }
}
