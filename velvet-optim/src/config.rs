//! [`VelvetConfig`]: what an optimizer is made from.

use crate::adaptive::{self, Brake, EntropyLr, PerplexityMomentum, PolyakCap, TrustRegion};
use crate::error::{Error, Result};
use crate::group::ParamGroup;
use crate::options::{
    BackendChoice, CautiousUpdate, DecayMode, GradClip, HalfParameters, MissingGradients, Momentum,
    NonFinite, SparseRows, StateFormat, UpdateNorms, WeightDecayOn,
};
use crate::rule::Rule;
use serde::{Deserialize, Serialize};

/// The hyper-parameters of [`Velvet`](crate::Velvet).
///
/// The defaults are those of `torch.optim.AdamW`, with which the update then agrees: no clipping, decay on every
/// parameter, nothing adaptive. [`VelvetConfig::language_model`] is the preset for training a language model.
///
/// ```
/// use velvet_optim::{GradClip, VelvetConfig};
/// let config = VelvetConfig { lr: 3e-4, clip: GradClip::GlobalNorm(1.0), ..Default::default() };
/// assert_eq!(config.beta2, 0.999);
/// config.validate()?;
/// # Ok::<(), velvet_optim::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VelvetConfig {
    /// The base learning rate, finite and at least 0 (default 1e-3). A schedule changes it through
    /// [`set_learning_rate`](candle_nn::Optimizer::set_learning_rate); [`EntropyLr`] scales it.
    pub lr: f64,
    /// Decay of the average of gradients, in [0, 1) (default 0.9). [`PerplexityMomentum`] takes its place once a
    /// loss was observed.
    pub beta1: f64,
    /// Decay of the average of squared gradients, in [0, 1) (default 0.999).
    pub beta2: f64,
    /// Added to the root of the second moment, at least 1.2e-38, the smallest normal f32 (default 1e-8).
    pub eps: f64,
    /// Decoupled weight decay, finite and at least 0 (default 0.01): a step first scales a parameter by
    /// `1 - lr * weight_decay`.
    pub weight_decay: f64,
    /// Which parameters decay (default: all).
    pub decay_on: WeightDecayOn,
    /// Where they decay (default: everywhere).
    pub decay_mode: DecayMode,
    /// The rule of all parameters that nothing else gives one (default: AdamW).
    pub rule: Rule,
    /// The rule of hidden matrices, `None` for `rule` (default).
    ///
    /// A parameter is one where it has two dimensions of at least 2 and, with names, is not called as embeddings,
    /// heads and adapters are (a part with `embed`, `embd` or `lora`, or `emb` as a word, such as `tok_emb`; an owner
    /// called `wte`, `wpe`,
    /// `shared`, `relative_attention_bias`, `lm_head`, `head`, `output`, `output_layer`, `classifier`, `score`,
    /// `decoder`,
    /// `cls`, `logits` or `to_logits`). Without names, its longer side must be less than 8 times the shorter: a
    /// vocabulary is longer. Where that is wrong for a model, give names and [`groups`](Self::groups).
    pub hidden_matrices: Option<Rule>,
    /// Parameters with settings of their own, by name (default: none); the first group that matches counts.
    pub groups: Vec<ParamGroup>,
    /// The form of AdamW's momentum (default: averaged).
    pub momentum: Momentum,
    /// Whether AdamW leaves out elements that point against their gradient (default: no).
    pub cautious_update: CautiousUpdate,
    /// Gradient clipping (default: off).
    pub clip: GradClip,
    /// The entropy-adaptive learning rate (default: off).
    pub entropy_lr: EntropyLr,
    /// The perplexity-guided momentum (default: off).
    pub perplexity_momentum: PerplexityMomentum,
    /// The overconfidence brake (default: off).
    pub brake: Brake,
    /// The Polyak cap on the learning rate (default: off).
    pub polyak: PolyakCap,
    /// The trust region on relative update size (default: off).
    pub trust_region: TrustRegion,
    /// What happens to rows without a gradient (default: they are updated as others); groups can choose for theirs.
    pub sparse_rows: SparseRows,
    /// How bf16 and f16 parameters are rounded (default: to nearest).
    pub half_parameters: HalfParameters,
    /// How state arrays are kept (default: in full precision).
    pub state_format: StateFormat,
    /// Whether updates are measured (default: only where needed).
    pub update_norms: UpdateNorms,
    /// What to do about parameters without a gradient (default: report each once).
    pub missing_gradients: MissingGradients,
    /// What to do about NaN or infinity in a gradient (default: an error before anything is written).
    pub non_finite: NonFinite,
    /// Which implementation updates parameters (default: the fastest there is).
    pub backend: BackendChoice,
}

impl Default for VelvetConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            decay_on: WeightDecayOn::All,
            decay_mode: DecayMode::Always,
            rule: Rule::AdamW,
            hidden_matrices: None,
            groups: Vec::new(),
            momentum: Momentum::Averaged,
            cautious_update: CautiousUpdate::Off,
            clip: GradClip::Off,
            entropy_lr: EntropyLr::Off,
            perplexity_momentum: PerplexityMomentum::Off,
            brake: Brake::Off,
            polyak: PolyakCap::Off,
            trust_region: TrustRegion::Off,
            sparse_rows: SparseRows::Off,
            half_parameters: HalfParameters::Nearest,
            state_format: StateFormat::Full,
            update_norms: UpdateNorms::Off,
            missing_gradients: MissingGradients::Report,
            non_finite: NonFinite::Error,
            backend: BackendChoice::Auto,
        }
    }
}

impl VelvetConfig {
    /// Sets the base learning rate.
    #[must_use]
    pub fn with_lr(mut self, lr: f64) -> Self {
        self.lr = lr;
        self
    }

    /// Sets both decay rates.
    #[must_use]
    pub fn with_betas(mut self, beta1: f64, beta2: f64) -> Self {
        (self.beta1, self.beta2) = (beta1, beta2);
        self
    }

    /// Sets the term added to the root of the second moment.
    #[must_use]
    pub fn with_eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// Sets the decoupled weight decay and the parameters it acts on.
    #[must_use]
    pub fn with_weight_decay(mut self, weight_decay: f64, on: WeightDecayOn) -> Self {
        (self.weight_decay, self.decay_on) = (weight_decay, on);
        self
    }

    /// Sets gradient clipping.
    #[must_use]
    pub fn with_clip(mut self, clip: GradClip) -> Self {
        self.clip = clip;
        self
    }

    /// Sets the entropy-adaptive learning rate.
    #[must_use]
    pub fn with_entropy_lr(mut self, entropy_lr: EntropyLr) -> Self {
        self.entropy_lr = entropy_lr;
        self
    }

    /// Sets the perplexity-guided momentum.
    #[must_use]
    pub fn with_perplexity_momentum(mut self, perplexity_momentum: PerplexityMomentum) -> Self {
        self.perplexity_momentum = perplexity_momentum;
        self
    }

    /// Sets the rule of all parameters that nothing else gives one.
    #[must_use]
    pub fn with_rule(mut self, rule: Rule) -> Self {
        self.rule = rule;
        self
    }

    /// Sets the rule of hidden matrices.
    #[must_use]
    pub fn with_hidden_matrices(mut self, rule: Rule) -> Self {
        self.hidden_matrices = Some(rule);
        self
    }

    /// Adds a group of parameters; those added before count first.
    #[must_use]
    pub fn with_group(mut self, group: ParamGroup) -> Self {
        self.groups.push(group);
        self
    }

    /// Sets the overconfidence brake.
    #[must_use]
    pub fn with_brake(mut self, brake: Brake) -> Self {
        self.brake = brake;
        self
    }

    /// Sets the Polyak cap.
    #[must_use]
    pub fn with_polyak(mut self, polyak: PolyakCap) -> Self {
        self.polyak = polyak;
        self
    }

    /// Sets the trust region.
    #[must_use]
    pub fn with_trust_region(mut self, trust_region: TrustRegion) -> Self {
        self.trust_region = trust_region;
        self
    }

    /// Sets how bf16 and f16 parameters are rounded.
    #[must_use]
    pub fn with_half_parameters(mut self, half_parameters: HalfParameters) -> Self {
        self.half_parameters = half_parameters;
        self
    }

    /// Sets how state arrays are kept.
    #[must_use]
    pub fn with_state_format(mut self, state_format: StateFormat) -> Self {
        self.state_format = state_format;
        self
    }

    /// Sets what happens to parameters without a gradient.
    #[must_use]
    pub fn with_missing_gradients(mut self, missing_gradients: MissingGradients) -> Self {
        self.missing_gradients = missing_gradients;
        self
    }

    /// Sets what happens when a gradient holds NaN or infinity.
    #[must_use]
    pub fn with_non_finite(mut self, non_finite: NonFinite) -> Self {
        self.non_finite = non_finite;
        self
    }

    /// Sets the implementation.
    #[must_use]
    pub fn with_backend(mut self, backend: BackendChoice) -> Self {
        self.backend = backend;
        self
    }

    /// Checks every field against its range.
    ///
    /// # Errors
    /// [`Error::Config`] names the first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        const MIN_EPS: f64 = f32::MIN_POSITIVE as f64;
        at_least_zero("lr", self.lr)?;
        unit("beta1", self.beta1)?;
        unit("beta2", self.beta2)?;
        // Below this an f32 step divides 0 by 0 wherever no gradient was seen yet.
        check("eps", self.eps, "a finite number >= 1.2e-38", self.eps.is_finite() && self.eps >= MIN_EPS)?;
        at_least_zero("weight_decay", self.weight_decay)?;
        if let GradClip::GlobalNorm(max) = self.clip {
            positive("clip.GlobalNorm", max)?;
        }
        self.rule.validate().map_err(|error| error.within("rule"))?;
        if let Some(rule) = &self.hidden_matrices {
            rule.validate().map_err(|error| error.within("hidden_matrices"))?;
        }
        for (i, group) in self.groups.iter().enumerate() {
            group.validate().map_err(|error| error.within(&format!("groups[{i}]")))?;
        }
        adaptive::validate(self)
    }

    /// Whether a step must measure its updates.
    pub(crate) fn measures(&self) -> bool {
        self.update_norms == UpdateNorms::On
            || self.polyak != PolyakCap::Off
            || self.trust_region != TrustRegion::Off
    }

    /// Whether a part looks at the loss.
    pub(crate) fn observes(&self) -> bool {
        self.entropy_lr != EntropyLr::Off
            || self.perplexity_momentum != PerplexityMomentum::Off
            || self.brake != Brake::Off
            || self.polyak != PolyakCap::Off
    }
}

fn check(field: &'static str, got: f64, expected: &'static str, good: bool) -> Result<()> {
    if good { Ok(()) } else { Err(Error::Config { field: field.into(), expected, got }) }
}

pub(crate) fn unit(field: &'static str, got: f64) -> Result<()> {
    check(field, got, "a number in [0, 1)", (0.0..1.0).contains(&got))
}

pub(crate) fn fraction(field: &'static str, got: f64) -> Result<()> {
    check(field, got, "a number in [0, 1]", (0.0..=1.0).contains(&got))
}

pub(crate) fn positive(field: &'static str, got: f64) -> Result<()> {
    check(field, got, "a finite number > 0", got.is_finite() && got > 0.0)
}

pub(crate) fn at_least_zero(field: &'static str, got: f64) -> Result<()> {
    check(field, got, "a finite number >= 0", got.is_finite() && got >= 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::{Lion, Orthogonal, Sgd};

    #[test]
    fn defaults_are_those_of_torch_adamw() {
        let c = VelvetConfig::default();
        assert_eq!((c.lr, c.beta1, c.beta2, c.eps, c.weight_decay), (1e-3, 0.9, 0.999, 1e-8, 0.01));
        assert_eq!(c.clip, GradClip::Off);
        assert_eq!(c.entropy_lr, EntropyLr::Off);
        assert_eq!(c.perplexity_momentum, PerplexityMomentum::Off);
        c.validate().unwrap();
    }

    #[test]
    fn each_field_out_of_range_is_named() {
        let base = VelvetConfig::default;
        let bad = [
            ("lr", base().with_lr(f64::NAN)),
            ("lr", base().with_lr(-1.0)),
            ("beta1", base().with_betas(1.0, 0.9)),
            ("beta2", base().with_betas(0.9, -0.1)),
            ("eps", base().with_eps(0.0)),
            ("eps", base().with_eps(1e-46)),
            ("weight_decay", base().with_weight_decay(f64::INFINITY, WeightDecayOn::All)),
            ("clip.GlobalNorm", base().with_clip(GradClip::GlobalNorm(0.0))),
            ("rule.Lion.beta2", base().with_rule(Rule::Lion(Lion { beta2: 1.0, ..Lion::default() }))),
            (
                "hidden_matrices.Sgd.momentum",
                base().with_hidden_matrices(Rule::Sgd(Sgd { momentum: -1.0, ..Sgd::default() })),
            ),
            (
                "hidden_matrices.Orthogonal.steps",
                base()
                    .with_hidden_matrices(Rule::Orthogonal(Orthogonal { steps: 0, ..Orthogonal::default() })),
            ),
            (
                "groups[1].lr_scale",
                base()
                    .with_group(ParamGroup::of(["*"]))
                    .with_group(ParamGroup { lr_scale: f64::NAN, ..ParamGroup::of(["*"]) }),
            ),
            (
                "groups[0].rule.Lion.beta1",
                base().with_group(ParamGroup {
                    rule: Some(Rule::Lion(Lion { beta1: 1.0, ..Lion::default() })),
                    ..ParamGroup::of(["*"])
                }),
            ),
            ("brake.nats", base().with_brake(Brake::Gap { margin: 0.1, nats: 0.0, floor: 0.1, decay: 0.8 })),
            (
                "polyak.factor",
                base().with_polyak(PolyakCap::Cap { lower_bound: 0.0, factor: 0.0, decay: 0.9 }),
            ),
            (
                "trust_region.max_ratio",
                base().with_trust_region(TrustRegion::Relative { max_ratio: 0.0, weight_floor: 1e-3 }),
            ),
            ("entropy_lr.initial_loss", base().with_entropy_lr(EntropyLr::warm_up(0))),
            (
                "perplexity_momentum.initial_loss",
                base().with_perplexity_momentum(PerplexityMomentum::progress(1)),
            ),
        ];
        for (expected, config) in bad {
            match config.validate() {
                Err(Error::Config { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }

    #[test]
    fn serde_round_trips_and_rejects_unknown_fields() {
        let config = VelvetConfig::language_model(32064);
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<VelvetConfig>(&text).unwrap(), config);
        assert_eq!(serde_json::from_str::<VelvetConfig>("{}").unwrap(), VelvetConfig::default());
        assert!(serde_json::from_str::<VelvetConfig>(r#"{"learning_rate": 1}"#).is_err());
    }
}
