//! The backward pass without candle's sum of each gradient with zeros.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId};

/// A variable and its gradient so far.
type Gradients = HashMap<TensorId, (Tensor, Tensor)>;

thread_local! {
    /// The gradients of variables during a pass of [`backward`] on this thread; `None` outside of one.
    static DELIVERED: RefCell<Option<Gradients>> = const { RefCell::new(None) };
}

/// The gradients of a loss, as [`Tensor::backward`] computes them, with less memory moved.
///
/// ```text
/// candle:     dw = 0 + dw', where the operation gives dw': zeros are written, both are read, the sum is written
/// here:       dw = dw'
/// ```
///
/// candle adds what an operation's backward gives to a tensor of zeros, for each parameter: 16 bytes moved for each 4 of
/// gradient. Here the operations of this crate hand the gradients of variables over as they are; where a variable is used
/// more than once they are added. Everything else is candle's: operations of others, tensors that are no variables,
/// the order. The values are the same but for the sign of a zero (`0 + -0` is `0`) and, of a variable that operations of
/// others use too, the order of the sum. So is what one does with them:
///
/// | | |
/// |---|---|
/// | `loss.backward()?` | `backward(&loss)?` |
/// | `optimizer.backward_step(&loss)?` of candle's | `optimizer.step(&backward(&loss)?)?` |
/// | `optimizer.backward_step(&loss)?` of velvet-optim | `optimizer.backward_step_with(&loss, backward)?` |
///
/// An operation of your own whose backward calls `Tensor::backward` on a graph with operations of this crate in it must
/// call this function there, as [`checkpoint`](super::checkpoint()) does: otherwise the gradients of that graph's variables
/// go to the outer pass. So must tasks in a pool of rayon's that has other passes in it, since a thread that waits within one
/// may take the next.
///
/// # Errors
/// Those of the operations' backward.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use vesper_model::ops::{Path, backward, linear};
/// let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let w = Var::new(&[[3f32, 4.]], &Device::Cpu)?;
/// let loss = linear(&x, w.as_tensor(), Path::Fused)?.sum_all()?;
/// let grads = backward(&loss)?;
/// assert_eq!(grads.get(&w).unwrap().to_vec2::<f32>()?, [[1., 2.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    let _pass = Pass::begin();
    let mut store = loss.backward()?;
    for (variable, gradient) in DELIVERED.take().unwrap_or_default().into_values() {
        let gradient = match store.remove(&variable) {
            Some(other) => (other + gradient)?, // of an operation that delivers nothing
            None => gradient,
        };
        store.insert(&variable, gradient);
    }
    Ok(store)
}

/// For the backward of an operation: hands over the gradient of a variable during [`backward`]; otherwise gives it back, for
/// candle.
pub(super) fn deliver(of: &Tensor, gradient: Option<Tensor>) -> Result<Option<Tensor>> {
    let Some(gradient) = gradient else { return Ok(None) };
    deliver_onto(of, |before| match before {
        Some(before) => before + gradient,
        None => Ok(gradient),
    })
}

/// As [`deliver`], for an operation that adds its gradient by itself to what was delivered before: `None` where nothing was,
/// or where candle adds.
pub(super) fn deliver_onto(
    of: &Tensor,
    gradient: impl FnOnce(Option<&Tensor>) -> Result<Tensor>,
) -> Result<Option<Tensor>> {
    if !of.is_variable() {
        return gradient(None).map(Some);
    }
    let before = DELIVERED.with_borrow_mut(|all| all.as_mut().map(|all| all.remove(&of.id())));
    let Some(before) = before else { return gradient(None).map(Some) }; // outside of a pass
    // candle detaches the gradients that it passes on as well: they hold no graph.
    let sum = gradient(before.as_ref().map(|(_, before)| before))?.detach();
    DELIVERED.with_borrow_mut(|all| {
        if let Some(all) = all {
            all.insert(of.id(), (of.clone(), sum));
        }
    });
    Ok(None)
}

/// A pass on this thread. Passes nest: an inner one has gradients of its own.
struct Pass {
    outer: Option<Gradients>,
}

impl Pass {
    fn begin() -> Self {
        Self { outer: DELIVERED.replace(Some(Gradients::new())) }
    }
}

impl Drop for Pass {
    /// Also where the pass failed.
    fn drop(&mut self) {
        DELIVERED.set(self.outer.take());
    }
}
