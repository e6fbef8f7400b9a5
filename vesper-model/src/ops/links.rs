//! Operations with more inputs than candle's have: a chain of scalars leads from the result to all of its leaves.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, DType, Device, Layout, MetalStorage, Result, Shape, Tensor,
};

/// What the backward of an operation leaves for the links, in the order of the leaves.
#[derive(Clone, Default)]
pub(super) struct Gradients(Arc<Mutex<Vec<Option<Tensor>>>>);

impl Gradients {
    pub(super) fn put(&self, gradients: Vec<Option<Tensor>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = gradients;
    }

    fn take(&self, place: usize) -> Option<Tensor> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_mut(place).and_then(Option::take)
    }
}

/// A scalar to be an input of the operation, whose backward puts the leaves' gradients where the links find them and gives
/// the scalar a gradient of zero.
pub(super) fn chain(leaves: &[&Tensor], device: &Device) -> Result<(Tensor, Gradients)> {
    let gradients = Gradients::default();
    let mut link = Tensor::zeros((), DType::F32, device)?;
    for (place, leaf) in leaves.iter().enumerate() {
        link = link.apply_op2(leaf, Link { place, gradients: gradients.clone() })?;
    }
    Ok((link, gradients))
}

/// A scalar of a backend's own.
pub(super) fn scalar<S>(like: &S) -> Result<(S, Shape)>
where
    S: BackendStorage,
    S::Device: BackendDevice<Storage = S>,
{
    let shape = Shape::from(());
    Ok((like.device().zeros_impl(&shape, DType::F32)?, shape))
}

/// One leaf on the chain from the result: hands it the gradient that was left at its place.
struct Link {
    place: usize,
    gradients: Gradients,
}

impl CustomOp2 for Link {
    fn name(&self) -> &'static str {
        "vesper-link"
    }

    fn cpu_fwd(
        &self,
        link: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        scalar(link)
    }

    fn cuda_fwd(
        &self,
        link: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        scalar(link)
    }

    fn metal_fwd(
        &self,
        link: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        scalar(link)
    }

    fn bwd(
        &self,
        link: &Tensor,
        leaf: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient = match self.gradients.take(self.place) {
            Some(gradient) => gradient,
            // A leaf that the result does not depend on.
            None => leaf.zeros_like()?,
        };
        Ok((link.track_op().then(|| grad.clone()), Some(gradient)))
    }
}
