//! Pre-norm decoder blocks as one operation.

use candle_core::{Result, Tensor, bail};
use era_act::Activation;

use super::{
    Backend, Heads, Path, Rope, check_dtypes, check_sizes, decoder_cpu, gated_feed_forward,
    residual_rms_norm, rms_norm, self_attention, sizes,
};

/// The parameters of a [`decoder_block`].
#[derive(Debug, Clone)]
pub struct DecoderWeights {
    /// (d)
    pub norm_attention: Tensor,
    /// (packed, d): the projections of queries, keys and values below each other, see [`Heads`].
    pub qkv: Tensor,
    /// (d, query heads * head size)
    pub out: Tensor,
    /// (d)
    pub norm_feed_forward: Tensor,
    /// (2 ffn, d): the gate's projection and the other one below it.
    pub gate_up: Tensor,
    /// (d, ffn)
    pub down: Tensor,
}

impl DecoderWeights {
    pub(super) fn all(&self) -> [&Tensor; 6] {
        [&self.norm_attention, &self.qkv, &self.out, &self.norm_feed_forward, &self.gate_up, &self.down]
    }

    /// Made of its tensors in the order of [`DecoderWeights::all`].
    #[cfg(feature = "cuda")]
    pub(super) fn from_all(mut next: impl FnMut() -> Option<Tensor>) -> Result<Self> {
        let mut take = || next().map_or_else(|| bail!("a block with too few weights"), Ok);
        Ok(Self {
            norm_attention: take()?,
            qkv: take()?,
            out: take()?,
            norm_feed_forward: take()?,
            gate_up: take()?,
            down: take()?,
        })
    }

    pub(super) fn contiguous(&self) -> Result<Self> {
        Ok(Self {
            norm_attention: self.norm_attention.contiguous()?,
            qkv: self.qkv.contiguous()?,
            out: self.out.contiguous()?,
            norm_feed_forward: self.norm_feed_forward.contiguous()?,
            gate_up: self.gate_up.contiguous()?,
            down: self.down.contiguous()?,
        })
    }
}

/// What a [`decoder_block`] computes with them.
#[derive(Debug, Clone, Copy)]
pub struct DecoderSettings {
    /// Of the attention.
    pub heads: Heads,
    /// Of the feed-forward's gate.
    pub activation: Activation,
    /// Of both norms.
    pub eps: f64,
}

/// A block of a decoder: attention and gated feed-forward, each behind an RMSNorm and with a residual sum.
///
/// ```text
/// x: (batch, t, d)
/// s = x + self_attention(rms_norm(x))    y = s + gated_feed_forward(rms_norm(s))
/// ```
///
/// The same as [`rms_norm`](super::rms_norm()), [`self_attention`](super::self_attention()),
/// [`residual_rms_norm`](super::residual_rms_norm()) and [`gated_feed_forward`](super::gated_feed_forward())
/// after each other, in one node of candle's graph: for each edge between two nodes candle writes zeros and adds the
/// gradient to them, which for the edges of a block is a quarter of the time of a training step on CUDA; here residual
/// gradients are added inside of the norms' backward, and on CUDA weights in f32 get theirs straight from the products.
///
/// Saves what the four operations save; on CUDA also, for weights in f32 beside activations in bf16 or f16, their copies in
/// that dtype. x and the dtypes are as in those operations.
///
/// # Errors
/// What the four operations refuse, and `out` or `down` with another number of rows than d.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use era_act::Activation;
/// use vesper_model::ops::{DecoderSettings, DecoderWeights, Heads, Path, decoder_block};
/// let heads = Heads { query: 2, kv: 1, dim: 4 };
/// let ones = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, &Device::Cpu);
/// let norm = Tensor::ones(6, DType::F32, &Device::Cpu)?;
/// let weights = DecoderWeights {
///     norm_attention: norm.clone(),
///     qkv: ones((heads.packed(), 6))?,
///     out: ones((6, 8))?,
///     norm_feed_forward: norm,
///     gate_up: ones((2 * 10, 6))?,
///     down: ones((6, 10))?,
/// };
/// let settings = DecoderSettings { heads, activation: Activation::Silu, eps: 1e-6 };
/// let x = Tensor::ones((1, 5, 6), DType::F32, &Device::Cpu)?;
/// assert_eq!(decoder_block(&x, &weights, settings, None, Path::Fused)?.dims(), [1, 5, 6]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn decoder_block(
    x: &Tensor,
    weights: &DecoderWeights,
    settings: DecoderSettings,
    positions: Option<&Rope>,
    path: Path,
) -> Result<Tensor> {
    decoder_blocks(x, std::slice::from_ref(weights), settings, positions, path)
}

/// A stack of blocks, each of which takes what the one before gives: [`decoder_block`] after [`decoder_block`].
///
/// ```text
/// x: (batch, t, d)
/// y = block_n(.. block_2(block_1(x)))
/// ```
///
/// All of them are one node of candle's graph, so that the gradient between two blocks is neither summed with zeros nor
/// copied. No blocks at all give x. Saves what each block saves; a block without a gradient before or in it saves
/// nothing.
///
/// # Errors
/// As [`decoder_block`].
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use era_act::Activation;
/// use vesper_model::ops::{DecoderSettings, DecoderWeights, Heads, Path, decoder_blocks};
/// let heads = Heads { query: 2, kv: 1, dim: 4 };
/// let ones = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, &Device::Cpu);
/// let norm = Tensor::ones(6, DType::F32, &Device::Cpu)?;
/// let block = DecoderWeights {
///     norm_attention: norm.clone(),
///     qkv: ones((heads.packed(), 6))?,
///     out: ones((6, 8))?,
///     norm_feed_forward: norm,
///     gate_up: ones((2 * 10, 6))?,
///     down: ones((6, 10))?,
/// };
/// let settings = DecoderSettings { heads, activation: Activation::Silu, eps: 1e-6 };
/// let x = Tensor::ones((1, 5, 6), DType::F32, &Device::Cpu)?;
/// let y = decoder_blocks(&x, &[block.clone(), block], settings, None, Path::Fused)?;
/// assert_eq!(y.dims(), [1, 5, 6]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn decoder_blocks(
    x: &Tensor,
    blocks: &[DecoderWeights],
    settings: DecoderSettings,
    positions: Option<&Rope>,
    path: Path,
) -> Result<Tensor> {
    let [b, t, d] = sizes("decoder_block", "x", x)?;
    for (i, weights) in blocks.iter().enumerate() {
        for (name, weight) in [("out", &weights.out), ("down", &weights.down)] {
            if weight.dims().first() != Some(&d) || weight.rank() != 2 {
                bail!("decoder_block: {name} {:?} of block {i} for x {:?}", weight.shape(), x.shape());
            }
        }
        // What the operations would say after the first of them have run.
        let [packed, _] = sizes("decoder_block", "gate_up", &weights.gate_up)?;
        let wide = [b, t, settings.heads.packed().max(packed)];
        check_sizes("decoder_block", &[x.dims(), &wide])?;
    }
    if blocks.is_empty() || (x.elem_count() == 0 && x.device().is_cuda()) {
        return Ok(x.clone()); // candle cannot add nothing to nothing there
    }
    if fits(x, blocks, settings)? {
        match path.backend(x) {
            Backend::Cpu => return decoder_cpu::decoder_blocks(x, blocks, settings, positions),
            #[cfg(feature = "cuda")]
            Backend::Cuda if super::cuda::attention::supports(settings.heads, x.dtype()) => {
                super::attention::CausalAttention::new(settings.heads, positions, t)?; // checks the positions
                return super::cuda::decoder::decoder_blocks(x, blocks, settings, positions);
            }
            _ => {}
        }
    }
    blocks.iter().try_fold(x.clone(), |x, weights| composed(&x, weights, settings, positions, path))
}

/// A block as its four operations.
fn composed(
    x: &Tensor,
    weights: &DecoderWeights,
    settings: DecoderSettings,
    positions: Option<&Rope>,
    path: Path,
) -> Result<Tensor> {
    let DecoderSettings { heads, activation, eps } = settings;
    let n = rms_norm(x, &weights.norm_attention, eps, path)?;
    let attention = self_attention(&n, &weights.qkv, &weights.out, heads, positions, path)?;
    let (sum, n) = residual_rms_norm(x, &attention, &weights.norm_feed_forward, eps, path)?;
    sum + gated_feed_forward(&n, &weights.gate_up, &weights.down, activation, path)?
}

/// Whether the shapes fit and nothing is empty; where not, one of the operations is to say what is wrong.
fn fits(x: &Tensor, blocks: &[DecoderWeights], settings: DecoderSettings) -> Result<bool> {
    let DecoderSettings { heads, activation, .. } = settings;
    let ((b, t, d), packed) = (x.dims3()?, heads.packed());
    activation.validate()?;
    for weights in blocks {
        let ffn = weights.down.dim(1)?;
        let fits = weights.norm_attention.dims() == [d]
            && weights.norm_feed_forward.dims() == [d]
            && weights.qkv.dims() == [packed, d]
            && weights.out.dims() == [d, heads.query * heads.dim]
            && weights.gate_up.dims() == [2 * ffn, d];
        if !fits || b * t * d * ffn == 0 {
            return Ok(false);
        }
        for weight in weights.all() {
            check_dtypes("decoder_block", x, &[("weight", weight)])?;
        }
    }
    Ok(true)
}
