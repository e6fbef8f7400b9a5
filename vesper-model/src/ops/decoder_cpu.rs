//! Pre-norm decoder blocks on the CPU: the loops and products of their operations, without candle's graph between them.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::attention::CausalAttention;
use super::feed_forward::GatedFeedForward;
use super::gemm::Precision;
use super::links::{self, Gradients};
use super::residual::{self, Normed};
use super::self_attention::SelfAttention;
use super::{DecoderSettings, DecoderWeights, Path, Rope, rms_norm};

/// See [`super::decoder_blocks`]; there is one at least, shapes and dtypes have been checked, and nothing is empty.
pub(super) fn decoder_blocks(
    x: &Tensor,
    blocks: &[DecoderWeights],
    settings: DecoderSettings,
    positions: Option<&Rope>,
) -> Result<Tensor> {
    let x = x.contiguous()?;
    let blocks = blocks.iter().map(DecoderWeights::contiguous).collect::<Result<Vec<_>>>()?;
    let (t, precision) = (x.dim(1)?, Precision::of(x.dtype()));
    let result = Normed::default();
    let (mut layers, mut tracked) = (Vec::new(), x.track_op());
    let mut input = x.detach();
    let mut normed = first_norm(&input, &blocks, settings.eps)?;
    for (i, weights) in blocks.iter().enumerate() {
        let deeper = tracked;
        // A block that no gradient goes through keeps nothing.
        tracked |= weights.all().into_iter().any(Tensor::track_op);
        let [_, qkv, out, norm_feed_forward, gate_up, down] = weights.all().map(Tensor::detach);
        let (d, ffn) = down.dims2()?;

        let attention = CausalAttention::new(settings.heads, positions, t)?;
        let attention = SelfAttention::new(attention, precision, tracked).unrounded();
        let attended = normed.apply_op3_no_bwd(&qkv, &out, &attention)?;
        let (sum, n) = residual::fused_rms_norm(&input, &attended, &norm_feed_forward, settings.eps)?;
        drop(attended);
        let feed_forward =
            GatedFeedForward::new(settings.activation, (d, ffn, d), precision, tracked).unrounded();
        let fed = n.apply_op3_no_bwd(&gate_up, &down, &feed_forward)?;

        let next = if let Some(next) = blocks.get(i + 1) {
            residual::fused_rms_norm(&sum, &fed, &next.norm_attention.detach(), settings.eps)?
        } else {
            result.put(residual::sum(&sum, &fed)?);
            (input.clone(), normed.clone()) // none follows
        };
        if tracked {
            let eps = settings.eps;
            let weights = weights.clone();
            layers.push(Layer {
                eps,
                weights,
                deeper,
                attention,
                feed_forward,
                x: input,
                n_attention: normed,
                sum,
                n_feed_forward: n,
            });
        }
        (input, normed) = next;
    }
    let leaves: Vec<&Tensor> =
        blocks.iter().flat_map(DecoderWeights::all).filter(|weight| weight.track_op()).collect();
    let (link, gradients) = links::chain(&leaves, x.device())?;
    x.apply_op2(&link, Node { layers, result, gradients })
}

/// What the first block's attention takes.
fn first_norm(x: &Tensor, blocks: &[DecoderWeights], eps: f64) -> Result<Tensor> {
    match blocks.first() {
        Some(first) => rms_norm(x, &first.norm_attention.detach(), eps, Path::Fused),
        None => Ok(x.clone()),
    }
}

/// A block that a gradient goes through.
struct Layer {
    eps: f64,
    weights: DecoderWeights,
    /// Whether something before the block has a gradient.
    deeper: bool,
    attention: SelfAttention,
    feed_forward: GatedFeedForward,
    /// What it was given, (b, t, d).
    x: Tensor,
    /// The norm of x.
    n_attention: Tensor,
    /// The sum after the attention.
    sum: Tensor,
    /// Its norm.
    n_feed_forward: Tensor,
}

impl Layer {
    /// The gradients of x, where something before it has one, and of the weights that have one.
    fn backward(&self, dy: &Tensor) -> Result<(Option<Tensor>, Vec<Tensor>)> {
        let DecoderWeights { norm_attention, qkv, out, norm_feed_forward, gate_up, down } = &self.weights;
        let wanted = |weight: &Tensor| weight.track_op();
        let before = self.deeper || wanted(norm_attention);

        let inputs = [&self.n_feed_forward, gate_up, down];
        let [dn, dgate_up, ddown] =
            self.feed_forward.gradients(inputs, dy, [true, wanted(gate_up), wanted(down)])?;
        let Some(dn) = dn else { bail!("a feed-forward without a gradient") };
        let [dsum, dnorm_feed_forward] = rms_norm::gradients(
            &self.sum,
            norm_feed_forward,
            &dn,
            Some(dy),
            self.eps,
            [true, wanted(norm_feed_forward)],
        )?;
        let Some(dsum) = dsum else { bail!("a norm without a gradient") };
        drop(dn);
        let inputs = [&self.n_attention, qkv, out];
        let [dn, dqkv, dout] = self.attention.gradients(inputs, &dsum, [before, wanted(qkv), wanted(out)])?;
        let [dx, dnorm_attention] = match dn {
            Some(dn) => rms_norm::gradients(
                &self.x,
                norm_attention,
                &dn,
                Some(&dsum),
                self.eps,
                [self.deeper, wanted(norm_attention)],
            )?,
            None => [None, None],
        };
        let of_weights = [dnorm_attention, dqkv, dout, dnorm_feed_forward, dgate_up, ddown];
        Ok((dx, of_weights.into_iter().flatten().collect()))
    }
}

/// The blocks as a node of candle's graph.
struct Node {
    /// From the first that has a gradient to the last.
    layers: Vec<Layer>,
    result: Normed<CpuStorage>,
    gradients: Gradients,
}

impl CustomOp2 for Node {
    fn name(&self) -> &'static str {
        "vesper-decoder-blocks"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match self.result.take() {
            Some(y) => Ok((y, layout.shape().clone())),
            None => bail!("{}: the result has been taken", self.name()),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        link: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut next = Some(dy.contiguous()?);
        let mut gradients = Vec::new(); // from the last block's to the first's
        for layer in self.layers.iter().rev() {
            let Some(dy) = next else { bail!("{}: a block without a gradient", self.name()) };
            let (dx, of_block) = layer.backward(&dy)?;
            gradients.push(of_block);
            next = dx;
        }
        let dx = next.filter(|_| x.track_op());
        if !link.track_op() {
            return Ok((dx, None));
        }
        self.gradients.put(gradients.into_iter().rev().flatten().map(Some).collect());
        Ok((dx, Some(link.zeros_like()?)))
    }
}
