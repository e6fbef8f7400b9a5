//! One run: one model trained one way.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use serde::{Deserialize, Serialize};
use std::time::Instant;
use velvet_optim::{EntropyLr, NonFinite, Optimizer, Schedule, Span, Velvet, VelvetConfig};
use vesper_data::{BatchSampler, EvalBatches, SamplerConfig, Tokens};
use vesper_model::ops::backward;
use vesper_model::{VesperConfig, VesperLM, trainable};

use super::arm::Arm;
use super::parts::Part;

/// What all runs of a study share.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The model.
    pub model: VesperConfig,
    /// Activations are of this type, parameters f32.
    pub compute: DType,
    /// Training tokens.
    pub train: Tokens,
    /// Held-out tokens.
    pub held_out: Tokens,
    /// Sequences a step.
    pub batch: usize,
    /// Tokens a sequence.
    pub seq: usize,
    /// Sequences of the held-out text that a run ends on.
    pub eval_windows: usize,
    /// Where it runs.
    pub device: Device,
}

/// What is done to the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Data {
    /// Nothing.
    Clean,
    /// Eight batches, evenly spread over the middle of the run, are of random tokens.
    Corrupted,
}

/// How a run begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WarmUp {
    /// As the arm does.
    #[default]
    Own,
    /// With the whole learning rate at once.
    Off,
}

impl WarmUp {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    fn is_own(&self) -> bool {
        *self == Self::Own
    }
}

/// One run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// How the model is updated.
    pub arm: Arm,
    /// What is added to that.
    #[serde(default, skip_serializing_if = "Part::is_none")]
    pub part: Part,
    /// How it begins.
    #[serde(default, skip_serializing_if = "WarmUp::is_own")]
    pub warm_up: WarmUp,
    /// The base learning rate; it falls linearly to 0 over the last half.
    pub lr: f64,
    /// Optimizer steps.
    pub steps: u64,
    /// Of the first weights and the order of the data, the same for all arms.
    pub seed: u64,
    /// What is done to the data.
    pub data: Data,
}

impl Task {
    /// A run of an arm as it is, on clean data.
    pub fn new(arm: Arm, lr: f64, steps: u64, seed: u64) -> Self {
        Self { arm, part: Part::None, warm_up: WarmUp::Own, lr, steps, seed, data: Data::Clean }
    }

    fn config(&self, vocab: usize) -> VelvetConfig {
        let mut config = self.part.add_to(self.arm.config(vocab), vocab);
        if self.warm_up == WarmUp::Off {
            config.entropy_lr = EntropyLr::Off;
        }
        config.non_finite = NonFinite::Skip;
        config
    }

    /// The share of the steps that warm the learning rate up.
    fn warm_up_share(&self) -> f64 {
        match self.warm_up {
            WarmUp::Own if !self.part.warms_up() => self.arm.warm_up(),
            WarmUp::Own | WarmUp::Off => 0.0,
        }
    }
}

/// What a run came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// The run.
    #[serde(flatten)]
    pub task: Task,
    /// Held-out loss at the end, nats a token; none where the run diverged.
    pub loss: Option<f64>,
    /// Seconds of all steps.
    pub seconds: f64,
    /// Steps that were left out for NaN or infinity in a gradient.
    pub skipped: u64,
    /// Mean training loss of each twentieth of the run.
    pub curve: Vec<f64>,
}

impl Setting {
    /// Makes a run.
    ///
    /// # Errors
    /// A device that is out of memory or fails.
    pub fn run(&self, task: Task) -> Result<Outcome> {
        Ok(self.run_and(task, |_| Ok(()))?.0)
    }

    /// Makes a run, and looks at the trained model.
    ///
    /// # Errors
    /// As [`Setting::run`], and those of `look`.
    pub fn run_and<T>(&self, task: Task, look: impl FnOnce(&VesperLM) -> Result<T>) -> Result<(Outcome, T)> {
        let varmap = VarMap::new();
        let model = VesperLM::initialize(&self.model, &varmap, task.seed, DType::F32, &self.device)?
            .with_compute_dtype(self.compute);
        let config = task.config(self.model.vocab_size);
        let mut optimizer = Velvet::named(trainable(&self.model, &varmap)?, config)?;
        let sampler =
            SamplerConfig::default().with_batch(self.batch).with_seq(self.seq).with_seed(task.seed + 1);
        let mut batches = BatchSampler::new(self.train.clone(), sampler)?;
        let schedule = Schedule::Linear {
            warm_up: Span::Fraction(task.warm_up_share()),
            decay: Span::Fraction(0.5),
            end: 0.0,
        };
        let part = task.steps.div_ceil(20);
        let (mut curve, mut sum): (Vec<f64>, Option<Tensor>) = (Vec::new(), None);
        self.device.synchronize()?;
        let started = Instant::now();
        for step in 0..task.steps {
            let mut batch = batches.next_batch(&self.device)?;
            if task.data == Data::Corrupted && corrupted(step, task.steps) {
                (batch.inputs, batch.targets) = self.noise(task.seed * 1000 + step)?;
            }
            let out = model.loss(&batch.inputs, &batch.targets)?;
            let mut lr = schedule.lr(task.lr, step, task.steps);
            if task.arm == Arm::Original {
                let loss = f64::from(out.loss.to_scalar::<f32>()?);
                if let Some((scale, beta1)) = task.arm.original(loss, self.model.vocab_size) {
                    let mut config = optimizer.config().clone();
                    config.beta1 = beta1;
                    optimizer.set_config(config)?;
                    lr *= scale;
                }
            }
            optimizer.set_learning_rate(lr);
            optimizer.observe_with_entropy(&out.loss, &out.entropy)?;
            optimizer.try_step(&backward(&out.loss)?)?;
            let loss = out.loss.detach();
            sum = Some(match sum {
                Some(sum) => (sum + loss)?,
                None => loss,
            });
            if (step + 1) % part == 0 || step + 1 == task.steps {
                let steps = (step % part + 1) as f64;
                if let Some(sum) = sum.take() {
                    curve.push(f64::from(sum.to_scalar::<f32>()?) / steps);
                }
                // A diverged run is lost; going on would only cost time.
                if curve.last().is_some_and(|loss| !loss.is_finite()) {
                    break;
                }
            }
        }
        self.device.synchronize()?;
        let seconds = started.elapsed().as_secs_f64();
        let model = model.detach();
        let loss = self.held_out_loss(&model)?;
        let skipped = optimizer.stats()?.skipped;
        let outcome = Outcome { task, loss: loss.is_finite().then_some(loss), seconds, skipped, curve };
        Ok((outcome, look(&model)?))
    }

    fn held_out_loss(&self, model: &VesperLM) -> Result<f64> {
        let batches = EvalBatches::new(self.held_out.clone(), self.batch, self.seq, &self.device)?;
        let (mut sum, mut count) = (0.0, 0.0);
        for batch in batches.limit(self.eval_windows) {
            let batch = batch?;
            let n = batch.counted as f64; // the last batch may be smaller
            sum += n * f64::from(model.loss(&batch.inputs, &batch.targets)?.loss.to_scalar::<f32>()?);
            count += n;
        }
        Ok(sum / count)
    }

    /// Inputs and targets of random tokens.
    fn noise(&self, seed: u64) -> Result<(Tensor, Tensor)> {
        let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            ((x >> 32) % self.model.vocab_size as u64) as u32
        };
        let mut tokens = || -> Result<Tensor> {
            let ids: Vec<u32> = (0..self.batch * self.seq).map(|_| next()).collect();
            Ok(Tensor::from_vec(ids, (self.batch, self.seq), &self.device)?)
        };
        Ok((tokens()?, tokens()?))
    }
}

/// Eight steps between 30 % and 70 % of a run.
fn corrupted(step: u64, steps: u64) -> bool {
    (0..8).any(|i| step == steps * (60 + 10 * i) / 200)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_steps_are_corrupted() {
        for steps in [100, 300, 601] {
            assert_eq!((0..steps).filter(|&step| corrupted(step, steps)).count(), 8);
        }
    }
}
