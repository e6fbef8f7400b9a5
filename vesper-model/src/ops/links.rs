//! Operations with more inputs than candle's have: a chain of scalars leads from the result to all of its leaves.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, DType, Device, Layout, MetalStorage, Result, Shape, Tensor,
};

use super::backward::deliver;

/// What the backward of an operation leaves for the links, in the order of the leaves; of each thread by itself, since several
/// may be on their way back through the same graph.
#[derive(Clone, Default)]
pub(super) struct Gradients(Arc<Mutex<HashMap<ThreadId, Vec<Option<Tensor>>>>>);

impl Gradients {
    pub(super) fn put(&self, gradients: Vec<Option<Tensor>>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(thread::current().id(), gradients);
    }

    fn take(&self, place: usize) -> Option<Tensor> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get_mut(&thread::current().id())?.get_mut(place)?.take()
    }
}

/// A scalar to be an input of the operation, whose backward puts the leaves' gradients where the links find them and gives
/// the scalar a gradient of zero.
pub(super) fn chain(leaves: &[&Tensor], device: &Device) -> Result<(Tensor, Gradients)> {
    let gradients = Gradients::default();
    let end = Tensor::zeros((), DType::F32, device)?;
    let mut link = end.clone();
    for (i, leaves) in leaves.chunks(2).enumerate() {
        let next = Link { place: 2 * i, gradients: gradients.clone() };
        let leaf = |i: usize| leaves.get(i).copied().unwrap_or(&end);
        link = link.apply_op3(leaf(0), leaf(1), next)?;
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

/// Two leaves on the chain from the result, or one and nothing: hands them the gradients that were left from its place on.
struct Link {
    place: usize,
    gradients: Gradients,
}

impl Link {
    fn gradient(&self, place: usize, leaf: &Tensor) -> Result<Option<Tensor>> {
        if !leaf.track_op() {
            return Ok(None);
        }
        let gradient = match self.gradients.take(place) {
            Some(gradient) => gradient,
            // A leaf that the result does not depend on.
            None => leaf.zeros_like()?,
        };
        deliver(leaf, Some(gradient))
    }
}

impl CustomOp3 for Link {
    fn name(&self) -> &'static str {
        "vesper-link"
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
