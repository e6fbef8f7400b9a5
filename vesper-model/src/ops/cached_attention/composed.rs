//! As candle's operations: the reference, and the path of what has no kernel.

use candle_core::{D, Result, Tensor};

use crate::ops::attention_composed::{compute, mask};
use crate::ops::{Heads, Place, Rope, rope};

/// Queries whose scores are in memory at once.
const CHUNK: usize = 256;

/// See [`super::cached_attention`]; shapes have been checked.
pub(super) fn cached_attention(
    qkv: &Tensor,
    cache: &Tensor,
    heads: Heads,
    positions: &Rope,
    Place { row, position: start }: Place,
) -> Result<Tensor> {
    let (_, t, _) = qkv.dims3()?;
    let Heads { query, kv, dim } = heads;
    if t == 0 {
        return qkv.narrow(D::Minus1, 0, query * dim);
    }
    let split = |first: usize, n: usize| -> Result<Tensor> {
        qkv.narrow(D::Minus1, first * dim, n * dim)?.reshape((1, t, n, dim))?.transpose(1, 2)?.contiguous()
    };
    // (1, kv, capacity, dim)
    let part = |values: usize| cache.narrow(0, values, 1)?.squeeze(0)?.narrow(0, row, 1);
    let (keys, values) = (part(0)?, part(1)?);
    keys.slice_set(&rope(&split(query, kv)?, positions, start)?.contiguous()?, 2, start)?;
    values.slice_set(&split(query + kv, kv)?, 2, start)?;
    let q = rope(&split(0, query)?, positions, start)?; // (1, query, t, dim)
    let mut each = Vec::new();
    for first in (0..t).step_by(CHUNK) {
        let n = CHUNK.min(t - first);
        let (before, end) = (start + first, start + first + n);
        let (keys, values) = (keys.narrow(2, 0, end)?, values.narrow(2, 0, end)?);
        each.push(attend(&q.narrow(2, first, n)?, &keys, &values, before)?);
    }
    Tensor::cat(&each, 1)
}

/// q: (1, query, n, dim), of which the first is at position `before`; keys, values: (1, kv, before + n, dim). Result:
/// (1, n, query dim).
fn attend(q: &Tensor, keys: &Tensor, values: &Tensor, before: usize) -> Result<Tensor> {
    let (_, query, n, dim) = q.dims4()?;
    let (_, kv, end, _) = keys.dims4()?;
    // The query heads of a group share their keys: one product a group.
    let group = query / kv;
    let q = q.contiguous()?.reshape((1, kv, group * n, dim))?;
    let compute = compute(q.dtype());
    let scores = q.matmul(&keys.t()?)?.to_dtype(compute)?;
    let scores = (scores / (dim as f64).sqrt())?.reshape((1, kv, group, n, end))?;
    let scores =
        if n == 1 { scores } else { scores.broadcast_add(&mask(before, n, q.device(), compute)?)? };
    let weights = candle_nn::ops::softmax_last_dim(&scores.contiguous()?)?;
    let weights = weights.reshape((1, kv, group * n, end))?.to_dtype(values.dtype())?;
    let out = weights.matmul(&values.contiguous()?)?; // (1, kv, group n, dim)
    out.reshape((1, query, n, dim))?.transpose(1, 2)?.reshape((1, n, query * dim))
}
