//! One token after another: a decoder's step of a few rows, over a cache, without candle's operations between.
//!
//! The weights and the cache are read once, as they are stored (f32, bf16, f16 or blocks); activations are in f32 throughout.
//! On the CPU (here) that is done by all threads. On CUDA (`cuda::decode`) each part of a block is one kernel, and a graph of
//! them is replayed.

mod attention;
pub(in crate::ops) mod matvec;
mod step;

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};
use half::slice::HalfFloatSliceExt;
use pulp::bytemuck;

use super::{DecoderSettings, Rope};
use crate::quantized::Weight;
use matvec::Rows;

/// A row of a cache and the position of the token that is read there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) row: usize,
    pub(crate) position: usize,
}

/// Everything that a step reads but the cache.
#[derive(Debug, Clone)]
pub(crate) struct StepWeights {
    /// (vocab, d)
    pub(crate) embed: Weight,
    pub(crate) layers: Vec<StepLayer>,
    /// (d)
    pub(crate) norm: Tensor,
    /// (vocab, d)
    pub(crate) head: Weight,
    pub(crate) settings: DecoderSettings,
    pub(crate) rope: Rope,
}

impl StepWeights {
    /// All but the norms.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Weight> {
        let layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.out, &l.gate_up, &l.down]);
        layers.chain([&self.embed, &self.head])
    }
}

#[cfg(feature = "cuda")]
impl StepWeights {
    /// Of the blocks, two each, and the last one.
    pub(super) fn norms(&self) -> impl Iterator<Item = &Tensor> {
        let layers = self.layers.iter().flat_map(|layer| [&layer.norm_attention, &layer.norm_feed_forward]);
        layers.chain([&self.norm])
    }
}

/// As [`DecoderWeights`](super::DecoderWeights), with matrices that may be in blocks.
#[derive(Debug, Clone)]
pub(crate) struct StepLayer {
    pub(crate) norm_attention: Tensor,
    pub(crate) qkv: Weight,
    pub(crate) out: Weight,
    pub(crate) norm_feed_forward: Tensor,
    pub(crate) gate_up: Weight,
    pub(crate) down: Weight,
}

/// What a step computes of each token.
#[derive(Debug)]
pub(crate) struct StepOutput {
    /// After the last norm, (rows, d).
    pub(crate) hidden: Vec<f32>,
    /// (vocab) each
    pub(crate) logits: Vec<Vec<f32>>,
}

/// Runs `f` on the rows of a CPU matrix of f32 or bf16.
fn with_rows<R>(matrix: &Tensor, f: impl FnOnce(Rows<'_>) -> Result<R>) -> Result<R> {
    let (_, width) = matrix.dims2()?;
    let (storage, layout) = matrix.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a decoding step got a matrix that is not contiguous: {layout:?}");
    };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(data)) => {
            f(Rows::new(bytemuck::cast_slice(&data[start..end]), width, false))
        }
        Storage::Cpu(CpuStorage::BF16(data)) => {
            match bytemuck::try_cast_slice(data[start..end].reinterpret_cast()) {
                Ok(words) if width.is_multiple_of(2) => f(Rows::new(words, width / 2, true)),
                _ => bail!("a decoding step needs rows of bf16 that begin at multiples of 4 bytes"),
            }
        }
        _ => bail!("a decoding step on the CPU needs f32 or bf16, got {:?}", matrix.dtype()),
    }
}

/// Rotates heads of `dim` as tokens at `position`, in place.
fn rotated(heads: &mut [f32], dim: usize, rope: &Rope, position: usize) {
    let half = dim / 2;
    let (cos, sin) = &*rope.table;
    let (cos, sin) = (&cos[position * half..][..half], &sin[position * half..][..half]);
    for head in heads.chunks_exact_mut(dim) {
        let (a, b) = head.split_at_mut(half);
        for i in 0..half {
            let (x, y) = (a[i], b[i]);
            a[i] = x * cos[i] - y * sin[i];
            b[i] = y * cos[i] + x * sin[i];
        }
    }
}
