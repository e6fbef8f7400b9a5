//! The output layer and the cross-entropy on CUDA, in chunks of rows.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

use super::blas::{Matrix, product};
use super::cast;
use super::launch::{
    Element, Held, Module, aligned, allocate, blocks, by_dtype, is_empty, launch, not_here, size, tensor,
    view, wrap, zeros,
};
use crate::ops::backward::deliver;
use crate::ops::{CrossEntropy, LossAndEntropy};

/// At most this many logits are in memory at once (512 MiB in bf16), but at least 128 rows: the products over fewer rows
/// leave part of a large device idle.
const LOGITS: usize = 1 << 28;
/// Threads of a block of `cross_entropy_rows`.
const THREADS: u32 = 512;

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    vocab: u32,
    stride: u32,
    ignore: u32,
    gradient: u32,
    scale: f32,
}

const _: () = assert!(size_of::<Params>() == 20);
// SAFETY: plain numbers in the layout of `CrossEntropyParams`.
unsafe impl DeviceRepr for Params {}

/// What the loss has beside -ln p(target).
#[repr(C)]
#[derive(Clone, Copy)]
struct Terms {
    z_loss: f32,
    smoothing: f32,
}

const _: () = assert!(size_of::<Terms>() == 8);
// SAFETY: plain numbers in the layout of `CrossEntropyTerms`.
unsafe impl DeviceRepr for Terms {}

/// What the forward pass leaves on the device. The gradients still want the factor dloss / count.
#[derive(Default)]
struct Saved {
    entropy: Option<Tensor>,
    /// How many rows count, one f32.
    count: Option<Tensor>,
    /// In f32 for f16, which would round twice.
    dhidden: Option<Tensor>,
    /// In f32 whatever the dtype, because it is added up over the chunks.
    dweight: Option<Tensor>,
}

struct LinearCrossEntropy {
    settings: CrossEntropy,
    /// In the dtype of the activations.
    weight: Tensor,
    hidden_tracked: bool,
    weight_tracked: bool,
    saved: Arc<Mutex<Saved>>,
}

/// See [`crate::ops::linear_cross_entropy`]; shapes and dtypes have been checked.
pub(in crate::ops) fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    settings: CrossEntropy,
) -> Result<LossAndEntropy> {
    if is_empty(&[hidden, weight]) {
        let zero = zeros(hidden.device(), (), DType::F32)?;
        return Ok(LossAndEntropy { loss: zero.clone(), entropy: zero });
    }
    let saved = Arc::new(Mutex::new(Saved::default()));
    let op = LinearCrossEntropy {
        settings,
        weight: cast::weight(weight, hidden.dtype())?,
        hidden_tracked: hidden.track_op(),
        weight_tracked: weight.track_op(),
        saved: Arc::clone(&saved),
    };
    let targets = targets.to_dtype(DType::U32)?.contiguous()?;
    let loss = aligned(hidden)?.apply_op3(weight, &targets, op)?;
    let entropy = saved.lock().unwrap_or_else(PoisonError::into_inner).entropy.clone();
    match entropy {
        Some(entropy) => Ok(LossAndEntropy { loss, entropy }),
        None => bail!("linear_cross_entropy: no entropy was computed"),
    }
}

impl LinearCrossEntropy {
    fn forward<T: Element>(
        &self,
        (hidden, lh): (&CudaStorage, &Layout),
        (targets, lt): (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let (n, (vocab, d)) = (lt.shape().elem_count(), self.weight.dims2()?);
        let (device, held) = (hidden.device(), Held::new(&self.weight));
        let (hidden, weight) = (view::<T>(hidden, lh)?, held.view::<T>()?);
        let targets = view::<u32>(targets, lt)?;
        // Rows start at multiples of 16 bytes, for the kernel's vectors and cuBLAS's tensor cores.
        let stride = vocab.next_multiple_of(8);
        let rows = (LOGITS / stride / 128 * 128).max(128).min(n);
        // p - 1 in f16 would leave 10 bits for all p; there the gradient is 1024 times as large until the products.
        let scale = if T::DTYPE == DType::F16 { 1024.0 } else { 1.0 };
        let gradient = self.hidden_tracked || self.weight_tracked;
        let params = Params {
            vocab: size(vocab)?,
            stride: size(stride)?,
            ignore: self.settings.ignore_index,
            gradient: u32::from(gradient),
            scale,
        };
        let mut logits = allocate::<T>(device, rows * stride)?;
        let (mut losses, mut entropies) = (allocate::<f32>(device, n)?, allocate::<f32>(device, n)?);
        let widened = T::DTYPE == DType::F16;
        let size_of = |wanted| if self.hidden_tracked && wanted { n * d } else { 0 };
        let (mut dhidden, mut wide_dhidden) =
            (allocate::<T>(device, size_of(!widened))?, allocate::<f32>(device, size_of(widened))?);
        let mut dweight = if self.weight_tracked { Some(allocate::<f32>(device, vocab * d)?) } else { None };
        let plain = self.settings.is_plain();
        let name = format!("cross_entropy_{}_{}", if plain { "rows" } else { "terms" }, T::NAME);
        let terms =
            Terms { z_loss: self.settings.z_loss as f32, smoothing: self.settings.label_smoothing as f32 };
        for start in (0..n).step_by(rows) {
            let rows = rows.min(n - start);
            let hidden = hidden.slice(start * d..(start + rows) * d);
            let h = Matrix::new(&hidden, rows, d, d);
            let w = Matrix::new(&weight, vocab, d, d);
            let w = w.t();
            product(device, &h, &w, &mut logits.as_view_mut(), stride, (1.0, 0.0))?;
            let wanted = targets.slice(start..start + rows);
            let mut loss = losses.slice_mut(start..start + rows);
            let mut entropy = entropies.slice_mut(start..start + rows);
            let (module, config) = (Module::CrossEntropy, blocks(rows, THREADS)?);
            let (z, loss, entropy) = (&mut logits, &mut loss, &mut entropy);
            if plain {
                launch!(device, module, &name, config, z, &wanted, loss, entropy, &params);
            } else {
                launch!(device, module, &name, config, z, &wanted, loss, entropy, &params, &terms);
            }
            let dz = logits.as_view();
            if self.hidden_tracked {
                let (place, factors) = (start * d..(start + rows) * d, (1.0 / scale, 0.0));
                let dz = Matrix::new(&dz, rows, vocab, stride);
                if widened {
                    product(device, &dz, &w.t(), &mut wide_dhidden.slice_mut(place), d, factors)?;
                } else {
                    product(device, &dz, &w.t(), &mut dhidden.slice_mut(place), d, factors)?;
                }
            }
            if let Some(dweight) = &mut dweight {
                let dz = Matrix::new(&dz, rows, vocab, stride).t();
                let beta = if start == 0 { 0.0 } else { 1.0 };
                product(device, &dz, &h, &mut dweight.as_view_mut(), d, (1.0 / scale, beta))?;
            }
        }
        let mut results =
            [allocate::<f32>(device, 1)?, allocate::<f32>(device, 1)?, allocate::<f32>(device, 1)?];
        let [loss, entropy, count] = &mut results;
        let total = n as u64;
        launch!(
            device,
            Module::CrossEntropy,
            "cross_entropy_finish",
            blocks(1, 1024)?,
            &losses,
            &entropies,
            &targets,
            loss,
            entropy,
            count,
            &total,
            &self.settings.ignore_index,
        );
        let [loss, entropy, count] = results;
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Saved {
            entropy: Some(tensor(entropy, device, ())),
            count: Some(tensor(count, device, ())),
            dhidden: match (self.hidden_tracked, widened) {
                (false, _) => None,
                (true, false) => Some(tensor(dhidden, device, lh.shape())),
                (true, true) => Some(tensor(wide_dhidden, device, lh.shape())),
            },
            dweight: dweight.map(|slice| tensor(slice, device, (vocab, d))),
        };
        Ok(wrap(loss, device))
    }
}

/// `gradient * dloss / count` in the dtype `T`; gradient is of `T` or of f32.
fn scaled<T: Element>(gradient: &Tensor, dloss: &Tensor, count: &Tensor) -> Result<Tensor> {
    let (held, dloss, count) = (Held::new(gradient), Held::new(dloss), Held::new(count));
    let (device, n) = (held.device()?, gradient.elem_count());
    let mut out = allocate::<T>(device, n)?;
    let config = blocks(n.div_ceil(8 * 256).clamp(1, 1 << 16), 256)?;
    let (total, dloss, count) = (n as u64, dloss.view::<f32>()?, count.view::<f32>()?);
    if gradient.dtype() == T::DTYPE {
        let name = format!("cross_entropy_scale_{}", T::NAME);
        let from = held.view::<T>()?;
        launch!(device, Module::CrossEntropy, &name, config, &from, &mut out, &dloss, &count, &total);
    } else {
        let name = format!("cross_entropy_scale_f32_{}", T::NAME);
        let from = held.view::<f32>()?;
        launch!(device, Module::CrossEntropy, &name, config, &from, &mut out, &dloss, &count, &total);
    }
    Ok(tensor(out, device, gradient.shape()))
}

impl CustomOp3 for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "vesper-linear-cross-entropy-cuda"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        not_here(self.name())
    }

    fn cuda_fwd(
        &self,
        hidden: &CudaStorage,
        lh: &Layout,
        _: &CudaStorage,
        _: &Layout,
        targets: &CudaStorage,
        lt: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let loss = by_dtype!(hidden.dtype(), T => self.forward::<T>((hidden, lh), (targets, lt))?);
        Ok((loss, Shape::from(())))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _targets: &Tensor,
        _loss: &Tensor,
        dloss: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dloss = dloss.contiguous()?;
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(count) = &saved.count else { return Ok((None, None, None)) };
        let scale = |gradient: &Option<Tensor>, of: &Tensor| -> Result<Option<Tensor>> {
            let Some(gradient) = gradient else { return Ok(None) };
            by_dtype!(of.dtype(), T => scaled::<T>(gradient, &dloss, count).map(Some))
        };
        Ok((scale(&saved.dhidden, hidden)?, deliver(weight, scale(&saved.dweight, weight)?)?, None))
    }
}
