//! Rotary position embedding, in the half-split layout of Llama.

use std::sync::Arc;

use candle_core::{D, Device, Result, Tensor, bail};

use super::check_sizes;

/// The angles of the rotary embedding, for positions 0 to `positions - 1`.
///
/// ```text
/// angle(p, i) = p / theta^(2 i / head_dim),   i = 0 .. head_dim / 2
/// ```
///
/// # References
/// Su et al., RoFormer, arXiv 2104.09864.
#[derive(Debug, Clone)]
pub struct Rope {
    /// cos and sin, each (positions, head_dim / 2), row by row.
    pub(super) table: Arc<(Vec<f32>, Vec<f32>)>,
    cos: Tensor,
    sin: Tensor,
    pub(super) head_dim: usize,
    pub(super) positions: usize,
}

impl Rope {
    /// Angles for heads of `head_dim` at base `theta`, on a device, in f32 there.
    ///
    /// # Errors
    /// An odd `head_dim`, or a device that is out of memory.
    pub fn new(head_dim: usize, positions: usize, theta: f64, device: &Device) -> Result<Self> {
        if !head_dim.is_multiple_of(2) {
            bail!("rotary embedding needs an even head size, got {head_dim}");
        }
        let half = head_dim / 2;
        let (cos, sin): (Vec<f32>, Vec<f32>) = (0..positions * half)
            .map(|k| {
                let (position, i) = (k / half, k % half);
                // The frequency is rounded to f32 first, as in the models that this one must agree with.
                let frequency = f64::from((1.0 / theta.powf(2.0 * i as f64 / head_dim as f64)) as f32);
                let angle = position as f64 * frequency;
                (angle.cos() as f32, angle.sin() as f32)
            })
            .unzip();
        Ok(Self {
            cos: Tensor::from_slice(&cos, (positions, half), device)?,
            sin: Tensor::from_slice(&sin, (positions, half), device)?,
            table: Arc::new((cos, sin)),
            head_dim,
            positions,
        })
    }

    /// cos on the device, (positions, head_dim / 2), f32.
    #[cfg(feature = "cuda")]
    pub(super) fn cos(&self) -> &Tensor {
        &self.cos
    }

    /// sin on the device, (positions, head_dim / 2), f32.
    #[cfg(feature = "cuda")]
    pub(super) fn sin(&self) -> &Tensor {
        &self.sin
    }

    /// How many positions the table has.
    pub fn positions(&self) -> usize {
        self.positions
    }
}

/// Rotates the heads of `x`, whose rows stand at positions `offset`, `offset + 1`, ...
///
/// ```text
/// x: (.., t, head_dim) = [a | b]    result = [a cos - b sin | b cos + a sin]
/// ```
///
/// A composition of candle ops with a gradient, on every device. (`candle_nn::rotary_emb::rope` has no gradient.) x may be
/// f32, f64, bf16 or f16 and of any strides; the angles are rounded to its dtype. Saves x's halves and the products, four
/// times the size of x. [`causal_attention`](super::causal_attention()) and
/// [`self_attention`](super::self_attention()) rotate inside of their kernels, in f32, and save none of that.
///
/// # Errors
/// Positions past the table, another head size, or too many elements.
pub fn rope(x: &Tensor, rope: &Rope, offset: usize) -> Result<Tensor> {
    let (t, d) = (x.dim(D::Minus2)?, x.dim(D::Minus1)?);
    if d != rope.head_dim || offset.checked_add(t).is_none_or(|end| end > rope.positions) {
        bail!(
            "rope: {t} positions from {offset} of head size {d}, but the table has {} of head size {}",
            rope.positions,
            rope.head_dim
        );
    }
    check_sizes("rope", &[x.dims()])?;
    if x.elem_count() == 0 {
        return Ok(x.clone());
    }
    let half = d / 2;
    let cos = rope.cos.narrow(0, offset, t)?.to_dtype(x.dtype())?;
    let sin = rope.sin.narrow(0, offset, t)?.to_dtype(x.dtype())?;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[&low, &high], D::Minus1)
}
