//! Adapters of one layer, put into its weight, and into its bias where they have one.

use candle_core::{DType, Result, Tensor};

use crate::frozen::{check_input, rows};
use crate::linear::{added, check_merged};
use crate::{Adapter, Error, FrozenLinear, Merge};

/// Adapters of a layer, with what each counts for.
pub(crate) type Weighted<'a> = [(&'a dyn Adapter, f64)];

/// Whether there is a weight that gives the outputs of the layer with the adapters: not for kinds that choose by the input,
/// and not in blocks.
pub(crate) fn is_exact(base: &FrozenLinear, adapters: &Weighted<'_>) -> bool {
    let exact = |(adapter, _): &(&dyn Adapter, f64)| adapter.merge_quality() == Merge::Exact;
    base.quantized_weight().is_none() && adapters.iter().all(exact)
}

/// The layer with the adapters in its weight, where that [`is_exact`].
pub(crate) fn exact(base: &FrozenLinear, adapters: &Weighted<'_>) -> crate::Result<FrozenLinear> {
    changed(base, adapters, |adapter| adapter.delta_weight())
}

/// The layer with the weights in it that are nearest to the adapters for inputs like `sample`, (..., in), and how far its
/// outputs are off on them, relative to what the adapters add. Switches the adapters' dropout off.
pub(crate) fn nearest(
    base: &FrozenLinear,
    adapters: &Weighted<'_>,
    sample: &Tensor,
) -> crate::Result<(FrozenLinear, f64)> {
    check_input(sample, base.in_features())?;
    if sample.elem_count() == 0 {
        let message = "a sample without rows measures nothing".into();
        return Err(Error::Adapters { message });
    }
    for (adapter, _) in adapters {
        adapter.set_training(None); // the error is that of evaluation
    }
    let sample = sample.detach().reshape((rows(sample.shape()), base.in_features()))?;
    let merged = changed(base, adapters, |adapter| adapter.delta_weight_for(&sample))?;
    let y = base.forward(&sample)?;
    let mut delta = y.zeros_like()?;
    for (adapter, share) in adapters {
        delta = (delta + times(adapter.delta_beside(&sample, &y, base.bias())?.detach(), *share)?)?;
    }
    let error = norm(&((merged.forward(&sample)? - y)? - &delta)?)?;
    Ok((merged, if error == 0.0 { 0.0 } else { error / norm(&delta)? }))
}

fn changed(
    base: &FrozenLinear,
    adapters: &Weighted<'_>,
    change: impl Fn(&dyn Adapter) -> Result<Tensor>,
) -> crate::Result<FrozenLinear> {
    let mut weight = base.weight()?;
    let mut bias = base.bias().cloned();
    for (adapter, share) in adapters {
        weight = added(&weight, &times(change(*adapter)?, *share)?)?;
        if let Some(own) = adapter.delta_bias()? {
            let own = times(own, *share)?;
            bias = Some(match bias {
                None => own,
                Some(bias) => added(&bias, &own)?,
            });
        }
    }
    let merged = base.with_weight(&weight)?.with_bias(bias.as_ref())?;
    check_merged(&merged.weight()?)?;
    merged.bias().map_or(Ok(()), check_merged)?;
    Ok(merged)
}

fn times(change: Tensor, share: f64) -> Result<Tensor> {
    if share == 1.0 { Ok(change) } else { change * share }
}

fn norm(t: &Tensor) -> Result<f64> {
    Ok(t.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}
