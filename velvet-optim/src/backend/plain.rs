//! The back end in candle operations: any device, any speed. It is the specification of the others.

use super::{Job, state_dtype};
use candle_core::{DType, Device, Result, Tensor, Var};

pub(super) fn zero_slots(param: &Var, count: usize) -> Result<Vec<Tensor>> {
    (0..count).map(|_| Tensor::zeros(param.shape(), state_dtype(param.dtype()), param.device())).collect()
}

pub(super) fn update(jobs: Vec<Job<'_>>) -> Result<()> {
    for job in jobs {
        let super::Slots::OnDevice(slots) = job.slots else { continue };
        // Empty tensors have no update, and some devices refuse to launch nothing.
        if job.param.elem_count() == 0 {
            continue;
        }
        let dtype = state_dtype(job.param.dtype());
        // Detached: the new value must not drag the history of the old one along.
        let p = job.param.as_detached_tensor().to_dtype(dtype)?;
        let g = job.grad.detach().to_dtype(dtype)?;
        let p = job.rule.update_plain(&p, &g, slots)?;
        job.param.set(&p.to_dtype(job.param.dtype())?)?;
    }
    Ok(())
}

/// One transfer to the host a device, however many gradients there are.
pub(super) fn sums_of_squares(grads: &[&Tensor]) -> Result<Vec<f64>> {
    let mut sums = vec![0.0; grads.len()];
    let mut left: Vec<usize> = (0..grads.len()).filter(|&i| grads[i].elem_count() > 0).collect();
    while let Some(&first) = left.first() {
        let device = grads[first].device();
        let (here, others): (Vec<_>, Vec<_>) =
            left.into_iter().partition(|&i| grads[i].device().same_device(device));
        let scalars = here
            .iter()
            .map(|&i| grads[i].detach().to_dtype(wide(device))?.sqr()?.sum_all())
            .collect::<Result<Vec<_>>>()?;
        let values = Tensor::stack(&scalars, 0)?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        for (&i, value) in here.iter().zip(values.to_vec1::<f64>()?) {
            sums[i] = value;
        }
        left = others;
    }
    Ok(sums)
}

/// Metal has no f64.
fn wide(device: &Device) -> DType {
    if device.is_metal() { DType::F32 } else { DType::F64 }
}
