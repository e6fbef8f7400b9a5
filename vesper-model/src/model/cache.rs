//! Keys and values of the tokens seen so far, so that each new token costs one row.

use candle_core::{D, DType, Device, Result, Tensor};

use crate::ops::{Heads, Path, Place, Rope, causal_attention, rope};

/// Keys and values of one layer, (2, rows, kv, capacity, dim). What lies behind a row's length is never read.
#[derive(Debug, Clone)]
pub(super) struct LayerCache {
    both: Tensor,
}

impl LayerCache {
    pub(super) fn new(
        rows: usize,
        capacity: usize,
        heads: Heads,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Ok(Self { both: Tensor::zeros((2, rows, heads.kv, capacity, heads.dim), dtype, device)? })
    }

    pub(super) fn tensor(&self) -> &Tensor {
        &self.both
    }

    /// (1, kv, capacity, dim)
    fn part(&self, values: usize, row: usize) -> Result<Tensor> {
        self.both.narrow(0, values, 1)?.squeeze(0)?.narrow(0, row, 1)
    }

    /// Writes the keys and values of `qkv` (places, t, packed) at their places and attends from each of its queries to
    /// all positions up to its own: (places, t, query dim).
    pub(super) fn attend(
        &self,
        qkv: &Tensor,
        heads: Heads,
        positions: &Rope,
        places: &[Place],
        path: Path,
    ) -> Result<Tensor> {
        let each = places
            .iter()
            .enumerate()
            .map(|(i, place)| self.attend_row(&qkv.narrow(0, i, 1)?, heads, positions, *place, path))
            .collect::<Result<Vec<_>>>()?;
        if each.len() == 1 { Ok(each[0].clone()) } else { Tensor::cat(&each, 0) }
    }

    fn attend_row(
        &self,
        qkv: &Tensor,
        heads: Heads,
        positions: &Rope,
        Place { row, position: start }: Place,
        path: Path,
    ) -> Result<Tensor> {
        let (_, t, _) = qkv.dims3()?;
        let Heads { query, kv, dim } = heads;
        let end = start + t;
        let split = |start: usize, n: usize| -> Result<Tensor> {
            qkv.narrow(D::Minus1, start * dim, n * dim)?
                .reshape((1, t, n, dim))?
                .transpose(1, 2)?
                .contiguous()
        };
        let (keys, values) = (self.part(0, row)?, self.part(1, row)?);
        let k = rope(&split(query, kv)?, positions, start)?; // (1, kv, t, dim)
        keys.slice_set(&k.contiguous()?, 2, start)?;
        values.slice_set(&split(query + kv, kv)?, 2, start)?;
        if start == 0 {
            // Nothing before it: as in training, and never all of the scores in memory.
            return causal_attention(qkv, heads, Some(positions), path);
        }
        let q = rope(&split(0, query)?, positions, start)?; // (1, query, t, dim)
        let (keys, values) = (keys.narrow(2, 0, end)?, values.narrow(2, 0, end)?);
        // The query heads of a group share their keys: one product a group.
        let group = query / kv;
        let q = q.reshape((1, kv, group * t, dim))?;
        let compute = if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let scores = q.matmul(&keys.t()?)?.to_dtype(compute)?;
        let scores = (scores / (dim as f64).sqrt())?.reshape((1, kv, group, t, end))?;
        let scores =
            if t == 1 { scores } else { scores.broadcast_add(&mask(start, t, q.device(), compute)?)? };
        let weights = candle_nn::ops::softmax_last_dim(&scores.contiguous()?)?;
        let weights = weights.reshape((1, kv, group * t, end))?.to_dtype(values.dtype())?;
        let out = weights.matmul(&values.contiguous()?)?; // (1, kv, group t, dim)
        out.reshape((1, query, t, dim))?.transpose(1, 2)?.reshape((1, t, query * dim))
    }

    /// Row i becomes what row `from[i]` is, in its first `len` positions.
    pub(super) fn reorder(&self, from: &Tensor, len: usize) -> Result<()> {
        let chosen = self.both.narrow(3, 0, len)?.contiguous()?.index_select(from, 1)?;
        self.both.slice_set(&chosen.contiguous()?, 3, 0)
    }
}

/// (t, start + t): row i sees positions up to start + i.
fn mask(start: usize, t: usize, device: &Device, dtype: DType) -> Result<Tensor> {
    let width = start + t;
    let mask: Vec<f32> =
        (0..t * width).map(|k| if k % width > start + k / width { f32::NEG_INFINITY } else { 0.0 }).collect();
    Tensor::from_vec(mask, (t, width), device)?.to_dtype(dtype)
}
