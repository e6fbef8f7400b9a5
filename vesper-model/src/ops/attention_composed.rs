//! Causal attention as compositions of candle ops: the reference, and the same in blocks of query rows.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{Heads, Rope, check_sizes, checkpoint, rope};

/// About as many scores are in memory at once.
const SCORES: usize = 16 << 20;

/// Queries, keys and values, each (b, query, t, dim), rotated, the keys and values once for every query head.
fn split(qkv: &Tensor, heads: Heads, positions: Option<&Rope>) -> Result<[Tensor; 3]> {
    let (b, t, _) = qkv.dims3()?;
    let Heads { query, kv, dim } = heads;
    let part = |start: usize, n: usize| -> Result<Tensor> {
        // (b, t, n dim) -> (b, n, t, dim)
        qkv.narrow(D::Minus1, start * dim, n * dim)?.reshape((b, t, n, dim))?.transpose(1, 2)?.contiguous()
    };
    let (q, k, v) = (part(0, query)?, part(query, kv)?, part(query + kv, kv)?);
    let (q, k) = match positions {
        Some(table) => (rope(&q, table, 0)?, rope(&k, table, 0)?),
        None => (q, k),
    };
    // Each key and value head serves query / kv consecutive query heads.
    let share = |x: Tensor| -> Result<Tensor> {
        let group = query / kv;
        x.unsqueeze(2)?.expand((b, kv, group, t, dim))?.reshape((b, query, t, dim))?.contiguous()
    };
    Ok([q.contiguous()?, share(k)?, share(v)?])
}

/// q: (b, query, n, dim), k and v: (b, query, keys, dim), mask: (n, keys), added to the scores
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let dim = q.dim(D::Minus1)?;
    let scores = q.matmul(&k.t()?.contiguous()?)?.to_dtype(mask.dtype())?;
    let scores = (scores / (dim as f64).sqrt())?.broadcast_add(mask)?;
    candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?.matmul(v)
}

/// (b, query, t, dim) to (b, t, query dim)
fn merge(out: &Tensor) -> Result<Tensor> {
    let (b, query, t, dim) = out.dims4()?;
    out.transpose(1, 2)?.reshape((b, t, query * dim))
}

/// In what the scores of activations of a dtype are.
pub(super) fn compute(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The specification: all scores at once.
pub(super) fn reference(qkv: &Tensor, heads: Heads, positions: Option<&Rope>) -> Result<Tensor> {
    let (b, t, _) = qkv.dims3()?;
    check_sizes("causal_attention", &[&[b, heads.query, t, t]])?;
    if b * t == 0 {
        return qkv.narrow(D::Minus1, 0, heads.query * heads.dim); // candle's maximum refuses empty tensors
    }
    let [q, k, v] = split(qkv, heads, positions)?;
    merge(&attend(&q, &k, &v, &mask(0, t, qkv.device(), compute(qkv.dtype()))?)?)
}

/// (n, before + n), to be added to scores: row i sees positions up to before + i.
pub(super) fn mask(before: usize, n: usize, device: &Device, dtype: DType) -> Result<Tensor> {
    let width = before + n;
    let seen = |k: usize| k % width <= before + k / width;
    let mask: Vec<f32> = (0..n * width).map(|k| if seen(k) { 0.0 } else { f32::NEG_INFINITY }).collect();
    Tensor::from_vec(mask, (n, width), device)?.to_dtype(dtype)
}

/// As [`reference`], a block of query rows at a time, each computed again in the backward: the scores of a block are in
/// memory, never all. Nothing is uploaded, so that it can be part of a recorded step.
pub(super) fn blocked(qkv: &Tensor, heads: Heads, positions: Option<&Rope>, scores: usize) -> Result<Tensor> {
    let (b, t, _) = qkv.dims3()?;
    let rows = (scores / (b * heads.query * t).max(1)).max(16);
    check_sizes("causal_attention", &[&[b, heads.query, rows.min(t), t]])?;
    let [q, k, v] = split(qkv, heads, positions)?;
    let places = places(t, qkv.device())?;
    let blocks = (0..t)
        .step_by(rows)
        .map(|first| {
            let n = rows.min(t - first);
            let keys = first + n;
            let (own, all) = (places.narrow(0, first, n)?, places.narrow(0, 0, keys)?);
            let seen = own.unsqueeze(1)?.broadcast_ge(&all.unsqueeze(0)?)?;
            // 0 where a key is seen, and elsewhere what no score can make up for.
            let mask = seen.to_dtype(compute(qkv.dtype()))?.affine(1e30, -1e30)?;
            let block = [q.narrow(2, first, n)?, k.narrow(2, 0, keys)?, v.narrow(2, 0, keys)?];
            let [q, k, v] = [block[0].contiguous()?, block[1].contiguous()?, block[2].contiguous()?];
            checkpoint(move |x| attend(&x[0], &x[1], &x[2], &mask), &[&q, &k, &v])
        })
        .collect::<Result<Vec<_>>>()?;
    merge(&Tensor::cat(&blocks, 2)?)
}

/// [`blocked`] for a device: what the fused path does where there is no kernel.
pub(super) fn without_kernel(qkv: &Tensor, heads: Heads, positions: Option<&Rope>) -> Result<Tensor> {
    blocked(qkv, heads, positions, SCORES)
}

/// 0, 1, .. t - 1, f32, made on the device.
fn places(t: usize, device: &Device) -> Result<Tensor> {
    let mut places = Tensor::zeros(1, DType::F32, device)?;
    while places.dim(0)? < t {
        places = Tensor::cat(&[&places, &(&places + places.dim(0)? as f64)?], 0)?;
    }
    places.narrow(0, 0, t)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    /// Numbers without a pattern, -1 to 1.
    fn numbers(shape: &[usize], dtype: DType) -> Tensor {
        let n: usize = shape.iter().product();
        let values: Vec<f64> = (0..n).map(|i| ((i * 7919 + 13) % 1009) as f64 / 504.5 - 1.0).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    }

    #[test]
    fn blocks_equal_the_whole_with_their_gradient() {
        for (b, t, heads) in [
            (1, 1, Heads { query: 1, kv: 1, dim: 2 }),
            (2, 17, Heads { query: 4, kv: 2, dim: 6 }),
            (1, 70, Heads { query: 5, kv: 5, dim: 4 }),
        ] {
            let positions = Rope::new(heads.dim, t, 1e4, &Device::Cpu).unwrap();
            let run = |f: &dyn Fn(&Tensor) -> Result<Tensor>| {
                let qkv = Var::from_tensor(&numbers(&[b, t, heads.packed()], DType::F64)).unwrap();
                let out = f(qkv.as_tensor()).unwrap();
                let weights = numbers(out.dims(), DType::F64).flip(&[1]).unwrap();
                let loss = (&out * weights).unwrap().sum_all().unwrap();
                (out, loss.backward().unwrap().remove(&qkv).unwrap())
            };
            let whole = run(&|qkv| reference(qkv, heads, Some(&positions)));
            let parts = run(&|qkv| blocked(qkv, heads, Some(&positions), 1));
            for (a, b) in [(whole.0, parts.0), (whole.1, parts.1)] {
                let off = (a - b).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
                assert!(off < 1e-24, "off by {:e}", off.sqrt());
            }
        }
    }
}
