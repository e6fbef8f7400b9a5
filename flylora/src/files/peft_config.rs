use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::CONFIG_FILE;
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
/// let lora = config.lora("model.layers.0.self_attn.q_proj"); // what to make the layer's adapter with
/// println!("rank {}, scale {}", lora.r, lora.scale());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct PeftConfig {
    /// The file that it was read from.
    path: PathBuf,
    r: usize,
    alpha: f64,
    scaling: Scaling,
    /// The modules that have an adapter: names, or endings of them; one regular expression is kept as it is.
    target_modules: Vec<String>,
    /// Modules with another rank, by name or by the ending of the name.
    rank_pattern: BTreeMap<String, usize>,
    /// Modules with another alpha, by name or by the ending of the name.
    alpha_pattern: BTreeMap<String, f64>,
}

/// Fields that only say how the adapter came to be, or which modules it is for: the tensors say that too.
const NO_EFFECT: [&str; 15] = [
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

impl PeftConfig {
    /// Reads `adapter_config.json` in `dir`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], [`Error::Format`], and [`Error::Unsupported`] for a field, known or not, that asks for something
    /// other than plain LoRA. Unknown fields that are null, false or empty are off and are passed over.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join(CONFIG_FILE);
        let text =
            std::fs::read_to_string(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let value = serde_json::from_str(&text)
            .map_err(|e| Error::Format { path: path.clone(), message: format!("not complete JSON: {e}") })?;
        match value {
            Value::Object(fields) => Self::parse(&path, &fields),
            _ => Err(Error::Format { path, message: "expected a JSON object".into() }),
        }
    }

    /// The configuration of the adapter of a module, with the default seed.
    pub fn lora(&self, module: &str) -> LoraConfig {
        let r = pattern(&self.rank_pattern, module).unwrap_or(self.r);
        let alpha = pattern(&self.alpha_pattern, module).unwrap_or(self.alpha);
        LoraConfig { r, alpha, scaling: self.scaling, ..LoraConfig::default() }
    }

    /// The modules that have an adapter, as the file gives them: names, endings of names, or one regular expression.
    pub fn target_modules(&self) -> &[String] {
        &self.target_modules
    }

    pub(super) fn check(&self, module: &str, adapter: &LoraConfig) -> Result<()> {
        let file = self.lora(module);
        let fail = |field, expected: String, got: String| {
            Err(Error::Mismatch { path: self.path.clone(), module: module.to_owned(), field, expected, got })
        };
        if file.r != adapter.r {
            return fail("r", adapter.r.to_string(), file.r.to_string());
        }
        // Decimal numbers may lose their last bit on the way through a file.
        if (file.scale() / adapter.scale() - 1.0).abs() > 1e-12 {
            return fail("the scale", adapter.scale().to_string(), file.scale().to_string());
        }
        Ok(())
    }

    pub(super) fn from_adapters(adapters: &[(&str, &LoraConfig)]) -> Result<Self> {
        let Some(((_, first), rest)) = adapters.split_first() else {
            return Err(Error::Adapters { message: "there is no adapter to save".into() });
        };
        if let Some((path, other)) = rest.iter().find(|(_, other)| other.scaling != first.scaling) {
            let (a, b) = (other.scaling, first.scaling);
            let message = format!("{path} scales by {a:?} and others by {b:?}: one directory holds one kind");
            return Err(Error::Adapters { message });
        }
        let others = |differs: fn(&LoraConfig, &LoraConfig) -> bool| {
            rest.iter().filter(move |(_, other)| differs(other, first))
        };
        Ok(Self {
            path: PathBuf::from(CONFIG_FILE),
            r: first.r,
            alpha: first.alpha,
            scaling: first.scaling,
            target_modules: adapters.iter().map(|(path, _)| (*path).to_owned()).collect(),
            rank_pattern: others(|a, b| a.r != b.r).map(|(path, c)| ((*path).to_owned(), c.r)).collect(),
            alpha_pattern: others(|a, b| a.alpha != b.alpha)
                .map(|(path, c)| ((*path).to_owned(), c.alpha))
                .collect(),
        })
    }

    pub(super) fn to_json(&self) -> String {
        let value = json!({
            "alpha_pattern": self.alpha_pattern.iter().map(|(k, v)| (k.clone(), number(*v))).collect::<Map<_, _>>(),
            "base_model_name_or_path": null,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": number(self.alpha),
            "lora_dropout": 0.0,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "target_modules": self.target_modules,
            "task_type": null,
            "use_dora": false,
            "use_rslora": self.scaling == Scaling::AlphaOverSqrtR,
        });
        format!("{value:#}\n")
    }

    fn parse(path: &Path, fields: &Map<String, Value>) -> Result<Self> {
        let wrong = |field: &str, expected: &str, value: Option<&Value>| Error::Format {
            path: path.to_owned(),
            message: format!(
                "{field}: expected {expected}, got {}",
                value.map_or("nothing".into(), Value::to_string)
            ),
        };
        let unsupported = |field: &str, value: &Value, reason| Error::Unsupported {
            path: path.to_owned(),
            field: field.to_owned(),
            value: value.to_string(),
            reason,
        };
        let rank = |field: &str, value: Option<&Value>| {
            let r = value.and_then(Value::as_u64).and_then(|r| usize::try_from(r).ok()).filter(|r| *r > 0);
            r.ok_or_else(|| wrong(field, "a whole number from 1 on", value))
        };
        let alpha = |field: &str, value: Option<&Value>| {
            let alpha = value.and_then(Value::as_f64).filter(|a| a.is_finite() && *a != 0.0);
            alpha.ok_or_else(|| wrong(field, "a number other than 0", value))
        };

        let mut config = Self {
            path: path.to_owned(),
            r: rank("r", fields.get("r"))?,
            alpha: alpha("lora_alpha", fields.get("lora_alpha"))?,
            scaling: Scaling::AlphaOverR,
            target_modules: Vec::new(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        };
        if fields.get("peft_type").is_none() {
            return Err(wrong("peft_type", "\"LORA\"", None));
        }
        for (field, value) in fields {
            match field.as_str() {
                "r" | "lora_alpha" => {}
                "peft_type" if value == "LORA" => {}
                "peft_type" => return Err(unsupported(field, value, "only LORA is")),
                "use_rslora" => match value {
                    Value::Bool(true) => config.scaling = Scaling::AlphaOverSqrtR,
                    Value::Bool(false) | Value::Null => {}
                    _ => return Err(wrong(field, "true or false", Some(value))),
                },
                "bias" if value == "none" || value.is_null() => {}
                "bias" => return Err(unsupported(field, value, "only \"none\" is")),
                // The others change the base weights, which the adapter alone cannot undo.
                "init_lora_weights"
                    if value.is_boolean()
                        || matches!(value.as_str(), Some("gaussian" | "eva" | "orthogonal")) => {}
                "init_lora_weights" => {
                    return Err(unsupported(
                        field,
                        value,
                        "only true, false, \"gaussian\", \"orthogonal\" and \"eva\" are",
                    ));
                }
                "target_modules" => {
                    config.target_modules =
                        names(value).ok_or_else(|| wrong(field, "a name or a list of names", Some(value)))?;
                }
                "rank_pattern" => {
                    for (key, value) in
                        entries(value).ok_or_else(|| wrong(field, "an object", Some(value)))?
                    {
                        literal(key)
                            .ok_or_else(|| unsupported(field, &json!(key), "regular expressions are not"))?;
                        config
                            .rank_pattern
                            .insert(key.clone(), rank(&format!("{field}.{key}"), Some(value))?);
                    }
                }
                "alpha_pattern" => {
                    for (key, value) in
                        entries(value).ok_or_else(|| wrong(field, "an object", Some(value)))?
                    {
                        literal(key)
                            .ok_or_else(|| unsupported(field, &json!(key), "regular expressions are not"))?;
                        config
                            .alpha_pattern
                            .insert(key.clone(), alpha(&format!("{field}.{key}"), Some(value))?);
                    }
                }
                known if NO_EFFECT.contains(&known) => {}
                _ if is_off(value) => {}
                _ => return Err(unsupported(field, value, "only plain LoRA is")),
            }
        }
        Ok(config)
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

/// A number as PEFT writes it: whole where it is.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

fn names(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::Null => Some(Vec::new()),
        Value::String(name) => Some(vec![name.clone()]),
        Value::Array(items) => items.iter().map(|item| item.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

fn entries(value: &Value) -> Option<Vec<(&String, &Value)>> {
    match value {
        Value::Null => Some(Vec::new()),
        Value::Object(fields) => Some(fields.iter().collect()),
        _ => None,
    }
}

/// PEFT reads the keys of patterns as regular expressions; the dot in a name is the one sign that does no harm.
fn literal(key: &str) -> Option<()> {
    key.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.')).then_some(())
}

/// The entry for a module: its own, or else the longest one that its name ends with.
fn pattern<T: Copy>(patterns: &BTreeMap<String, T>, module: &str) -> Option<T> {
    let fits =
        |key: &str| module.strip_suffix(key).is_some_and(|front| front.is_empty() || front.ends_with('.'));
    patterns.iter().filter(|(key, _)| fits(key)).max_by_key(|(key, _)| key.len()).map(|(_, value)| *value)
}
