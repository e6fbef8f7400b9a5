//! One step: gradients in, parameters out.

use crate::adaptive::TrustRegion;
use crate::backend::{self, Job, Rounding};
use crate::config::VelvetConfig;
use crate::error::{Error, Result};
use crate::group::Training;
use crate::options::{GradClip, HalfParameters, MissingGradients, NonFinite, SparseRows};
use crate::parameter::{Parameter, UpdateSize};
use crate::rounding;
use crate::rule::{AdamOptions, StepScalars};
use crate::velvet::Velvet;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_nn::Optimizer;

/// A parameter's position and its gradient.
type Found = (usize, Tensor);

impl Velvet {
    /// Takes one step, as [`step`](Optimizer::step) does, with this crate's own error.
    ///
    /// # Errors
    /// A gradient that does not fit its parameter, a learning rate that is not finite, and what the configuration
    /// makes an error ([`MissingGradients`], [`NonFinite`]). Parameters and moments are then as they were. On a GPU
    /// [`NonFinite::Error`] is that of an earlier step, since when nothing was updated; this one was not taken.
    ///
    /// # Examples
    /// ```
    /// use candle_core::{Device, Tensor, Var};
    /// use velvet_optim::{Error, Velvet, VelvetConfig};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let w = Var::new(&[1f32, 2.], &Device::Cpu)?;
    /// let mut opt = Velvet::named(vec![("w".into(), w.clone())], VelvetConfig::default())?;
    /// opt.try_step(&w.sqr()?.sum_all()?.backward()?)?;
    /// let infinite = w.affine(f64::INFINITY, 0.)?.sum_all()?;
    /// match opt.try_step(&infinite.backward()?) {
    ///     Err(Error::NonFiniteGradients { names, .. }) => assert_eq!(names, ["w"]),
    ///     other => panic!("{other:?}"),
    /// }
    /// assert_eq!(opt.stats()?.step, 1); // the second changed nothing
    /// # Ok(())
    /// # }
    /// ```
    pub fn try_step(&mut self, grads: &GradStore) -> Result<()> {
        self.raise_failure(false)?;
        if !(self.config.lr.is_finite() && self.config.lr >= 0.0) {
            return Err(Error::LearningRate { step: self.number()?, lr: self.config.lr });
        }
        let found = self.find(grads)?;
        if self.config.missing_gradients == MissingGradients::Error && !self.missing.is_empty() {
            return Err(Error::MissingGradients { step: self.number()?, names: self.missing_gradients() });
        }
        self.report_missing();
        self.report_unobserved();
        if let Some(resident) = &mut self.resident {
            resident.step(&self.parameters, &self.config, &found)?;
            return found
                .iter()
                .filter_map(|&(i, _)| self.parameters.get(i))
                .try_for_each(Parameter::keep_masked);
        }
        let number = self.number()?;
        let Some(clip_scale) = self.measure(&found, number)? else {
            self.stats.skipped += 1;
            return Ok(());
        };
        self.measure_weights(&found)?;
        self.apply(found, clip_scale)
    }

    /// As [`backward_step`](Optimizer::backward_step), with another way to the gradients than [`Tensor::backward`],
    /// such as
    /// `vesper_model::ops::backward`, which moves less memory, or one that counts or changes them.
    ///
    /// # Errors
    /// Those of `backward`, and as [`try_step`](Self::try_step).
    ///
    /// # Examples
    /// ```
    /// use candle_core::{Device, Tensor, Var};
    /// use velvet_optim::{Optimizer, Velvet, VelvetConfig};
    /// let w = Var::new(&[1f32, 2.], &Device::Cpu)?;
    /// let mut optimizer = Velvet::new(vec![w.clone()], VelvetConfig::default())?;
    /// let loss = w.sqr()?.sum_all()?;
    /// optimizer.backward_step_with(&loss, Tensor::backward)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn backward_step_with(
        &mut self,
        loss: &Tensor,
        backward: impl FnOnce(&Tensor) -> candle_core::Result<GradStore>,
    ) -> candle_core::Result<()> {
        // A loss of several elements is fine for candle's backward (their sum), but is nothing to adapt to.
        if self.config.observes() {
            self.observe(loss)?;
        }
        let grads = backward(loss)?;
        self.step(&grads)
    }

    /// The number of the next step: the first is 1.
    fn number(&self) -> Result<u64> {
        let stats = if self.resident.is_some() { self.snapshot()?.stats } else { self.stats };
        Ok(stats.step + 1)
    }

    /// The gradients of all parameters, checked; notes which are missing.
    fn find(&mut self, grads: &GradStore) -> Result<Vec<Found>> {
        let mut found = Vec::with_capacity(self.parameters.len());
        self.missing.clear();
        for (i, parameter) in self.parameters.iter().enumerate() {
            if parameter.plan.training == Training::Frozen {
                continue;
            }
            match grads.get(&parameter.var) {
                Some(grad) => found.push((i, parameter.prepare(grad, &self.storages)?)),
                None => self.missing.push(i),
            }
        }
        Ok(found)
    }

    fn report_missing(&mut self) {
        let mut names = Vec::new();
        for &i in &self.missing {
            if let Some(parameter) = self.parameters.get_mut(i)
                && !std::mem::replace(&mut parameter.reported, true)
            {
                names.push(parameter.describe(self.naming));
            }
        }
        if !names.is_empty() {
            (self.warn)(&format!("no gradient, so no update, for {}", names.join(", ")));
        }
    }

    fn report_unobserved(&mut self) {
        let seen = match &self.resident {
            Some(resident) => resident.has_observed(),
            None => self.adaptive.averages().iter().any(Option::is_some),
        };
        if self.config.observes() && !seen && !std::mem::replace(&mut self.unobserved_reported, true) {
            (self.warn)(
                "an adaptive part is on and no loss was observed, so it does nothing: \
                 call observe before step, or use backward_step",
            );
        }
    }

    /// Measures the gradients; returns the clip scale, or `None` where the step is to be skipped.
    fn measure(&mut self, found: &[Found], step: u64) -> Result<Option<f64>> {
        if self.config.clip == GradClip::Off && self.config.non_finite == NonFinite::Unchecked {
            self.stats.grad_norm = None;
            return Ok(Some(1.0));
        }
        let sums = backend::sums_of_squares(&found.iter().map(|(_, grad)| grad).collect::<Vec<_>>())?;
        let norm = sums.iter().fold(0.0, |all, sum| all + sum).sqrt(); // `sum` of nothing is -0
        self.stats.grad_norm = Some(norm);
        if !norm.is_finite() {
            match self.config.non_finite {
                NonFinite::Unchecked => {}
                NonFinite::Skip => return Ok(None),
                NonFinite::Error => {
                    let names = found
                        .iter()
                        .zip(&sums)
                        .filter(|(_, sum)| !sum.is_finite())
                        .filter_map(|((i, _), _)| self.parameters.get(*i))
                        .map(|parameter| parameter.describe(self.naming))
                        .collect();
                    return Err(Error::NonFiniteGradients { step, norm, names });
                }
            }
        }
        Ok(Some(self.clip_scale(norm)))
    }

    /// The trust region needs a size of the weights before the first update is measured.
    fn measure_weights(&mut self, found: &[Found]) -> Result<()> {
        if self.config.trust_region == TrustRegion::Off {
            return Ok(());
        }
        let unknown = |&&(i, _): &&Found| self.parameters.get(i).is_some_and(|p| p.size.is_none());
        let unknown: Vec<usize> = found.iter().filter(unknown).map(|&(i, _)| i).collect();
        let weights: Vec<Tensor> = unknown
            .iter()
            .filter_map(|&i| self.parameters.get(i))
            .map(|parameter| parameter.var.as_detached_tensor())
            .collect();
        let sums = backend::sums_of_squares(&weights.iter().collect::<Vec<_>>())?;
        for (i, sum) in unknown.into_iter().zip(sums) {
            if let Some(parameter) = self.parameters.get_mut(i) {
                let weight = (sum / parameter.var.elem_count().max(1) as f64).sqrt();
                parameter.size = Some(UpdateSize { change: UpdateSize::FIRST_CHANGE, weight, ratio: 0.0 });
            }
        }
        Ok(())
    }

    fn apply(&mut self, found: Vec<Found>, clip_scale: f64) -> Result<()> {
        let config = &self.config;
        let scalars = StepScalars {
            clip_scale,
            lr: self.adaptive.lr(config.lr),
            beta1: self.adaptive.momentum.value().unwrap_or(config.beta1),
            beta2: config.beta2,
            eps: config.eps,
            progress: self.adaptive.momentum.progress(),
            options: AdamOptions::of(config),
        };
        let (number, measure) = (self.stats.step + 1, config.measures());
        let mut found = found.into_iter().peekable();
        let mut jobs = Vec::with_capacity(found.len());
        let mut after = Vec::with_capacity(found.len());
        for (i, parameter) in self.parameters.iter_mut().enumerate() {
            let Some((_, grad)) = found.next_if(|(at, _)| *at == i) else { continue };
            let Parameter { var, plan, slots, beta_products, size, .. } = parameter;
            let mut scalars = scalars;
            scalars.lr *= plan.lr_scale;
            if let Some(size) = size {
                scalars.lr *= config.trust_region.scale(scalars.lr, size.change, size.weight);
            }
            let betas = plan.rule.betas(&scalars);
            let products = [beta_products[0] * betas[0], beta_products[1] * betas[1]];
            let rounding = match config.half_parameters {
                HalfParameters::Stochastic { seed } => {
                    Rounding::Stochastic { key: rounding::key(seed, number, i as u64) }
                }
                HalfParameters::Nearest | HalfParameters::Master => Rounding::Nearest,
            };
            jobs.push(Job {
                param: var,
                grad,
                step: plan.rule.step(&scalars, plan.decay, products),
                slots,
                sparse_row: match plan.sparse_rows {
                    SparseRows::Skip => {
                        Some(var.elem_count() / var.dims().first().copied().unwrap_or(1).max(1))
                    }
                    SparseRows::Off => None,
                },
                rounding,
                measure,
            });
            after.push((i, scalars.lr, products));
        }
        let measured = backend::update(jobs)?;
        let mut all = backend::Measured::default();
        for ((i, lr, products), measured) in after.into_iter().zip(measured) {
            let Some(parameter) = self.parameters.get_mut(i) else { continue };
            parameter.beta_products = products;
            parameter.keep_masked()?;
            if measure {
                let elements = parameter.var.elem_count();
                parameter.size = UpdateSize::new(measured, elements, lr, parameter.size).or(parameter.size);
                all += measured;
            }
        }
        if measure && scalars.lr > 0.0 {
            self.adaptive.polyak.measured(all.descent / scalars.lr);
        }
        self.stats.step = number;
        self.stats.clip_scale = clip_scale;
        self.stats.lr = scalars.lr;
        self.stats.beta1 = scalars.beta1;
        self.stats.progress = scalars.progress;
        self.stats.update_ratio = measure.then(|| (all.change_sq / all.weight_sq).sqrt());
        Ok(())
    }
}

impl Optimizer for Velvet {
    type Config = VelvetConfig;

    /// As [`Velvet::from_vars`].
    fn new(vars: Vec<Var>, config: VelvetConfig) -> candle_core::Result<Self> {
        Ok(Self::from_vars(vars, config)?)
    }

    /// As [`Velvet::try_step`].
    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        self.try_step(grads)?;
        Ok(())
    }

    /// The base learning rate; [`Stats::lr`](crate::Stats::lr) is the one applied, which
    /// [`EntropyLr`](crate::EntropyLr) may have scaled.
    fn learning_rate(&self) -> f64 {
        self.config.lr
    }

    /// Sets the base learning rate.
    fn set_learning_rate(&mut self, lr: f64) {
        self.config.lr = lr;
        if let Some(resident) = &mut self.resident {
            // A step sets it again where this failed, and can say so.
            let _ = resident.set_learning_rate(lr);
        }
    }

    /// Observes the loss, computes the gradients and takes a step.
    fn backward_step(&mut self, loss: &Tensor) -> candle_core::Result<()> {
        self.backward_step_with(loss, Tensor::backward)
    }
}
