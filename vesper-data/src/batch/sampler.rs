//! Training batches in a seeded, resumable order.

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::host::HostBatch;
use super::order::{ORDER, Permutation, Use, first_order};
use super::prefetch::BatchSource;
use super::{Batch, check_batch, check_names, check_numbers, window_count};
use crate::error::{DataError, Result};
use crate::tokens::Tokens;

/// The shape and the order of training batches.
///
/// # Examples
///
/// ```
/// use vesper_data::SamplerConfig;
///
/// let config = SamplerConfig::default().with_batch(32).with_seq(1024).with_seed(42).with_shard(1, 4);
/// assert!(config.validate().is_ok());
/// assert!(config.with_shard(4, 4).validate().is_err()); // ranks count from 0
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplerConfig {
    /// Windows, or packed rows, a batch of this rank. Default 8, at least 1.
    pub batch: usize,
    /// Tokens a window or row. Default 256, at least 1.
    pub seq: usize,
    /// Chooses the order of the windows or rows. Default 0, any number.
    pub seed: u64,
    /// Which of the programs that train together this is, from 0. Default 0, below `world`.
    pub rank: usize,
    /// How many programs train together. Default 1, at least 1. At each step, rank `r` takes the `r`-th `batch` of
    /// the next `world * batch` windows or rows: all ranks must have the same `batch`, `world`, `seq` and `seed`.
    pub world: usize,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self { batch: 8, seq: 256, seed: 0, rank: 0, world: 1 }
    }
}

impl SamplerConfig {
    /// Sets the number of windows a batch.
    pub fn with_batch(mut self, batch: usize) -> Self {
        self.batch = batch;
        self
    }

    /// Sets the number of tokens a window.
    pub fn with_seq(mut self, seq: usize) -> Self {
        self.seq = seq;
        self
    }

    /// Sets the seed of the order.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets which of how many programs that train together this is.
    pub fn with_shard(mut self, rank: usize, world: usize) -> Self {
        self.rank = rank;
        self.world = world;
        self
    }

    /// Checks every field against its range.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] that names the field.
    pub fn validate(&self) -> Result<()> {
        check_batch(self.batch, self.seq)?;
        let wrong =
            |name, got: usize, expected| Err(DataError::Config { name, got: got.to_string(), expected });
        if self.world == 0 {
            return wrong("world", self.world, "at least 1");
        }
        if self.rank >= self.world {
            return wrong("rank", self.rank, "a number below world");
        }
        match self.batch.checked_mul(self.world) {
            Some(rows) if u32::try_from(rows).is_ok() => Ok(()),
            _ => wrong("world", self.world, "batch * world below 2^32"),
        }
    }

    /// How many windows of a step come before, and after, those of this rank.
    pub(super) fn others(&self) -> (usize, usize) {
        (self.batch * self.rank, self.batch * (self.world - self.rank).saturating_sub(1))
    }
}

/// Where a [`BatchSampler`] is: all that is needed to go on with the same windows, with any batch size and number of
/// ranks.
///
/// The last three fields do not say where the sampler is but what it samples from, so that a state cannot be
/// restored onto other data unnoticed. States of ranks that made the same number of steps are equal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerState {
    /// The algorithm of the shuffle, [`ORDER`](super::ORDER).
    #[serde(default = "first_order")]
    pub order: String,
    /// The seed of the order.
    pub seed: u64,
    /// The epoch, from 0.
    pub epoch: u64,
    /// How many windows of the epoch were used, by all ranks.
    pub position: u64,
    /// Tokens a window.
    pub seq: u64,
    /// Windows an epoch.
    pub windows: u64,
    /// A digest of the data.
    pub data: u64,
}

/// Cuts a token stream into windows and gives them out in a shuffled order.
///
/// ```text
/// windows = (tokens - 1) / seq
/// window i: inputs  tokens[i * seq     .. (i + 1) * seq]
///           targets tokens[i * seq + 1 ..= (i + 1) * seq]
/// ```
///
/// Each token but the first and up to `seq` at the end is a target exactly once an epoch, unless the loss leaves it
/// out. The order depends on the seed and the epoch alone, and is computed as it is needed: it takes no memory. A
/// batch that begins near the end of an epoch goes on with the first windows of the next one, so that every batch is
/// full and every window is used.
///
/// # Examples
///
/// ```
/// use candle_core::Device;
/// use vesper_data::{BatchSampler, SamplerConfig, Tokens};
///
/// let tokens = Tokens::from((0..101).collect::<Vec<u32>>());
/// let config = SamplerConfig::default().with_batch(2).with_seq(10).with_seed(7);
/// let mut sampler = BatchSampler::new(tokens.clone(), config.clone())?;
/// assert_eq!(sampler.windows(), 10);
///
/// let batch = sampler.next_batch(&Device::Cpu)?;
/// assert_eq!(batch.inputs.dims(), [2, 10]);
/// let (inputs, targets) = (batch.inputs.to_vec2::<u32>()?, batch.targets.to_vec2::<u32>()?);
/// assert_eq!(targets[1][3], inputs[1][3] + 1); // the token that follows
///
/// let state = sampler.state();
/// let next = sampler.next_batch(&Device::Cpu)?.inputs.to_vec2::<u32>()?;
/// let mut resumed = BatchSampler::new(tokens, config)?;
/// resumed.restore(&state)?;
/// assert_eq!(resumed.next_batch(&Device::Cpu)?.inputs.to_vec2::<u32>()?, next);
/// # Ok::<(), vesper_data::DataError>(())
/// ```
#[derive(Clone, Debug)]
pub struct BatchSampler {
    tokens: Tokens,
    config: SamplerConfig,
    windows: usize,
    data: u64,
    epoch: u64,
    position: u64,
}

impl BatchSampler {
    /// Starts at the beginning of epoch 0.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] for a setting out of its range, [`DataError::TooFewTokens`] where the data does
    /// not fill one window.
    pub fn new(tokens: Tokens, config: SamplerConfig) -> Result<Self> {
        config.validate()?;
        let windows = window_count(tokens.len(), config.seq)?;
        let data = tokens.digest()?;
        Ok(Self { tokens, config, windows, data, epoch: 0, position: 0 })
    }

    /// The configuration; its seed is the one of the state that was restored last, if any was.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// The number of windows an epoch.
    pub fn windows(&self) -> usize {
        self.windows
    }

    /// The epoch that the next window belongs to, from 0.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The next batch of this rank, on `device`: inputs and targets of shape `(batch, seq)`.
    ///
    /// # Errors
    ///
    /// [`DataError::CacheDamaged`], or [`DataError::Candle`] where the device cannot take the batch. The sampler then
    /// stays where it was.
    pub fn next_batch(&mut self, device: &Device) -> Result<Batch> {
        let before = (self.epoch, self.position);
        let batch = self.prepare().and_then(|mut host| host.place(device));
        if batch.is_err() {
            (self.epoch, self.position) = before;
        }
        batch
    }

    /// Moves on by one batch without making it: gives the indices of its windows.
    pub fn next_windows(&mut self) -> Vec<usize> {
        let (before, after) = self.config.others();
        self.advance(before);
        let mut indices = Vec::with_capacity(self.config.batch);
        while indices.len() < self.config.batch {
            let rest = self.windows as u64 - self.position;
            let wanted = (self.config.batch - indices.len()).min(rest as usize);
            let order = Permutation::new(self.windows as u64, self.config.seed, self.epoch, Use::Windows);
            indices.extend((self.position..).take(wanted).map(|place| order.at(place) as usize));
            self.advance(wanted);
        }
        self.advance(after);
        indices
    }

    /// Moves on by `count` windows, less than 2^32 of them.
    fn advance(&mut self, count: usize) {
        let windows = self.windows as u64;
        let position = self.position + count as u64;
        self.epoch = self.epoch.wrapping_add(position / windows);
        self.position = position % windows;
    }

    /// Where the sampler is.
    pub fn state(&self) -> SamplerState {
        SamplerState {
            order: ORDER.to_owned(),
            seed: self.config.seed,
            epoch: self.epoch,
            position: self.position,
            seq: self.config.seq as u64,
            windows: self.windows as u64,
            data: self.data,
        }
    }

    /// Goes to where a sampler of the same data was; its seed is taken over, the batch size and the ranks may differ.
    ///
    /// # Errors
    ///
    /// [`DataError::StateOrder`] where the state is of another shuffle, [`DataError::State`] where it is of other
    /// data, of another sequence length, or was altered; the sampler then stays where it was.
    pub fn restore(&mut self, state: &SamplerState) -> Result<()> {
        check_names(&[("the order", &state.order, ORDER)])?;
        let now = self.state();
        check_numbers(&[
            ("seq", state.seq, now.seq),
            ("the number of windows", state.windows, now.windows),
            ("the digest of the data", state.data, now.data),
        ])?;
        if state.position >= now.windows {
            return Err(DataError::State {
                name: "the position (below)",
                saved: state.position,
                now: now.windows,
            });
        }
        self.config.seed = state.seed;
        (self.epoch, self.position) = (state.epoch, state.position);
        Ok(())
    }
}

impl BatchSource for BatchSampler {
    type Host = HostBatch;
    type Batch = Batch;
    type State = SamplerState;

    fn prepare(&mut self) -> Result<HostBatch> {
        let before = (self.epoch, self.position);
        let indices = self.next_windows();
        let host = HostBatch::gather(&self.tokens, self.config.seq, &indices);
        if host.is_err() {
            (self.epoch, self.position) = before;
        }
        host
    }

    fn place(host: &mut HostBatch, device: &Device) -> Result<Batch> {
        host.place(device)
    }

    fn state(&self) -> SamplerState {
        Self::state(self)
    }
}
