//! A small GPT-2, written with the layers of candle-nn.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, Module, VarBuilder, VarMap, embedding, layer_norm, linear};
use vesper_model::ops::{self, CrossEntropy, Heads, Path};

/// Sizes of the model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gpt2Config {
    /// Rows of the embedding.
    pub(crate) vocab: usize,
    /// The longest sequence.
    pub(crate) positions: usize,
    /// Width.
    pub(crate) hidden: usize,
    /// Blocks.
    pub(crate) layers: usize,
    /// Heads of a block.
    pub(crate) heads: usize,
}

/// Which lines run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lines {
    /// candle's own.
    Plain,
    /// The three that `vesper_model::ops` replaces.
    Ops,
}

struct Block {
    norm_attention: LayerNorm,
    qkv: Linear,
    out: Linear,
    norm_feed_forward: LayerNorm,
    up: Linear,
    down: Linear,
}

/// The model.
pub(crate) struct Gpt2 {
    tokens: Embedding,
    positions: Embedding,
    blocks: Vec<Block>,
    norm: LayerNorm,
    heads: Heads,
    lines: Lines,
}

impl Gpt2 {
    /// A model on the variables of `vb`.
    pub(crate) fn new(config: Gpt2Config, lines: Lines, vb: &VarBuilder<'_>) -> Result<Self> {
        let d = config.hidden;
        let block = |vb: VarBuilder<'_>| {
            Ok(Block {
                norm_attention: layer_norm(d, 1e-5, vb.pp("ln_1"))?,
                qkv: linear(d, 3 * d, vb.pp("attn.c_attn"))?,
                out: linear(d, d, vb.pp("attn.c_proj"))?,
                norm_feed_forward: layer_norm(d, 1e-5, vb.pp("ln_2"))?,
                up: linear(d, 4 * d, vb.pp("mlp.c_fc"))?,
                down: linear(4 * d, d, vb.pp("mlp.c_proj"))?,
            })
        };
        Ok(Self {
            tokens: embedding(config.vocab, d, vb.pp("wte"))?,
            positions: embedding(config.positions, d, vb.pp("wpe"))?,
            blocks: (0..config.layers).map(|i| block(vb.pp(format!("h.{i}")))).collect::<Result<_>>()?,
            norm: layer_norm(d, 1e-5, vb.pp("ln_f"))?,
            heads: Heads { query: config.heads, kv: config.heads, dim: d / config.heads },
            lines,
        })
    }

    /// Mean next-token loss; ids and targets: (batch, t).
    pub(crate) fn loss(&self, ids: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let places = Tensor::arange(0, t as u32, ids.device())?;
        let mut h = self.tokens.forward(ids)?.broadcast_add(&self.positions.forward(&places)?)?; // (b, t, d)
        for block in &self.blocks {
            let n = self.norm(&block.norm_attention, &h)?;
            let attended = self.attention(&block.qkv.forward(&n)?)?;
            h = (h + block.out.forward(&attended)?)?;
            let n = self.norm(&block.norm_feed_forward, &h)?;
            h = (h + block.down.forward(&block.up.forward(&n)?.gelu()?)?)?;
        }
        let h = self.norm(&self.norm, &h)?.reshape((b * t, ()))?;
        self.cross_entropy(&h, self.tokens.embeddings(), &targets.flatten_all()?)
    }

    /// The first line: candle's `LayerNorm::forward` has no gradient where there is a bias, `layer_norm_slow` has one.
    fn norm(&self, layer: &LayerNorm, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (layer.weight(), layer.bias());
        match (self.lines, bias) {
            (Lines::Plain, Some(bias)) => candle_nn::ops::layer_norm_slow(x, weight, bias, 1e-5),
            (Lines::Plain, None) => layer.forward(x),
            (Lines::Ops, bias) => ops::layer_norm(x, weight, bias, 1e-5, Path::Fused),
        }
    }

    /// The second line, which is several in candle: qkv (b, t, 3 d) to (b, t, d).
    fn attention(&self, qkv: &Tensor) -> Result<Tensor> {
        if self.lines == Lines::Ops {
            return ops::causal_attention(qkv, self.heads, None, Path::Fused);
        }
        let Heads { query: heads, dim, .. } = self.heads;
        let (b, t, _) = qkv.dims3()?;
        let split = qkv.reshape((b, t, 3, heads, dim))?.permute((2, 0, 3, 1, 4))?.contiguous()?;
        let (q, k, v) = (split.get(0)?, split.get(1)?, split.get(2)?); // (b, heads, t, dim)
        let scores = (q.matmul(&k.t()?)? / (dim as f64).sqrt())?;
        let mask: Vec<f32> =
            (0..t * t).map(|k| if k % t > k / t { f32::NEG_INFINITY } else { 0.0 }).collect();
        let scores = scores.broadcast_add(&Tensor::from_vec(mask, (t, t), qkv.device())?)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        weights.matmul(&v)?.transpose(1, 2)?.reshape((b, t, heads * dim))
    }

    /// The third line: h (n, d), weight (vocab, d), targets (n).
    fn cross_entropy(&self, h: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
        match self.lines {
            Lines::Plain => candle_nn::loss::cross_entropy(&h.matmul(&weight.t()?)?, targets),
            Lines::Ops => {
                let settings = CrossEntropy::default();
                Ok(ops::linear_cross_entropy(h, weight, targets, settings, Path::Fused)?.loss)
            }
        }
    }
}

/// Sets every variable to small values that depend on its name and the place alone.
pub(crate) fn initialize(varmap: &VarMap, device: &Device) -> Result<()> {
    let vars = varmap.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for (name, var) in vars.iter() {
        if name.contains("ln_") {
            continue; // norms start at 1 and 0
        }
        let seed = name.bytes().fold(0u32, |h, b| h.wrapping_mul(31).wrapping_add(u32::from(b)));
        let random = ops::Philox { seed: seed.into(), offset: 0 };
        // Dropout of ones is 0 or 2: sixteen of them make a number near a normal one.
        let ones = Tensor::ones((16, var.elem_count()), DType::F32, device)?;
        let sum = ops::dropout(&ones, 0.5, random, Path::Fused)?.sum(0)?;
        var.set(&((sum - 16.0)? * 0.005)?.reshape(var.shape())?)?;
    }
    Ok(())
}
