//! One step: gradients in, parameters out.

use crate::backend::{self, Job};
use crate::config::VelvetConfig;
use crate::error::{Error, Result};
use crate::options::{GradClip, MissingGradients, NonFinite, WeightDecayOn};
use crate::rule::{AdamW, Rule, StepScalars};
use crate::stats::Stats;
use crate::velvet::Velvet;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_nn::Optimizer;
use std::collections::HashSet;

/// A parameter's position and its gradient.
type Found = (usize, Tensor);

impl Velvet {
    /// Takes one step, as [`step`](Optimizer::step) does, with this crate's own error.
    ///
    /// # Errors
    /// A gradient that does not fit its parameter, a learning rate that is not finite, and what the configuration
    /// makes an error ([`MissingGradients`], [`NonFinite`]). Parameters and moments are then as they were.
    pub fn try_step(&mut self, grads: &GradStore) -> Result<&Stats> {
        let number = self.stats.step + 1;
        if !(self.config.lr.is_finite() && self.config.lr >= 0.0) {
            return Err(Error::LearningRate { step: number, lr: self.config.lr });
        }
        let found = self.find(grads)?;
        if self.config.missing_gradients == MissingGradients::Error && !self.missing.is_empty() {
            return Err(Error::MissingGradients { step: number, names: self.missing_gradients() });
        }
        self.report_missing();
        self.report_unobserved();
        let Some(clip_scale) = self.measure(&found, number)? else {
            self.stats.skipped += 1;
            return Ok(&self.stats);
        };
        self.apply(found, clip_scale)?;
        Ok(&self.stats)
    }

    /// The gradients of all parameters, checked; notes which are missing.
    fn find(&mut self, grads: &GradStore) -> Result<Vec<Found>> {
        let storages: HashSet<usize> =
            self.parameters.iter().map(|parameter| backend::storage_address(&parameter.var)).collect();
        let mut found = Vec::with_capacity(self.parameters.len());
        self.missing.clear();
        for (i, parameter) in self.parameters.iter().enumerate() {
            match grads.get(&parameter.var) {
                Some(grad) => found.push((i, parameter.prepare(grad, &storages)?)),
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
        let seen = self.warm_up.average().is_some() || self.momentum.average().is_some();
        if self.is_adaptive() && !seen && !std::mem::replace(&mut self.unobserved_reported, true) {
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
        let norm = sums.iter().sum::<f64>().sqrt();
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

    fn apply(&mut self, found: Vec<Found>, clip_scale: f64) -> Result<()> {
        let config = &self.config;
        let scalars = StepScalars {
            clip_scale,
            lr: config.lr * self.warm_up.value(),
            beta1: self.momentum.value().unwrap_or(config.beta1),
            beta2: config.beta2,
            eps: config.eps,
        };
        let mut found = found.into_iter().peekable();
        let mut steps = Vec::with_capacity(found.len());
        for (i, parameter) in self.parameters.iter_mut().enumerate() {
            if let Some((_, grad)) = found.next_if(|(at, _)| *at == i) {
                let [first, second] = parameter.beta_products;
                let products = [first * scalars.beta1, second * scalars.beta2];
                let decay = weight_decay(config, &parameter.var);
                steps.push((AdamW::new(scalars, decay, products), parameter, grad, products));
            }
        }
        let jobs = steps
            .iter_mut()
            .map(|(rule, parameter, grad, _)| Job {
                param: &parameter.var,
                grad: grad.clone(),
                rule: rule as &dyn Rule,
                slots: &mut parameter.slots,
            })
            .collect();
        backend::update(jobs)?;
        for (_, parameter, _, products) in steps {
            parameter.beta_products = products;
        }
        self.stats.step += 1;
        self.stats.clip_scale = clip_scale;
        self.stats.lr = scalars.lr;
        self.stats.beta1 = scalars.beta1;
        Ok(())
    }
}

fn weight_decay(config: &VelvetConfig, var: &Var) -> f64 {
    match config.decay_on {
        WeightDecayOn::All => config.weight_decay,
        WeightDecayOn::Matrices if var.rank() >= 2 => config.weight_decay,
        WeightDecayOn::Matrices => 0.0,
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

    /// The base learning rate; [`Stats::lr`] is the one applied, which [`EntropyLr`](crate::EntropyLr) may have scaled.
    fn learning_rate(&self) -> f64 {
        self.config.lr
    }

    /// Sets the base learning rate.
    fn set_learning_rate(&mut self, lr: f64) {
        self.config.lr = lr;
    }

    /// Observes the loss, computes the gradients and takes a step.
    fn backward_step(&mut self, loss: &Tensor) -> candle_core::Result<()> {
        // A loss of several elements is fine for candle's backward (their sum), but is nothing to adapt to.
        if self.is_adaptive() {
            self.observe(loss)?;
        }
        let grads = loss.backward()?;
        self.step(&grads)
    }
}
