//! The study of the parts that are off by default: each added to AdamW and to Velvet, at the tuned learning rate and where
//! something is wrong.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use velvet_optim::{
    Brake, CautiousUpdate, DecayMode, EntropyLr, Momentum, PolyakCap, ProgressSignal, TrustRegion,
    VelvetConfig,
};

use super::arm::Arm;
use super::plan::{Record, Study};
use super::task::{Data, Task, WarmUp};

/// A part that an arm is run with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// None.
    #[default]
    None,
    /// The overconfidence brake.
    Brake,
    /// The Polyak cap.
    PolyakCap,
    /// The trust region.
    TrustRegion,
    /// The cautious update.
    CautiousUpdate,
    /// The cautious decay.
    CautiousDecay,
    /// Nesterov's momentum in AdamW.
    Nesterov,
    /// The warm-up driven by the loss in place of the arm's own.
    LossWarmUp,
    /// The warm-up driven by the entropy of the predictions in place of the arm's own.
    EntropyWarmUp,
}

impl Part {
    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }

    /// Whether it takes the place of a warm-up over steps.
    pub fn warms_up(self) -> bool {
        matches!(self, Self::LossWarmUp | Self::EntropyWarmUp)
    }

    /// A configuration with this part.
    pub fn add_to(self, config: VelvetConfig, vocab: usize) -> VelvetConfig {
        match self {
            Self::None => config,
            Self::Brake => config.with_brake(Brake::gap()),
            Self::PolyakCap => config.with_polyak(PolyakCap::cap()),
            Self::TrustRegion => config.with_trust_region(TrustRegion::relative()),
            Self::CautiousUpdate => VelvetConfig { cautious_update: CautiousUpdate::Aligned, ..config },
            Self::CautiousDecay => VelvetConfig { decay_mode: DecayMode::Cautious, ..config },
            Self::Nesterov => VelvetConfig { momentum: Momentum::Nesterov, ..config },
            Self::LossWarmUp => config.with_entropy_lr(EntropyLr::warm_up(vocab)),
            Self::EntropyWarmUp => config.with_entropy_lr(by_entropy(EntropyLr::warm_up(vocab))),
        }
    }
}

/// A warm-up that the entropy of the predictions drives in place of the loss.
pub(super) fn by_entropy(warm_up: EntropyLr) -> EntropyLr {
    match warm_up {
        EntropyLr::WarmUp { initial_loss, margin, nats, floor, decay, .. } => {
            let signal = ProgressSignal::Entropy;
            EntropyLr::WarmUp { initial_loss, margin, nats, floor, decay, signal }
        }
        other => other,
    }
}

/// What is wrong with a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Condition {
    /// Nothing.
    Tuned,
    /// The learning rate is this many times the arm's best.
    Rate(f64),
    /// There is no warm-up of any kind.
    Cold,
    /// Eight batches are of random tokens.
    Corrupted,
}

/// What is compared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Parts {
    /// The best learning rate of AdamW.
    pub adamw_lr: f64,
    /// The best learning rate of Velvet.
    pub velvet_lr: f64,
    /// Seeds of every run.
    pub seeds: u64,
    /// Steps of a run.
    pub steps: u64,
}

impl Parts {
    /// The arms that parts are added to.
    pub const ARMS: [Arm; 2] = [Arm::Adamw, Arm::Velvet];

    /// The parts that an arm is run with, the first of which is none.
    pub fn parts(arm: Arm) -> Vec<Part> {
        use Part::{
            Brake, CautiousDecay, CautiousUpdate, EntropyWarmUp, LossWarmUp, Nesterov, None, PolyakCap,
            TrustRegion,
        };
        let mut parts =
            vec![None, Brake, PolyakCap, TrustRegion, CautiousUpdate, CautiousDecay, EntropyWarmUp];
        if arm == Arm::Adamw {
            // Velvet has the second already, and the first in its other rule.
            parts.extend([Nesterov, LossWarmUp]);
        }
        parts
    }

    /// What an arm is run under.
    pub fn conditions(arm: Arm) -> Vec<Condition> {
        let rates = if arm == Arm::Adamw { [4.0, 8.0] } else { [2.0, 8.0] };
        let [low, high] = rates.map(Condition::Rate);
        vec![Condition::Tuned, low, high, Condition::Cold, Condition::Corrupted]
    }

    /// The run of an arm with a part, or none where the part has nothing to do with the condition.
    pub fn task(&self, arm: Arm, part: Part, condition: Condition, seed: u64) -> Option<Task> {
        // Parts that are to make a wrong setting harmless; the others are to make a right one better.
        let protects =
            matches!(part, Part::None | Part::Brake | Part::PolyakCap | Part::TrustRegion) || part.warms_up();
        let best = if arm == Arm::Adamw { self.adamw_lr } else { self.velvet_lr };
        let task = Task { part, ..Task::new(arm, best, self.steps, seed) };
        match condition {
            Condition::Tuned => Some(task),
            // Twice Velvet's best is eight times AdamW's: the arm alone, to be compared with AdamW.
            Condition::Rate(factor) => {
                let runs = match arm {
                    Arm::Adamw => protects,
                    _ => part.is_none() || factor > 2.0 && protects && !part.warms_up(),
                };
                runs.then_some(Task { lr: best * factor, ..task })
            }
            Condition::Cold => {
                (protects && !part.warms_up()).then_some(Task { warm_up: WarmUp::Off, ..task })
            }
            Condition::Corrupted => {
                (protects && !part.warms_up()).then_some(Task { data: Data::Corrupted, ..task })
            }
        }
    }

    /// All runs, those first that can least be done without.
    pub fn tasks(&self) -> Vec<Task> {
        let mut tasks = Vec::new();
        for seed in 0..self.seeds {
            for at in 0..5 {
                for arm in Self::ARMS {
                    let condition = Self::conditions(arm).get(at).copied();
                    let parts = Self::parts(arm);
                    let of = |part| condition.and_then(|condition| self.task(arm, part, condition, seed));
                    tasks.extend(parts.into_iter().filter_map(of));
                }
            }
        }
        // Whether the rates are the best ones for this length.
        for (arm, best) in [(Arm::Adamw, self.adamw_lr), (Arm::Velvet, self.velvet_lr)] {
            for factor in [0.5, 2.0] {
                let task = Task::new(arm, best * factor, self.steps, 0);
                if !tasks.contains(&task) {
                    tasks.push(task);
                }
            }
        }
        tasks
    }
}

impl Study<'_, Parts> {
    /// Makes all runs that there is time for.
    ///
    /// # Errors
    /// A run fails, or the record cannot be written.
    pub fn run(mut self) -> Result<Record<Parts>> {
        for task in self.plan().tasks() {
            self.one(task)?;
        }
        Ok(self.into_record())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Parts {
        Parts { adamw_lr: 1e-3, velvet_lr: 4e-3, seeds: 3, steps: 240 }
    }

    #[test]
    fn every_part_changes_a_valid_configuration() {
        for arm in Parts::ARMS {
            let base = arm.config(8192);
            for part in Parts::parts(arm) {
                let config = part.add_to(base.clone(), 8192);
                config.validate().unwrap();
                assert_eq!(config == base, part.is_none(), "{arm:?} {part:?}");
            }
        }
    }

    #[test]
    fn no_run_is_planned_twice_and_every_one_has_its_seeds() {
        let tasks = plan().tasks();
        for (i, task) in tasks.iter().enumerate() {
            assert!(!tasks[..i].contains(task), "{task:?}");
        }
        // 9 + 6 + 6 + 4 + 4 of AdamW and 7 + 1 + 4 + 4 + 4 of Velvet, three times; three other rates.
        assert_eq!(tasks.len(), 3 * 29 + 3 * 20 + 3);
        let steps: u64 = tasks.iter().map(|task| task.steps).sum();
        assert!(steps <= 75 * 500, "{steps}");
    }
}
