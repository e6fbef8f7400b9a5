//! A step that is recorded once, as a CUDA graph, and replayed.

use candle_core::{Device, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use super::cuda::graph::Recording;

/// A training step that is recorded as a CUDA graph at its third run in a thread and replayed from then on.
///
/// ```text
/// run 1, 2:   step(state, inputs)
/// run 3:      record what step(state, inputs) launches, and replay it
/// run 4 ..:   copy the inputs to the recorded addresses, replay
/// ```
///
/// A small model's step is bound by its launches (some thousand of them, each some microseconds of the host); a replay
/// sends them all at once. The results are those of the step, to the bit. On devices other than CUDA, and for inputs
/// of other shapes or dtypes than those of the first run, the step simply runs.
///
/// What the step needs (a model, an optimizer) is its `state`, which lives as long as the recording that refers to its
/// memory. In a replay the host runs nothing of the step, so:
///
/// - numbers of the host's are those of the recording: a learning rate must live on the device (`velvet_optim::Velvet`
///   keeps it there; [`state_mut`](Self::state_mut) and `set_learning_rate` between runs count), and dropout would
///   draw one mask for ever;
/// - the step must not read anything back, such as a loss by `to_scalar`: that is an error of the recording. Read the
///   result of [`run`](Self::run) instead;
/// - after anything that gives the state other memory (loading an optimizer's state, another configuration), call
///   [`reset`](Self::reset).
///
/// The device must be one of [`cuda_device`](super::cuda_device), or [prepared](super::prepare_cuda_device) before its
/// first tensor, and no other thread may use its stream during the third run. The memory of the recording is its own, as
/// much as a step needs; what the pool had kept for the runs before is given back.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use vesper_model::ops::{CapturedStep, cuda_device};
/// let device = cuda_device(0).unwrap_or(Device::Cpu);
/// let total = Var::zeros(2, DType::F32, &device)?;
/// let mut step = CapturedStep::new(total, |total: &mut Var, inputs: &[Tensor]| {
///     total.set(&(total.as_tensor() + &inputs[0])?)?;
///     total.sum_all()
/// });
/// for i in 1..=4 {
///     let sum = step.run(&[&Tensor::new(&[i as f32, 1.], &device)?])?;
///     assert_eq!(sum.to_scalar::<f32>()?, [2., 5., 9., 14.][i - 1]);
/// }
/// assert_eq!(step.state().to_vec1::<f32>()?, [10., 4.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
/// NVIDIA, CUDA Programming Guide, CUDA Graphs.
pub struct CapturedStep<S, F> {
    #[cfg(feature = "cuda")]
    recording: Recording,
    state: S,
    step: F,
}

impl<S, F> std::fmt::Debug for CapturedStep<S, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CapturedStep").field("is_recorded", &self.is_recorded()).finish_non_exhaustive()
    }
}

impl<S, F> CapturedStep<S, F>
where
    F: FnMut(&mut S, &[Tensor]) -> Result<Tensor>,
{
    /// A step over `state`; nothing runs yet.
    pub fn new(state: S, step: F) -> Self {
        Self {
            #[cfg(feature = "cuda")]
            recording: Recording::default(),
            state,
            step,
        }
    }

    /// One step. The result, without a graph, is overwritten by the next run.
    ///
    /// # Errors
    /// No inputs, inputs of several devices, the step's own errors, or a step that cannot be recorded, because it reads
    /// from the device or uploads to it.
    pub fn run(&mut self, inputs: &[&Tensor]) -> Result<Tensor> {
        let Some(device) = inputs.first().map(|x| x.device()) else {
            bail!("a captured step takes at least one input");
        };
        if inputs.iter().any(|x| !x.device().same_device(device)) {
            bail!("a captured step: its inputs are not all on one device");
        }
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            return self.recording.run(device, inputs, |inputs| (self.step)(&mut self.state, inputs));
        }
        let _: &Device = device;
        let inputs: Vec<Tensor> = inputs.iter().map(|x| x.detach()).collect();
        Ok((self.step)(&mut self.state, &inputs)?.detach())
    }
}

impl<S, F> CapturedStep<S, F> {
    /// What the step works on.
    pub fn state(&self) -> &S {
        &self.state
    }

    /// The same, to be changed where its memory stays: a learning rate, say.
    pub fn state_mut(&mut self) -> &mut S {
        &mut self.state
    }

    /// The state, without the step.
    pub fn into_state(self) -> S {
        self.state
    }

    /// Whether runs are replays.
    pub fn is_recorded(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.recording.is_complete();
        #[cfg(not(feature = "cuda"))]
        false
    }

    /// Forgets the recording: the next runs are the first ones again.
    pub fn reset(&mut self) {
        #[cfg(feature = "cuda")]
        {
            self.recording = Recording::default();
        }
    }
}
