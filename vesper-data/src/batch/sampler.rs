//! Training batches in a seeded, resumable order.

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::order::epoch_order;
use super::{Batch, check_batch, gather, window_count};
use crate::error::{DataError, Result};
use crate::tokens::Tokens;

/// The shape and the order of training batches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplerConfig {
    /// Windows a batch. Default 8, at least 1.
    pub batch: usize,
    /// Tokens a window. Default 256, at least 1.
    pub seq: usize,
    /// Chooses the order of the windows. Default 0, any number.
    pub seed: u64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self { batch: 8, seq: 256, seed: 0 }
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

    /// Checks every field against its range.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] that names the field.
    pub fn validate(&self) -> Result<()> {
        check_batch(self.batch, self.seq)
    }
}

/// Where a [`BatchSampler`] is: all that is needed to go on with the same batches.
///
/// The last three fields do not say where the sampler is but what it samples from, so that a state cannot be
/// restored onto other data unnoticed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerState {
    /// The seed of the order.
    pub seed: u64,
    /// The epoch, from 0.
    pub epoch: u64,
    /// How many windows of the epoch were used.
    pub position: u64,
    /// Tokens a window.
    pub seq: u64,
    /// Windows an epoch.
    pub windows: u64,
    /// A digest of a few thousand of the data's tokens.
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
/// Each token but the first and up to `seq` at the end is a target exactly once an epoch. The order depends on
/// the seed and the epoch alone. A batch that begins near the end of an epoch goes on with the first windows
/// of the next one, so that every batch is full and every window is used.
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
    position: usize,
    order: Vec<usize>,
}

impl BatchSampler {
    /// Starts at the beginning of epoch 0.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] for a batch or a sequence of 0, [`DataError::TooFewTokens`] where the data does
    /// not fill one window.
    pub fn new(tokens: Tokens, config: SamplerConfig) -> Result<Self> {
        config.validate()?;
        let windows = window_count(tokens.len(), config.seq)?;
        let data = digest(&tokens);
        let order = epoch_order(windows, config.seed, 0);
        Ok(Self { tokens, config, windows, data, epoch: 0, position: 0, order })
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

    /// The next batch, on `device`: inputs and targets of shape `(batch, seq)`.
    ///
    /// # Errors
    ///
    /// [`DataError::Candle`] where the device cannot take the batch. The sampler then stays where it was.
    pub fn next_batch(&mut self, device: &Device) -> Result<Batch> {
        let before = self.state();
        let indices = self.next_windows();
        let batch = gather(&self.tokens, self.config.seq, &indices, device);
        if batch.is_err() {
            self.restore(&before)?;
        }
        batch
    }

    /// Moves on by one batch without making it: gives the indices of its windows.
    pub fn next_windows(&mut self) -> Vec<usize> {
        let mut indices = Vec::with_capacity(self.config.batch);
        while indices.len() < self.config.batch {
            let wanted = self.config.batch - indices.len();
            let rest = self.order.get(self.position..).unwrap_or_default();
            let taken = rest.len().min(wanted);
            indices.extend(rest.iter().take(taken));
            self.position += taken;
            if self.position >= self.windows {
                self.start_epoch(self.epoch.wrapping_add(1));
            }
        }
        indices
    }

    fn start_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.position = 0;
        self.order = epoch_order(self.windows, self.config.seed, epoch);
    }

    /// Where the sampler is.
    pub fn state(&self) -> SamplerState {
        SamplerState {
            seed: self.config.seed,
            epoch: self.epoch,
            position: self.position as u64,
            seq: self.config.seq as u64,
            windows: self.windows as u64,
            data: self.data,
        }
    }

    /// Goes to where a sampler of the same data was; its seed is taken over, the batch size may differ.
    ///
    /// # Errors
    ///
    /// [`DataError::State`] where the state is of other data, of another sequence length, or was altered; the
    /// sampler then stays where it was.
    pub fn restore(&mut self, state: &SamplerState) -> Result<()> {
        let now = self.state();
        let checks = [
            ("seq", state.seq, now.seq),
            ("the number of windows", state.windows, now.windows),
            ("the digest of the data", state.data, now.data),
        ];
        for (name, saved, now) in checks {
            if saved != now {
                return Err(DataError::State { name, saved, now });
            }
        }
        if state.position >= now.windows {
            return Err(DataError::State {
                name: "the position (below)",
                saved: state.position,
                now: now.windows,
            });
        }
        if (state.seed, state.epoch) != (now.seed, now.epoch) {
            self.config.seed = state.seed;
            self.start_epoch(state.epoch);
        }
        self.position = state.position as usize;
        Ok(())
    }
}

/// A 64-bit FNV-1a hash of up to 4096 evenly spaced tokens and the length: enough to notice other data, and
/// quick for any size.
fn digest(tokens: &Tokens) -> u64 {
    const SAMPLES: usize = 4096;
    let len = tokens.len();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |value: u64| {
        for byte in value.to_le_bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    add(len as u64);
    let mut id = [0];
    for sample in 0..SAMPLES.min(len) {
        let position = (sample as u128 * len as u128 / SAMPLES.min(len) as u128) as usize;
        if tokens.read_into(position, &mut id).is_ok() {
            add(id[0].into());
        }
    }
    hash
}
