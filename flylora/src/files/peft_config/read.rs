use serde::Deserialize;
use serde_json::{Value, json};

use super::fields::{Reader, is_off};
use super::order::Orders;
use super::{PeftConfig, Saved};
use crate::adapter::{AdaLoraConfig, AdapterKind, FlyLoraConfig, MaskSelection, MaskedLoraConfig};
use crate::targets::Targets;
use crate::{Error, LoraConfig, Result, Scaling};

/// Fields that only say how the adapter came to be: the tensors say what there is.
const NO_EFFECT: [&str; 12] = [
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "total_step",
];

/// Fields of AdaLoRA that matter in training alone. `r` is not used, and `rank_pattern` says what the tensors' shapes
/// say too.
const ADA_LORA_TRAINING: [&str; 8] =
    ["beta1", "beta2", "deltaT", "r", "rank_pattern", "target_r", "tfinal", "tinit"];

impl Reader<'_> {
    /// The configuration that the fields are.
    pub(super) fn read(&self, order: &Orders) -> Result<PeftConfig> {
        let mut kind = self.kind()?;
        let mut targets = Targets::default();
        let mut fan_in_fan_out = false;
        let mut saved = Saved::default();
        for (field, value) in self.fields {
            let handled = match field.as_str() {
                "lora_dropout" => {
                    self.dropout(&mut kind, field, value)?;
                    true
                }
                "peft_type" | "lora_alpha" | "alpha_pattern" => true,
                "fan_in_fan_out" => {
                    fan_in_fan_out = self.flag(field)?;
                    true
                }
                "bias" => {
                    saved.biases = self.biases(field, value)?;
                    true
                }
                "modules_to_save" => {
                    saved.modules = self.names(field, value)?;
                    true
                }
                "init_lora_weights" => {
                    self.check_init(field, value)?;
                    true
                }
                known if NO_EFFECT.contains(&known) => true,
                _ => {
                    self.field_of_kind(&mut kind, field, value)?
                        || self.targets(&mut targets, field, value)?
                }
            };
            if !handled && !is_off(value) {
                let reason = match kind {
                    AdapterKind::Lora(_) | AdapterKind::Dora(_) => "it is no part of LoRA here",
                    _ => "it is no part of this peft_type",
                };
                return Err(self.unsupported(field, value, reason));
            }
        }
        targets
            .leave_out_trained(&saved.modules)
            .map_err(|_| self.unsupported("modules_to_save", &json!(saved.modules), "no name of a module"))?;
        let mut config = PeftConfig {
            path: self.path.to_owned(),
            kind,
            targets,
            fan_in_fan_out,
            saved,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
        };
        if !matches!(config.kind, AdapterKind::AdaLora(_)) {
            for key in &order.rank_pattern.0 {
                let value = self.fields.get("rank_pattern").and_then(|p| p.get(key));
                let rank = self.rank_value(&format!("rank_pattern.{key}"), value)?;
                config.rank_pattern.push((self.pattern("rank_pattern", key)?, rank));
            }
        }
        for key in &order.alpha_pattern.0 {
            let value = self.fields.get("alpha_pattern").and_then(|p| p.get(key));
            let alpha = self.alpha_value(&format!("alpha_pattern.{key}"), value)?;
            config.alpha_pattern.push((self.pattern("alpha_pattern", key)?, alpha));
        }
        config.kind.validate().map_err(|e| self.format(e.to_string()))?;
        Ok(config)
    }

    /// The kind with the fields that must be there.
    fn kind(&self) -> Result<AdapterKind> {
        let alpha = || self.alpha_value("lora_alpha", self.fields.get("lora_alpha"));
        let lora = || -> Result<LoraConfig> {
            Ok(LoraConfig { r: self.rank("r")?, alpha: alpha()?, ..LoraConfig::default() })
        };
        match self.fields.get("peft_type") {
            Some(Value::String(kind)) => match kind.as_str() {
                "LORA" if self.flag("use_dora")? => Ok(AdapterKind::Dora(lora()?)),
                "LORA" => Ok(AdapterKind::Lora(lora()?)),
                "ADALORA" => {
                    let init_r = self.rank("init_r")?;
                    Ok(AdapterKind::AdaLora(AdaLoraConfig {
                        init_r,
                        alpha: alpha()?,
                        ..AdaLoraConfig::default()
                    }))
                }
                "FLYLORA" => {
                    let (r, k) = (self.rank("r")?, self.rank("fly_k")?);
                    let density = self.number("fly_density")?;
                    let alpha = alpha()?;
                    Ok(AdapterKind::FlyLora(FlyLoraConfig {
                        r,
                        k,
                        density,
                        alpha,
                        ..FlyLoraConfig::default()
                    }))
                }
                "MASKED_FLYLORA" => {
                    let (lora, sparsity) = (lora()?, self.number("fly_sparsity")?);
                    Ok(AdapterKind::MaskedLora(MaskedLoraConfig {
                        lora,
                        sparsity,
                        ..MaskedLoraConfig::default()
                    }))
                }
                _ => Err(self.unsupported(
                    "peft_type",
                    &json!(kind),
                    "only LORA, ADALORA, FLYLORA and MASKED_FLYLORA are",
                )),
            },
            other => Err(self.wrong("peft_type", "\"LORA\" or another name", other)),
        }
    }

    /// Takes a field that belongs to the kind.
    fn field_of_kind(&self, kind: &mut AdapterKind, field: &str, value: &Value) -> Result<bool> {
        let dora = matches!(kind, AdapterKind::Dora(_));
        Ok(match kind {
            AdapterKind::Lora(c) | AdapterKind::Dora(c) => match field {
                "r" | "rank_pattern" | "use_dora" => true,
                "use_rslora" => self.scaling(field, c)?,
                "lora_bias" if !dora => {
                    c.bias = self.flag(field)?;
                    true
                }
                _ => false,
            },
            AdapterKind::AdaLora(c) => match field {
                "init_r" => true,
                "orth_reg_weight" => {
                    c.orthogonality = self.number(field)?;
                    true
                }
                // Training alone.
                "use_rslora" => !self.flag(field)?,
                known => ADA_LORA_TRAINING.contains(&known),
            },
            AdapterKind::FlyLora(c) => match field {
                "r" | "rank_pattern" | "fly_k" | "fly_density" => true,
                "fly_balance_rate" => {
                    c.balance_rate = self.number(field)?;
                    true
                }
                "fly_routing" => {
                    c.routing = self.choice(field, value)?;
                    true
                }
                _ => false,
            },
            AdapterKind::MaskedLora(c) => match field {
                "r" | "rank_pattern" | "fly_sparsity" => true,
                "use_rslora" => self.scaling(field, &mut c.lora)?,
                "fly_selection" => {
                    c.selection = self.choice::<MaskSelection>(field, value)?;
                    true
                }
                _ => false,
            },
        })
    }

    fn dropout(&self, kind: &mut AdapterKind, field: &str, value: &Value) -> Result<()> {
        let rate = if value.is_null() { 0.0 } else { self.number(field)? };
        if !(0.0..1.0).contains(&rate) {
            return Err(self.wrong(field, "a number from 0 up to 1, without it", Some(value)));
        }
        match kind {
            AdapterKind::Lora(c) | AdapterKind::Dora(c) => c.dropout = rate,
            AdapterKind::MaskedLora(c) => c.lora.dropout = rate,
            AdapterKind::AdaLora(c) => c.dropout = rate,
            AdapterKind::FlyLora(_) if rate == 0.0 => {}
            AdapterKind::FlyLora(_) => return Err(self.unsupported(field, value, "FlyLoRA has no dropout")),
        }
        Ok(())
    }

    /// Whether the biases of the model are in the file.
    fn biases(&self, field: &str, value: &Value) -> Result<bool> {
        match value.as_str() {
            Some("all" | "lora_only") => Ok(true),
            Some("none") => Ok(false),
            _ if value.is_null() => Ok(false),
            _ => Err(self.unsupported(field, value, "only \"none\", \"all\" and \"lora_only\" are")),
        }
    }

    fn targets(&self, targets: &mut Targets, field: &str, value: &Value) -> Result<bool> {
        targets.read(field, value).map_err(|e| match e {
            Error::Pattern { pattern, .. } => {
                self.unsupported(field, &json!(pattern), "it cannot be read as a regular expression")
            }
            other => self.format(other.to_string()),
        })
    }

    fn scaling(&self, field: &str, config: &mut LoraConfig) -> Result<bool> {
        if self.flag(field)? {
            config.scaling = Scaling::AlphaOverSqrtR;
        }
        Ok(true)
    }

    fn choice<T: for<'de> Deserialize<'de>>(&self, field: &str, value: &Value) -> Result<T> {
        T::deserialize(value).map_err(|e| self.format(format!("{field}: {e}")))
    }

    /// The others change the base weights, which the adapter alone cannot undo.
    fn check_init(&self, field: &str, value: &Value) -> Result<()> {
        let harmless = ["gaussian", "eva", "orthogonal"];
        if value.is_boolean() || value.is_null() || value.as_str().is_some_and(|v| harmless.contains(&v)) {
            return Ok(());
        }
        Err(self.unsupported(field, value, "only true, false, \"gaussian\", \"orthogonal\" and \"eva\" are"))
    }
}
