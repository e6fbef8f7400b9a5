//! The configuration of a Llama: from `transformers`, and for it.

use std::path::Path;

use era_act::Activation;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::invalid;
use crate::generate::OneOrMany;
use crate::{Result, VesperConfig};

/// What `transformers` takes for a `MistralConfig` whose `sliding_window` is absent.
const MISTRAL_WINDOW: usize = 4096;

struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl Fields<'_> {
    /// A field that is absent or null is `None`.
    fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value.clone())
                .map(Some)
                .map_err(|error| invalid(self.path, format!("{key} is {value}: {error}"))),
        }
    }

    fn require<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        self.get(key)?.ok_or_else(|| invalid(self.path, format!("{key} is missing")))
    }

    fn refuse(&self, key: &str, why: &str) -> Result<()> {
        let value = self.map.get(key).unwrap_or(&Value::Null);
        Err(invalid(self.path, format!("{key} is {value}: {why}")))
    }

    /// `transformers` gives the beginning and end of text a default id, which an explicit null removes.
    fn token(&self, key: &str, default: u32, vocab: usize) -> Result<Option<u32>> {
        if !self.map.contains_key(key) {
            return Ok(Some(default).filter(|&id| (id as usize) < vocab));
        }
        Ok(self.get::<OneOrMany>(key)?.map(Vec::from).and_then(|ids| ids.first().copied()))
    }
}

/// Translates the `config.json` of a Llama or a Mistral.
///
/// `transformers` ignores a field that its Llama does not know, so everything but the fields below only informs.
pub(super) fn translate(path: &Path, kind: &str, map: &Map<String, Value>) -> Result<VesperConfig> {
    let fields = Fields { path, map };
    let mistral = kind == "mistral";
    refuse_other_mathematics(&fields)?;
    let vocab_size: usize = fields.require("vocab_size")?;
    let hidden_size: usize = fields.require("hidden_size")?;
    let heads: usize = fields.require("num_attention_heads")?;
    let kv_heads = fields.get("num_key_value_heads")?.unwrap_or(if mistral { 8 } else { heads });
    let head_dim = match fields.get::<usize>("head_dim")? {
        Some(head_dim) => head_dim,
        None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let reason =
                format!("hidden_size is {hidden_size}, expected a multiple of num_attention_heads = {heads}");
            return Err(invalid(path, reason));
        }
    };
    let positions = fields.get("max_position_embeddings")?.unwrap_or(if mistral { 131_072 } else { 2048 });
    refuse_sliding_window(&fields, mistral, positions)?;
    Ok(VesperConfig {
        model_type: "vesper".into(),
        architectures: vec!["VesperForCausalLM".into()],
        vocab_size,
        hidden_size,
        num_hidden_layers: fields.require("num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        intermediate_size: fields.require("intermediate_size")?,
        max_position_embeddings: positions,
        rms_norm_eps: fields.get("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta: rope_theta(&fields)?,
        tie_word_embeddings: fields.get("tie_word_embeddings")?.unwrap_or(false),
        hidden_act: activation(&fields)?,
        initializer_range: fields.get("initializer_range")?.unwrap_or(0.02),
        bos_token_id: fields.token("bos_token_id", 1, vocab_size)?,
        eos_token_id: fields.token("eos_token_id", 2, vocab_size)?,
        adapter: None,
    })
}

fn activation(fields: &Fields<'_>) -> Result<Activation> {
    let name = fields.get::<String>("hidden_act")?.unwrap_or_else(|| "silu".into());
    name.parse().map_err(|error| invalid(fields.path, format!("hidden_act: {error}")))
}

/// Newer versions write the base inside `rope_parameters`, older ones beside it.
fn rope_theta(fields: &Fields<'_>) -> Result<f64> {
    let inner = match fields.map.get("rope_parameters") {
        Some(Value::Object(map)) => Fields { path: fields.path, map }.get("rope_theta")?,
        _ => None,
    };
    Ok(match inner {
        Some(theta) => theta,
        None => fields.get("rope_theta")?.unwrap_or(1e4),
    })
}

fn refuse_other_mathematics(fields: &Fields<'_>) -> Result<()> {
    if let Some(names) = fields.get::<Vec<String>>("architectures")?
        && !names.is_empty()
        && !names.iter().any(|name| name == "LlamaForCausalLM" || name == "MistralForCausalLM")
    {
        fields.refuse("architectures", "expected LlamaForCausalLM or MistralForCausalLM")?;
    }
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = fields.get::<Map<String, Value>>(key)? else { continue };
        for name in ["rope_type", "type"] {
            if rope.get(name).is_some_and(|kind| kind != "default") {
                fields.refuse(key, "only the default rotary embedding is supported")?;
            }
        }
        if rope.get("partial_rotary_factor").is_some_and(|factor| factor.as_f64() != Some(1.0)) {
            fields.refuse(key, "only rotary embeddings over the whole head are supported")?;
        }
        // Versions before `rope_type` scaled by the factor alone.
        if rope.get("factor").is_some_and(|factor| factor.as_f64() != Some(1.0)) {
            fields.refuse(key, "scaled rotary angles are not supported")?;
        }
    }
    if fields.get::<f64>("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        fields.refuse("partial_rotary_factor", "only rotary embeddings over the whole head are supported")?;
    }
    for key in ["attention_bias", "mlp_bias"] {
        if fields.get::<bool>(key)? == Some(true) {
            fields.refuse(key, "biases are not supported")?;
        }
    }
    if fields.get::<Value>("quantization_config")?.is_some() {
        fields.refuse("quantization_config", "quantised weights are not supported")?;
    }
    Ok(())
}

/// A window that is as long as the longest sequence hides nothing.
fn refuse_sliding_window(fields: &Fields<'_>, mistral: bool, positions: usize) -> Result<()> {
    let window = match fields.get::<usize>("sliding_window")? {
        None if mistral && !fields.map.contains_key("sliding_window") => Some(MISTRAL_WINDOW),
        window => window,
    };
    match window {
        Some(window) if window < positions => {
            let reason = format!(
                "sliding_window is {window}, shorter than max_position_embeddings = {positions}: \
                 attention over a window is not supported"
            );
            Err(invalid(fields.path, reason))
        }
        _ => Ok(()),
    }
}

/// Every field of `transformers`' Llama, so that none of its defaults can differ from ours.
pub(super) fn describe(config: &VesperConfig, dtype: &str) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": null,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": true,
        "vocab_size": config.vocab_size,
    })
}
