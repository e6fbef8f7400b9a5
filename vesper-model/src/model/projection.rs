//! A linear layer whose rows may be several projections packed together, each with an adapter or without.

use std::sync::Arc;

use candle_core::{D, Result, Tensor};
use candle_nn::VarBuilder;
use flylora::{Adapter, AdapterLinear, FrozenLinear, LoraAdapter, Merge};

use crate::ops::{Path, linear};
use crate::quantized::{Weight, frozen};
use crate::{AdapterConfig, Projection, VesperConfig};

/// `y = x W^T`, plus what the adapters of its parts add to their rows.
#[derive(Debug, Clone)]
pub(super) struct Packed {
    weight: Weight,
    parts: Vec<Part>,
    /// Whether the adapters' share of the result has a gradient.
    tracked: bool,
}

/// One of the projections, in the order of the rows.
#[derive(Debug, Clone)]
struct Part {
    projection: Projection,
    width: usize,
    adapter: Option<Arc<dyn Adapter>>,
}

/// Gives a parameter by its name and shape.
pub(super) type Fetch<'a> = dyn FnMut(&str, &[usize]) -> Result<Weight> + 'a;

/// Gives the adapter of a projection, if it gets one.
pub(super) type Make<'a> =
    dyn FnMut(Projection, &FrozenLinear) -> crate::Result<Option<Arc<dyn Adapter>>> + 'a;

impl Packed {
    /// Fetches `{prefix}.{name}.weight`, and takes the adapters of `parts` from `adapters`, which is the block's.
    pub(super) fn new(
        config: &VesperConfig,
        parts: &[Projection],
        name: &str,
        fetch: &mut Fetch<'_>,
        adapters: Option<&VarBuilder<'_>>,
    ) -> Result<Self> {
        let (input, _) = config.projection_size(parts[0]);
        let rows: usize = parts.iter().map(|&p| config.projection_size(p).1).sum();
        let weight = fetch(name, &[rows, input])?;
        let weight = if config.adapter.is_some() { weight.detach() } else { weight };
        let parts = parts
            .iter()
            .map(|&projection| {
                let (input, width) = config.projection_size(projection);
                let adapter: Option<Arc<dyn Adapter>> = match (&config.adapter, adapters) {
                    (Some(AdapterConfig { lora, targets }), Some(vb)) if targets.contains(&projection) => {
                        Some(Arc::new(LoraAdapter::new(input, width, lora, vb.pp(projection.path()))?))
                    }
                    _ => None,
                };
                Ok(Part { projection, width, adapter })
            })
            .collect::<Result<_>>()?;
        Ok(Self { weight, parts, tracked: true })
    }

    /// The matrix, where no part has an adapter: then a larger fused operation can take it.
    pub(super) fn plain(&self) -> Option<&Tensor> {
        if self.is_adapted() { None } else { self.weight.plain() }
    }

    /// The matrix, plain or in blocks, where no part has an adapter.
    pub(super) fn bare(&self) -> Option<&Weight> {
        (!self.is_adapted()).then_some(&self.weight)
    }

    fn is_adapted(&self) -> bool {
        self.parts.iter().any(|part| part.adapter.is_some())
    }

    /// The matrix of all parts, without what the adapters add.
    pub(super) fn weight(&self) -> &Weight {
        &self.weight
    }

    pub(super) fn weight_mut(&mut self) -> &mut Weight {
        &mut self.weight
    }

    /// x: (.., in) to (.., out)
    pub(super) fn forward(&self, x: &Tensor, path: Path) -> Result<Tensor> {
        // Of many rows the kinds of adapters have cheaper ways to their own layer than beside the packed one.
        let many = x.elem_count() >= x.dim(D::Minus1)?.pow(2);
        let alike = self.weight.plain().is_some_and(|weight| weight.dtype() == x.dtype());
        if self.is_adapted() && self.tracked && many && alike && path == Path::Fused {
            return self.part_by_part(x);
        }
        let y = match &self.weight {
            Weight::Plain(weight) => linear(x, weight, path)?,
            Weight::Blocks(blocks) => blocks.linear(x)?,
        };
        if !self.is_adapted() {
            return Ok(y);
        }
        let mut dims = y.dims().to_vec();
        let mut start = 0;
        let deltas = self
            .parts
            .iter()
            .map(|part| {
                let own = start;
                start += part.width;
                if let Some(adapter) = &part.adapter {
                    return adapter.delta_beside(x, &y.narrow(D::Minus1, own, part.width)?, None);
                }
                if let Some(last) = dims.last_mut() {
                    *last = part.width;
                }
                Tensor::zeros(dims.as_slice(), y.dtype(), y.device())
            })
            .collect::<Result<Vec<_>>>()?;
        let delta = Tensor::cat(&deltas, D::Minus1)?;
        y + if self.tracked { delta } else { delta.detach() }
    }

    /// Each part as a layer of its own, with its adapter in the cheapest way that its kind has.
    fn part_by_part(&self, x: &Tensor) -> Result<Tensor> {
        let mut start = 0;
        let mut outputs = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let own = frozen(&self.weight, start, part.width)?;
            start += part.width;
            outputs.push(match &part.adapter {
                None => own.forward(x)?,
                Some(adapter) => AdapterLinear::from_parts(own, Arc::clone(adapter))?.forward(x)?,
            });
        }
        match outputs.as_slice() {
            [one] => Ok(one.clone()),
            several => Tensor::cat(several, D::Minus1),
        }
    }

    /// The same layer without gradients.
    pub(super) fn detach(&self) -> Self {
        Self { weight: self.weight.detach(), parts: self.parts.clone(), tracked: false }
    }

    /// Freezes the matrix and puts adapters beside its parts, where `make` gives one for a projection and its layer.
    pub(super) fn attach(&mut self, make: &mut Make<'_>) -> crate::Result<()> {
        let mut start = 0;
        let mut parts = self.parts.clone();
        for part in &mut parts {
            let own = frozen(&self.weight, start, part.width)?;
            start += part.width;
            if let Some(adapter) = make(part.projection, &own)? {
                part.adapter = Some(adapter);
            }
        }
        *self = Self { weight: self.weight.detach(), parts, tracked: true };
        Ok(())
    }

    /// The adapters, with their projections.
    pub(super) fn adapters(&self) -> impl Iterator<Item = (Projection, &Arc<dyn Adapter>)> {
        self.parts.iter().filter_map(|part| Some((part.projection, part.adapter.as_ref()?)))
    }

    /// The same layer with its adapters in the matrix; none where one of them is no constant matrix, or has a bias, for which
    /// there is no place. A matrix in blocks
    /// that has an adapter becomes one in f32, for the blocks would round away much of what the adapter learned.
    pub(super) fn merged(&self) -> Result<Option<Self>> {
        if !self.is_adapted() {
            return Ok(Some(self.clone()));
        }
        let weight = self.weight.to_plain()?;
        let mut rows = Vec::with_capacity(self.parts.len());
        let mut start = 0;
        for part in &self.parts {
            let own = weight.narrow(0, start, part.width)?;
            start += part.width;
            rows.push(match &part.adapter {
                None => own,
                Some(adapter) if is_matrix(adapter) => {
                    let delta = adapter.delta_weight()?;
                    (own.to_dtype(delta.dtype())? + delta)?.to_dtype(weight.dtype())?
                }
                Some(_) => return Ok(None),
            });
        }
        let parts = self.parts.iter().map(|part| Part { adapter: None, ..part.clone() }).collect();
        let weight = Weight::Plain(Tensor::cat(&rows, 0)?.detach());
        Ok(Some(Self { weight, parts, tracked: self.tracked }))
    }
}

/// Whether what an adapter adds is a constant matrix's product.
pub(super) fn is_matrix(adapter: &Arc<dyn Adapter>) -> bool {
    adapter.merge_quality() == Merge::Exact && matches!(adapter.delta_bias(), Ok(None))
}
