//! LoRA by way of the weight that it makes, where rows are many.
//!
//! ```text
//! W' = W + scale B A      y = x W'^T + bias      dx = dy W'
//! dA = scale (dy B)^T x   dB = scale dy^T (x A^T)
//! ```
//!
//! With `W'` at hand, forward and the gradient of x cost what the frozen layer costs; of the adapter there remain four
//! products with r columns. `W'` is made for each pass and let go of at once: nothing of its size is kept in the graph,
//! and no gradient of its size is made. Rounding apart it is the same function: `W'` is rounded to the dtype of the
//! weight, so this is for f32 and f64 alone. In half types a small change would be rounded away.
//!
//! A change under a mask, `M * (B A)`, has no low rank: it goes the same way whatever the rows, or in half types as a layer
//! of its own beside the frozen one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp3, DType, Layout, MetalStorage, Result, Shape, Tensor,
};

use crate::FrozenLinear;
use crate::frozen::{Frozen, rows};

/// A low-rank change of a weight: `scale B A`, a (r, in), b (out, r), less what it started from.
pub(crate) struct LowRank {
    pub(crate) a: Tensor,
    pub(crate) b: Tensor,
    pub(crate) scale: f64,
    /// `A0` and `B0` without gradients: `scale B0 A0` is taken off.
    pub(crate) origin: Option<(Tensor, Tensor)>,
    /// Which entries of the change are there.
    pub(crate) mask: Option<Mask>,
    /// What each row of `W'` is multiplied by, as in DoRA: (out, 1), with a gradient. Not with an origin or a mask.
    pub(crate) ratio: Option<Tensor>,
}

/// Which entries of a change (out, in) are there, and what its gradient does.
pub(crate) struct Mask {
    /// (out, in), of zeros and ones
    pub(crate) ones: Tensor,
    /// Whether the gradient goes straight through, as if all entries were there.
    pub(crate) through: bool,
    /// Who may want to see the gradient of the change, masked or not.
    pub(crate) wanted: Arc<Wanted>,
}

/// The gradient of a masked change, kept where it is wanted.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    /// Whether the next backward pass shall keep it.
    pub(crate) wanted: AtomicBool,
    /// (out, in)
    pub(crate) gradient: Mutex<Option<Tensor>>,
}

impl LowRank {
    /// The layer with the change for x (..., in), in one operation where that is cheaper than in two.
    pub(crate) fn layer(self, base: &FrozenLinear, x: &Tensor) -> Result<Option<Tensor>> {
        let (inputs, outputs) = (base.in_features(), base.out_features());
        let fits = base.quantized_weight().is_none()
            && x.dtype() == base.dtype()
            && x.dims().last() == Some(&inputs)
            && x.elem_count() > 0;
        // The products of all rows with A and B against the product of the two and a pass over the weight.
        let many = rows(x.shape()) * (inputs + outputs) >= 2 * inputs * outputs;
        let exact = matches!(x.dtype(), DType::F32 | DType::F64) && self.a.dtype() == x.dtype();
        if !fits {
            return Ok(None);
        }
        if exact && (many || self.mask.is_some()) {
            return self.effective_layer(base, x).map(Some);
        }
        #[cfg(feature = "cuda")]
        if self.mask.is_some() && x.device().is_cuda() && x.dtype() == DType::BF16 {
            return self.beside_its_own(base, x).map(Some);
        }
        #[cfg(feature = "cuda")]
        if self.has_low_kernels(x)? {
            let ratio = self.ratio.as_ref().map(not_zero).transpose()?;
            return crate::cuda::beside(base, x, &self.a, &self.b, self.scale, ratio.as_ref()).map(Some);
        }
        Ok(None)
    }

    /// The change alone for x (m, in), in the dtype of x, where there are kernels for it.
    #[cfg(feature = "cuda")]
    pub(crate) fn by_kernels(&self, x: &Tensor) -> Result<Option<Tensor>> {
        if !self.has_low_kernels(x)? {
            return Ok(None);
        }
        crate::cuda::alone(x, &self.a, &self.b, self.scale).map(Some)
    }

    #[cfg(feature = "cuda")]
    fn has_low_kernels(&self, x: &Tensor) -> Result<bool> {
        Ok(self.origin.is_none()
            && self.mask.is_none()
            && self.a.dtype() != DType::F64
            && crate::cuda::has_kernels(x, self.a.dim(0)?))
    }

    /// The change alone for x (m, in) by a weight of its own, in the dtype of x.
    pub(crate) fn alone(self, x: &Tensor) -> Result<Tensor> {
        let weight = self.change()?.to_dtype(x.dtype())?;
        self.apply(x, FrozenLinear::new(weight.clone(), None)?, weight, Target::Alone)
    }

    fn effective_layer(self, base: &FrozenLinear, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight(base)?;
        self.apply(x, base.clone(), weight, Target::Layer)
    }

    /// The layer and the change by a weight of its own, added up in one operation.
    #[cfg(feature = "cuda")]
    fn beside_its_own(self, base: &FrozenLinear, x: &Tensor) -> Result<Tensor> {
        let weight = self.change()?.to_dtype(x.dtype())?.contiguous()?;
        let x = crate::cuda::aligned(x)?;
        self.apply(&x, FrozenLinear::new(weight.clone(), None)?, weight, Target::Beside(base.clone()))
    }

    fn apply(self, x: &Tensor, base: FrozenLinear, weight: Tensor, target: Target) -> Result<Tensor> {
        let a = self.a.clone();
        let b = match &self.ratio {
            None => self.b.clone(),
            Some(ratio) => Tensor::cat(&[&self.b, ratio], 1)?, // an operation takes three tensors
        };
        let op = Effective { weight: Mutex::new(Some(weight)), base, target, change: self };
        x.contiguous()?.apply_op3(&a, &b, op)
    }

    /// `W'`, outside of any graph.
    fn weight(&self, base: &FrozenLinear) -> Result<Tensor> {
        let weight = self.direction(base)?;
        match &self.ratio {
            None => Ok(weight),
            Some(ratio) => weight.broadcast_mul(&not_zero(&ratio.detach())?),
        }
    }

    /// `W'` without the ratio.
    fn direction(&self, base: &FrozenLinear) -> Result<Tensor> {
        let weight = base.weight()?;
        #[cfg(feature = "cuda")]
        if self.origin.is_none()
            && self.mask.is_none()
            && weight.dtype() == DType::F32
            && crate::cuda::has_kernels(&weight, self.a.dim(0)?)
        {
            return crate::cuda::effective(&weight, &self.a.detach(), &self.b.detach(), self.scale);
        }
        weight + self.change()?
    }

    /// `W' - W`, outside of any graph: (out, in).
    fn change(&self) -> Result<Tensor> {
        let (a, b) = (self.a.detach(), self.b.detach());
        let change = (b * self.scale)?.matmul(&a)?;
        let change = match &self.origin {
            None => change,
            // From each other first: at the start the two are the same to the bit.
            Some((a, b)) => (change - (b * self.scale)?.matmul(a)?)?,
        };
        match &self.mask {
            None => Ok(change),
            Some(mask) => change * &mask.ones,
        }
    }

    /// `dA` and `dB` for x (m, in) and dy (m, out).
    fn gradients(&self, x: &Tensor, dy: &Tensor, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
        let (a, b, dtype) = (a.detach(), b.detach(), a.dtype());
        if let Some(mask) = &self.mask {
            let wanted = mask.wanted.wanted.load(Ordering::Relaxed);
            if wanted || !mask.through {
                // The gradient of the update in full, which costs as much as that of the weight.
                let full = (dy.t()?.matmul(x)?.to_dtype(dtype)? * self.scale)?; // (out, in)
                let own = if mask.through { full.clone() } else { (&full * &mask.ones)? };
                if wanted {
                    *mask.wanted.gradient.lock().unwrap_or_else(PoisonError::into_inner) = Some(full);
                }
                return Ok((b.t()?.matmul(&own)?, own.matmul(&a.t()?)?));
            }
        }
        #[cfg(feature = "cuda")]
        if dtype != DType::F64 && crate::cuda::has_kernels(x, a.dim(0)?) {
            let wide = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
            let (da, db) = crate::cuda::gradients((x, dy), (&wide.0, &wide.1), self.scale)?;
            return Ok((da.to_dtype(dtype)?, db.to_dtype(dtype)?));
        }
        let (x, dy) = (&x.to_dtype(dtype)?, &dy.to_dtype(dtype)?);
        let (low, back) = (x.matmul(&a.t()?)?, dy.matmul(&b)?); // (m, r)
        let da = (back.t()?.matmul(x)? * self.scale)?; // (r, in)
        let db = (dy.t()?.matmul(&low)? * self.scale)?; // (out, r)
        Ok((da, db))
    }
}

/// A ratio without zeros, with the same gradient: what a row that is multiplied by 0 would have been cannot be told from its result, and the
/// gradient of the ratio is made of that.
fn not_zero(ratio: &Tensor) -> Result<Tensor> {
    ratio + (ratio.detach().eq(0.0)?.to_dtype(ratio.dtype())? * 1e-20)?
}

/// The sum over the rows of `a * b`, both (m, n): (n, 1).
fn products_of_columns(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if crate::cuda::has_kernels(a, 1) {
        return crate::cuda::products_of_columns(a, b);
    }
    (a * b)?.sum(0)?.unsqueeze(1)
}

/// What a change is for.
enum Target {
    /// The layer itself, which takes `W'`.
    Layer,
    /// Nothing: the layer is that of the change.
    Alone,
    /// The layer is that of the change, and this one is added.
    #[cfg(feature = "cuda")]
    Beside(FrozenLinear),
}

struct Effective {
    /// The layer that is changed, or one of the change alone.
    base: FrozenLinear,
    target: Target,
    change: LowRank,
    /// `W'`, until the forward pass takes it: the graph does not keep it.
    weight: Mutex<Option<Tensor>>,
}

impl Effective {
    /// The frozen layer with `W'`.
    fn frozen(&self) -> Result<Frozen> {
        let taken = self.weight.lock().unwrap_or_else(PoisonError::into_inner).take();
        let weight = taken.map_or_else(|| self.weight(), Ok)?;
        Ok(Frozen(self.base.with_weight(&weight)?))
    }

    /// The gradient of x for dy (m, out): (m, in).
    fn back(&self, dy: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Target::Beside(base) = &self.target {
            return crate::cuda::both_back(base, &self.weight()?, dy);
        }
        dy.matmul(&self.weight()?)
    }

    /// In the dtype of the layer.
    fn weight(&self) -> Result<Tensor> {
        if matches!(self.target, Target::Layer) { self.change.weight(&self.base) } else { self.base.weight() }
    }
}

impl CustomOp3 for Effective {
    fn name(&self) -> &'static str {
        "lora-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.frozen()?.cpu_fwd(x, lx)
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        #[cfg(feature = "cuda")]
        if let Target::Beside(base) = &self.target {
            return crate::cuda::both_layers(base, &self.weight()?, x, lx);
        }
        self.frozen()?.cuda_fwd(x, lx)
    }

    fn metal_fwd(
        &self,
        x: &MetalStorage,
        lx: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.frozen()?.metal_fwd(x, lx)
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let m = rows(x.shape());
        let dy = dy.detach().contiguous()?.reshape((m, self.base.out_features()))?;
        let flat = x.detach().reshape((m, self.base.in_features()))?;
        let dx = if x.track_op() { Some(self.back(&dy)?.reshape(x.shape())?) } else { None };
        if self.change.ratio.is_none() {
            let (da, db) = self.change.gradients(&flat, &dy, a, b)?;
            return Ok((dx, Some(da), Some(db)));
        }
        let (b, r) = (b.detach(), a.dim(0)?);
        let ratio = not_zero(&b.narrow(1, r, 1)?)?;
        let scaled = b.narrow(1, 0, r)?.broadcast_mul(&ratio)?; // as if it stood in B
        let (da, db) = self.change.gradients(&flat, &dy, a, &scaled)?;
        let of_ratio = products_of_columns(&dy, &y.detach().reshape(dy.shape())?)?.div(&ratio)?;
        Ok((dx, Some(da), Some(Tensor::cat(&[&db.broadcast_mul(&ratio)?, &of_ratio], 1)?)))
    }
}
