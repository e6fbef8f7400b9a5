//! Rotary position embedding, in the half-split layout of Llama.

use std::fmt;
use std::sync::Arc;

use candle_core::{D, Device, Result, Tensor, bail};

use super::{RopeScaling, check_float, check_sizes};

/// The angles of the rotary embedding, for positions 0 to `positions - 1`.
///
/// ```text
/// angle(p, i) = p / theta^(2 i / head_dim),   i = 0 .. head_dim / 2
/// ```
///
/// Frequencies and angles are rounded to f32, in the order of `transformers`: a checkpoint was trained with those.
///
/// # References
/// Su et al., RoFormer, arXiv 2104.09864.
#[derive(Clone)]
pub struct Rope {
    /// cos and sin, each (positions, head_dim / 2), row by row.
    pub(super) table: Arc<(Vec<f32>, Vec<f32>)>,
    cos: Tensor,
    sin: Tensor,
    pub(super) head_dim: usize,
    pub(super) positions: usize,
}

impl fmt::Debug for Rope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the tables: a model's would be thousands of numbers.
        let mut shown = f.debug_struct("Rope");
        shown.field("head_dim", &self.head_dim).field("positions", &self.positions).finish_non_exhaustive()
    }
}

impl Rope {
    /// Angles for heads of `head_dim` at base `theta`, on a device, in f32 there.
    ///
    /// # Errors
    /// An odd `head_dim`, a `theta` that is no positive number, more angles than a tensor may have, or a device that is out
    /// of memory.
    pub fn new(head_dim: usize, positions: usize, theta: f64, device: &Device) -> Result<Self> {
        Self::scaled(head_dim, positions, theta, None, device)
    }

    /// As [`Rope::new`], with the frequencies lowered by `scaling`.
    ///
    /// # Errors
    /// As [`Rope::new`], and a parameter of the scaling that is out of its range.
    ///
    /// # Examples
    /// ```
    /// use vesper_model::candle_core::{Device, Tensor};
    /// use vesper_model::ops::{Rope, RopeScaling, rope};
    ///
    /// let x = Tensor::new(&[[1f32, 0.0]], &Device::Cpu)?;
    /// let plain = Rope::new(2, 16, 1e4, &Device::Cpu)?;
    /// let slower = Rope::scaled(2, 16, 1e4, Some(RopeScaling::Linear { factor: 4.0 }), &Device::Cpu)?;
    /// let (a, b) = (rope(&x, &plain, 2)?, rope(&x, &slower, 8)?); // four times as far, by the same angle
    /// assert_eq!(a.to_vec2::<f32>()?, b.to_vec2::<f32>()?);
    /// # Ok::<(), vesper_model::candle_core::Error>(())
    /// ```
    pub fn scaled(
        head_dim: usize,
        positions: usize,
        theta: f64,
        scaling: Option<RopeScaling>,
        device: &Device,
    ) -> Result<Self> {
        if !head_dim.is_multiple_of(2) {
            bail!("rotary embedding needs an even head size, got {head_dim}");
        }
        if let Some(scaling) = scaling {
            scaling.validate()?;
        }
        if !((theta as f32).is_finite() && theta as f32 > 0.0) {
            bail!("rotary embedding: a theta of {theta}, expected a positive number of f32");
        }
        let half = head_dim / 2;
        check_sizes("rotary embedding", &[&[head_dim][..], &[positions], &[positions, half]])?;
        let lowered = |f| scaling.map_or(f, |scaling| scaling.apply(f));
        let frequencies: Vec<f32> = frequencies(head_dim, theta).map(lowered).collect();
        let (cos, sin): (Vec<f32>, Vec<f32>) = (0..positions)
            .flat_map(|position| frequencies.iter().map(move |f| f64::from(position as f32 * f)))
            .map(|angle| (angle.cos() as f32, angle.sin() as f32))
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

/// `theta^(-2 i / head_dim)` for each pair i of a head, in radians a token.
pub(super) fn frequencies(head_dim: usize, theta: f64) -> impl Iterator<Item = f32> {
    (0..head_dim / 2).map(move |i| {
        let exponent = (2 * i) as f32 / head_dim as f32;
        1.0 / f64::from(theta as f32).powf(f64::from(exponent)) as f32
    })
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
/// Positions past the table, another head size, another dtype, or too many elements.
pub fn rope(x: &Tensor, rope: &Rope, offset: usize) -> Result<Tensor> {
    let &[.., t, d] = x.dims() else {
        bail!("rope: x of shape {:?}, expected rank 2 or more", x.shape());
    };
    if d != rope.head_dim || offset.checked_add(t).is_none_or(|end| end > rope.positions) {
        bail!(
            "rope: {t} positions from {offset} of head size {d}, but the table has {} of head size {}",
            rope.positions,
            rope.head_dim
        );
    }
    check_float("rope", "x", x.dtype())?;
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
