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

use std::sync::{Mutex, PoisonError};

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
        if many && exact {
            return self.effective_layer(base, x).map(Some);
        }
        #[cfg(feature = "cuda")]
        if self.origin.is_none()
            && self.a.dtype() != DType::F64
            && crate::cuda::has_kernels(x, self.a.dim(0)?)
        {
            return crate::cuda::beside(base, x, &self.a, &self.b, self.scale).map(Some);
        }
        Ok(None)
    }

    fn effective_layer(self, base: &FrozenLinear, x: &Tensor) -> Result<Tensor> {
        let (a, b) = (self.a.clone(), self.b.clone());
        let op = Effective { weight: Mutex::new(Some(self.weight(base)?)), base: base.clone(), change: self };
        x.contiguous()?.apply_op3(&a, &b, op)
    }

    /// `W'`, outside of any graph.
    fn weight(&self, base: &FrozenLinear) -> Result<Tensor> {
        let (a, b) = (self.a.detach(), self.b.detach());
        let weight = base.weight()?;
        #[cfg(feature = "cuda")]
        if self.origin.is_none()
            && weight.dtype() == DType::F32
            && crate::cuda::has_kernels(&weight, a.dim(0)?)
        {
            return crate::cuda::effective(&weight, &a, &b, self.scale);
        }
        let change = (b * self.scale)?.matmul(&a)?;
        let change = match &self.origin {
            None => change,
            // From each other first: at the start the two are the same to the bit.
            Some((a, b)) => (change - (b * self.scale)?.matmul(a)?)?,
        };
        weight + change
    }

    /// `dA` and `dB` for x (m, in) and dy (m, out).
    fn gradients(&self, x: &Tensor, dy: &Tensor, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
        let (a, b) = (a.detach(), b.detach());
        #[cfg(feature = "cuda")]
        if x.dtype() == DType::F32 && crate::cuda::has_kernels(x, a.dim(0)?) {
            return crate::cuda::gradients((x, dy), (&a, &b), None, self.scale);
        }
        let (low, back) = (x.matmul(&a.t()?)?, dy.matmul(&b)?); // (m, r)
        let da = (back.t()?.matmul(x)? * self.scale)?; // (r, in)
        let db = (dy.t()?.matmul(&low)? * self.scale)?; // (out, r)
        Ok((da, db))
    }
}

struct Effective {
    base: FrozenLinear,
    change: LowRank,
    /// `W'`, until the forward pass takes it: the graph does not keep it.
    weight: Mutex<Option<Tensor>>,
}

impl Effective {
    /// The frozen layer with `W'`.
    fn frozen(&self) -> Result<Frozen> {
        let taken = self.weight.lock().unwrap_or_else(PoisonError::into_inner).take();
        let weight = taken.map_or_else(|| self.change.weight(&self.base), Ok)?;
        Ok(Frozen(self.base.with_weight(&weight)?))
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
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let m = rows(x.shape());
        let dy = dy.detach().contiguous()?.reshape((m, self.base.out_features()))?;
        let flat = x.detach().reshape((m, self.base.in_features()))?;
        let dx = if x.track_op() {
            Some(dy.matmul(&self.change.weight(&self.base)?)?.reshape(x.shape())?)
        } else {
            None
        };
        let (da, db) = self.change.gradients(&flat, &dy, a, b)?;
        Ok((dx, Some(da), Some(db)))
    }
}
