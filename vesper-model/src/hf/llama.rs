//! The configuration of a Llama, or of what is one but for a detail: from `transformers`, and for it.

use std::path::Path;

use era_act::Activation;
use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::{invalid, rope};
use crate::{Result, VesperConfig};

/// What `transformers` takes for a `MistralConfig` whose `sliding_window` is absent.
const MISTRAL_WINDOW: usize = 4096;

/// The classes whose mathematics is ours.
const ARCHITECTURES: [&str; 3] = ["LlamaForCausalLM", "MistralForCausalLM", "VesperForCausalLM"];

/// Whose defaults hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Mistral,
    /// A VesperLM that `transformers` saved, with the classes of `python/`.
    Vesper,
}

/// Translates a `config.json` that `transformers` wrote.
///
/// `transformers` ignores a field that its Llama does not know, so everything but the fields below only informs.
pub(super) fn translate(path: &Path, family: Family, map: &Map<String, Value>) -> Result<VesperConfig> {
    let fields = Fields::new(path, map);
    let mistral = family == Family::Mistral;
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
    let (rope_theta, rope_scaling) = rope::read(&fields, positions)?;
    let default = |id: u32| Some(id).filter(|_| family != Family::Vesper && (id as usize) < vocab_size);
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
        rope_theta,
        rope_scaling,
        tie_word_embeddings: fields.get("tie_word_embeddings")?.unwrap_or(false),
        hidden_act: fields.get("hidden_act")?.unwrap_or(Activation::Silu),
        initializer_range: fields.get("initializer_range")?.unwrap_or(0.02),
        bos_token_id: fields.token("bos_token_id", default(1))?,
        eos_token_id: fields.token("eos_token_id", default(2))?,
        adapter: None,
    })
}

fn refuse_other_mathematics(fields: &Fields<'_>) -> Result<()> {
    if let Some(names) = fields.get::<Vec<String>>("architectures")?
        && !names.is_empty()
        && !names.iter().any(|name| ARCHITECTURES.contains(&name.as_str()))
    {
        return Err(fields.refusal("architectures", &format!("expected {}", ARCHITECTURES.join(" or "))));
    }
    if fields.get::<f64>("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        let why = "only rotary embeddings over the whole head are supported";
        return Err(fields.refusal("partial_rotary_factor", why));
    }
    for key in ["attention_bias", "mlp_bias"] {
        if fields.get::<bool>(key)? == Some(true) {
            return Err(fields.refusal(key, "biases are not supported"));
        }
    }
    if fields.get::<Value>("quantization_config")?.is_some() {
        return Err(fields.refusal("quantization_config", "quantised weights are not supported"));
    }
    Ok(())
}

/// A window that is as long as the longest sequence hides nothing.
fn refuse_sliding_window(fields: &Fields<'_>, mistral: bool, positions: usize) -> Result<()> {
    let window = match fields.get::<usize>("sliding_window")? {
        None if mistral && !fields.has("sliding_window") => Some(MISTRAL_WINDOW),
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
        "rope_scaling": config.rope_scaling,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": true,
        "vocab_size": config.vocab_size,
    })
}
