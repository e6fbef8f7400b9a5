//! Differentiable operations that a transformer trains with, for any candle model.
//!
//! Several of candle's fused operations cut the gradient without a word (`softmax_last_dim`, `rms_norm`, `layer_norm`,
//! `rope`, ...). Every operation here has an exact backward (but [`quantized_embedding`], a look-up in a table that is not
//! trained). Those that take a [`Path`] have two:
//!
//! - **fused**: one pass, parallel and vectorised, with a hand-written backward, on the CPU and, with the feature
//!   `cuda`, on CUDA;
//! - **reference**: a composition of candle ops, which is the specification, runs on every device, and is what the
//!   fused path is tested against.
//!
//! [`Path`] chooses; `Path::Fused` takes the reference where a fused kernel does not exist: on CUDA for f64, and, in
//! blocks, for attention with heads over 128 (over 64 where the kernels are built for less than 8.0). The CUDA kernels compute in f32, use no atomic additions of floats, and give the same
//! bits each time. [`cuda_device`] opens a device that is set up for training, [`prepare_cpu`] sets up a process for it,
//! [`backward()`] computes the gradients of a loss with less memory moved than `Tensor::backward`, and [`CapturedStep`] replays
//! a whole training step as a CUDA graph.
//!
//! | operation | replaces | saves for the backward |
//! |---|---|---|
//! | [`linear`] | `x.matmul(&w.t()?)` | its inputs |
//! | [`quantized_linear`] | `candle_core::quantized::QMatMul`, which has no backward | nothing: the weight is part of it |
//! | [`quantized_embedding`] | `QTensor::dequantize` and a look-up | nothing: it has no gradient |
//! | [`FrozenLinear`] | a linear layer that is not trained | nothing: the weight is part of the layer |
//! | [`rms_norm`] | `candle_nn::ops::rms_norm` | its inputs |
//! | [`layer_norm`] | `candle_nn::ops::layer_norm` | its inputs |
//! | [`residual_rms_norm`], [`residual_layer_norm`] | an addition and a norm | the sum |
//! | [`dropout`] | `candle_nn::ops::dropout` | nothing: the mask is drawn again |
//! | [`causal_attention`] | narrow, rope, matmul, softmax, matmul | the packed projection; on CUDA rotated, and a number a row and head |
//! | [`self_attention`] | the above between its two projections | the same, and the attention's output |
//! | [`gated_feed_forward`] | two products, an activation, a product | the packed product |
//! | [`decoder_block`], [`decoder_blocks`] | a whole pre-norm block of the above, or a stack of them | what they save; one node of the graph |
//! | [`linear_cross_entropy`] | matmul and `candle_nn::loss::cross_entropy` | the two gradients; on CUDA that of the weight in f32 |
//! | [`embedding`], [`embedding_in`] | `candle_nn::Embedding` | the ids |
//! | [`rope`] | `candle_nn::rotary_emb::rope` | what candle's operations save |
//! | [`checkpoint`] | any part of a model | that part's inputs; it runs again in the backward |
//!
//! Weights may be in f32 beside activations in bf16 or f16 (mixed precision), and get their gradients in f32, except those of a
//! [`FrozenLinear`], which takes x in its weight's dtype. The kernels on the CPU read them as they are; all others, and the
//! references, convert them to the dtype of the activations. Of a norm's weight, a few numbers, the gradient is rounded to that
//! dtype first; inside of [`decoder_block`] it is not.
//!
//! On the CPU the matrix products of bf16 activations multiply in bf16 and add in f32 where the processor has AVX512-BF16,
//! twice as fast as in f32; elsewhere they run in f32, and bf16 is converted while it is read. The instructions are
//! chosen at run time. The bits of a result do not depend on the number of threads, but on the processor.
//!
//! No operation takes a tensor of more than `u32::MAX` elements: it says so before it allocates anything.

mod attention;
mod attention_composed;
mod backward;
mod cached_attention;
mod captured;
mod checkpoint;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod decode;
mod decoder;
mod decoder_cpu;
mod device;
mod dropout;
mod embedding;
mod feed_forward;
mod filled;
mod gemm;
mod layer_norm;
mod linear;
mod links;
mod matrix;
mod notice;
mod philox;
mod quantized;
mod real;
mod residual;
mod rms_norm;
mod rope;
mod rope_scaling;
pub(crate) mod scores;
mod self_attention;
mod stored;

pub use attention::{Heads, causal_attention};
pub use backward::backward;
pub(crate) use cached_attention::cached_attention;
pub use captured::CapturedStep;
pub use checkpoint::checkpoint;
pub use cross_entropy::{CrossEntropy, LossAndEntropy, linear_cross_entropy};
#[cfg(feature = "cuda")]
pub(crate) use cuda::decode::CudaStep;
pub(crate) use decode::{Place, StepLayer, StepWeights};
pub use decoder::{DecoderSettings, DecoderWeights, decoder_block, decoder_blocks};
pub use device::{cuda_device, prepare_cpu, prepare_cuda_device, release_unused_memory};
pub use dropout::dropout;
pub use embedding::{embedding, embedding_in};
pub use feed_forward::gated_feed_forward;
pub use flylora::FrozenLinear;
pub use layer_norm::layer_norm;
pub use linear::linear;
pub use philox::Philox;
pub(crate) use quantized::quantized_product;
pub use quantized::{QUANTIZED_ROWS, quantized_embedding, quantized_linear};
pub use residual::{residual_layer_norm, residual_rms_norm};
pub use rms_norm::rms_norm;
pub use rope::{Rope, rope};
pub use rope_scaling::RopeScaling;
pub use self_attention::self_attention;

use candle_core::{DType, Device, Result, Tensor, bail};

/// Which implementation an operation runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Path {
    /// The fused kernel where there is one for the device and dtype, otherwise the reference.
    #[default]
    Fused,
    /// The composition of candle ops. (Of a tensor without elements on the CPU, the fused kernel: candle's own operations
    /// do not take all of its parts.)
    Reference,
}

/// Where an operation runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backend {
    /// The fused kernel on the CPU.
    Cpu,
    /// The fused kernels on CUDA.
    #[cfg(feature = "cuda")]
    Cuda,
    /// The composition of candle ops.
    Reference,
}

impl Path {
    /// The one place that looks at a device: what runs an operation on `x`.
    fn backend(self, x: &Tensor) -> Backend {
        match (self, x.device(), x.dtype()) {
            (path, Device::Cpu, DType::F32 | DType::F64 | DType::BF16 | DType::F16)
                if path == Self::Fused || x.elem_count() == 0 =>
            {
                Backend::Cpu
            }
            #[cfg(feature = "cuda")]
            (Self::Fused, Device::Cuda(_), dtype) if cuda::has_kernels(dtype) => Backend::Cuda,
            _ => Backend::Reference,
        }
    }
}

/// The sizes of a tensor of rank `N`.
fn sizes<const N: usize>(operation: &str, name: &str, x: &Tensor) -> Result<[usize; N]> {
    match x.dims().try_into() {
        Ok(sizes) => Ok(sizes),
        Err(_) => bail!("{operation}: {name} of shape {:?}, expected rank {N}", x.shape()),
    }
}

/// The last dimension.
fn width(operation: &str, name: &str, x: &Tensor) -> Result<usize> {
    match x.dims().last() {
        Some(width) => Ok(*width),
        None => bail!("{operation}: {name} is a scalar, expected rank 1 or more"),
    }
}

/// Refuses what the operations do not compute in.
fn check_float(operation: &str, name: &str, dtype: DType) -> Result<()> {
    if !matches!(dtype, DType::F32 | DType::F64 | DType::BF16 | DType::F16) {
        bail!("{operation}: {name} must be f32, f64, bf16 or f16, got {dtype:?}");
    }
    Ok(())
}

/// Refuses weights of another dtype than `x`, unless they are in f32 beside bf16 or f16, and what is no floating point.
fn check_dtypes(operation: &str, x: &Tensor, weights: &[(&str, &Tensor)]) -> Result<()> {
    check_float(operation, "x", x.dtype())?;
    let half = matches!(x.dtype(), DType::BF16 | DType::F16);
    for (name, weight) in weights {
        if weight.dtype() != x.dtype() && !(half && weight.dtype() == DType::F32) {
            bail!("{operation}: x is {:?} and the {name} {:?}", x.dtype(), weight.dtype());
        }
    }
    Ok(())
}

/// As `to_dtype`; of no elements too, which candle cannot convert on CUDA.
pub(crate) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.elem_count() == 0 && x.device().is_cuda() && cuda::has_kernels(dtype) {
        return cuda::zeros(x.device(), x.shape(), dtype);
    }
    x.to_dtype(dtype)
}

/// Ids or targets in u32: as they are, or converted from u8 or i64. What u32 cannot hold becomes `u32::MAX`.
fn as_ids(operation: &str, ids: &Tensor) -> Result<Tensor> {
    match ids.dtype() {
        DType::U32 => Ok(ids.clone()),
        // Nothing, which candle cannot convert on a GPU, nor every part of nothing on a CPU.
        DType::U8 | DType::I64 if ids.elem_count() == 0 => Ok(ids.clone()),
        DType::U8 => ids.to_dtype(DType::U32),
        DType::I64 => ids.clamp(-1i64, i64::from(u32::MAX))?.to_dtype(DType::U32),
        other => bail!("{operation}: ids must be u32, u8 or i64, got {other:?}"),
    }
}

/// Refuses tensors of more than `u32::MAX` elements, before anything is allocated: candle's own kernels count in u32
/// on CUDA, where such a size would wrap around without a word.
fn check_sizes(operation: &str, shapes: &[&[usize]]) -> Result<()> {
    for shape in shapes {
        let elements = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
        if shape.contains(&0) || elements.is_some_and(|n| u32::try_from(n).is_ok()) {
            continue;
        }
        bail!(
            "{operation}: a tensor of shape {shape:?} has more than the {} elements that are possible",
            u32::MAX
        );
    }
    Ok(())
}
