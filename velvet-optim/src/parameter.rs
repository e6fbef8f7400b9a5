//! The parameters an optimizer updates: their names, state and identity.

use crate::backend::{self, Measured};
use crate::config::VelvetConfig;
use crate::error::{Error, Result};
use crate::group::{self, Plan, Training};
use crate::rule::{Rule, SlotSpec};
use crate::state::{Data, MASTER, Slot, Values};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor, Var};
use half::slice::HalfFloatSliceExt;
use std::collections::{HashMap, HashSet};

/// How the parameters of an optimizer are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Naming {
    /// By names that were given; parameters are in their order.
    Named,
    /// By position: `param.00000` and so on.
    Positional,
}

/// One parameter and everything that belongs to it.
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) var: Var,
    /// What the configuration says about it.
    pub(crate) plan: Plan,
    /// Its state arrays; none while it is frozen from the start.
    pub(crate) slots: Vec<Slot>,
    /// The products of the betas applied to this parameter so far.
    pub(crate) beta_products: [f64; 2],
    /// What was measured of its last update.
    pub(crate) size: Option<UpdateSize>,
    /// 1 where elements are trained and 0 where they are kept at zero, in the parameter's shape and type.
    pub(crate) mask: Option<Tensor>,
    /// A missing gradient was reported already.
    pub(crate) reported: bool,
}

/// Root mean squares of a parameter's last update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct UpdateSize {
    /// Of the change for each unit of learning rate; of the last update that had a gradient other than zeros.
    pub(crate) change: f64,
    /// Of the weights before it.
    pub(crate) weight: f64,
    /// Of the change over that of the weights.
    pub(crate) ratio: f64,
}

impl UpdateSize {
    /// The change for each unit of learning rate that is expected of a first update: AdamW's.
    pub(crate) const FIRST_CHANGE: f64 = 1.0;

    /// What was measured of an update after that of size `last`; `None` where there was nothing to measure.
    pub(crate) fn new(measured: Measured, elements: usize, lr: f64, last: Option<Self>) -> Option<Self> {
        if elements == 0 || lr <= 0.0 {
            return None;
        }
        let rms = |sum: f64| (sum / elements as f64).sqrt();
        let (moved, weight) = (rms(measured.change_sq), rms(measured.weight_sq));
        // A gradient of zeros tells nothing about the update that the next gradient will make.
        let known = last.map_or(Self::FIRST_CHANGE, |last| last.change);
        let change = if measured.descent == 0.0 { known.max(moved / lr) } else { moved / lr };
        // What is no number (gradients that are none and were not looked at) says nothing of a size either.
        if !(change.is_finite() && weight.is_finite()) {
            return None;
        }
        Some(Self { change, weight, ratio: moved / weight })
    }
}

impl Parameter {
    /// The name, with the shape where the name is only a position.
    pub(crate) fn describe(&self, naming: Naming) -> String {
        match naming {
            Naming::Named => self.name.clone(),
            Naming::Positional => format!("{} (shape {:?})", self.name, self.var.dims()),
        }
    }

    /// The gradient as back ends need it: checked, contiguous, and in storage of its own.
    pub(crate) fn prepare(&self, grad: &Tensor, storages: &HashSet<usize>) -> Result<Tensor> {
        let error = |what, expected: String, got: String| {
            Err(Error::Gradient { name: self.name.clone(), what, expected, got })
        };
        if grad.dims() != self.var.dims() {
            return error("shape", format!("{:?}", self.var.dims()), format!("{:?}", grad.dims()));
        }
        if !grad.device().same_device(self.var.device()) {
            let location = |t: &Tensor| format!("{:?}", t.device().location());
            return error("device", location(&self.var), location(grad));
        }
        if !backend::supports(grad.dtype()) {
            return error("dtype", "f32, f64, bf16 or f16".to_owned(), grad.dtype().as_str().to_owned());
        }
        let grad = match &self.mask {
            // Not a product, which NaN and infinity would survive.
            Some(mask) => {
                let grad = grad.detach().contiguous()?;
                mask.ne(0.0)?.where_cond(&grad, &grad.zeros_like()?)?
            }
            None => grad.contiguous()?,
        };
        self.check_state()?;
        // A gradient may be a parameter's own storage (a hand-made GradStore): reading it while it is lent for
        // writing would wait for ever.
        if storages.contains(&backend::storage_address(&grad)) { Ok(grad.copy()?) } else { Ok(grad) }
    }
}

impl Parameter {
    /// Back ends take state arrays by their place and would make nothing of a wrong number of them.
    fn check_state(&self) -> Result<()> {
        let has_master = self.slots.last().is_some_and(|slot| slot.spec.name == MASTER);
        let (expected, got) = (self.plan.rule.arrays(), self.slots.len() - usize::from(has_master));
        if expected == got {
            return Ok(());
        }
        let (name, rule) = (&self.name, self.plan.rule.name());
        let message = format!("`{name}`: {rule} needs {expected} state arrays, got {got}");
        Err(candle_core::Error::Msg(message).into())
    }

    /// Keeps the elements at zero from now on where `kept`, of the parameter's shape and u8, is 0.
    pub(crate) fn set_mask(&mut self, kept: &Tensor) -> Result<()> {
        let values = self.var.as_detached_tensor();
        self.var.set(&kept.where_cond(&values, &values.zeros_like()?)?)?;
        let mask = kept.to_dtype(self.var.dtype())?.contiguous()?;
        for slot in &mut self.slots {
            slot.zero_where(&mask)?;
        }
        self.mask = Some(mask);
        Ok(())
    }

    /// Sets masked elements to zero again after an update that mixes elements, in the master copy too.
    pub(crate) fn keep_masked(&self) -> Result<()> {
        if let (Some(mask), Rule::Orthogonal(_)) = (&self.mask, self.plan.rule) {
            let kept = mask.ne(0.0)?;
            let values = self.var.as_detached_tensor();
            self.var.set(&kept.where_cond(&values, &values.zeros_like()?)?)?;
            if let Some(Slot { spec: SlotSpec { name: MASTER, .. }, data: Data::Tensor(master) }) =
                self.slots.last()
                && master.elem_count() > 0
            {
                // In its place: kernels, and steps captured in a graph, have its address.
                master.slice_set(&kept.where_cond(master, &master.zeros_like()?)?, 0, 0)?;
            }
        }
        Ok(())
    }

    /// Makes the master copy from the parameter as it is now; whether there is one.
    pub(crate) fn refresh_master(&mut self) -> Result<bool> {
        let Some(slot) = self.slots.last_mut().filter(|slot| slot.spec.name == MASTER) else {
            return Ok(false);
        };
        let values = self.var.as_detached_tensor().to_device(&Device::Cpu)?.flatten_all()?;
        slot.data = slot.data_of(&Values::F32(values.to_dtype(DType::F32)?.to_vec1()?))?;
        Ok(true)
    }
}

/// Names variables, leaves out those that cannot be trained (integers), and gives each its empty state.
pub(crate) fn collect(
    vars: Vec<(String, Var)>,
    naming: Naming,
    config: &VelvetConfig,
) -> Result<Vec<Parameter>> {
    let mut vars: Vec<_> = vars.into_iter().filter(|(_, var)| var.dtype().is_float()).collect();
    match naming {
        Naming::Named => vars.sort_by(|a, b| a.0.cmp(&b.0)),
        Naming::Positional => {
            for (i, (name, _)) in vars.iter_mut().enumerate() {
                *name = format!("param.{i:05}");
            }
        }
    }
    if let Some(pair) = vars.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(Error::DuplicateName { name: pair[0].0.clone() });
    }
    let mut by_storage: HashMap<usize, &str> = HashMap::new();
    for (name, var) in &vars {
        if let Some(first) = by_storage.insert(backend::storage_address(var), name) {
            return Err(Error::DuplicateVariable { first: first.to_owned(), second: name.clone() });
        }
        if !backend::supports(var.dtype()) {
            return Err(Error::UnsupportedDType {
                name: name.clone(),
                dtype: var.dtype().as_str().to_owned(),
            });
        }
    }
    let plans = group::plans(config, naming, vars.iter().map(|(name, var)| (name.as_str(), var.dims())))?;
    vars.into_iter()
        .zip(plans)
        .map(|((name, var), plan)| {
            let slots = match plan.training {
                Training::On => backend::empty_state(&var, &plan, config)?,
                Training::Frozen => Vec::new(),
            };
            let beta_products = [1.0; 2];
            Ok(Parameter { name, var, plan, slots, beta_products, size: None, mask: None, reported: false })
        })
        .collect()
}

/// 64 bits that depend on a tensor's shape, element type and every bit of its values.
pub(crate) fn fingerprint(tensor: &Tensor) -> Result<u64> {
    let host = tensor.to_device(&Device::Cpu)?.contiguous()?;
    let mut hash = Mixer(host.dtype().size_in_bytes() as u64);
    for &dim in host.dims() {
        hash.add(dim as u64);
    }
    let (storage, layout) = host.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else { return Ok(hash.0) };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(x)) => hash.add_all(x.get(start..end), |x| u64::from(x.to_bits())),
        Storage::Cpu(CpuStorage::F64(x)) => hash.add_all(x.get(start..end), |x| x.to_bits()),
        Storage::Cpu(CpuStorage::BF16(x)) => {
            hash.add_all(x.get(start..end).map(HalfFloatSliceExt::reinterpret_cast), |&x| u64::from(x));
        }
        Storage::Cpu(CpuStorage::F16(x)) => {
            hash.add_all(x.get(start..end).map(HalfFloatSliceExt::reinterpret_cast), |&x| u64::from(x));
        }
        _ => {}
    }
    Ok(hash.0)
}

/// A hash to tell weights apart, not to withstand an attacker.
struct Mixer(u64);

impl Mixer {
    fn add(&mut self, word: u64) {
        let mut x = self.0.rotate_left(23) ^ word;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.0 = (x ^ (x >> 31)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    }

    fn add_all<T>(&mut self, values: Option<&[T]>, bits: impl Fn(&T) -> u64) {
        for value in values.unwrap_or_default() {
            self.add(bits(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::BackendChoice;
    use crate::velvet::Velvet;

    #[test]
    fn a_rule_without_its_state_arrays_is_an_error() {
        for backend in [BackendChoice::Auto, BackendChoice::Plain] {
            let w = Var::ones(3, DType::F32, &Device::Cpu).unwrap();
            let config = VelvetConfig::default().with_backend(backend);
            let mut opt = Velvet::named(vec![("w".to_owned(), w.clone())], config).unwrap();
            opt.parameters[0].plan.rule = Rule::Lion(crate::Lion::default());
            let grads = w.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let error = opt.try_step(&grads).unwrap_err().to_string();
            assert_eq!(error, "`w`: lion needs 1 state arrays, got 2");
            assert_eq!(w.to_vec1::<f32>().unwrap(), [1.0; 3]);
        }
    }

    #[test]
    fn fingerprints_see_shape_type_and_every_bit() {
        let t = Tensor::new(&[[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]], &Device::Cpu).unwrap();
        let base = fingerprint(&t).unwrap();
        assert_eq!(base, fingerprint(&t.copy().unwrap()).unwrap());
        assert_eq!(base, fingerprint(&t.t().unwrap().contiguous().unwrap().t().unwrap()).unwrap());
        let other_bit = f32::from_bits(6f32.to_bits() + 1);
        let changed = Tensor::new(&[[1f32, 2.0, 3.0], [4.0, 5.0, other_bit]], &Device::Cpu).unwrap();
        for other in [t.reshape((3, 2)).unwrap(), t.to_dtype(DType::F64).unwrap(), changed] {
            assert_ne!(base, fingerprint(&other).unwrap());
        }
        let half = t.to_dtype(DType::BF16).unwrap();
        assert_ne!(fingerprint(&half).unwrap(), fingerprint(&half.neg().unwrap()).unwrap());
    }
}
