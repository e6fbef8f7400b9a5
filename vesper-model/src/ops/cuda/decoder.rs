//! Pre-norm decoder blocks on CUDA: the kernels and products of its operations, without candle's graph between them.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use era_act::Activation;

use super::attention::Attention;
use super::blas::{Matrix, product};
use super::blas_lt::sum_with_product;
use super::launch::{Element, Held, aligned, allocate, by_dtype, from_storage, not_here, tensor, wrap};
use super::{cast, rms_norm, rope};
use crate::ops::links::{self, Gradients};
use crate::ops::residual::Normed;
use crate::ops::{DecoderSettings, DecoderWeights, Rope};

/// See [`crate::ops::decoder_blocks`]; there is one at least, shapes and dtypes have been checked, nothing is empty, and
/// `attention::supports` holds.
pub(in crate::ops) fn decoder_blocks(
    x: &Tensor,
    blocks: &[DecoderWeights],
    settings: DecoderSettings,
    positions: Option<&Rope>,
) -> Result<Tensor> {
    let (x, dtype) = (aligned(x)?, x.dtype());
    let result = Normed::default();
    let (mut layers, mut input, mut tracked) = (Vec::new(), x.detach(), x.track_op());
    let mut narrowed = Narrowed::new(blocks, tracked, dtype);
    for (i, weights) in blocks.iter().enumerate() {
        let wanted = weights.all().map(|weight| weight.track_op().then(|| weight.dtype()));
        let block = Block {
            eps: settings.eps,
            attention: Attention { heads: settings.heads, rope: positions.cloned() },
            activation: settings.activation,
            weights: narrowed.of_next()?,
            wanted,
        };
        let (y, saved) = by_dtype!(dtype, T => block.forward::<T>(&input)?);
        // A block that no gradient goes through keeps nothing.
        tracked |= wanted.iter().any(Option::is_some);
        if tracked {
            layers.push(Layer { block, x: input.clone(), saved });
        }
        if i + 1 < blocks.len() {
            input = from_storage(y, x.shape());
        } else if tracked {
            result.put(y);
        } else {
            return Ok(from_storage(y, x.shape()));
        }
    }
    let leaves: Vec<&Tensor> =
        blocks.iter().flat_map(DecoderWeights::all).filter(|weight| weight.track_op()).collect();
    let (link, gradients) = links::chain(&leaves, x.device())?;
    x.apply_op2(&link, Node { layers, result, gradients })
}

/// The blocks' weights in the dtype of the activations: of those whose weights are kept anyway, since a gradient goes
/// through them, all at once; of others when their turn comes.
struct Narrowed<'a> {
    rest: &'a [DecoderWeights],
    /// Blocks in `rest` before the first that a gradient goes through.
    alone: usize,
    dtype: DType,
    ready: std::vec::IntoIter<Tensor>,
}

impl<'a> Narrowed<'a> {
    fn new(blocks: &'a [DecoderWeights], tracked: bool, dtype: DType) -> Self {
        let first = blocks.iter().position(|block| block.all().iter().any(|weight| weight.track_op()));
        let alone = if tracked { 0 } else { first.unwrap_or(blocks.len()) };
        Self { rest: blocks, alone, dtype, ready: Vec::new().into_iter() }
    }

    /// Of the next block.
    fn of_next(&mut self) -> Result<DecoderWeights> {
        if self.ready.len() == 0 {
            let n = if self.alone > 0 { 1 } else { self.rest.len() };
            let (now, rest) = self.rest.split_at(n);
            let all: Vec<&Tensor> = now.iter().flat_map(DecoderWeights::all).collect();
            self.ready = cast::weights(&all, self.dtype)?.into_iter();
            self.rest = rest;
            self.alone = self.alone.saturating_sub(1);
        }
        DecoderWeights::from_all(|| self.ready.next())
    }
}

/// A block that a gradient goes through.
struct Layer {
    block: Block,
    /// What it was given, (b, t, d).
    x: Tensor,
    saved: Saved,
}

/// The arithmetic, without a graph.
struct Block {
    eps: f64,
    attention: Attention,
    activation: Activation,
    /// In the dtype of x.
    weights: DecoderWeights,
    /// The dtypes of the weights that have a gradient, in the order of [`DecoderWeights::all`].
    wanted: [Option<DType>; 6],
}

struct Saved {
    /// The norm of x, (rows, d).
    n_attention: Tensor,
    /// The rotated projection, (b, t, packed).
    rotated: Tensor,
    /// The output of the attention, (rows, query dim).
    attended: Tensor,
    /// The logarithms of the sums of exponentials, (b, query, t).
    logs: Tensor,
    /// The sum after the attention, (rows, d).
    sum: Tensor,
    /// Its norm, (rows, d).
    n_feed_forward: Tensor,
    /// The packed product of the feed-forward, (rows, 2 ffn).
    packed: Tensor,
}

impl Block {
    /// x: (b, t, d)
    fn forward<T: Element>(&self, x: &Tensor) -> Result<(CudaStorage, Saved)> {
        let ((b, t, d), heads, w) = (x.dims3()?, self.attention.heads, &self.weights);
        let (rows, width, ffn) = (b * t, heads.query * heads.dim, w.down.dim(1)?);
        let device = x.device().as_cuda_device()?;
        let x = x.reshape((rows, d))?;
        let n_attention = rms_norm::rms_norm(&x, &w.norm_attention, self.eps)?;
        let mut projected = times_transposed(&n_attention, &w.qkv)?;
        if let Some(table) = &self.attention.rope {
            rope::rotate::<T>(device, projected.as_cuda_slice_mut::<T>()?, heads, (rows, t), table, 1.0)?;
        }
        let (attended, logs) =
            self.attention.forward::<T>(device, &projected.as_cuda_slice::<T>()?.as_view(), (b, t))?;
        let attended = tensor(attended, device, (rows, width));
        let sum = from_storage(plus_times_transposed::<T>(&x, &attended, &w.out)?, (rows, d));
        let n_feed_forward = rms_norm::rms_norm(&sum, &w.norm_feed_forward, self.eps)?;

        let packed = from_storage(times_transposed(&n_feed_forward, &w.gate_up)?, (rows, 2 * ffn));
        let inner = self.activation.gated(&packed)?;
        let y = plus_times_transposed::<T>(&sum, &inner, &w.down)?;
        let saved = Saved {
            n_attention,
            rotated: from_storage(projected, (b, t, heads.packed())),
            attended,
            logs: tensor(logs, device, (b, heads.query, t)),
            sum,
            n_feed_forward,
            packed,
        };
        Ok((y, saved))
    }

    /// dy: (rows, d). The gradients of x and of the weights.
    fn backward<T: Element>(
        &self,
        x: &Tensor,
        saved: &Saved,
        dy: &Tensor,
    ) -> Result<(Tensor, [Option<Tensor>; 6])> {
        let (w, (rows, d)) = (&self.weights, dy.dims2()?);
        let [norm_attention, qkv, out, norm_feed_forward, gate_up, down] = self.wanted;

        let dinner = dy.matmul(&w.down)?;
        let (dpacked, down) = if down.is_some() {
            let (dpacked, inner) = self.activation.gated_backward_and_value(&saved.packed, &dinner)?;
            (dpacked, gradient::<T>(dy, &inner, down)?)
        } else {
            (self.activation.gated_backward(&saved.packed, &dinner)?, None)
        };
        drop(dinner);
        let gate_up = gradient::<T>(&dpacked, &saved.n_feed_forward, gate_up)?;
        let dn = dpacked.matmul(&w.gate_up)?;
        drop(dpacked);
        let (dsum, norm_feed_forward) = rms_norm::backward::<T>(
            &saved.sum,
            &w.norm_feed_forward,
            &dn,
            Some(dy),
            self.eps,
            norm_feed_forward,
        )?;
        drop(dn);

        let dattended = dsum.matmul(&w.out)?;
        let out = gradient::<T>(&dsum, &saved.attended, out)?;
        let dprojected =
            self.attention.backward::<T>(&saved.rotated, &saved.attended, &saved.logs, &dattended)?;
        drop(dattended);
        let dprojected = dprojected.reshape((rows, ()))?;
        let qkv = gradient::<T>(&dprojected, &saved.n_attention, qkv)?;
        let dn = dprojected.matmul(&w.qkv)?;
        drop(dprojected);
        let x = x.reshape((rows, d))?;
        let (dx, norm_attention) =
            rms_norm::backward::<T>(&x, &w.norm_attention, &dn, Some(&dsum), self.eps, norm_attention)?;
        Ok((dx, [norm_attention, qkv, out, norm_feed_forward, gate_up, down]))
    }
}

/// `x w^T` of two matrices.
fn times_transposed(x: &Tensor, w: &Tensor) -> Result<CudaStorage> {
    let ((rows, inner), (columns, _)) = (x.dims2()?, w.dims2()?);
    let (x, w) = (Held::new(x), Held::new(w));
    let transposed = w.layout().transpose(0, 1)?;
    x.storage()?.matmul(w.storage()?, (1, rows, columns, inner), x.layout(), &transposed)
}

/// `sum + x w^T` of matrices.
fn plus_times_transposed<T: Element>(sum: &Tensor, x: &Tensor, w: &Tensor) -> Result<CudaStorage> {
    let ((rows, inner), (columns, _)) = (x.dims2()?, w.dims2()?);
    let (sum, x, w) = (Held::new(sum), Held::new(x), Held::new(w));
    let device = x.device()?;
    let mut y = allocate::<T>(device, rows * columns)?;
    let (x, w) = (x.view::<T>()?, w.view::<T>()?);
    let (a, b) = (Matrix::new(&x, rows, inner, inner), Matrix::new(&w, columns, inner, inner).t());
    sum_with_product(device, &sum.view()?, &a, &b, &mut y.as_view_mut())?;
    Ok(wrap(y, device))
}

/// `dy^T x`, the gradient of a weight, in the weight's dtype; None where it has none.
fn gradient<T: Element>(dy: &Tensor, x: &Tensor, dtype: Option<DType>) -> Result<Option<Tensor>> {
    fn of<T: Element, C: Element>(dy: &Tensor, x: &Tensor) -> Result<Tensor> {
        let ((rows, out), (_, input)) = (dy.dims2()?, x.dims2()?);
        let (dy, x) = (Held::new(dy), Held::new(x));
        let device = dy.device()?;
        let mut dw = allocate::<C>(device, out * input)?;
        let (from, with) = (dy.view::<T>()?, x.view::<T>()?);
        let (a, b) = (Matrix::new(&from, rows, out, out).t(), Matrix::new(&with, rows, input, input));
        product::<T, C>(device, &a, &b, &mut dw.as_view_mut(), input, (1.0, 0.0))?;
        Ok(tensor(dw, device, (out, input)))
    }
    Ok(match dtype {
        None => None,
        Some(DType::F32) => Some(of::<T, f32>(dy, x)?),
        Some(_) => Some(of::<T, T>(dy, x)?),
    })
}

/// The blocks as a node of candle's graph.
struct Node {
    /// From the first that has a gradient to the last.
    layers: Vec<Layer>,
    result: Normed<CudaStorage>,
    gradients: Gradients,
}

impl CustomOp2 for Node {
    fn name(&self) -> &'static str {
        "vesper-decoder-blocks-cuda"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        not_here(self.name())
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
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
        let (_, _, d) = x.dims3()?;
        let mut dy = aligned(dy)?.reshape(((), d))?;
        let mut gradients = Vec::new(); // from the last block's to the first's
        for Layer { block, x, saved } in self.layers.iter().rev() {
            let (dx, of_block) = by_dtype!(x.dtype(), T => block.backward::<T>(x, saved, &dy)?);
            let tracked = of_block.into_iter().zip(block.wanted).filter(|(_, wanted)| wanted.is_some());
            gradients.push(tracked.map(|(gradient, _)| gradient).collect::<Vec<_>>());
            dy = dx;
        }
        let dx = if x.track_op() { Some(dy.reshape(x.shape())?) } else { None };
        if !link.track_op() {
            return Ok((dx, None));
        }
        self.gradients.put(gradients.into_iter().rev().flatten().collect());
        Ok((dx, Some(link.zeros_like()?)))
    }
}
