use std::path::{Path, PathBuf};

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};

use super::CONFIG_FILE;
use super::save::SaveOptions;
use crate::adapter::{AdaLoraConfig, AdapterKind, FlyLoraConfig, MaskSelection, MaskedLoraConfig};
use crate::targets::{Pattern, Targets};
use crate::{Error, LoraConfig, Result, Scaling};

/// What a PEFT `adapter_config.json` says about the adapters beside it.
///
/// # Examples
///
/// ```no_run
/// use flylora::files::PeftConfig;
///
/// # fn main() -> Result<(), flylora::Error> {
/// let config = PeftConfig::read("adapters/french")?;
/// let kind = config.kind("model.layers.0.self_attn.q_proj")?; // what to make the layer's adapter with
/// println!("{kind}, on {:?}", config.targets());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct PeftConfig {
    /// The file that it was read from.
    path: PathBuf,
    /// The kind of a module that no pattern names.
    kind: AdapterKind,
    targets: Targets,
    fan_in_fan_out: bool,
    /// Modules with another rank or alpha, in the order of the file: the first that matches counts.
    rank_pattern: Vec<(Pattern, usize)>,
    alpha_pattern: Vec<(Pattern, f64)>,
}

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

/// PEFT's way of matching the key of a pattern: the end of a path, from a dot on.
const PATTERN_FRAME: &str = r"^(.*\.)?({})$";

impl PeftConfig {
    /// Reads `adapter_config.json` in `dir`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], [`Error::Format`], and [`Error::Unsupported`] for a field, known or not, that asks for something
    /// that is not there. Unknown fields that are null, false or empty are off and are passed over.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join(CONFIG_FILE);
        let text =
            std::fs::read_to_string(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let format = |message: String| Error::Format { path: path.clone(), message };
        let value = serde_json::from_str(&text).map_err(|e| format(format!("not complete JSON: {e}")))?;
        let Value::Object(fields) = value else {
            return Err(format("expected a JSON object".into()));
        };
        let order: Orders = serde_json::from_str(&text).map_err(|e| format(e.to_string()))?;
        Reader { path: &path, fields: &fields }.read(&order)
    }

    /// The kind of the adapter of a module, with its rank and alpha.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] where they are not in their range.
    pub fn kind(&self, module: &str) -> Result<AdapterKind> {
        let r = first(&self.rank_pattern, module);
        let alpha = first(&self.alpha_pattern, module);
        let mut kind = self.kind.clone();
        match &mut kind {
            AdapterKind::Lora(c)
            | AdapterKind::Dora(c)
            | AdapterKind::MaskedLora(MaskedLoraConfig { lora: c, .. }) => {
                (c.r, c.alpha) = (r.unwrap_or(c.r), alpha.unwrap_or(c.alpha));
            }
            // PEFT gives all AdaLoRA layers one alpha.
            AdapterKind::AdaLora(_) => {}
            AdapterKind::FlyLora(c) => (c.r, c.alpha) = (r.unwrap_or(c.r), alpha.unwrap_or(c.alpha)),
        }
        kind.validate()?;
        Ok(kind)
    }

    /// The rank, alpha and scaling of a module's adapter, for kinds that have LoRA's; the seed is the default one.
    pub fn lora(&self, module: &str) -> LoraConfig {
        let base = match &self.kind {
            AdapterKind::Lora(c) | AdapterKind::Dora(c) => c.clone(),
            AdapterKind::MaskedLora(c) => c.lora.clone(),
            AdapterKind::AdaLora(c) => {
                LoraConfig { r: c.init_r, alpha: c.alpha, dropout: c.dropout, ..LoraConfig::default() }
            }
            AdapterKind::FlyLora(c) => LoraConfig { r: c.r, alpha: c.alpha, ..LoraConfig::default() },
        };
        let r = first(&self.rank_pattern, module).unwrap_or(base.r);
        let alpha = first(&self.alpha_pattern, module).unwrap_or(base.alpha);
        LoraConfig { r, alpha, ..base }
    }

    /// Which modules have an adapter.
    pub fn targets(&self) -> &Targets {
        &self.targets
    }

    /// The modules that have an adapter, where the file lists them: names, or endings of names.
    pub fn target_modules(&self) -> &[String] {
        self.targets.listed_names()
    }

    /// Whether the model keeps its weights as (in, out), as GPT-2 does.
    pub fn fan_in_fan_out(&self) -> bool {
        self.fan_in_fan_out
    }

    pub(super) fn check(&self, module: &str, adapter: &AdapterKind) -> Result<()> {
        let file = self.kind(module)?;
        let fail = |field, expected: String, got: String| {
            Err(Error::Mismatch { path: self.path.clone(), module: module.to_owned(), field, expected, got })
        };
        if peft_type(&file) != peft_type(adapter)
            || matches!(file, AdapterKind::Dora(_)) != matches!(adapter, AdapterKind::Dora(_))
        {
            return fail("the kind", adapter.to_string(), file.to_string());
        }
        let (ours, theirs) = (numbers(adapter), numbers(&file));
        for ((field, ours), (_, theirs)) in ours.into_iter().zip(theirs) {
            // Decimal numbers may lose their last bit on the way through a file.
            if (theirs - ours).abs() > 1e-12 * ours.abs() {
                return fail(field, ours.to_string(), theirs.to_string());
            }
        }
        match (&file, adapter) {
            (AdapterKind::FlyLora(file), AdapterKind::FlyLora(ours)) if file.routing != ours.routing => {
                fail("fly_routing", format!("{:?}", ours.routing), format!("{:?}", file.routing))
            }
            _ => Ok(()),
        }
    }

    /// The configuration file of these adapters.
    pub(super) fn write(adapters: &[(&str, AdapterKind)], options: &SaveOptions) -> Result<String> {
        let Some(((_, first), rest)) = adapters.split_first() else {
            return Err(Error::Adapters { message: "there is no adapter to save".into() });
        };
        let mut fields = fields_of(first);
        let common = shared(first);
        let mut ranks = Map::new();
        let mut alphas = Map::new();
        for (path, other) in rest {
            if shared(other) != common {
                return Err(differ(path, other, first));
            }
            let ((r, alpha), (first_r, first_alpha)) = (rank_and_alpha(other), rank_and_alpha(first));
            if (r, alpha) == (first_r, first_alpha) {
                continue;
            }
            let pattern = pattern_key(path, adapters);
            if r != first_r {
                ranks.insert(pattern.clone(), json!(r));
            }
            if alpha != first_alpha {
                alphas.insert(pattern, number(alpha));
            }
        }
        if matches!(first, AdapterKind::AdaLora(_)) {
            if let Some((path, other)) = rest.iter().find(|(_, k)| rank_and_alpha(k) != rank_and_alpha(first))
            {
                return Err(differ(path, other, first));
            }
            fields.insert("rank_pattern".into(), Value::Null);
        } else {
            fields.insert("rank_pattern".into(), Value::Object(ranks));
        }
        fields.insert("alpha_pattern".into(), Value::Object(alphas));
        let listed = Targets::names(adapters.iter().map(|(path, _)| *path));
        for (field, value) in options.targets.as_ref().unwrap_or(&listed).to_json() {
            fields.insert(field.into(), value);
        }
        for (field, value) in [
            ("base_model_name_or_path", json!(options.base_model)),
            ("bias", json!("none")),
            ("fan_in_fan_out", json!(options.fan_in_fan_out)),
            ("inference_mode", json!(true)),
            ("init_lora_weights", json!(true)),
            ("modules_to_save", Value::Null),
            ("task_type", json!(options.task_type)),
        ] {
            fields.insert(field.into(), value);
        }
        Ok(format!("{:#}\n", Value::Object(fields)))
    }
}

fn differ(path: &str, other: &AdapterKind, first: &AdapterKind) -> Error {
    let message = format!(
        "{path} is {other}, made otherwise than others, which are {first}: one directory holds one kind"
    );
    Error::Adapters { message }
}

/// A pattern that matches this path and no other: the path itself, where that is one. (An expression matches endings too,
/// and its dots match anything.)
fn pattern_key(path: &str, adapters: &[(&str, AdapterKind)]) -> String {
    let pattern = Pattern::new("rank_pattern", path, PATTERN_FRAME);
    let only = pattern.is_ok_and(|p| adapters.iter().all(|(other, _)| p.is_match(other) == (*other == path)));
    if only { path.to_owned() } else { format!("^{}", fancy_regex::escape(path)) }
}

fn peft_type(kind: &AdapterKind) -> &'static str {
    match kind {
        AdapterKind::Lora(_) | AdapterKind::Dora(_) => "LORA",
        AdapterKind::AdaLora(_) => "ADALORA",
        AdapterKind::FlyLora(_) => "FLYLORA",
        AdapterKind::MaskedLora(_) => "MASKED_FLYLORA",
    }
}

fn rank_and_alpha(kind: &AdapterKind) -> (usize, f64) {
    match kind {
        AdapterKind::Lora(c) | AdapterKind::Dora(c) => (c.r, c.alpha),
        AdapterKind::MaskedLora(c) => (c.lora.r, c.lora.alpha),
        AdapterKind::AdaLora(c) => (c.init_r, c.alpha),
        AdapterKind::FlyLora(c) => (c.r, c.alpha),
    }
}

fn dropout(kind: &AdapterKind) -> f64 {
    match kind {
        AdapterKind::Lora(c) | AdapterKind::Dora(c) => c.dropout,
        AdapterKind::MaskedLora(c) => c.lora.dropout,
        AdapterKind::AdaLora(c) => c.dropout,
        AdapterKind::FlyLora(_) => 0.0,
    }
}

/// What must be equal for an adapter to take the tensors of another.
fn numbers(kind: &AdapterKind) -> Vec<(&'static str, f64)> {
    let (r, _) = rank_and_alpha(kind);
    match kind {
        AdapterKind::Lora(c) | AdapterKind::Dora(c) => vec![("r", r as f64), ("the scale", c.scale())],
        AdapterKind::MaskedLora(c) => {
            vec![("r", r as f64), ("the scale", c.lora.scale()), ("fly_sparsity", c.sparsity)]
        }
        AdapterKind::AdaLora(c) => vec![("init_r", r as f64), ("the scale", c.scale())],
        AdapterKind::FlyLora(c) => {
            vec![("r", r as f64), ("fly_k", c.k as f64), ("fly_density", c.density), ("the scale", c.scale())]
        }
    }
}

/// The fields that are of the kind.
fn fields_of(kind: &AdapterKind) -> Map<String, Value> {
    let (r, alpha) = rank_and_alpha(kind);
    let mut value = json!({
        "peft_type": peft_type(kind),
        "r": r,
        "lora_alpha": number(alpha),
        "lora_dropout": dropout(kind),
    });
    let more = match kind {
        AdapterKind::Lora(c) | AdapterKind::Dora(c) => json!({
            "use_dora": matches!(kind, AdapterKind::Dora(_)),
            "use_rslora": c.scaling == Scaling::AlphaOverSqrtR,
        }),
        AdapterKind::MaskedLora(c) => json!({
            "fly_selection": c.selection,
            "fly_sparsity": c.sparsity,
            "use_rslora": c.lora.scaling == Scaling::AlphaOverSqrtR,
        }),
        AdapterKind::FlyLora(c) => json!({
            "fly_balance_rate": c.balance_rate,
            "fly_density": c.density,
            "fly_k": c.k,
            "fly_routing": c.routing,
        }),
        // PEFT wants the length of a run, also where none is to come.
        AdapterKind::AdaLora(c) => json!({
            "init_r": c.init_r,
            "orth_reg_weight": c.orthogonality,
            "target_r": c.init_r,
            "total_step": 1,
            "r": 8,
        }),
    };
    if let (Value::Object(fields), Value::Object(more)) = (&mut value, more) {
        fields.extend(more);
    }
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// The fields that adapters of one directory must have in common.
fn shared(kind: &AdapterKind) -> Map<String, Value> {
    let mut fields = fields_of(kind);
    for own in ["r", "lora_alpha", "init_r", "target_r"] {
        fields.remove(own);
    }
    fields
}

/// A number as PEFT writes it: whole where it is.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

fn first<T: Copy>(patterns: &[(Pattern, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value)
}

struct Reader<'a> {
    path: &'a Path,
    fields: &'a Map<String, Value>,
}

impl Reader<'_> {
    fn read(&self, order: &Orders) -> Result<PeftConfig> {
        let mut kind = self.kind()?;
        let mut targets = Targets::default();
        let mut fan_in_fan_out = false;
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
                "bias" if value == "none" || value.is_null() => true,
                "bias" => return Err(self.unsupported(field, value, "only \"none\" is")),
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
        let mut config = PeftConfig {
            path: self.path.to_owned(),
            kind,
            targets,
            fan_in_fan_out,
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
        Ok(match kind {
            AdapterKind::Lora(c) | AdapterKind::Dora(c) => match field {
                "r" | "rank_pattern" | "use_dora" => true,
                "use_rslora" => self.scaling(field, c)?,
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

    fn flag(&self, field: &str) -> Result<bool> {
        match self.fields.get(field) {
            Some(Value::Bool(flag)) => Ok(*flag),
            None | Some(Value::Null) => Ok(false),
            other => Err(self.wrong(field, "true or false", other)),
        }
    }

    fn number(&self, field: &str) -> Result<f64> {
        let value = self.fields.get(field);
        value.and_then(Value::as_f64).ok_or_else(|| self.wrong(field, "a number", value))
    }

    fn rank(&self, field: &str) -> Result<usize> {
        self.rank_value(field, self.fields.get(field))
    }

    fn rank_value(&self, field: &str, value: Option<&Value>) -> Result<usize> {
        let r = value.and_then(Value::as_u64).and_then(|r| usize::try_from(r).ok()).filter(|r| *r > 0);
        r.ok_or_else(|| self.wrong(field, "a whole number from 1 on", value))
    }

    fn alpha_value(&self, field: &str, value: Option<&Value>) -> Result<f64> {
        let alpha = value.and_then(Value::as_f64).filter(|a| a.is_finite() && *a != 0.0);
        alpha.ok_or_else(|| self.wrong(field, "a number other than 0", value))
    }

    fn pattern(&self, field: &str, key: &str) -> Result<Pattern> {
        Pattern::new(field, key, PATTERN_FRAME)
            .map_err(|_| self.unsupported(field, &json!(key), "it cannot be read as a regular expression"))
    }

    fn wrong(&self, field: &str, expected: &str, value: Option<&Value>) -> Error {
        let got = value.map_or("nothing".into(), Value::to_string);
        self.format(format!("{field}: expected {expected}, got {got}"))
    }

    fn format(&self, message: String) -> Error {
        Error::Format { path: self.path.to_owned(), message }
    }

    fn unsupported(&self, field: &str, value: &Value, reason: &'static str) -> Error {
        Error::Unsupported {
            path: self.path.to_owned(),
            field: field.to_owned(),
            value: value.to_string(),
            reason,
        }
    }
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// The order of the patterns, which the values alone no longer have.
#[derive(Deserialize)]
struct Orders {
    #[serde(default)]
    rank_pattern: Keys,
    #[serde(default)]
    alpha_pattern: Keys,
}

/// The keys of an object in the order of the text; none for anything that is no object.
#[derive(Default)]
struct Keys(Vec<String>);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(KeysVisitor)
    }
}

struct KeysVisitor;

impl<'de> Visitor<'de> for KeysVisitor {
    type Value = Keys;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of names and numbers")
    }

    fn visit_unit<E>(self) -> std::result::Result<Keys, E> {
        Ok(Keys::default())
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<Keys, M::Error> {
        let mut keys = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value::<IgnoredAny>()?;
            keys.push(key);
        }
        Ok(Keys(keys))
    }
}
