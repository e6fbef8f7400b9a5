use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::super::save::SaveOptions;
use super::PATTERN_FRAME;
use super::kinds::{dropout, peft_type, rank_and_alpha};
use crate::adapter::AdapterKind;
use crate::targets::{Pattern, Targets};
use crate::{Error, Result, Scaling};

/// The configuration file of these adapters.
pub(in crate::files) fn write(adapters: &[(&str, AdapterKind)], options: &SaveOptions) -> Result<String> {
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
        if let Some((path, other)) = rest.iter().find(|(_, k)| rank_and_alpha(k) != rank_and_alpha(first)) {
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
        ("modules_to_save", saved_modules(options)?),
        ("task_type", json!(options.task_type)),
    ] {
        fields.insert(field.into(), value);
    }
    Ok(format!("{:#}\n", Value::Object(fields)))
}

/// The modules of the parameters that are saved in full.
fn saved_modules(options: &SaveOptions) -> Result<Value> {
    let modules: Option<BTreeSet<&str>> =
        options.saved_parameters.keys().map(|name| Some(name.rsplit_once('.')?.0)).collect();
    match modules {
        Some(modules) if modules.is_empty() => Ok(Value::Null),
        Some(modules) if !modules.contains("") => Ok(json!(modules)),
        _ => Err(Error::Adapters {
            message: "a saved parameter must be named with its module: lm_head.weight".into(),
        }),
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
    let mut fields = match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    };
    if matches!(kind, AdapterKind::Lora(c) if c.bias) {
        fields.insert("lora_bias".into(), json!(true));
    }
    fields
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
