//! One transformer block: attention and feed-forward, each behind a norm and a residual sum.

use candle_core::{D, Result, Tensor};
use candle_nn::VarBuilder;
use era_act::Activation;

use super::cache::LayerCache;
use super::projection::{Fetch, Packed};
use crate::ops::{
    DecoderSettings, DecoderWeights, Heads, Path, Place, Rope, StepLayer, causal_attention, decoder_block,
    gated_feed_forward, residual_rms_norm, rms_norm, self_attention,
};
use crate::quantized::Weight;
use crate::{Projection, VesperConfig};

#[derive(Debug, Clone)]
pub(super) struct Block {
    norm_attention: Tensor,
    qkv: Packed,
    output: Packed,
    norm_feed_forward: Tensor,
    gate_up: Packed,
    down: Packed,
    activation: Activation,
    heads: Heads,
    eps: f64,
}

impl Block {
    /// Fetches the block's parameters; `adapters` has those of the configuration.
    pub(super) fn new(
        config: &VesperConfig,
        fetch: &mut Fetch<'_>,
        adapters: Option<&VarBuilder<'_>>,
    ) -> Result<Self> {
        use Projection::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
        let mut norm = |name: &str| -> Result<Tensor> {
            let weight = fetch(name, &[config.hidden_size])?.to_plain()?;
            Ok(if config.adapter.is_some() { weight.detach() } else { weight })
        };
        let (norm_attention, norm_feed_forward) =
            (norm("input_layernorm")?, norm("post_attention_layernorm")?);
        let mut packed = |parts: &[Projection], name: &str| Packed::new(config, parts, name, fetch, adapters);
        Ok(Self {
            norm_attention,
            qkv: packed(&[QProj, KProj, VProj], "self_attn.qkv_proj")?,
            output: packed(&[OProj], "self_attn.o_proj")?,
            norm_feed_forward,
            gate_up: packed(&[GateProj, UpProj], "mlp.gate_up_proj")?,
            down: packed(&[DownProj], "mlp.down_proj")?,
            activation: config.hidden_act,
            heads: Heads {
                query: config.num_attention_heads,
                kv: config.num_key_value_heads,
                dim: config.head_dim,
            },
            eps: config.rms_norm_eps,
        })
    }

    /// x: (batch, t, hidden) to the same shape
    pub(super) fn forward(&self, x: &Tensor, rope: &Rope, path: Path) -> Result<Tensor> {
        if let Some(weights) = self.plain() {
            return decoder_block(x, &weights, self.settings(), Some(rope), path);
        }
        self.feed_forward(x, &self.attention(x, rope, path)?, path)
    }

    /// What the attention adds to x.
    fn attention(&self, x: &Tensor, rope: &Rope, path: Path) -> Result<Tensor> {
        let n = rms_norm(x, &self.norm_attention, self.eps, path)?;
        if let (Some(qkv), Some(output)) = (self.qkv.plain(), self.output.plain()) {
            return self_attention(&n, qkv, output, self.heads, Some(rope), path);
        }
        let qkv = self.qkv.forward(&n, path)?;
        let attention = causal_attention(&qkv, self.heads, Some(rope), path)?;
        self.output.forward(&attention, path)
    }

    /// As [`Block::forward`], and what goes into the activation: (batch, t, ffn).
    pub(super) fn forward_and_gates(&self, x: &Tensor, rope: &Rope, path: Path) -> Result<(Tensor, Tensor)> {
        let attention = self.attention(x, rope, path)?;
        let (x, n) = residual_rms_norm(x, &attention, &self.norm_feed_forward, self.eps, path)?;
        let gate_up = self.gate_up.forward(&n, path)?; // (batch, t, 2 ffn)
        let inner = self.activation.gated(&gate_up)?;
        let gates = gate_up.narrow(D::Minus1, 0, inner.dim(D::Minus1)?)?;
        Ok(((x + self.down.forward(&inner, path)?)?, gates))
    }

    pub(super) fn settings(&self) -> DecoderSettings {
        DecoderSettings { heads: self.heads, activation: self.activation, eps: self.eps }
    }

    /// The parameters, where no projection has an adapter or is in blocks.
    pub(super) fn plain(&self) -> Option<DecoderWeights> {
        Some(DecoderWeights {
            norm_attention: self.norm_attention.clone(),
            qkv: self.qkv.plain()?.clone(),
            out: self.output.plain()?.clone(),
            norm_feed_forward: self.norm_feed_forward.clone(),
            gate_up: self.gate_up.plain()?.clone(),
            down: self.down.plain()?.clone(),
        })
    }

    /// The parameters for a decoding step, where no projection has an adapter.
    pub(super) fn step_layer(&self) -> Option<StepLayer> {
        Some(StepLayer {
            norm_attention: self.norm_attention.clone(),
            qkv: self.qkv.bare()?.clone(),
            out: self.output.bare()?.clone(),
            norm_feed_forward: self.norm_feed_forward.clone(),
            gate_up: self.gate_up.bare()?.clone(),
            down: self.down.bare()?.clone(),
        })
    }

    /// As [`Block::forward`], for tokens that follow what the cache holds before their places: (places, t, hidden);
    /// without a gradient.
    pub(super) fn forward_cached(
        &self,
        x: &Tensor,
        rope: &Rope,
        cache: &LayerCache,
        places: &[Place],
        path: Path,
    ) -> Result<Tensor> {
        let n = rms_norm(x, &self.norm_attention, self.eps, path)?;
        let qkv = self.qkv.forward(&n, path)?;
        let attention = cache.attend(&qkv, self.heads, rope, places, path)?;
        self.feed_forward(x, &self.output.forward(&attention, path)?, path)
    }

    /// The feed-forward of `x + attention`, and that sum.
    fn feed_forward(&self, x: &Tensor, attention: &Tensor, path: Path) -> Result<Tensor> {
        let (x, n) = residual_rms_norm(x, attention, &self.norm_feed_forward, self.eps, path)?;
        let out = if let (Some(gate_up), Some(down)) = (self.gate_up.plain(), self.down.plain()) {
            gated_feed_forward(&n, gate_up, down, self.activation, path)?
        } else {
            let gate_up = self.gate_up.forward(&n, path)?; // (batch, t, 2 ffn)
            let inner = match path {
                Path::Fused => self.activation.gated(&gate_up)?,
                Path::Reference => era_act::reference::gated(&self.activation, &gate_up)?,
            };
            self.down.forward(&inner, path)?
        };
        x + out
    }

    /// The projections, in the order of the forward pass.
    pub(super) fn packs(&self) -> [&Packed; 4] {
        [&self.qkv, &self.output, &self.gate_up, &self.down]
    }

    pub(super) fn packs_mut(&mut self) -> [&mut Packed; 4] {
        [&mut self.qkv, &mut self.output, &mut self.gate_up, &mut self.down]
    }

    /// The projections' matrices by their names in the block, without adapters.
    pub(super) fn matrices(&self) -> [(&'static str, &Weight); 4] {
        [
            ("self_attn.qkv_proj", self.qkv.weight()),
            ("self_attn.o_proj", self.output.weight()),
            ("mlp.gate_up_proj", self.gate_up.weight()),
            ("mlp.down_proj", self.down.weight()),
        ]
    }

    pub(super) fn matrices_mut(&mut self) -> [(&'static str, &mut Weight); 4] {
        [
            ("self_attn.qkv_proj", self.qkv.weight_mut()),
            ("self_attn.o_proj", self.output.weight_mut()),
            ("mlp.gate_up_proj", self.gate_up.weight_mut()),
            ("mlp.down_proj", self.down.weight_mut()),
        ]
    }

    /// The norms' weights by their names in the block.
    pub(super) fn norms(&self) -> [(&'static str, &Tensor); 2] {
        [("input_layernorm", &self.norm_attention), ("post_attention_layernorm", &self.norm_feed_forward)]
    }

    pub(super) fn detach(&self) -> Self {
        Self {
            norm_attention: self.norm_attention.detach(),
            qkv: self.qkv.detach(),
            output: self.output.detach(),
            norm_feed_forward: self.norm_feed_forward.detach(),
            gate_up: self.gate_up.detach(),
            down: self.down.detach(),
            activation: self.activation,
            heads: self.heads,
            eps: self.eps,
        }
    }
}
