//! CUDA graphs of steps.

use std::sync::Arc;
use std::thread::ThreadId;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaStream, result, sys};
use candle_core::{CudaDevice, Result, Tensor, bail};

/// Runs before the recording: the first allocates and loads what stays (kernels, an optimizer's state), and lets candle
/// keep on the device what it uploads for layouts; the second shows that nothing is missing.
const WARM: usize = 2;

/// What [`CapturedStep`](crate::ops::CapturedStep) keeps of a step.
#[derive(Default)]
pub(in crate::ops) struct Recording {
    graph: Option<CudaGraph>,
    /// The addresses that the graph reads and writes.
    inputs: Vec<Tensor>,
    output: Option<Tensor>,
    /// Warm runs so far, and the thread that made them: what candle keeps of its uploads is a thread's own.
    warm: usize,
    thread: Option<ThreadId>,
}

// SAFETY: the driver's graph objects belong to no thread, and `&mut self` keeps two threads from launching one at once.
unsafe impl Send for Recording {}

impl Recording {
    pub(in crate::ops) fn is_complete(&self) -> bool {
        self.graph.is_some()
    }

    pub(in crate::ops) fn run(
        &mut self,
        device: &CudaDevice,
        inputs: &[&Tensor],
        mut step: impl FnMut(&[Tensor]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if self.inputs.is_empty() {
            self.inputs = inputs.iter().map(|x| x.detach().force_contiguous()).collect::<Result<_>>()?;
        } else if self.fits(inputs) {
            for (to, from) in self.inputs.iter().zip(inputs) {
                overwrite(to, from)?;
            }
        } else {
            let inputs: Vec<Tensor> = inputs.iter().map(|x| x.detach()).collect();
            return Ok(step(&inputs)?.detach());
        }
        let thread = Some(std::thread::current().id());
        if self.graph.is_none() && self.thread != thread {
            (self.warm, self.thread) = (0, thread);
        }
        if self.graph.is_none() && self.warm < WARM {
            self.warm += 1;
            let _kept = device.enable_cuda_graph_htod_cache();
            let out = step(&self.inputs)?.detach();
            match &self.output {
                None => self.output = Some(out.copy()?),
                Some(output) => overwrite(output, &out)?,
            }
        } else {
            if self.graph.is_none() {
                self.graph = Some(self.record(device, &mut step)?);
            }
            let Some(graph) = &self.graph else { bail!("a captured step lost its recording") };
            graph.launch().w()?;
        }
        match &self.output {
            Some(output) => Ok(output.clone()),
            None => bail!("a captured step has no result"),
        }
    }

    /// Whether the inputs are of the recorded shapes, dtypes and device.
    fn fits(&self, inputs: &[&Tensor]) -> bool {
        self.inputs.len() == inputs.len()
            && self.inputs.iter().zip(inputs).all(|(to, from)| {
                to.shape() == from.shape()
                    && to.dtype() == from.dtype()
                    && to.device().same_device(from.device())
            })
    }

    fn record(
        &self,
        device: &CudaDevice,
        step: &mut impl FnMut(&[Tensor]) -> Result<Tensor>,
    ) -> Result<CudaGraph> {
        let Some(output) = &self.output else { bail!("a captured step is recorded after its first runs") };
        let stream = device.cuda_stream();
        stream.synchronize().w()?;
        give_back_memory(&stream)?;
        let _kept = device.enable_cuda_graph_htod_cache();
        let mut capture = Capture::begin(stream)?;
        let ran = step(&self.inputs).and_then(|out| overwrite(output, &out.detach()));
        let graph = capture.end();
        match (ran, graph) {
            (Ok(()), Ok(Some(graph))) => Ok(graph),
            (Err(error), _) => Err(error.context(
                "the step cannot be recorded as a CUDA graph; it must not read from the device or upload to it",
            )),
            (Ok(()), Ok(None)) => bail!("the step launched nothing that could be recorded"),
            (Ok(()), Err(error)) => Err(error),
        }
    }
}

/// What `launches` sends to the device's stream, as a graph; it must have run before, and allocate nothing.
pub(super) fn record(device: &CudaDevice, launches: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    let stream = device.cuda_stream();
    stream.synchronize().w()?;
    let mut capture = Capture::begin(stream)?;
    let ran = launches();
    let graph = capture.end();
    ran?;
    match graph? {
        Some(graph) => Ok(graph),
        None => bail!("there was nothing to record as a CUDA graph"),
    }
}

/// A stream that is recording, which ends whatever happens.
struct Capture {
    stream: Option<Arc<CudaStream>>,
}

impl Capture {
    fn begin(stream: Arc<CudaStream>) -> Result<Self> {
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).w()?;
        Ok(Self { stream: Some(stream) })
    }

    fn end(&mut self) -> Result<Option<CudaGraph>> {
        let Some(stream) = self.stream.take() else { return Ok(None) };
        // Memory that a replay leaves allocated is freed by the next one.
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        stream.end_capture(flags).w()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// Copies values in place.
fn overwrite(to: &Tensor, from: &Tensor) -> Result<()> {
    to.flatten_all()?.slice_set(&from.flatten_all()?.contiguous()?, 0, 0)
}

/// Returns to the driver what the pool keeps free: a graph allocates from another pool.
fn give_back_memory(stream: &CudaStream) -> Result<()> {
    // SAFETY: the device handle is that of a live context, and the pool is the device's own.
    unsafe {
        let pool = result::device::get_default_mem_pool(stream.context().cu_device()).w()?;
        result::mem_pool::trim_to(pool, 0).w()
    }
}
