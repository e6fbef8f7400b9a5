//! Causal self-attention over a packed projection, with rotary positions and grouped queries.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::filled::filled;
use super::gemm::Precision;
use super::matrix::{Matrix, Target, Threads, product};
use super::real::{self, Real};
use super::{Backend, Path, Rope, attention_composed, check_float, check_sizes, notice, sizes};

/// Query rows handled at once: the scores in memory are `BLOCK x t` a thread, never `t x t`.
pub(super) const BLOCK: usize = 64;

/// How a packed projection is split into heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads, a divisor of `query`.
    pub kv: usize,
    /// Size of one head.
    pub dim: usize,
}

impl Heads {
    /// Width of the packed projection: `(query + 2 kv) * dim`, or `usize::MAX` where that is more.
    pub fn packed(self) -> usize {
        self.kv.saturating_mul(2).saturating_add(self.query).saturating_mul(self.dim)
    }
}

/// Causal self-attention.
///
/// ```text
/// qkv: (batch, t, (query + 2 kv) * dim), rows [q heads | k heads | v heads]
/// result: (batch, t, query * dim)
/// o[h, i] = sum over j <= i of softmax_j(rope(q[h, i]) . rope(k[g, j]) / sqrt(dim)) v[g, j],   g = h * kv / query
/// ```
///
/// The rotary embedding is applied inside when `positions` is given. The fused path keeps a block of rows of scores a
/// thread, computes the scores again in the backward, and saves nothing but `qkv` (on CUDA the rotated projection and
/// the logarithm of each row's sum of exponentials); the backward gives the packed gradient in one tensor. Computed in
/// f32 for f32, bf16 and f16, in f64 for f64; on CUDA the products of bf16 and f16 round the weights to the dtype.
///
/// On CUDA there are kernels for heads of up to 128 (of up to 64 where the kernels are built for less than compute
/// capability 8.0). Larger heads, and f64, run as blocks of candle's operations, which are computed again in the backward:
/// slower, but without `t x t` scores; a line on stderr says so once. The reference holds all scores.
///
/// # Errors
/// Shapes that do not fit the heads, heads that are not possible, another dtype, or more rows than `positions` has.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use vesper_model::ops::{Heads, Path, causal_attention};
/// let heads = Heads { query: 4, kv: 2, dim: 8 };
/// let qkv = Tensor::ones((1, 3, heads.packed()), DType::F32, &Device::Cpu)?;
/// let out = causal_attention(&qkv, heads, None, Path::Fused)?;
/// assert_eq!(out.dims(), [1, 3, 32]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
/// Vaswani et al., arXiv 1706.03762; Ainslie et al. (grouped queries), arXiv 2305.13245; Dao et al. (blocked softmax
/// and recomputation), arXiv 2205.14135.
pub fn causal_attention(qkv: &Tensor, heads: Heads, positions: Option<&Rope>, path: Path) -> Result<Tensor> {
    let [_, t, width] = sizes("causal_attention", "qkv", qkv)?;
    if width != heads.packed() {
        bail!("causal_attention: qkv of shape {:?} does not fit {heads:?}", qkv.shape());
    }
    check_float("causal_attention", "qkv", qkv.dtype())?;
    check_sizes("causal_attention", &[qkv.dims()])?;
    let op = CausalAttention::new(heads, positions, t)?;
    match path.backend(qkv) {
        Backend::Cpu => return qkv.contiguous()?.apply_op1(op),
        #[cfg(feature = "cuda")]
        Backend::Cuda => {
            if super::cuda::attention::supports(heads, qkv.dtype()) {
                return super::cuda::attention::causal_attention(qkv, heads, positions);
            }
        }
        Backend::Reference => {}
    }
    if path == Path::Reference || qkv.elem_count() == 0 {
        return attention_composed::reference(qkv, heads, positions);
    }
    notice::once(format!(
        "no attention kernel for heads of {} in {:?} on this device; it runs as blocks of candle's operations",
        heads.dim,
        qkv.dtype()
    ));
    attention_composed::without_kernel(qkv, heads, positions)
}

pub(super) struct CausalAttention {
    pub(super) heads: Heads,
    rope: Option<Rope>,
}

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Shapes {
    t: usize,
    heads: Heads,
}

impl Shapes {
    fn group(self) -> usize {
        self.heads.query / self.heads.kv
    }
}

/// Rotates rows of (t, dim), the first at position `first`, in place, forwards or backwards.
#[inline(always)]
fn rotate<T: Real>(rows: &mut [T], dim: usize, rope: &Rope, first: usize, sign: T) {
    let half = dim / 2;
    let (cos, sin) = &*rope.table;
    for (position, row) in (first..).zip(rows.chunks_exact_mut(dim)) {
        let (a, b) = row.split_at_mut(half);
        let cos = &cos[position * half..][..half];
        let sin = &sin[position * half..][..half];
        for i in 0..half {
            let (c, s) = (T::of(f64::from(cos[i])), T::of(f64::from(sin[i])) * sign);
            let (x, y) = (a[i], b[i]);
            a[i] = x * c - y * s;
            b[i] = y * c + x * s;
        }
    }
}

/// A product of one head, in the type of the computation: its sizes are too small for bf16 to pay.
pub(super) fn multiply<T: Real>(dst: Target<'_, T>, a: Matrix<'_, T>, b: Matrix<'_, T>) -> Result<()> {
    product(dst, a, b, Precision::Full, Threads::One)
}

/// Copies one head out of the packed rows, rotated, where there is a rotation, from the given position on.
pub(super) fn head<T: Real>(
    packed: &[T],
    width: usize,
    start: usize,
    dim: usize,
    rope: Option<(&Rope, usize)>,
) -> Vec<T> {
    let mut rows = Vec::with_capacity(packed.len() / width.max(1) * dim);
    for row in packed.chunks_exact(width) {
        rows.extend_from_slice(&row[start..start + dim]);
    }
    if let Some((rope, first)) = rope {
        real::simd(
            #[inline(always)]
            || rotate(&mut rows, dim, rope, first, T::ONE),
        );
    }
    rows
}

/// Scores of the query rows `first ..` turned into softmax weights: row r sees keys 0 ..= first + r.
pub(super) fn softmax_rows<T: Real>(scores: &mut [T], keys: usize, first: usize, scale: T) {
    real::simd(
        #[inline(always)]
        || {
            for (r, row) in scores.chunks_exact_mut(keys).enumerate() {
                let (seen, future) = row.split_at_mut(first + r + 1);
                let top = real::max(seen) * scale;
                for x in seen.iter_mut() {
                    *x = (*x * scale - top).exp();
                }
                let inverse = T::ONE / real::sum(seen);
                for x in seen.iter_mut() {
                    *x *= inverse;
                }
                future.fill(T::ZERO);
            }
        },
    );
}

impl CausalAttention {
    /// Checks that the heads make sense and that the rotary table has `t` rows for them.
    pub(super) fn new(heads: Heads, positions: Option<&Rope>, t: usize) -> Result<Self> {
        if heads.query == 0 || heads.kv == 0 || heads.dim == 0 || !heads.query.is_multiple_of(heads.kv) {
            bail!("causal_attention: impossible {heads:?}");
        }
        if let Some(rope) = positions
            && (rope.head_dim != heads.dim || t > rope.positions)
        {
            bail!(
                "causal_attention: {t} rows of head size {}, but the rotary table has {} of head size {}",
                heads.dim,
                rope.positions,
                rope.head_dim
            );
        }
        Ok(Self { heads, rope: positions.cloned() })
    }

    fn rotation(&self) -> Option<(&Rope, usize)> {
        self.rope.as_ref().map(|rope| (rope, 0))
    }

    fn scale<T: Real>(&self) -> T {
        T::of(1.0 / (self.heads.dim as f64).sqrt())
    }

    /// Output of one key/value head's group of query heads over one sequence: (group, t, dim).
    fn forward_group<T: Real>(&self, packed: &[T], kv: usize, shapes: Shapes) -> Result<Vec<T>> {
        let Shapes { t, heads: Heads { query, kv: kv_heads, dim } } = shapes;
        let (group, width) = (shapes.group(), shapes.heads.packed());
        let k = head(packed, width, (query + kv) * dim, dim, self.rotation());
        let k = Matrix::new(&k, t, dim, dim)?;
        let v = &packed[(query + kv_heads + kv) * dim..];
        let mut out = vec![T::ZERO; group * t * dim];
        let mut scores = vec![T::ZERO; BLOCK.min(t) * t];
        for (g, out) in out.chunks_exact_mut(t * dim).enumerate() {
            let q = head(packed, width, (kv * group + g) * dim, dim, self.rotation());
            for first in (0..t).step_by(BLOCK) {
                let rows = BLOCK.min(t - first);
                let keys = first + rows;
                let scores = &mut scores[..rows * keys];
                let block = Matrix::new(&q[first * dim..], rows, dim, dim)?;
                multiply(Target::overwrite(scores, keys), block, k.first_rows(keys).t())?;
                softmax_rows(scores, keys, first, self.scale());
                let weights = Matrix::new(&*scores, rows, keys, keys)?;
                let v = Matrix::new(v, keys, dim, width)?;
                multiply(Target::overwrite(&mut out[first * dim..], dim), weights, v)?;
            }
        }
        Ok(out)
    }

    /// Gradients of one group over one sequence: q (group, t, dim), k and v (t, dim).
    fn backward_group<T: Real>(
        &self,
        packed: &[T],
        dout: &[T],
        kv: usize,
        shapes: Shapes,
    ) -> Result<(Vec<T>, Vec<T>, Vec<T>)> {
        let Shapes { t, heads: Heads { query, kv: kv_heads, dim } } = shapes;
        let (group, width) = (shapes.group(), shapes.heads.packed());
        let k = head(packed, width, (query + kv) * dim, dim, self.rotation());
        let k = Matrix::new(&k, t, dim, dim)?;
        let v = &packed[(query + kv_heads + kv) * dim..];
        let mut dq = vec![T::ZERO; group * t * dim];
        let (mut dk, mut dv) = (vec![T::ZERO; t * dim], vec![T::ZERO; t * dim]);
        let mut weights = vec![T::ZERO; BLOCK.min(t) * t];
        let mut dscores = vec![T::ZERO; BLOCK.min(t) * t];
        for (g, dq) in dq.chunks_exact_mut(t * dim).enumerate() {
            let h = kv * group + g;
            let q = head(packed, width, h * dim, dim, self.rotation());
            for first in (0..t).step_by(BLOCK) {
                let rows = BLOCK.min(t - first);
                let keys = first + rows;
                let (p, ds) = (&mut weights[..rows * keys], &mut dscores[..rows * keys]);
                let q = Matrix::new(&q[first * dim..], rows, dim, dim)?;
                let k = k.first_rows(keys);
                let v = Matrix::new(v, keys, dim, width)?;
                let dout = Matrix::new(&dout[first * query * dim + h * dim..], rows, dim, query * dim)?;
                multiply(Target::overwrite(p, keys), q, k.t())?;
                softmax_rows(p, keys, first, self.scale());
                multiply(Target::overwrite(ds, keys), dout, v.t())?;
                let scale = self.scale::<T>();
                real::simd(
                    #[inline(always)]
                    || {
                        for (p, ds) in p.chunks_exact(keys).zip(ds.chunks_exact_mut(keys)) {
                            // dS = P (dP - sum(P dP)) / sqrt(dim)
                            let dot = real::fold(keys, |j| p[j] * ds[j]);
                            for (ds, &p) in ds.iter_mut().zip(p) {
                                *ds = p * (*ds - dot) * scale;
                            }
                        }
                    },
                );
                let (p, ds) = (Matrix::new(&*p, rows, keys, keys)?, Matrix::new(&*ds, rows, keys, keys)?);
                multiply(Target::overwrite(&mut dq[first * dim..], dim), ds, k)?;
                multiply(Target::add(&mut dk, dim), ds.t(), q)?;
                multiply(Target::add(&mut dv, dim), p.t(), dout)?;
            }
            if let Some(rope) = &self.rope {
                rotate(dq, dim, rope, 0, -T::ONE);
            }
        }
        if let Some(rope) = &self.rope {
            rotate(&mut dk, dim, rope, 0, -T::ONE);
        }
        Ok((dq, dk, dv))
    }

    /// qkv: (b, t, packed) to (b, t, query dim)
    pub(super) fn forward<T: Real>(&self, qkv: &[T], b: usize, t: usize) -> Result<Vec<T>> {
        let shapes = Shapes { t, heads: self.heads };
        let Heads { query, kv, dim } = self.heads;
        let width = self.heads.packed();
        if b * t == 0 {
            return Ok(Vec::new());
        }
        let groups: Vec<Vec<T>> = (0..b * kv)
            .into_par_iter()
            .map(|task| {
                let packed = &qkv[task / kv * t * width..][..t * width];
                self.forward_group(packed, task % kv, shapes)
            })
            .collect::<Result<_>>()?;
        // (b, kv, group, t, dim) -> (b, t, query dim)
        let ([out], _) = filled(b * t * query * dim, t * query * dim, |range, [out]| {
            let groups = &groups[range.start / (t * query * dim) * kv..][..kv];
            for (i, row) in out.chunks_exact_mut(query * dim).enumerate() {
                for (h, head) in row.chunks_exact_mut(dim).enumerate() {
                    let (kv, g) = (h / shapes.group(), h % shapes.group());
                    head.copy_from_slice(&groups[kv][(g * t + i) * dim..][..dim]);
                }
            }
        });
        Ok(out)
    }

    /// The packed gradient, (b, t, packed)
    pub(super) fn backward<T: Real>(&self, qkv: &[T], dout: &[T], b: usize, t: usize) -> Result<Vec<T>> {
        let shapes = Shapes { t, heads: self.heads };
        let Heads { query, kv, dim } = self.heads;
        let width = self.heads.packed();
        if b * t == 0 {
            return Ok(Vec::new());
        }
        let groups: Vec<(Vec<T>, Vec<T>, Vec<T>)> = (0..b * kv)
            .into_par_iter()
            .map(|task| {
                let packed = &qkv[task / kv * t * width..][..t * width];
                let dout = &dout[task / kv * t * query * dim..][..t * query * dim];
                self.backward_group(packed, dout, task % kv, shapes)
            })
            .collect::<Result<_>>()?;
        let ([dqkv], _) = filled(b * t * width, t * width, |range, [dqkv]| {
            let groups = &groups[range.start / (t * width) * kv..][..kv];
            for (i, row) in dqkv.chunks_exact_mut(width).enumerate() {
                for (h, head) in row.chunks_exact_mut(dim).enumerate() {
                    let source = if h < query {
                        &groups[h / shapes.group()].0[(h % shapes.group() * t + i) * dim..]
                    } else if h < query + kv {
                        &groups[h - query].1[i * dim..]
                    } else {
                        &groups[h - query - kv].2[i * dim..]
                    };
                    head.copy_from_slice(&source[..dim]);
                }
            }
        });
        Ok(dqkv)
    }

    fn backward_tensor<T: Real>(&self, qkv: &Tensor, dout: &Tensor) -> Result<Tensor> {
        let (b, t, _) = qkv.dims3()?;
        let dqkv = real::with_values::<T, _>(qkv, |qkv| {
            real::with_values::<T, _>(dout, |dout| self.backward(qkv, dout, b, t))
        })?;
        real::tensor(dqkv, qkv.shape(), qkv.dtype())
    }
}

impl CustomOp1 for CausalAttention {
    fn name(&self) -> &'static str {
        "vesper-causal-attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let (b, t, _) = layout.shape().dims3()?;
        let out = match qkv.dtype() {
            DType::F64 => f64::store(self.forward(&f64::read(qkv, layout)?, b, t)?, DType::F64)?,
            dtype => f32::store(self.forward(&f32::read(qkv, layout)?, b, t)?, dtype)?,
        };
        Ok((out, (b, t, self.heads.query * self.heads.dim).into()))
    }

    fn bwd(&self, qkv: &Tensor, _out: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        let dout = dout.contiguous()?;
        Ok(Some(match qkv.dtype() {
            DType::F64 => self.backward_tensor::<f64>(qkv, &dout)?,
            _ => self.backward_tensor::<f32>(qkv, &dout)?,
        }))
    }
}
