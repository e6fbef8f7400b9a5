use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Result, Tensor, Var};

use crate::frozen::check_input;
use crate::linear::check_size;
use crate::{Adapter, Error, FrozenLinear, Merge, merge};

/// A frozen linear layer with any number of named adapters, of which those that are active add to its output.
///
/// ```text
/// y = W x + b + sum over the active adapters of weight * delta(x)
/// ```
///
/// Adapters are added, replaced and removed while the layer is in use; each row of a batch may have its own
/// ([`forward_rows`](Self::forward_rows)).
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use flylora::{AdapterKind, FrozenLinear, LoraConfig, MultiLinear, Place};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let base = FrozenLinear::new(Tensor::randn(0f32, 0.1, (6, 12), &Device::Cpu)?, None)?;
/// let mut layer = MultiLinear::new(base);
/// for name in ["french", "verse"] {
///     let kind = AdapterKind::Lora(LoraConfig::default().with_r(4));
///     let adapter = kind.build(layer.base(), &Place::alone(name, DType::F32, &Device::Cpu))?;
///     layer.insert(name, adapter)?;
/// }
/// layer.activate(&[("french", 1.0), ("verse", 0.5)])?;
/// let x = Tensor::randn(0f32, 1.0, (3, 12), &Device::Cpu)?;
/// assert_eq!(layer.forward(&x)?.dims(), [3, 6]);
///
/// // One batch, three rows, each with its own.
/// let y = layer.forward_rows(&x, &[Some("french"), None, Some("verse")])?;
/// assert_eq!(y.dims(), [3, 6]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct MultiLinear {
    base: FrozenLinear,
    adapters: BTreeMap<String, Arc<dyn Adapter>>,
    /// Names of adapters that there are, with their weights.
    active: Vec<(String, f64)>,
    enabled: bool,
    merged: Option<FrozenLinear>,
}

impl MultiLinear {
    /// A layer without adapters.
    pub fn new(base: FrozenLinear) -> Self {
        Self { base, adapters: BTreeMap::new(), active: Vec::new(), enabled: true, merged: None }
    }

    /// The frozen layer, without the adapters.
    pub fn base(&self) -> &FrozenLinear {
        &self.base
    }

    /// Puts an adapter under a name and returns the one that had it; the new one is active where the old one was.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] where the adapter is not of the layer's size; [`Error::Adapters`] while the layer is merged.
    pub fn insert(
        &mut self,
        name: impl Into<String>,
        adapter: Arc<dyn Adapter>,
    ) -> crate::Result<Option<Arc<dyn Adapter>>> {
        self.check_unmerged()?;
        check_size(&self.base, &adapter)?;
        Ok(self.adapters.insert(name.into(), adapter))
    }

    /// Takes an adapter away; it is then no longer active.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownAdapter`], and [`Error::Adapters`] while the layer is merged.
    pub fn remove(&mut self, name: &str) -> crate::Result<Arc<dyn Adapter>> {
        self.check_unmerged()?;
        let adapter = self.adapters.remove(name).ok_or_else(|| self.unknown(name))?;
        self.active.retain(|(active, _)| active != name);
        Ok(adapter)
    }

    /// The names of the adapters, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// An adapter.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownAdapter`].
    pub fn adapter(&self, name: &str) -> crate::Result<&Arc<dyn Adapter>> {
        self.adapters.get(name).ok_or_else(|| self.unknown(name))
    }

    /// Makes these adapters, with these weights, the active ones, and no others.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownAdapter`]; [`Error::Config`] for a weight that is not finite; [`Error::Adapters`] where one is
    /// named twice, or the layer is merged. The active ones then stay as they were.
    pub fn activate(&mut self, active: &[(&str, f64)]) -> crate::Result<()> {
        self.check_unmerged()?;
        for (i, (name, weight)) in active.iter().enumerate() {
            self.adapter(name)?;
            if !weight.is_finite() {
                let expected = "finite".into();
                return Err(Error::Config { field: "weight", expected, got: weight.to_string() });
            }
            if active.iter().take(i).any(|(other, _)| other == name) {
                return Err(Error::Adapters { message: format!("{name} is named twice") });
            }
        }
        self.active = active.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect();
        Ok(())
    }

    /// The active adapters and their weights.
    pub fn active(&self) -> &[(String, f64)] {
        &self.active
    }

    /// Switches all adapters on or off; off, the layer is its base, merged or not.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// Whether the adapters are on.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Applies the layer with the active adapters; x: (..., in), returns (..., out).
    ///
    /// # Errors
    ///
    /// Those of [`FrozenLinear::forward`] and [`Adapter::delta`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(nothing) = crate::cuda::nothing(x, self.base.out_features())? {
            return Ok(nothing);
        }
        if let Some(merged) = self.merged.as_ref().filter(|_| self.enabled) {
            return merged.forward(x);
        }
        let y = self.base.forward(x)?;
        if !self.enabled {
            return Ok(y);
        }
        let mut sum = y.clone();
        for (name, weight) in &self.active {
            let delta = self.adapter(name)?.delta_beside(x, &y, self.base.bias())?;
            sum = (sum + if *weight == 1.0 { delta } else { (delta * *weight)? })?;
        }
        Ok(sum)
    }

    /// Applies the layer with an adapter of its own, or none, for each entry of the first dimension; x: (batch, ...,
    /// in), adapters: one for each of the batch. The active ones do not count.
    ///
    /// The base runs once for the whole batch, and each adapter once, for all rows that name it.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownAdapter`]; [`Error::Adapters`] for another number of adapters than rows, or while the layer is
    /// merged; and as [`forward`](Self::forward).
    pub fn forward_rows(&self, x: &Tensor, adapters: &[Option<&str>]) -> Result<Tensor> {
        self.check_unmerged()?;
        check_input(x, self.base.in_features())?;
        let batch = if x.rank() < 2 { 1 } else { x.dim(0)? };
        if adapters.len() != batch || x.rank() < 2 {
            let message =
                format!("{} adapters are named for a batch of shape {:?}", adapters.len(), x.dims());
            return Err(Error::Adapters { message }.into());
        }
        #[cfg(feature = "cuda")]
        if let Some(nothing) = crate::cuda::nothing(x, self.base.out_features())? {
            return Ok(nothing);
        }
        let mut groups: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
        for (row, name) in adapters.iter().enumerate() {
            if let Some(name) = name {
                groups.entry(name).or_default().push(row as u32);
            }
        }
        let y = self.base.forward(x)?;
        if !self.enabled {
            return Ok(y);
        }
        let mut sum = y.clone();
        for (name, rows) in groups {
            let adapter = self.adapter(name)?;
            if rows.len() == batch {
                sum = (sum + adapter.delta_beside(x, &y, self.base.bias())?)?;
                continue;
            }
            let rows = Tensor::new(rows, x.device())?;
            let (own_x, own_y) = (x.contiguous()?.index_select(&rows, 0)?, y.index_select(&rows, 0)?);
            let delta = adapter.delta_beside(&own_x, &own_y, self.base.bias())?;
            sum = sum.index_add(&rows, &delta.contiguous()?, 0)?;
        }
        Ok(sum)
    }

    /// Says what the forward passes from now on are, for the dropout of all adapters: see [`Adapter::set_training`].
    pub fn set_training(&self, pass: Option<u64>) {
        self.adapters.values().for_each(|adapter| adapter.set_training(pass));
    }

    /// The trained variables of all adapters by name (`french.lora_A.weight` and so on), sorted.
    pub fn parameters(&self) -> Vec<(String, Var)> {
        let of = |(name, adapter): (&String, &Arc<dyn Adapter>)| {
            adapter.parameters().into_iter().map(|(p, var)| (format!("{name}.{p}"), var)).collect::<Vec<_>>()
        };
        self.adapters.iter().flat_map(of).collect()
    }

    /// Adds the active adapters to the weight: to merge one of several, [`activate`](Self::activate) it first.
    /// [`Merge::Unsupported`], and nothing merged, where one of them cannot be, or the base is quantised:
    /// [`merge_for`](Self::merge_for) merges those too. While merged, adapters can be neither changed nor chosen.
    ///
    /// With more than one kind active, each is added as it is alone: as [`forward`](Self::forward) does.
    ///
    /// # Errors
    ///
    /// [`Error::Adapters`] for a sum that is not finite in the dtype of the base, and candle's own; the layer is then not
    /// merged.
    pub fn merge(&mut self) -> crate::Result<Merge> {
        let active = self.weighted()?;
        if !merge::is_exact(&self.base, &active) {
            return Ok(Merge::Unsupported);
        }
        if self.merged.is_none() {
            self.merged = Some(merge::exact(&self.base, &active)?);
        }
        Ok(Merge::Exact)
    }

    /// As [`merge`](Self::merge), where that is exact; else merges for each active adapter the weight that is nearest for
    /// inputs like `sample`, and measures on it how far the outputs are off from those of all together; training's dropout
    /// is switched off for that. A quantised weight is quantised again.
    ///
    /// # Errors
    ///
    /// Those of [`merge`](Self::merge), [`Error::Shape`] for a sample that does not fit, and [`Error::Adapters`] for one without rows;
    /// the layer is then as it was.
    pub fn merge_for(&mut self, sample: &Tensor) -> crate::Result<Merge> {
        if let Merge::Exact = self.merge()? {
            return Ok(Merge::Exact);
        }
        let (merged, relative_error) = merge::nearest(&self.base, &self.weighted()?, sample)?;
        self.merged = Some(merged);
        Ok(Merge::Approximate { relative_error })
    }

    /// The active adapters, with their weights.
    fn weighted(&self) -> crate::Result<Vec<(&dyn Adapter, f64)>> {
        self.active.iter().map(|(name, weight)| Ok((self.adapter(name)?.as_ref(), *weight))).collect()
    }

    /// Goes back to the original weight, which was kept: the same bits.
    pub fn unmerge(&mut self) {
        self.merged = None;
    }

    /// Whether the active adapters are in the weight.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// The layer with the active adapters in its weight and no others, as a plain layer of candle-nn: merged already, or
    /// now. PEFT's `merge_and_unload(adapter_names=...)`.
    ///
    /// # Errors
    ///
    /// Those of [`merge`](Self::merge), and [`Error::Adapters`] where that is not supported and
    /// [`merge_for`](Self::merge_for) has not been called.
    pub fn into_merged(mut self) -> crate::Result<candle_nn::Linear> {
        if self.merged.is_none() && self.merge()? == Merge::Unsupported {
            let names: Vec<&str> = self.active.iter().map(|(name, _)| name.as_str()).collect();
            let message = format!("no weight does the same as {} here: see merge_for", names.join(" and "));
            return Err(Error::Adapters { message });
        }
        let layer = self.merged.unwrap_or(self.base);
        Ok(candle_nn::Linear::new(layer.weight()?, layer.bias().cloned()))
    }

    fn check_unmerged(&self) -> crate::Result<()> {
        if self.merged.is_some() {
            return Err(Error::Adapters { message: "the layer is merged: unmerge it first".into() });
        }
        Ok(())
    }

    fn unknown(&self, name: &str) -> Error {
        Error::UnknownAdapter { name: name.to_owned(), known: self.adapters.keys().cloned().collect() }
    }
}

impl candle_nn::Module for MultiLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        MultiLinear::forward(self, x)
    }
}
