//! A linear layer whose rows may be several projections packed together, each with an adapter or without.

use candle_core::{D, Result, Tensor};
use candle_nn::VarBuilder;
use flylora::{Adapter as _, LoraAdapter};

use crate::ops::{Path, linear};
use crate::{AdapterConfig, Projection, VesperConfig};

/// `y = x W^T`, plus what the adapters of its parts add to their rows.
#[derive(Debug, Clone)]
pub(super) struct Packed {
    weight: Tensor,
    /// Width of each part, in order, and its adapter.
    parts: Vec<(usize, Option<LoraAdapter>)>,
    /// Whether the adapters' share of the result has a gradient.
    tracked: bool,
}

impl Packed {
    /// Reads `{prefix}.{name}.weight` and the adapters of `parts` from the block at `vb`.
    pub(super) fn new(
        config: &VesperConfig,
        parts: &[Projection],
        name: &str,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let (input, _) = config.projection_size(parts[0]);
        let rows: usize = parts.iter().map(|&p| config.projection_size(p).1).sum();
        let weight = vb.pp(name).get((rows, input), "weight")?;
        let weight = if config.adapter.is_some() { weight.detach() } else { weight };
        let parts = parts
            .iter()
            .map(|&part| {
                let (input, output) = config.projection_size(part);
                let adapter = match &config.adapter {
                    Some(AdapterConfig { lora, targets }) if targets.contains(&part) => {
                        Some(LoraAdapter::new(input, output, lora, vb.pp(part.path()))?)
                    }
                    _ => None,
                };
                Ok((output, adapter))
            })
            .collect::<Result<_>>()?;
        Ok(Self { weight, parts, tracked: true })
    }

    /// The matrix, where no part has an adapter: then a larger fused operation can take it.
    pub(super) fn plain(&self) -> Option<&Tensor> {
        self.parts.iter().all(|(_, adapter)| adapter.is_none()).then_some(&self.weight)
    }

    /// x: (.., in) to (.., out)
    pub(super) fn forward(&self, x: &Tensor, path: Path) -> Result<Tensor> {
        let y = linear(x, &self.weight, path)?;
        if self.plain().is_some() {
            return Ok(y);
        }
        let mut dims = y.dims().to_vec();
        let deltas = self
            .parts
            .iter()
            .map(|(width, adapter)| {
                if let Some(adapter) = adapter {
                    return adapter.delta(x);
                }
                if let Some(last) = dims.last_mut() {
                    *last = *width;
                }
                Tensor::zeros(dims.as_slice(), y.dtype(), y.device())
            })
            .collect::<Result<Vec<_>>>()?;
        let delta = Tensor::cat(&deltas, D::Minus1)?;
        y + if self.tracked { delta } else { delta.detach() }
    }

    /// The same layer without gradients.
    pub(super) fn detach(&self) -> Self {
        Self { weight: self.weight.detach(), parts: self.parts.clone(), tracked: false }
    }
}
