//! A step on the CPU.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::attention::Attention;
use super::matvec::{Vectors, products};
use super::{Place, StepOutput, StepWeights, with_rows};
use crate::ops::real::{self, fold};
use crate::quantized::Weight;

impl StepWeights {
    /// Whether [`StepWeights::step`] takes these weights beside a cache of `compute`.
    pub(crate) fn takes(&self, compute: DType) -> bool {
        let fits = |matrix: &Weight| {
            // Blocks on the CPU are always to be read.
            let Some(matrix) = matrix.plain() else { return true };
            let known = matrix.dtype() == DType::F32 || matrix.dtype() == compute; // as the other operations have it
            known && with_rows(matrix, |_| Ok(())).is_ok()
        };
        matches!(compute, DType::F32 | DType::BF16)
            && self.settings.heads.dim.is_multiple_of(2)
            && self.matrices().all(fits)
    }

    /// Reads one token a place into the caches `(2, rows, kv, capacity, dim)` of the layers; the places are free and in
    /// the cache.
    pub(crate) fn step(&self, ids: &[u32], places: &[Place], caches: &[&Tensor]) -> Result<StepOutput> {
        // Inside of the pool handing out work is cheap; from outside each time would wake it.
        let mut result = None;
        rayon::scope(|_| result = Some(self.run(ids, places, caches)));
        match result {
            Some(result) => result,
            None => bail!("a decoding step has no result"),
        }
    }

    fn run(&self, ids: &[u32], places: &[Place], caches: &[&Tensor]) -> Result<StepOutput> {
        let (d, n) = (self.norm.elem_count(), ids.len());
        let settings = self.settings;
        let mut h = Vec::with_capacity(n * d);
        for &id in ids {
            let row = match &self.embed {
                Weight::Plain(table) => table.narrow(0, id as usize, 1)?,
                Weight::Blocks(table) => table.embedding(&Tensor::new(&[id], &Device::Cpu)?)?,
            };
            real::with_values::<f32, _>(&row, |row| {
                h.extend_from_slice(row);
                Ok(())
            })?;
        }
        for (layer, cache) in self.layers.iter().zip(caches) {
            let normed = norm(&h, &layer.norm_attention, settings.eps)?;
            let mut packed = product(&layer.qkv, &normed, n)?;
            let attention =
                Attention { packed: &mut packed, places, heads: settings.heads, rope: &self.rope };
            let attended = attention.run(cache)?;
            add(&mut h, &product(&layer.out, &attended, n)?);
            let normed = norm(&h, &layer.norm_feed_forward, settings.eps)?;
            let gate_up = product(&layer.gate_up, &normed, n)?;
            let width = gate_up.len() / n;
            let inner = settings.activation.gated(&Tensor::from_vec(gate_up, (n, width), &Device::Cpu)?)?;
            let down = real::with_values::<f32, _>(&inner, |inner| product(&layer.down, inner, n))?;
            add(&mut h, &down);
        }
        let hidden = norm(&h, &self.norm, settings.eps)?;
        let logits = product(&self.head, &hidden, n)?;
        let vocab = logits.len() / n;
        let logits =
            if n == 1 { vec![logits] } else { logits.chunks_exact(vocab).map(<[f32]>::to_vec).collect() };
        Ok(StepOutput { hidden, logits })
    }
}

/// x (n, in) to x W^T (n, out)
fn product(weight: &Weight, x: &[f32], n: usize) -> Result<Vec<f32>> {
    let weight = match weight {
        Weight::Plain(weight) => weight,
        Weight::Blocks(blocks) => return blocks.product(x, n),
    };
    let out = with_rows(weight, |rows| Ok(products(rows, &Vectors::new(x, n, rows))))?;
    if n == 1 {
        return Ok(out);
    }
    let width = out.len() / n;
    let mut turned = vec![0.0; out.len()];
    for (i, row) in turned.chunks_exact_mut(width).enumerate() {
        for (to, from) in row.iter_mut().zip(out.iter().skip(i).step_by(n)) {
            *to = *from;
        }
    }
    Ok(turned)
}

/// RMSNorm of each row.
fn norm(x: &[f32], weight: &Tensor, eps: f64) -> Result<Vec<f32>> {
    real::with_values::<f32, _>(weight, |weight| {
        let mut y = x.to_vec();
        real::simd(
            #[inline(always)]
            || {
                for row in y.chunks_exact_mut(weight.len()) {
                    let mean = fold(row.len(), |i| row[i] * row[i]) / row.len() as f32;
                    let scale = 1.0 / (mean + eps as f32).sqrt();
                    for (y, w) in row.iter_mut().zip(weight) {
                        *y = *y * scale * w;
                    }
                }
            },
        );
        Ok(y)
    })
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
