//! The ways to update a model that the study compares.

use serde::{Deserialize, Serialize};
use velvet_optim::{
    Brake, CautiousUpdate, DecayMode, EntropyLr, Momentum, Orthogonal, PerplexityMomentum, PolyakCap,
    RowMoment, Rule, TrustRegion, VelvetConfig,
};

use super::parts::by_entropy;

/// One way to update a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Arm {
    /// AdamW, betas .9 and .95, decay .1 on matrices, clip 1, warm-up over 5 % of the steps.
    Adamw,
    /// AdamW without warm-up.
    AdamwCold,
    /// AdamW with its warm-up and the perplexity-guided beta1.
    AdamwGuided,
    /// AdamW with the entropy-driven warm-up in place of its own.
    AdamwEntropy,
    /// AdamW without warm-up, under the trust region.
    AdamwTrust,
    /// AdamW without warm-up, under the Polyak cap.
    AdamwPolyak,
    /// AdamW without warm-up, with the overconfidence brake.
    AdamwBrake,
    /// AdamW with its warm-up and Nesterov's momentum.
    AdamwNesterov,
    /// AdamW with its warm-up and the cautious update.
    AdamwCautious,
    /// AdamW with its warm-up and the cautious decay.
    AdamwCautiousDecay,
    /// AdamW with the formula that Velvet was first published with.
    Original,
    /// The preset `VelvetConfig::language_model` as it first was: a warm-up driven by the loss, and no trust region.
    Velvet,
    /// The first preset without orthogonalised momentum.
    VelvetNoOrthogonal,
    /// The first preset without the second moment of rows.
    VelvetNoRows,
    /// The first preset without perplexity-guided momentum.
    VelvetNoGuide,
    /// The first preset without the entropy-driven warm-up, with a warm-up over 5 % of the steps.
    VelvetNoEntropy,
    /// The first preset with the warm-up driven by the entropy of the predictions in place of the loss.
    VelvetBySignal,
    /// The first preset under the trust region.
    VelvetTrust,
    /// The preset `VelvetConfig::language_model` as it is: under the trust region, without a warm-up.
    VelvetTrustCold,
    /// The first preset under the Polyak cap.
    VelvetPolyak,
    /// The first preset with the overconfidence brake.
    VelvetBrake,
    /// The first preset with the cautious decay.
    VelvetCautiousDecay,
}

impl Arm {
    /// The optimizer's configuration for a vocabulary.
    pub fn config(self, vocab: usize) -> VelvetConfig {
        let velvet = VelvetConfig::language_model(vocab);
        let velvet = VelvetConfig {
            hidden_matrices: Some(Rule::Orthogonal(Orthogonal::default())),
            entropy_lr: EntropyLr::warm_up(vocab),
            perplexity_momentum: PerplexityMomentum::progress(vocab),
            trust_region: TrustRegion::Off,
            ..velvet
        };
        let adamw = VelvetConfig {
            hidden_matrices: None,
            entropy_lr: EntropyLr::Off,
            perplexity_momentum: PerplexityMomentum::Off,
            ..velvet.clone()
        };
        match self {
            Self::Adamw | Self::AdamwCold | Self::Original => adamw,
            Self::AdamwGuided => adamw.with_perplexity_momentum(PerplexityMomentum::progress(vocab)),
            Self::AdamwEntropy => adamw.with_entropy_lr(EntropyLr::warm_up(vocab)),
            Self::AdamwTrust => adamw.with_trust_region(TrustRegion::relative()),
            Self::AdamwPolyak => adamw.with_polyak(PolyakCap::cap()),
            Self::AdamwBrake => adamw.with_brake(Brake::gap()),
            Self::AdamwNesterov => VelvetConfig { momentum: Momentum::Nesterov, ..adamw },
            Self::AdamwCautious => VelvetConfig { cautious_update: CautiousUpdate::Aligned, ..adamw },
            Self::AdamwCautiousDecay => VelvetConfig { decay_mode: DecayMode::Cautious, ..adamw },
            Self::Velvet => velvet,
            Self::VelvetNoOrthogonal => VelvetConfig { hidden_matrices: None, ..velvet },
            Self::VelvetNoRows => {
                let plain = Orthogonal { row_moment: RowMoment::Off, ..Orthogonal::default() };
                velvet.with_hidden_matrices(Rule::Orthogonal(plain))
            }
            Self::VelvetNoGuide => velvet.with_perplexity_momentum(PerplexityMomentum::Off),
            Self::VelvetNoEntropy => velvet.with_entropy_lr(EntropyLr::Off),
            Self::VelvetBySignal => {
                let warm_up = by_entropy(velvet.entropy_lr);
                velvet.with_entropy_lr(warm_up)
            }
            Self::VelvetTrust => velvet.with_trust_region(TrustRegion::relative()),
            Self::VelvetTrustCold => {
                velvet.with_trust_region(TrustRegion::relative()).with_entropy_lr(EntropyLr::Off)
            }
            Self::VelvetPolyak => velvet.with_polyak(PolyakCap::cap()),
            Self::VelvetBrake => velvet.with_brake(Brake::gap()),
            Self::VelvetCautiousDecay => VelvetConfig { decay_mode: DecayMode::Cautious, ..velvet },
        }
    }

    /// The share of the steps that warm the learning rate up.
    pub fn warm_up(self) -> f64 {
        match self {
            Self::Adamw
            | Self::AdamwGuided
            | Self::AdamwNesterov
            | Self::AdamwCautious
            | Self::AdamwCautiousDecay
            | Self::Original
            | Self::VelvetNoEntropy => 0.05,
            _ => 0.0,
        }
    }

    /// The learning rate's scale and beta1 of a step by the formula that Velvet was first published with:
    ///
    /// ```text
    /// scale = clamp(min(loss, 20) / ln V / 0.5, 0.7, 1.3)
    /// beta1 = clamp(0.9 * clamp(40 / exp(min(loss, 20)), 0.7, 1.3), 0.5, 0.999)
    /// ```
    pub fn original(self, loss: f64, vocab: usize) -> Option<(f64, f64)> {
        (self == Self::Original).then(|| {
            let loss = loss.min(20.0);
            let scale = (loss / (vocab as f64).ln() / 0.5).clamp(0.7, 1.3);
            let beta1 = (0.9 * (40.0 / loss.exp().max(1.0)).clamp(0.7, 1.3)).clamp(0.5, 0.999);
            (scale, beta1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    #[test]
    fn every_arm_has_a_valid_configuration() {
        for arm in Arm::value_variants() {
            arm.config(8192).validate().unwrap();
        }
    }

    #[test]
    fn the_preset_is_among_them() {
        assert_eq!(Arm::VelvetTrustCold.config(8192), VelvetConfig::language_model(8192));
    }

    #[test]
    fn the_original_formula_saturates() {
        let (scale, beta1) = Arm::Original.original(9.0, 8192).unwrap();
        assert_eq!((scale, beta1), (1.3, 0.9 * 0.7));
        assert_eq!(Arm::Velvet.original(9.0, 8192), None);
    }
}
