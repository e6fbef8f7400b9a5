//! On the CPU: keys and values are read as the cache stores them, a block of scores a thread.

use std::sync::OnceLock;

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use crate::ops::attention::{BLOCK, head, multiply, softmax_rows};
use crate::ops::matrix::{Matrix, Target};
use crate::ops::real::{self, Operand, Real};
use crate::ops::{Heads, Place, Rope};

/// See [`super::cached_attention`]; shapes have been checked.
pub(super) fn cached_attention(
    qkv: &Tensor,
    cache: &Tensor,
    heads: Heads,
    positions: &Rope,
    place: Place,
) -> Result<Tensor> {
    let (_, rows, _, capacity, _) = cache.dims5()?;
    let op = CachedAttention { heads, positions, place, rows, capacity, out: OnceLock::new() };
    cache.inplace_op2(&qkv.contiguous()?, &op)?;
    let Some(out) = op.out.into_inner() else { bail!("cached_attention has no result") };
    Ok(out)
}

/// candle hands out a storage for writing to such an operation alone.
struct CachedAttention<'a> {
    heads: Heads,
    positions: &'a Rope,
    place: Place,
    rows: usize,
    capacity: usize,
    out: OnceLock<Tensor>,
}

impl CachedAttention<'_> {
    /// Where the positions of a head begin in the cache.
    fn start(&self, values: usize, head: usize) -> usize {
        ((values * self.rows + self.place.row) * self.heads.kv + head) * self.capacity * self.heads.dim
    }

    /// Puts rotated keys and values, head after head (2 kv, t, dim), into the cache.
    fn keep<E: Copy>(&self, cache: &mut [E], heads: &[E]) {
        let Heads { kv, dim, .. } = self.heads;
        let each = heads.len() / (2 * kv);
        for (i, own) in heads.chunks_exact(each).enumerate() {
            let start = self.start(i / kv, i % kv) + self.place.position * dim;
            cache[start..][..each].copy_from_slice(own);
        }
    }

    fn run<T: Real>(
        &self,
        cache: &mut CpuStorage,
        lc: &Layout,
        packed: &[T],
        dtype: DType,
    ) -> Result<Vec<T>> {
        let Heads { query, kv, dim } = self.heads;
        let (width, first) = (self.heads.packed(), self.place.position);
        let t = packed.len() / width;
        let Some((offset, _)) = lc.contiguous_offsets() else { bail!("a cache must be contiguous") };

        let heads: Vec<Vec<T>> = (0..2 * kv)
            .into_par_iter()
            .map(|i| {
                let rope = (i < kv).then_some((self.positions, first));
                head(packed, width, (query + i) * dim, dim, rope)
            })
            .collect();
        match (&mut *cache, &T::store(heads.concat(), dtype)?) {
            (CpuStorage::F32(cache), CpuStorage::F32(heads)) => self.keep(&mut cache[offset..], heads),
            (CpuStorage::F64(cache), CpuStorage::F64(heads)) => self.keep(&mut cache[offset..], heads),
            (CpuStorage::BF16(cache), CpuStorage::BF16(heads)) => self.keep(&mut cache[offset..], heads),
            (CpuStorage::F16(cache), CpuStorage::F16(heads)) => self.keep(&mut cache[offset..], heads),
            _ => bail!("no cache of {dtype:?}"),
        }

        let end = first + t;
        let operands: Vec<Operand<'_, T>> = (0..2 * kv)
            .map(|i| {
                let start = offset + self.start(i / kv, i % kv);
                Operand::new(cache, &Layout::contiguous_with_offset((end, dim), start))
            })
            .collect::<Result<_>>()?;
        let blocks = t.div_ceil(BLOCK);
        let scale = T::of(1.0 / (dim as f64).sqrt());
        let one = |task: usize| -> Result<Vec<T>> {
            // The last rows see the most keys: they start first.
            let (h, block) = (task % query, (blocks - 1 - task / query) * BLOCK);
            let rows = BLOCK.min(t - block);
            let (before, keys) = (first + block, first + block + rows);
            let own = &packed[block * width..][..rows * width];
            let q = head(own, width, h * dim, dim, Some((self.positions, before)));
            let group = h / (query / kv);
            let (k, v) = (operands[group].values(), operands[kv + group].values());
            let mut scores = vec![T::ZERO; rows * keys];
            let q = Matrix::new(&q, rows, dim, dim)?;
            multiply(Target::overwrite(&mut scores, keys), q, Matrix::new(k, keys, dim, dim)?.t())?;
            softmax_rows(&mut scores, keys, before, scale);
            let weights = Matrix::new(&scores, rows, keys, keys)?;
            let mut out = vec![T::ZERO; rows * dim];
            multiply(Target::overwrite(&mut out, dim), weights, Matrix::new(v, keys, dim, dim)?)?;
            Ok(out)
        };
        let parts: Vec<Vec<T>> = (0..query * blocks).into_par_iter().map(one).collect::<Result<_>>()?;

        let mut out = vec![T::ZERO; t * query * dim];
        out.par_chunks_mut(BLOCK * query * dim).enumerate().for_each(|(block, out)| {
            let parts = &parts[(blocks - 1 - block) * query..][..query];
            for (i, row) in out.chunks_exact_mut(query * dim).enumerate() {
                for (head, part) in row.chunks_exact_mut(dim).zip(parts) {
                    head.copy_from_slice(&part[i * dim..][..dim]);
                }
            }
        });
        Ok(out)
    }
}

impl InplaceOp2 for CachedAttention<'_> {
    fn name(&self) -> &'static str {
        "vesper-cached-attention"
    }

    fn cpu_fwd(&self, cache: &mut CpuStorage, lc: &Layout, qkv: &CpuStorage, lq: &Layout) -> Result<()> {
        use candle_core::backend::BackendStorage;
        let (_, t, _) = lq.shape().dims3()?;
        let shape = (1, t, self.heads.query * self.heads.dim);
        let dtype = qkv.dtype();
        let out = match dtype {
            DType::F64 => real::tensor(self.run(cache, lc, &f64::read(qkv, lq)?, dtype)?, shape, dtype)?,
            _ => real::tensor(self.run(cache, lc, &f32::read(qkv, lq)?, dtype)?, shape, dtype)?,
        };
        let _ = self.out.set(out); // an operation runs once
        Ok(())
    }
}
