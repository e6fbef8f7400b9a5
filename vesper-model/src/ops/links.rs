//! Operations with more inputs than candle's have: a chain of scalars leads from the result to all of its leaves.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, DType, Device, Layout, MetalStorage, Result, Shape, Tensor,
};

use super::backward::deliver;

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
    for (i, leaves) in leaves.chunks(2).enumerate() {
        let next = Link { place: 2 * i, gradients: gradients.clone() };
        link = match leaves {
            [one, two] => link.apply_op3(one, two, next)?,
            [one] => link.apply_op2(one, next)?,
            _ => link,
        };
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

/// One or two leaves on the chain from the result: hands them the gradients that were left from its place on.
struct Link {
    place: usize,
    gradients: Gradients,
}

impl Link {
    const NAME: &'static str = "vesper-link";

    fn gradient(&self, place: usize, leaf: &Tensor) -> Result<Option<Tensor>> {
        let gradient = match self.gradients.take(place) {
            Some(gradient) => gradient,
            // A leaf that the result does not depend on.
            None => leaf.zeros_like()?,
        };
        deliver(leaf, Some(gradient))
    }
}

impl CustomOp2 for Link {
    fn name(&self) -> &'static str {
        Self::NAME
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
        Ok((link.track_op().then(|| grad.clone()), self.gradient(self.place, leaf)?))
    }
}

impl CustomOp3 for Link {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(
        &self,
        link: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
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
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        scalar(link)
    }

    fn bwd(
        &self,
        link: &Tensor,
        one: &Tensor,
        two: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let link = link.track_op().then(|| grad.clone());
        Ok((link, self.gradient(self.place, one)?, self.gradient(self.place + 1, two)?))
    }
}
