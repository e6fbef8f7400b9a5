//! Keys and values of the tokens seen so far, so that each new token costs one row.

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::ops::{Heads, Path, Place, Rope, cached_attention};

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
        let sizes = [2, rows, heads.kv, capacity, heads.dim, dtype.size_in_bytes()];
        let bytes = sizes.into_iter().try_fold(1usize, usize::checked_mul);
        if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
            bail!("no memory has room for {rows} sequences of {capacity} tokens");
        }
        Ok(Self { both: Tensor::zeros((2, rows, heads.kv, capacity, heads.dim), dtype, device)? })
    }

    pub(super) fn tensor(&self) -> &Tensor {
        &self.both
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
        let one = |(i, place): (usize, &Place)| {
            cached_attention(&qkv.narrow(0, i, 1)?, &self.both, heads, positions, *place, path)
        };
        let each = places.iter().enumerate().map(one).collect::<Result<Vec<_>>>()?;
        if each.len() == 1 { Ok(each[0].clone()) } else { Tensor::cat(&each, 0) }
    }

    /// Row i becomes what row `from[i]` is, in its first `len` positions.
    pub(super) fn reorder(&self, from: &Tensor, len: usize) -> Result<()> {
        let chosen = self.both.narrow(3, 0, len)?.contiguous()?.index_select(from, 1)?;
        self.both.slice_set(&chosen.contiguous()?, 3, 0)
    }
}
