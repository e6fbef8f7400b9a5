//! Gradient checkpointing: a part of a model that keeps its inputs alone and runs again in the backward.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, Layout, MetalStorage, Result, Shape, Tensor, Var,
};

use super::backward::backward;
use super::links::{self, Gradients, scalar};

/// `f(inputs)` without keeping what `f` computes on the way: the backward runs `f` again.
///
/// ```text
/// forward:  y = f(inputs), its graph is dropped
/// backward: y = f(inputs) again, then the gradients of its graph: for each input and for each variable that f uses
/// ```
///
/// `f` holds the parameters that it uses (clones of tensors are cheap: they share their memory). They need not be
/// listed: the variables are found in the graph of the first run. The inputs are cut off from the outer graph
/// inside `f`; a tensor with a graph that `f` captures instead gets its gradient as well, but the backward then walks
/// through that graph too, so pass it as an input. Checkpoints may be nested, inputs may be of any dtype, and those
/// that are not tracked get no gradient. Runs on every device.
///
/// `f` must give the same result when it runs again, before the variables change: draw the numbers that
/// [`dropout`](super::dropout()) needs outside of it. It runs twice, so a step costs one more forward pass of this part.
///
/// Saves the inputs (not copies) and the result; the backward copies the inputs that are tracked. Where nothing is
/// tracked it is `f(inputs)` and nothing more.
///
/// # Errors
/// Those of `f`, and candle's own.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use vesper_model::ops::checkpoint;
/// let x = Var::new(&[1f32, 2.], &Device::Cpu)?;
/// let w = Var::new(&[3f32, 4.], &Device::Cpu)?;
/// let weight = w.as_tensor().clone();
/// let y = checkpoint(move |xs| &xs[0] * (&xs[0] * &weight)?, &[x.as_tensor()])?; // x^2 w
/// let grads = y.sum_all()?.backward()?;
/// assert_eq!(grads.get(&x).unwrap().to_vec1::<f32>()?, [6., 16.]);
/// assert_eq!(grads.get(&w).unwrap().to_vec1::<f32>()?, [1., 4.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
/// Chen, Xu, Zhang and Guestrin, Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
pub fn checkpoint<F>(f: F, inputs: &[&Tensor]) -> Result<Tensor>
where
    F: Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
{
    let detached: Vec<Tensor> = inputs.iter().map(|x| x.detach()).collect();
    let y = f(&detached)?;
    let captured: Vec<Tensor> = y.sorted_nodes().into_iter().filter(|t| t.is_variable()).cloned().collect();
    let tracked: Vec<bool> = inputs.iter().map(|x| x.track_op() && x.dtype().is_float()).collect();
    let leaves: Vec<&Tensor> = inputs
        .iter()
        .zip(&tracked)
        .filter_map(|(x, &tracked)| tracked.then_some(*x))
        .chain(&captured)
        .collect();
    let y = y.detach();
    if leaves.is_empty() {
        return Ok(y);
    }
    let (link, gradients) = links::chain(&leaves, y.device())?;
    y.apply_op2(&link, Checkpoint { f, inputs: detached, tracked, captured, gradients })
}

/// Takes the result of `f` over into the outer graph.
struct Checkpoint<F> {
    f: F,
    inputs: Vec<Tensor>,
    /// Which of the inputs have a gradient.
    tracked: Vec<bool>,
    /// The variables that `f` uses.
    captured: Vec<Tensor>,
    gradients: Gradients,
}

impl<F> Checkpoint<F> {
    /// A copy: the storage may be that of a tensor that lives on.
    fn run<S>(y: &S, layout: &Layout) -> Result<(S, Shape)>
    where
        S: BackendStorage,
        S::Device: BackendDevice<Storage = S>,
    {
        let shape = layout.shape().clone();
        let mut copy = y.device().zeros_impl(&shape, y.dtype())?;
        if shape.elem_count() > 0 {
            y.copy_strided_src(&mut copy, 0, layout)?;
        }
        Ok((copy, shape))
    }
}

impl<F> CustomOp2 for Checkpoint<F>
where
    F: Fn(&[Tensor]) -> Result<Tensor> + Send + Sync,
{
    fn name(&self) -> &'static str {
        "vesper-checkpoint"
    }

    fn cpu_fwd(
        &self,
        y: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Self::run(y, layout)
    }

    fn cuda_fwd(
        &self,
        y: &CudaStorage,
        layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Self::run(y, layout)
    }

    fn metal_fwd(
        &self,
        y: &MetalStorage,
        layout: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        Self::run(y, layout)
    }

    fn bwd(
        &self,
        _y: &Tensor,
        link: &Tensor,
        _res: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut inputs, mut leaves) = (self.inputs.clone(), Vec::new());
        for (x, _) in inputs.iter_mut().zip(&self.tracked).filter(|(_, tracked)| **tracked) {
            let var = Var::from_tensor(x)?;
            *x = var.as_tensor().clone();
            leaves.push(x.clone());
        }
        leaves.extend(self.captured.iter().cloned());
        let y = (self.f)(&inputs)?;
        if y.shape() != dy.shape() {
            candle_core::bail!(
                "checkpoint: the closure gave {:?} in the forward and {:?} in the backward",
                dy.shape(),
                y.shape()
            );
        }
        // A closure may return something that has no gradient at all, such as a sum over a detached input.
        let gradients = if y.track_op() {
            let mut grads = backward(&y.apply_op1(Seed { dy: dy.detach() })?)?;
            // A leaf's gradient holds on to the graph that it came from, which is to go now.
            leaves.iter().map(|leaf| grads.remove(leaf).map(|gradient| gradient.detach())).collect()
        } else {
            vec![None; leaves.len()]
        };
        self.gradients.put(gradients);
        Ok((None, Some(link.zeros_like()?)))
    }
}

/// A scalar whose gradient for its input is `dy`: what the inner backward starts from.
struct Seed {
    dy: Tensor,
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "vesper-checkpoint-seed"
    }

    fn cpu_fwd(&self, y: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        scalar(y)
    }

    fn cuda_fwd(&self, y: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        scalar(y)
    }

    fn metal_fwd(&self, y: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        scalar(y)
    }

    fn bwd(&self, _y: &Tensor, _res: &Tensor, _grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.dy.clone()))
    }
}
