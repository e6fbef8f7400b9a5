//! Attention of single queries over the filled positions of a cache.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, bail};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use pulp::bytemuck;
use rayon::prelude::*;
use std::cell::Cell;

use super::matvec::{Rows, TASK, Vectors, some_products, weighted_sum};
use super::{Place, rotated};
use crate::ops::real::{self, Real};
use crate::ops::{Heads, Rope};

/// What one layer's attention works on: the packed projections `(places, packed)`, each of a token at its place.
pub(super) struct Attention<'a> {
    pub(super) packed: &'a mut [f32],
    pub(super) places: &'a [Place],
    pub(super) heads: Heads,
    pub(super) rope: &'a Rope,
}

/// The sizes of a cache `(2, rows, kv, capacity, dim)`.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    kv: usize,
    capacity: usize,
    dim: usize,
}

impl Sizes {
    /// Where a head's positions begin.
    fn head(self, values: usize, row: usize, head: usize) -> usize {
        (((values * self.rows) + row) * self.kv + head) * self.capacity * self.dim
    }
}

impl Attention<'_> {
    /// Writes the keys and values of the tokens into the cache and attends to all positions up to each token's own:
    /// `(places, query dim)`.
    pub(super) fn run(self, cache: &Tensor) -> Result<Vec<f32>> {
        let (_, rows, kv, capacity, dim) = cache.dims5()?;
        let out = Cell::new(Vec::new());
        let op = InPlace { attention: Cell::new(Some(self)), sizes: Sizes { rows, kv, capacity, dim }, out };
        cache.inplace_op1(&op)?;
        Ok(op.out.take())
    }

    fn rotate(&mut self) {
        let Heads { query, kv, dim } = self.heads;
        for (packed, place) in self.packed.chunks_exact_mut(self.heads.packed()).zip(self.places) {
            rotated(&mut packed[..(query + kv) * dim], dim, self.rope, place.position);
        }
    }

    /// Writes keys and values by `put(where, values)`.
    fn write(&self, sizes: Sizes, mut put: impl FnMut(usize, &[f32])) {
        let Heads { query, kv, dim } = self.heads;
        for (packed, place) in self.packed.chunks_exact(self.heads.packed()).zip(self.places) {
            for head in 0..kv {
                for (i, start) in [query, query + kv].into_iter().enumerate() {
                    let at = sizes.head(i, place.row, head) + place.position * dim;
                    put(at, &packed[(start + head) * dim..][..dim]);
                }
            }
        }
    }

    fn attend(&self, words: &[u32], pairs: bool, sizes: Sizes) -> Vec<f32> {
        let Heads { query, kv, dim } = self.heads;
        let (group, factor) = (query / kv, if pairs { 2 } else { 1 });
        let mut out = vec![0.0; self.places.len() * query * dim];
        let one = |i: usize, out: &mut [f32]| {
            let (place, head) = (self.places[i / kv], i % kv);
            let positions = place.position + 1;
            let rows = |values: usize| {
                let start = sizes.head(values, place.row, head) / factor;
                Rows::new(&words[start..][..positions * dim / factor], dim / factor, pairs)
            };
            let queries = &self.packed[i / kv * self.heads.packed() + head * group * dim..][..group * dim];
            let mut scores = vec![0.0; positions * group];
            some_products(rows(0), &Vectors::new(queries, group, rows(0)), &mut scores);
            let mut weights = vec![0.0; positions];
            for (g, out) in out.chunks_exact_mut(dim).enumerate() {
                for (weight, scores) in weights.iter_mut().zip(scores.chunks_exact(group)) {
                    *weight = scores[g];
                }
                softmax(&mut weights, 1.0 / (dim as f32).sqrt());
                weighted_sum(rows(1), &weights, out);
            }
        };
        let work: usize = self.places.iter().map(|place| 2 * (place.position + 1) * query * dim).sum();
        if work < 2 * TASK {
            out.chunks_exact_mut(group * dim).enumerate().for_each(|(i, out)| one(i, out));
        } else {
            out.par_chunks_exact_mut(group * dim).enumerate().for_each(|(i, out)| one(i, out));
        }
        out
    }
}

/// Turns scores into weights.
fn softmax(scores: &mut [f32], scale: f32) {
    real::simd(
        #[inline(always)]
        || {
            let top = real::max(scores) * scale;
            for x in scores.iter_mut() {
                *x = Real::exp(*x * scale - top);
            }
            let inverse = 1.0 / real::sum(scores);
            for x in scores.iter_mut() {
                *x *= inverse;
            }
        },
    );
}

/// candle hands out a storage for writing to such an operation alone.
struct InPlace<'a> {
    attention: Cell<Option<Attention<'a>>>,
    sizes: Sizes,
    out: Cell<Vec<f32>>,
}

impl InplaceOp1 for InPlace<'_> {
    fn name(&self) -> &'static str {
        "vesper-decode-attention"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (Some(mut attention), Some((start, end))) = (self.attention.take(), layout.contiguous_offsets())
        else {
            bail!("{}: a cache must be contiguous", self.name());
        };
        attention.rotate();
        let out = match storage {
            CpuStorage::F32(cache) => {
                let cache = &mut cache[start..end];
                attention.write(self.sizes, |at, values| cache[at..][..values.len()].copy_from_slice(values));
                attention.attend(bytemuck::cast_slice(cache), false, self.sizes)
            }
            CpuStorage::BF16(cache) => {
                let cache: &mut [bf16] = &mut cache[start..end];
                attention.write(self.sizes, |at, values| {
                    for (to, value) in cache[at..].iter_mut().zip(values) {
                        *to = bf16::from_f32(*value);
                    }
                });
                match bytemuck::try_cast_slice(cache.reinterpret_cast()) {
                    Ok(words) => attention.attend(words, true, self.sizes),
                    Err(_) => bail!("{}: a cache must begin at a multiple of 4 bytes", self.name()),
                }
            }
            _ => bail!("{}: a cache must be of f32 or bf16", self.name()),
        };
        self.out.set(out);
        Ok(())
    }
}
