//! VesperLM: a pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and a gated feed-forward.

mod adapters;
mod batch_session;
mod block;
mod cache;
mod decoding;
mod parameters;
mod projection;
mod quantize;
mod session;

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::ops::{
    CrossEntropy, DecoderWeights, Heads, LossAndEntropy, Path, Rope, StepWeights, cast, checkpoint,
    decoder_blocks, embedding_in, linear, linear_cross_entropy, rms_norm,
};
use crate::quantized::Weight;
use crate::{ModelError, Result, VesperConfig, hf};
use block::Block;

pub use batch_session::BatchSession;
pub use decoding::DecodeStep;
pub(crate) use parameters::insert;
pub use parameters::{Parameter, initialize, trainable};
pub use session::Session;

/// What a model keeps for its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activations {
    /// What each operation needs.
    #[default]
    Keep,
    /// The input of each block; the backward runs the blocks again ([`checkpoint`]). Less memory, about a third more
    /// time.
    Recompute,
}

/// A decoder-only language model.
///
/// ```text
/// h = E[ids]                                            (batch, t, hidden)
/// h = h + O attention(rope(QKV norm(h)))                in each block
/// h = h + D (act(G norm(h)) * U norm(h))
/// logits = norm(h) E^T                                  (batch, t, vocab)
/// ```
///
/// The parameters live in a `VarMap` (training) or in plain tensors (inference); the model only refers to them, so an
/// optimizer's steps are seen at once. Activations have the dtype of [`VesperLM::with_compute_dtype`]; the loss and
/// the norms are computed in f32.
///
/// # Examples
/// ```
/// use vesper_model::candle_core::{DType, Device, Tensor};
/// use vesper_model::candle_nn::VarMap;
/// use vesper_model::{VesperConfig, VesperLM};
///
/// let config = VesperConfig::preset("nano")?.with_vocab(100);
/// let varmap = VarMap::new();
/// let model = VesperLM::initialize(&config, &varmap, 42, DType::F32, &Device::Cpu)?;
/// let ids = Tensor::new(&[[1u32, 2, 3]], &Device::Cpu)?;
/// let targets = Tensor::new(&[[2u32, 3, 4]], &Device::Cpu)?;
/// let loss = model.loss(&ids, &targets)?.loss;
/// assert!((loss.to_scalar::<f32>()? - 128f32.ln()).abs() < 0.6); // not far from uniform at the start
/// let grads = loss.backward()?;
/// for var in varmap.all_vars() {
///     assert!(grads.get(&var).is_some());
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct VesperLM {
    config: VesperConfig,
    embed: Weight,
    blocks: Vec<Block>,
    norm: Tensor,
    /// None where the embedding is tied.
    head: Option<Weight>,
    rope: Rope,
    compute: DType,
    path: Path,
    activations: Activations,
}

impl VesperLM {
    /// Builds the model on variables or tensors of a `VarBuilder`, by the names of [`VesperConfig::parameters`].
    ///
    /// # Errors
    /// [`ModelError::InvalidConfig`], or a tensor that is missing or has another shape.
    #[allow(clippy::needless_pass_by_value)] // as candle's models take it
    pub fn new(config: &VesperConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let mut fetch = |name: &str, shape: &[usize]| Ok(Weight::Plain(vb.get(shape, name)?));
        Self::build(config, (vb.dtype(), vb.device()), &mut fetch, Some(&vb))
    }

    /// A model of what `fetch` gives by name, and of the adapters that the configuration has in `adapters`.
    pub(crate) fn build(
        config: &VesperConfig,
        (compute, device): (DType, &Device),
        fetch: &mut dyn FnMut(&str, &[usize]) -> candle_core::Result<Weight>,
        adapters: Option<&VarBuilder<'_>>,
    ) -> Result<Self> {
        config.validate()?;
        let frozen = config.adapter.is_some();
        let (v, d) = (config.vocab_size, config.hidden_size);
        let blocks = (0..config.num_hidden_layers)
            .map(|i| {
                let prefix = format!("model.layers.{i}");
                let mut fetch =
                    |name: &str, shape: &[usize]| fetch(&format!("{prefix}.{name}.weight"), shape);
                Block::new(config, &mut fetch, adapters.map(|vb| vb.pp(&prefix)).as_ref())
            })
            .collect::<candle_core::Result<_>>()?;
        let mut get = |name: &str, shape: &[usize]| -> Result<Weight> {
            let weight = fetch(name, shape)?;
            Ok(if frozen { weight.detach() } else { weight })
        };
        Ok(Self {
            embed: get("model.embed_tokens.weight", &[v, d])?,
            blocks,
            norm: get("model.norm.weight", &[d])?.to_plain()?,
            head: if config.tie_word_embeddings { None } else { Some(get("lm_head.weight", &[v, d])?) },
            rope: Rope::scaled(
                config.head_dim,
                config.max_position_embeddings,
                config.rope_theta,
                config.rope_scaling,
                device,
            )?,
            compute,
            path: Path::Fused,
            activations: Activations::Keep,
            config: config.clone(),
        })
    }

    /// A new model in a `VarMap`, with values that depend on the seed alone.
    ///
    /// # Errors
    /// As [`VesperLM::new`].
    pub fn initialize(
        config: &VesperConfig,
        varmap: &VarMap,
        seed: u64,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        initialize(config, varmap, seed, dtype, device)?;
        Self::new(config, VarBuilder::from_varmap(varmap, dtype, device))
    }

    /// A model of a Hugging Face directory, for inference: VesperLM's own or a Llama.
    ///
    /// # Errors
    /// What is wrong with which file: missing, truncated, another shape, an unsupported setting.
    pub fn load(dir: impl AsRef<std::path::Path>, dtype: DType, device: &Device) -> Result<Self> {
        let config = hf::read_config(dir.as_ref())?;
        let weights = hf::read_weights(dir.as_ref(), &config, dtype, device)?;
        Self::new(&config, VarBuilder::from_tensors(weights, dtype, device))
    }

    /// A model of a Hugging Face directory as variables of a `VarMap`, to train it further.
    ///
    /// `adapter` freezes it and adds new adapters, which start as `seed` says.
    ///
    /// # Errors
    /// As [`VesperLM::load`].
    pub fn load_into(
        dir: impl AsRef<std::path::Path>,
        adapter: Option<crate::AdapterConfig>,
        varmap: &VarMap,
        seed: u64,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let stored = hf::read_config(dir.as_ref())?;
        let weights = hf::read_weights(dir.as_ref(), &stored, dtype, device)?;
        let config = match adapter {
            Some(adapter) => stored.with_adapter(adapter),
            None => stored,
        };
        initialize(&config, varmap, seed, dtype, device)?;
        for (name, value) in &weights {
            insert(varmap, name, value, dtype)?;
        }
        Self::new(&config, VarBuilder::from_varmap(varmap, dtype, device))
    }

    /// Computes activations in `dtype` (bf16 usually) while the parameters keep theirs; the loss stays in f32.
    pub fn with_compute_dtype(mut self, dtype: DType) -> Self {
        self.compute = dtype;
        self
    }

    /// Runs the fused operations (default) or their candle reference.
    pub fn with_path(mut self, path: Path) -> Self {
        self.path = path;
        self
    }

    /// Keeps all activations for the backward pass (default), or the blocks' inputs alone.
    pub fn with_activations(mut self, activations: Activations) -> Self {
        self.activations = activations;
        self
    }

    /// The architecture.
    pub fn config(&self) -> &VesperConfig {
        &self.config
    }

    /// What activations are computed in, see [`VesperLM::with_compute_dtype`].
    pub fn compute_dtype(&self) -> DType {
        self.compute
    }

    /// The device that the parameters are on.
    pub fn device(&self) -> &Device {
        self.norm.device()
    }

    /// The same model without gradients: for evaluation, where it saves memory and time. It refers to the same
    /// storage, so it sees later updates of the variables.
    pub fn detach(&self) -> Self {
        Self {
            embed: self.embed.detach(),
            blocks: self.blocks.iter().map(Block::detach).collect(),
            norm: self.norm.detach(),
            head: self.head.as_ref().map(Weight::detach),
            ..self.clone()
        }
    }

    /// Logits of every position.
    ///
    /// ```text
    /// ids: (batch, t), u32    result: (batch, t, vocab), f32 (f64 in an f64 model)
    /// ```
    ///
    /// # Errors
    /// [`ModelError::SequenceTooLong`], an id outside the vocabulary, or a device that is out of memory.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let hidden = self.hidden(ids)?;
        self.logits(&hidden)
    }

    /// Mean next-token loss and the mean entropy of the predictions, both in nats.
    ///
    /// ```text
    /// ids, targets: (batch, t), u32    loss, entropy: scalars, f32
    /// ```
    ///
    /// Targets of `u32::MAX` do not count. The logits are never all in memory ([`linear_cross_entropy`]).
    ///
    /// # Errors
    /// As [`VesperLM::forward`].
    pub fn loss(&self, ids: &Tensor, targets: &Tensor) -> Result<LossAndEntropy> {
        let hidden = self.hidden(ids)?;
        let weight = self.output_weight().to_plain()?;
        Ok(linear_cross_entropy(&hidden, &weight, targets, CrossEntropy::default(), self.path)?)
    }

    /// What goes into the activation of each block's feed-forward, before the gate's values scale the others: for looking
    /// at what an activation does in a trained model, as which units are never used.
    ///
    /// ```text
    /// ids: (batch, t), u32    result: for each block (batch, t, ffn), in the dtype of the computation
    /// ```
    ///
    /// # Errors
    /// As [`VesperLM::forward`].
    ///
    /// # Examples
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::VarMap;
    /// use vesper_model::{VesperConfig, VesperLM};
    /// let config = VesperConfig::preset("nano")?.with_vocab(64);
    /// let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
    /// let gates = model.gates(&Tensor::new(&[[1u32, 2, 3]], &Device::Cpu)?)?;
    /// assert_eq!(gates.len(), config.num_hidden_layers);
    /// assert_eq!(gates[0].dims(), [1, 3, config.intermediate_size]);
    /// # Ok::<(), vesper_model::ModelError>(())
    /// ```
    pub fn gates(&self, ids: &Tensor) -> Result<Vec<Tensor>> {
        let mut h = self.embedded(ids)?;
        let mut all = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (next, gates) = block.forward_and_gates(&h, &self.rope, self.path)?;
            h = next;
            all.push(gates);
        }
        Ok(all)
    }

    /// Hidden states of every position after the last norm: what the output layer scores.
    ///
    /// ```text
    /// ids: (batch, t), u32    result: (batch, t, hidden), in the dtype of the computation
    /// ```
    ///
    /// # Errors
    /// As [`VesperLM::forward`].
    pub fn hidden_states(&self, ids: &Tensor) -> Result<Tensor> {
        self.hidden(ids)
    }

    /// A decoding session of up to `capacity` tokens with its own key-value cache; `capacity` is limited to the
    /// model's `max_position_embeddings`.
    ///
    /// # Errors
    /// A device that is out of memory.
    pub fn session(&self, capacity: usize) -> Result<Session> {
        Session::new(self, capacity)
    }

    /// A decoding session of `rows` sequences of up to `capacity` tokens each, with one key-value cache; `capacity` is
    /// limited to the model's `max_position_embeddings`.
    ///
    /// # Errors
    /// A device that is out of memory.
    pub fn batch_session(&self, rows: usize, capacity: usize) -> Result<BatchSession> {
        BatchSession::new(self, rows, capacity)
    }

    /// The blocks' parameters, where no projection has an adapter or is in blocks of numbers.
    fn plain_blocks(&self) -> Option<Vec<DecoderWeights>> {
        self.blocks.iter().map(Block::plain).collect()
    }

    /// What a fused decoding step reads; none where there are adapters.
    fn step_weights(&self) -> Option<StepWeights> {
        let settings = self.blocks.first().filter(|_| self.path == Path::Fused)?.settings();
        Some(StepWeights {
            embed: self.embed.clone(),
            layers: self.blocks.iter().map(Block::step_layer).collect::<Option<_>>()?,
            norm: self.norm.clone(),
            head: self.output_weight().clone(),
            settings,
            rope: self.rope.clone(),
        })
    }

    /// ids (batch, t) to the normalised last hidden states (batch, t, hidden)
    fn hidden(&self, ids: &Tensor) -> Result<Tensor> {
        let mut h = self.embedded(ids)?;
        match (self.activations, self.blocks.first(), self.plain_blocks()) {
            (Activations::Keep, Some(first), Some(blocks)) => {
                h = decoder_blocks(&h, &blocks, first.settings(), Some(&self.rope), self.path)?;
            }
            (Activations::Keep, ..) => {
                for block in &self.blocks {
                    h = block.forward(&h, &self.rope, self.path)?;
                }
            }
            (Activations::Recompute, ..) => {
                for block in &self.blocks {
                    let (block, rope, path) = (block.clone(), self.rope.clone(), self.path);
                    h = checkpoint(move |x| block.forward(&x[0], &rope, path), &[&h])?;
                }
            }
        }
        self.last_norm(&h)
    }

    /// ids (batch, t) to what the first block takes (batch, t, hidden)
    fn embedded(&self, ids: &Tensor) -> Result<Tensor> {
        let (_, t) = ids.dims2()?;
        if t > self.rope.positions() {
            return Err(ModelError::SequenceTooLong { got: t, limit: self.rope.positions() });
        }
        self.embed_ids(ids)
    }

    /// The rows of ids of any shape, in the dtype of the computation.
    fn embed_ids(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(match &self.embed {
            Weight::Plain(table) => embedding_in(table, ids, self.compute, self.path)?,
            Weight::Blocks(table) => cast(&table.embedding(ids)?, self.compute)?,
        })
    }

    fn last_norm(&self, h: &Tensor) -> Result<Tensor> {
        Ok(rms_norm(h, &self.norm, self.config.rms_norm_eps, self.path)?)
    }

    fn output_weight(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = match self.output_weight() {
            Weight::Plain(weight) => linear(hidden, weight, self.path)?,
            Weight::Blocks(weight) => weight.linear(hidden)?,
        };
        Ok(if logits.dtype() == DType::F64 { logits } else { cast(&logits, DType::F32)? })
    }

    fn heads(&self) -> Heads {
        Heads {
            query: self.config.num_attention_heads,
            kv: self.config.num_key_value_heads,
            dim: self.config.head_dim,
        }
    }
}
