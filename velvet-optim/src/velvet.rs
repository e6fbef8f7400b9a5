//! [`Velvet`]: construction, observation, and what it tells.

use crate::adaptive::Adaptive;
use crate::backend::{self, Resident};
use crate::config::VelvetConfig;
use crate::error::{Error, Result};
use crate::group::{self, Training};
use crate::options::GradClip;
use crate::parameter::{self, Naming, Parameter, UpdateSize};
use crate::state::Slot;
use crate::stats::Stats;
use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;
use std::collections::{HashMap, HashSet};

type WarningHook = Box<dyn Fn(&str) + Send + Sync>;

/// AdamW and other rules, fused and resumable, with optional adaptive parts: a trust region on the size of updates,
/// perplexity-guided momentum, an entropy-adaptive learning rate.
///
/// ```text
/// g = clip_scale * g
/// m = beta1 * m + (1 - beta1) * g
/// v = beta2 * v + (1 - beta2) * g^2
/// p = (1 - lr * weight_decay) * p - lr * (m / (1 - prod beta1)) / (sqrt(v / (1 - prod beta2)) + eps)
/// ```
///
/// with `lr` the base learning rate times the scales of [`EntropyLr`](crate::EntropyLr), [`Brake`](crate::Brake) and,
/// for each parameter, [`TrustRegion`](crate::TrustRegion), and beta1 that of
/// [`PerplexityMomentum`](crate::PerplexityMomentum). With everything adaptive off, as it is by default, this is
/// `torch.optim.AdamW`.
///
/// Other rules are chosen by [`VelvetConfig::rule`], [`VelvetConfig::hidden_matrices`] and
/// [`VelvetConfig::groups`]; see [`Rule`](crate::Rule).
///
/// # On a GPU
/// With the feature `cuda`, and all trained parameters on one CUDA device in f32, bf16 or f16, a step launches
/// kernels and reads nothing back: losses that are tensors on that device are taken in there, and the learning rate,
/// clipping, the adaptive parts and the counters live there. [`Velvet::stats`], [`Velvet::update_ratios`],
/// [`Velvet::state`] and [`Velvet::save`] wait for the device. With [`NonFinite::Error`](crate::NonFinite::Error) a
/// step that met NaN or infinity is left out on the device, and so are those after it; the error, with the number of
/// that step and the names, is returned once, by the first later step that can know of it without waiting, and at the
/// latest by `stats` or `save`.
///
/// Such a step can be captured in a CUDA graph: switch candle's event tracking off before the first tensor is made,
/// take one step so that everything is allocated, and capture a step whose gradients and observed losses will lie at
/// the same addresses in every replay. [`set_learning_rate`](candle_nn::Optimizer::set_learning_rate) between replays
/// counts; numbers given to [`Velvet::observe_value`] in a capture are those of every replay; warnings and errors of
/// the host's side come only from steps that were taken outside of the graph.
///
/// The moments are f32 (f64 for f64 parameters), whatever the parameters' type. A parameter without a gradient
/// keeps its value, moments and beta products, as in PyTorch. Variables of integers are left out.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use velvet_optim::{Optimizer, Velvet, VelvetConfig};
/// let x = Var::new(&[3f32, -2.0], &Device::Cpu)?;
/// let mut opt = Velvet::new(vec![x.clone()], VelvetConfig { lr: 0.1, ..Default::default() })?;
/// for _ in 0..200 {
///     let loss = x.sqr()?.sum_all()?;
///     opt.backward_step(&loss)?;
/// }
/// assert!(x.sqr()?.sum_all()?.to_scalar::<f32>()? < 1e-2);
/// assert_eq!(opt.stats()?.step, 200);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub struct Velvet {
    pub(crate) config: VelvetConfig,
    pub(crate) naming: Naming,
    pub(crate) parameters: Vec<Parameter>,
    /// The addresses of the parameters' storages.
    pub(crate) storages: HashSet<usize>,
    pub(crate) adaptive: Adaptive,
    pub(crate) stats: Stats,
    /// Where all parameters are on one device that keeps the numbers of a step: `stats`, `adaptive` and those of the
    /// parameters are then not up to date here.
    pub(crate) resident: Option<Resident>,
    /// Positions of the parameters that had no gradient in the last step.
    pub(crate) missing: Vec<usize>,
    pub(crate) unobserved_reported: bool,
    pub(crate) warn: WarningHook,
}

impl Velvet {
    /// Makes an optimizer of variables without names, as candle's `AdamW::new` takes them.
    ///
    /// Their state is kept by position (`param.00000`, ...). `VarMap::all_vars` gives another order in every
    /// process, so a saved state also holds a fingerprint of each parameter's values: see [`Velvet::load`].
    /// Prefer [`Velvet::from_varmap`] where there is a `VarMap`: names also make messages readable.
    ///
    /// # Errors
    /// A field of `config` out of range, a variable given twice, or a floating-point type without an update.
    pub fn from_vars(vars: Vec<Var>, config: VelvetConfig) -> Result<Self> {
        let vars = vars.into_iter().map(|var| (String::new(), var)).collect();
        Self::build(vars, Naming::Positional, config)
    }

    /// Makes an optimizer with a learning rate and otherwise default settings.
    ///
    /// # Errors
    /// As [`Velvet::from_vars`].
    pub fn new_lr(vars: Vec<Var>, learning_rate: f64) -> candle_core::Result<Self> {
        Ok(Self::from_vars(vars, VelvetConfig::default().with_lr(learning_rate))?)
    }

    /// Makes an optimizer of named variables; their order does not matter.
    ///
    /// # Errors
    /// As [`Velvet::from_vars`], and where two variables have one name.
    ///
    /// ```
    /// use candle_core::{DType, Device, Var};
    /// use velvet_optim::{Velvet, VelvetConfig};
    /// let w = Var::zeros((2, 3), DType::F32, &Device::Cpu)?;
    /// let opt = Velvet::named(vec![("w".to_owned(), w)], VelvetConfig::default())?;
    /// assert_eq!(opt.parameters().map(|(name, _)| name).collect::<Vec<_>>(), ["w"]);
    /// # Ok::<(), velvet_optim::Error>(())
    /// ```
    pub fn named(vars: Vec<(String, Var)>, config: VelvetConfig) -> Result<Self> {
        Self::build(vars, Naming::Named, config)
    }

    /// Makes an optimizer of all variables of a `VarMap`, under their names there.
    ///
    /// # Errors
    /// As [`Velvet::from_vars`].
    pub fn from_varmap(varmap: &VarMap, config: VelvetConfig) -> Result<Self> {
        // A map whose lock is poisoned still holds its variables.
        let data = varmap.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let vars = data.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
        drop(data);
        Self::build(vars, Naming::Named, config)
    }

    fn build(vars: Vec<(String, Var)>, naming: Naming, config: VelvetConfig) -> Result<Self> {
        config.validate()?;
        let parameters = parameter::collect(vars, naming, &config)?;
        let mut velvet = Self {
            naming,
            storages: parameters.iter().map(|parameter| backend::storage_address(&parameter.var)).collect(),
            parameters,
            adaptive: Adaptive::new(&config, [None; 5]),
            stats: Stats {
                step: 0,
                grad_norm: None,
                clip_scale: 1.0,
                lr: config.lr,
                beta1: config.beta1,
                progress: None,
                update_ratio: None,
                skipped: 0,
                ignored_losses: 0,
            },
            resident: None,
            missing: Vec::new(),
            unobserved_reported: false,
            warn: Box::new(|message| eprintln!("velvet-optim: {message}")),
            config,
        };
        velvet.settle()?;
        Ok(velvet)
    }

    /// Takes a training loss in, for the adaptive parts; call it once a step, before the step.
    ///
    /// `loss` is one number of any floating-point type. [`backward_step`](candle_nn::Optimizer::backward_step) does
    /// this by itself. A loss that is NaN or infinite is not taken in and is counted in
    /// [`Stats::ignored_losses`]. With everything adaptive off nothing is read, so nothing waits for a device.
    ///
    /// # Errors
    /// The tensor is not one floating-point number, or cannot be read from its device.
    pub fn observe(&mut self, loss: &Tensor) -> Result<()> {
        self.observe_tensors(loss, None)
    }

    /// Takes a training loss and the mean entropy of the predictions that it was made from in, both in nats: what
    /// [`Brake`](crate::Brake) and [`ProgressSignal::Entropy`](crate::ProgressSignal::Entropy) need.
    ///
    /// # Errors
    /// As [`Velvet::observe`].
    pub fn observe_with_entropy(&mut self, loss: &Tensor, entropy: &Tensor) -> Result<()> {
        self.observe_tensors(loss, Some(entropy))
    }

    fn observe_tensors(&mut self, loss: &Tensor, entropy: Option<&Tensor>) -> Result<()> {
        for t in [Some(loss), entropy].into_iter().flatten() {
            if t.elem_count() != 1 || !t.dtype().is_float() {
                return Err(Error::Loss { shape: t.dims().to_vec(), dtype: t.dtype().as_str().to_owned() });
            }
        }
        if self.config.observes() {
            let tensors = [Some(loss), entropy];
            if let Some(resident) = &mut self.resident
                && tensors.into_iter().flatten().all(|t| resident.holds(t))
            {
                let one = |t: &Tensor| t.detach().flatten_all();
                let entropy = entropy.map(one).transpose()?;
                return resident.observe(&self.config, &one(loss)?, entropy.as_ref());
            }
            let value = |t: &Tensor| -> Result<f64> {
                let value = t.detach().flatten_all()?.squeeze(0)?.to_device(&candle_core::Device::Cpu)?;
                Ok(value.to_dtype(DType::F64)?.to_scalar()?)
            };
            let (loss, entropy) = (value(loss)?, entropy.map(value).transpose()?);
            self.take_in(loss, entropy)?;
        }
        Ok(())
    }

    /// Takes a training loss in nats in, as [`Velvet::observe`] does.
    ///
    /// With gradient accumulation or several devices give the mean loss of the whole batch.
    pub fn observe_value(&mut self, loss: f64) {
        self.observe_values(loss, None);
    }

    /// Takes a training loss and the mean entropy of the predictions in, both in nats.
    pub fn observe_values(&mut self, loss: f64, entropy: Option<f64>) {
        if let Err(error) = self.take_in(loss, entropy) {
            // A launch that fails says that the device is gone: the next step is the error.
            (self.warn)(&format!("the loss was not observed: {error}"));
        }
    }

    fn take_in(&mut self, loss: f64, entropy: Option<f64>) -> Result<()> {
        match &mut self.resident {
            Some(resident) if self.config.observes() || !loss.is_finite() => {
                resident.observe_values(&self.config, loss, entropy)?;
            }
            Some(_) => {}
            None => {
                if !loss.is_finite() {
                    self.stats.ignored_losses += 1;
                }
                self.adaptive.observe(loss, entropy);
            }
        }
        Ok(())
    }

    /// Figures of the last step, and counters.
    ///
    /// # Errors
    /// They are on a device that cannot be read.
    pub fn stats(&self) -> Result<Stats> {
        let stats = self.snapshot()?.stats;
        // No change of no weights is no ratio: a step without gradients, or only empty parameters.
        Ok(Stats { update_ratio: stats.update_ratio.filter(|ratio| !ratio.is_nan()), ..stats })
    }

    /// The size of the last measured update of each parameter relative to its weights (the ratio of their norms), by
    /// name.
    ///
    /// A parameter without a gradient in the last step keeps the ratio of the last step in which it had one. Left out
    /// are parameters that were never measured ([`UpdateNorms`](crate::UpdateNorms)) and weights of zero that did not
    /// move, which are no ratio.
    ///
    /// # Errors
    /// They are on a device that cannot be read.
    pub fn update_ratios(&self) -> Result<Vec<(String, f64)>> {
        let sizes = self.snapshot()?.sizes;
        let named = self.parameters.iter().zip(sizes);
        let ratio = |size: UpdateSize| Some(size.ratio).filter(|ratio| !ratio.is_nan());
        Ok(named.filter_map(|(parameter, size)| Some((parameter.name.clone(), ratio(size?)?))).collect())
    }

    /// The rule of each parameter, by name, and whether it is trained: what the heuristic and the groups made of the
    /// configuration.
    pub fn rules(&self) -> impl Iterator<Item = (&str, crate::Rule, Training)> {
        self.parameters.iter().map(|p| (p.name.as_str(), p.plan.rule, p.plan.training))
    }

    /// The bytes that the state arrays take.
    pub fn state_bytes(&self) -> usize {
        self.parameters.iter().flat_map(|parameter| &parameter.slots).map(Slot::bytes_held).sum()
    }

    /// Keeps the elements of a parameter at zero whose mask is zero, in this and all later steps, or trains all of them
    /// again (`None`).
    ///
    /// Weights, moments and master copies of such elements are set to zero at once and have no gradient from then on;
    /// an element whose mask is not zero is trained whatever its value. The mask has the parameter's shape and any
    /// type. It is part of the saved state.
    ///
    /// # Errors
    /// There is no such parameter, or the mask has another shape.
    ///
    /// ```
    /// use candle_core::{Device, Tensor, Var};
    /// use velvet_optim::{Optimizer, Velvet, VelvetConfig};
    /// let w = Var::new(&[1f32, 2.0], &Device::Cpu)?;
    /// let mut opt = Velvet::named(vec![("w".to_owned(), w.clone())], VelvetConfig::default())?;
    /// opt.set_mask("w", Some(&Tensor::new(&[1u8, 0], &Device::Cpu)?))?;
    /// opt.backward_step(&w.sqr()?.sum_all()?)?;
    /// assert_eq!(w.to_vec1::<f32>()?[1], 0.0);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn set_mask(&mut self, name: &str, mask: Option<&Tensor>) -> Result<()> {
        let Some(parameter) = self.parameters.iter_mut().find(|parameter| parameter.name == name) else {
            return Err(Error::UnknownParameter { name: name.to_owned() });
        };
        let Some(mask) = mask else {
            parameter.mask = None;
            return Ok(());
        };
        let var = &parameter.var;
        if mask.dims() != var.dims() {
            let (expected, got) = (var.dims().to_vec(), mask.dims().to_vec());
            return Err(Error::Mask { name: name.to_owned(), expected, got });
        }
        let kept = mask.detach().to_device(var.device())?.ne(0.0)?;
        parameter.set_mask(&kept)?;
        if let Some(resident) = &mut self.resident {
            resident.invalidate();
        }
        Ok(())
    }

    /// Makes the f32 master copies of bf16 and f16 parameters from the parameters as they are now
    /// ([`HalfParameters::Master`](crate::HalfParameters::Master)): to be called after weights were loaded, averaged or
    /// changed by hand, since a step updates the copies and writes their rounding. [`Velvet::load`] does not need it.
    ///
    /// # Errors
    /// A parameter cannot be read from its device; copies made before it stay.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor, Var};
    /// use velvet_optim::{HalfParameters, Optimizer, Velvet, VelvetConfig};
    /// let w = Var::zeros(2, DType::BF16, &Device::Cpu)?;
    /// let config = VelvetConfig::default().with_half_parameters(HalfParameters::Master);
    /// let mut opt = Velvet::named(vec![("w".to_owned(), w.clone())], config)?;
    /// w.set(&Tensor::ones(2, DType::BF16, &Device::Cpu)?)?; // pretrained weights
    /// opt.refresh_masters()?;
    /// opt.backward_step(&w.sqr()?.sum_all()?)?;
    /// assert!(w.to_dtype(DType::F32)?.to_vec1::<f32>()?[0] > 0.9);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn refresh_masters(&mut self) -> Result<()> {
        for parameter in &mut self.parameters {
            if parameter.refresh_master()?
                && let Some(resident) = &mut self.resident
            {
                resident.invalidate();
            }
        }
        Ok(())
    }

    /// The parameters that had no gradient in the last step: names, with the shape where there is only a position.
    pub fn missing_gradients(&self) -> Vec<String> {
        self.missing
            .iter()
            .filter_map(|&i| self.parameters.get(i))
            .map(|parameter| parameter.describe(self.naming))
            .collect()
    }

    /// The parameters and their names: sorted by name, or by position where no names were given.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.parameters.iter().map(|parameter| (parameter.name.as_str(), &parameter.var))
    }

    /// The configuration; its `lr` is the base learning rate as it is now.
    pub fn config(&self) -> &VelvetConfig {
        &self.config
    }

    /// Replaces the configuration in mid-run: learning rate, groups, frozen parameters, adaptive parts.
    ///
    /// Moments, products of betas and averages of the loss stay. A parameter whose rule changes, while it is frozen
    /// too, begins with an empty state under the new one, and so does one that was frozen from the start and is no
    /// longer. The back end, the rounding of half-precision parameters and the format of the state stay those that
    /// the state was made for.
    ///
    /// # Errors
    /// A field is out of range or does not fit the parameters; the old configuration then stays.
    pub fn set_config(&mut self, mut config: VelvetConfig) -> Result<()> {
        config.validate()?;
        config.backend = self.config.backend;
        config.half_parameters = self.config.half_parameters;
        config.state_format = self.config.state_format;
        let shapes = self.parameters.iter().map(|p| (p.name.as_str(), p.var.dims()));
        let plans = group::plans(&config, self.naming, shapes)?;
        let mut fresh = Vec::with_capacity(plans.len());
        for (parameter, plan) in self.parameters.iter().zip(&plans) {
            let kept = !parameter.slots.is_empty() && parameter.plan.rule.name() == plan.rule.name();
            let same = kept
                && parameter.plan.rule.slots(parameter.var.dims()) == plan.rule.slots(parameter.var.dims());
            fresh.push(match plan.training {
                _ if same => None,
                Training::On => Some(backend::empty_state(&parameter.var, plan, &config)?),
                // What another rule left is of no use when it is thawed.
                Training::Frozen => Some(Vec::new()),
            });
        }
        self.pull()?;
        for ((parameter, plan), fresh) in self.parameters.iter_mut().zip(plans).zip(fresh) {
            let old = std::mem::replace(&mut parameter.plan, plan);
            if let Some(slots) = fresh {
                (parameter.slots, parameter.beta_products, parameter.size) = (slots, [1.0; 2], None);
            }
            // Rows that are left out do not begin where blocks of 8 bits do. Nothing else changes the format: what
            // candle operations keep in full on a device would lose precision by it.
            let Parameter { slots, var, plan, .. } = parameter;
            if plan.sparse_rows != old.sparse_rows {
                backend::reformat(slots, var, plan, &config)?;
            }
        }
        self.adaptive = Adaptive::new(&config, self.adaptive.averages());
        self.config = config;
        self.settle()
    }

    /// Sends warnings (one line each, without a newline) to a function in place of standard error.
    ///
    /// There are warnings for parameters without a gradient, once each; for an adaptive part that no loss was
    /// observed for; and for a state loaded by position.
    pub fn on_warning(&mut self, hook: impl Fn(&str) + Send + Sync + 'static) {
        self.warn = Box::new(hook);
    }

    /// Copies of the state arrays on the CPU, by name: `NAME.exp_avg`, `NAME.momentum_buffer` and so on; those that
    /// are kept in 8 bits are given in f32.
    ///
    /// # Errors
    /// A tensor cannot be read from its device.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        for parameter in &self.parameters {
            for slot in &parameter.slots {
                state.insert(format!("{}.{}", parameter.name, slot.spec.name), slot.tensor()?);
            }
        }
        Ok(state)
    }

    pub(crate) fn clip_scale(&self, norm: f64) -> f64 {
        match self.config.clip {
            GradClip::Off => 1.0,
            GradClip::GlobalNorm(max) => (max / (norm + 1e-6)).min(1.0),
        }
    }
}

impl std::fmt::Debug for Velvet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Velvet")
            .field("config", &self.config)
            .field("parameters", &self.parameters.len())
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}
