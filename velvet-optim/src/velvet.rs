//! [`Velvet`]: construction, observation, and what it tells.

use crate::adaptive::{ProgressState, WarmUpState};
use crate::config::VelvetConfig;
use crate::error::{Error, Result};
use crate::options::GradClip;
use crate::parameter::{self, Naming, Parameter};
use crate::rule::AdamW;
use crate::stats::Stats;
use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;
use std::collections::HashMap;

type WarningHook = Box<dyn Fn(&str) + Send + Sync>;

/// AdamW, fused and resumable, with an optional entropy-adaptive learning rate and perplexity-guided momentum.
///
/// ```text
/// g = clip_scale * g
/// m = beta1 * m + (1 - beta1) * g
/// v = beta2 * v + (1 - beta2) * g^2
/// p = (1 - lr * weight_decay) * p - lr * (m / (1 - prod beta1)) / (sqrt(v / (1 - prod beta2)) + eps)
/// ```
///
/// with `lr` the base learning rate times [`EntropyLr`](crate::EntropyLr)'s scale and beta1 that of
/// [`PerplexityMomentum`](crate::PerplexityMomentum). With everything adaptive off this is
/// `torch.optim.AdamW`.
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
/// assert_eq!(opt.stats().step, 200);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub struct Velvet {
    pub(crate) config: VelvetConfig,
    pub(crate) naming: Naming,
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) warm_up: WarmUpState,
    pub(crate) momentum: ProgressState,
    pub(crate) stats: Stats,
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
        let parameters = parameter::collect(vars, naming, config.backend)?;
        Ok(Self {
            naming,
            parameters,
            warm_up: WarmUpState::new(config.entropy_lr),
            momentum: ProgressState::new(config.perplexity_momentum),
            stats: Stats {
                step: 0,
                grad_norm: None,
                clip_scale: 1.0,
                lr: config.lr,
                beta1: config.beta1,
                skipped: 0,
                ignored_losses: 0,
            },
            missing: Vec::new(),
            unobserved_reported: false,
            warn: Box::new(|message| eprintln!("velvet-optim: {message}")),
            config,
        })
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
        if loss.elem_count() != 1 || !loss.dtype().is_float() {
            return Err(Error::Loss { shape: loss.dims().to_vec(), dtype: loss.dtype().as_str().to_owned() });
        }
        if self.is_adaptive() {
            let value = loss.detach().flatten_all()?.squeeze(0)?.to_device(&candle_core::Device::Cpu)?;
            self.observe_value(value.to_dtype(DType::F64)?.to_scalar()?);
        }
        Ok(())
    }

    /// Takes a training loss in nats in, as [`Velvet::observe`] does.
    ///
    /// With gradient accumulation or several devices give the mean loss of the whole batch.
    pub fn observe_value(&mut self, loss: f64) {
        if !loss.is_finite() {
            self.stats.ignored_losses += 1;
        }
        self.warm_up.observe(loss);
        self.momentum.observe(loss);
    }

    /// Figures of the last step, and counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
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

    /// Replaces the configuration in mid-run; moments, products of betas and averages of the loss stay.
    ///
    /// The back end stays the one that the state was made for.
    ///
    /// # Errors
    /// A field is out of range; the old configuration then stays.
    pub fn set_config(&mut self, config: VelvetConfig) -> Result<()> {
        config.validate()?;
        self.warm_up = WarmUpState::with_average(config.entropy_lr, self.warm_up.average());
        self.momentum = ProgressState::with_average(config.perplexity_momentum, self.momentum.average());
        let backend = self.config.backend;
        self.config = config;
        self.config.backend = backend;
        Ok(())
    }

    /// Sends warnings (one line each, without a newline) to a function in place of standard error.
    ///
    /// There are warnings for parameters without a gradient, once each; for an adaptive part that no loss was
    /// observed for; and for a state loaded by position.
    pub fn on_warning(&mut self, hook: impl Fn(&str) + Send + Sync + 'static) {
        self.warn = Box::new(hook);
    }

    /// Copies of the state arrays on the CPU, by name: `NAME.exp_avg` and `NAME.exp_avg_sq`.
    ///
    /// # Errors
    /// A tensor cannot be read from its device.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        for parameter in &self.parameters {
            for (i, slot) in AdamW::SLOTS.iter().enumerate() {
                if let Some(tensor) = parameter.slots.tensor(i, parameter.var.dims())? {
                    state.insert(format!("{}.{slot}", parameter.name), tensor);
                }
            }
        }
        Ok(state)
    }

    pub(crate) fn is_adaptive(&self) -> bool {
        self.config.entropy_lr != crate::EntropyLr::Off
            || self.config.perplexity_momentum != crate::PerplexityMomentum::Off
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
