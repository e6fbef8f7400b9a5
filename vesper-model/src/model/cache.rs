//! Keys and values of the tokens seen so far, so that each new token costs one row.

use candle_core::{D, DType, Device, Result, Tensor, bail};

use crate::ops::{Heads, Rope, rope};

/// Keys and values of one layer, each (batch, kv, capacity, dim).
#[derive(Debug, Clone)]
pub(super) struct LayerCache {
    keys: Tensor,
    values: Tensor,
    len: usize,
}

impl LayerCache {
    pub(super) fn new(
        batch: usize,
        capacity: usize,
        heads: Heads,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let shape = (batch, heads.kv, capacity, heads.dim);
        Ok(Self {
            keys: Tensor::zeros(shape, dtype, device)?,
            values: Tensor::zeros(shape, dtype, device)?,
            len: 0,
        })
    }

    /// Appends the keys and values of `qkv` (batch, t, packed) and attends from its queries to all of them.
    pub(super) fn attend(&mut self, qkv: &Tensor, heads: Heads, positions: &Rope) -> Result<Tensor> {
        let (b, t, _) = qkv.dims3()?;
        let Heads { query, kv, dim } = heads;
        let (start, end) = (self.len, self.len + t);
        if end > self.keys.dim(2)? {
            bail!("a cache of {} positions is full", self.keys.dim(2)?);
        }
        let split = |start: usize, n: usize| -> Result<Tensor> {
            qkv.narrow(D::Minus1, start * dim, n * dim)?
                .reshape((b, t, n, dim))?
                .transpose(1, 2)?
                .contiguous()
        };
        let q = rope(&split(0, query)?, positions, start)?; // (b, query, t, dim)
        let k = rope(&split(query, kv)?, positions, start)?; // (b, kv, t, dim)
        let v = split(query + kv, kv)?;
        self.keys.slice_set(&k.contiguous()?, 2, start)?;
        self.values.slice_set(&v, 2, start)?;
        self.len = end;
        let (keys, values) = (self.keys.narrow(2, 0, end)?, self.values.narrow(2, 0, end)?);
        // The query heads of a group share their keys: one product a group.
        let group = query / kv;
        let q = q.reshape((b, kv, group * t, dim))?;
        let compute = if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let scores = q.matmul(&keys.t()?)?.to_dtype(compute)?;
        let scores = (scores / (dim as f64).sqrt())?.reshape((b, kv, group, t, end))?;
        let scores =
            if t == 1 { scores } else { scores.broadcast_add(&mask(start, t, q.device(), compute)?)? };
        let weights = candle_nn::ops::softmax_last_dim(&scores.contiguous()?)?;
        let weights = weights.reshape((b, kv, group * t, end))?.to_dtype(values.dtype())?;
        let out = weights.matmul(&values.contiguous()?)?; // (b, kv, group t, dim)
        out.reshape((b, query, t, dim))?.transpose(1, 2)?.reshape((b, t, query * dim))
    }
}

/// (t, start + t): row i sees positions up to start + i.
fn mask(start: usize, t: usize, device: &Device, dtype: DType) -> Result<Tensor> {
    let width = start + t;
    let mask: Vec<f32> =
        (0..t * width).map(|k| if k % width > start + k / width { f32::NEG_INFINITY } else { 0.0 }).collect();
    Tensor::from_vec(mask, (t, width), device)?.to_dtype(dtype)
}
