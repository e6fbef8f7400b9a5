//! The keys of an architecture: what other programs know a model by, and what is read of a file that they wrote.

use era_act::Activation;

use super::header::Header;
use super::{LLAMA, VESPER, invalid, keys, rope_freqs};
use crate::ops::RopeScaling;
use crate::{ModelError, Result, VesperConfig};

/// The architecture that a model has for other programs.
pub(super) fn of(config: &VesperConfig) -> &'static str {
    let known = matches!(config.rope_scaling, None | Some(RopeScaling::Llama3 { .. }));
    if config.hidden_act == Activation::Silu && known { LLAMA } else { VESPER }
}

/// The keys that describe the model, without the architecture before them.
pub(super) fn integers(config: &VesperConfig) -> [(&'static str, usize); 9] {
    [
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("block_count", config.num_hidden_layers),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("vocab_size", config.vocab_size),
    ]
}

/// The configuration of the model in a file: this crate's own, or that of a Llama.
pub(super) fn config(header: &Header) -> Result<VesperConfig> {
    let architecture = header.text(keys::ARCHITECTURE)?.ok_or_else(|| header.missing(keys::ARCHITECTURE))?;
    let json = header.text(keys::CONFIG)?;
    let mut config: VesperConfig = match (json, architecture) {
        (Some(json), VESPER | LLAMA) => serde_json::from_str(json)
            .map_err(|error| invalid(&header.path, format!("{}: {error}", keys::CONFIG)))?,
        (None, VESPER) => return Err(header.missing(keys::CONFIG)),
        (None, LLAMA) => llama(header)?,
        (_, other) => return Err(header.wrong(keys::ARCHITECTURE, other, "vesper or llama")),
    };
    check(header, &config)?;
    config.rope_scaling = rope_freqs::scaling(header, &config, json.is_some())?;
    Ok(config)
}

fn check(header: &Header, config: &VesperConfig) -> Result<()> {
    config.validate().map_err(|error| match error {
        ModelError::InvalidConfig { field, got, expected } => {
            invalid(&header.path, format!("{field} is {got}, expected {expected}"))
        }
        other => other,
    })?;
    if config.adapter.is_some() {
        return Err(header.wrong("adapter", "there", "a model without adapters"));
    }
    Ok(())
}

/// A file that another program wrote.
fn llama(header: &Header) -> Result<VesperConfig> {
    let key = |name: &str| format!("{LLAMA}.{name}");
    let optional = |name: &str| -> Result<Option<usize>> {
        let key = key(name);
        let Some(value) = header.unsigned(&key)? else { return Ok(None) };
        match usize::try_from(value) {
            Ok(value) if value > 0 && value < 1 << 31 => Ok(Some(value)),
            _ => Err(header.wrong(&key, &value.to_string(), "from 1 to 2^31")),
        }
    };
    let size = |name: &str| optional(name)?.ok_or_else(|| header.missing(&key(name)));
    for name in ["expert_count", "attention.sliding_window"] {
        if header.unsigned(&key(name))?.is_some_and(|value| value > 0) {
            return Err(header.wrong(&key(name), "set", "a model without"));
        }
    }
    if header.text(&key("rope.scaling.type"))?.is_some_and(|kind| kind != "none") {
        return Err(header.wrong(&key("rope.scaling.type"), "set", "rotary positions that are not scaled"));
    }
    // Without a type the positions are scaled all the same. Old files have the second name.
    for name in ["rope.scaling.factor", "rope.scale_linear"] {
        if let Some(factor) = header.float(&key(name))?.filter(|&factor| factor != 0.0 && factor != 1.0) {
            let expected = "rotary positions that are not scaled";
            return Err(header.wrong(&key(name), &factor.to_string(), expected));
        }
    }
    let hidden_size = size("embedding_length")?;
    let num_attention_heads = size("attention.head_count")?;
    let head_dim = optional("attention.key_length")?.unwrap_or(hidden_size / num_attention_heads);
    for name in ["attention.value_length", "rope.dimension_count"] {
        if let Some(got) = optional(name)?.filter(|&got| got != head_dim) {
            return Err(header.wrong(&key(name), &got.to_string(), &format!("{head_dim}, as the heads")));
        }
    }
    let eps = key("attention.layer_norm_rms_epsilon");
    let embedding = header.tensors.get("token_embd.weight");
    let vocab_size = embedding.and_then(|info| info.shape.first().copied());
    let token = |key: &str| -> Result<Option<u32>> {
        let Some(value) = header.unsigned(key)? else { return Ok(None) };
        u32::try_from(value).map(Some).map_err(|_| header.wrong(key, &value.to_string(), "a token"))
    };
    Ok(VesperConfig {
        vocab_size: vocab_size.ok_or_else(|| invalid(&header.path, "no tensor token_embd.weight"))?,
        hidden_size,
        num_hidden_layers: size("block_count")?,
        num_attention_heads,
        num_key_value_heads: optional("attention.head_count_kv")?.unwrap_or(num_attention_heads),
        head_dim,
        intermediate_size: size("feed_forward_length")?,
        max_position_embeddings: size("context_length")?,
        rms_norm_eps: decimal(header.float(&eps)?.ok_or_else(|| header.missing(&eps))?),
        rope_theta: decimal(header.float(&key("rope.freq_base"))?.unwrap_or(1e4)),
        tie_word_embeddings: !header.tensors.contains_key("output.weight"),
        hidden_act: Activation::Silu,
        bos_token_id: token(keys::BOS)?,
        eos_token_id: token(keys::EOS)?,
        ..VesperConfig::preset("nano")?
    })
}

/// A number that was stored in f32 as the shortest decimal that means it: 1e-6 and not 9.99999997e-7.
pub(super) fn decimal(value: f64) -> f64 {
    format!("{}", value as f32).parse().unwrap_or(value)
}
