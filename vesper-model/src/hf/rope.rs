//! The rotary embedding as the versions of `transformers` describe it.

use super::fields::Fields;
use crate::Result;
use crate::ops::RopeScaling;

/// Base and scaling of the rotary angles.
///
/// Versions before 5 write `rope_theta` and `rope_scaling`, later ones both as `rope_parameters`. Either may name its
/// kind `rope_type` or, as the oldest do, `type`.
pub(super) fn read(fields: &Fields<'_>, positions: usize) -> Result<(f64, Option<RopeScaling>)> {
    let older = fields.object("rope_scaling")?;
    let newer = fields.object("rope_parameters")?;
    let scaling = match (&older, &newer) {
        (None, None) => None,
        (Some(rope), None) | (None, Some(rope)) => scaling_of(fields, rope, positions)?,
        (Some(older), Some(newer)) => {
            let scaling = scaling_of(fields, older, positions)?;
            if scaling != scaling_of(fields, newer, positions)? {
                return Err(fields.refusal("rope_scaling", "rope_parameters beside it says otherwise"));
            }
            scaling
        }
    };
    for rope in [&newer, &older].into_iter().flatten() {
        if let Some(theta) = rope.get("rope_theta")? {
            return Ok((theta, scaling));
        }
    }
    Ok((fields.get("rope_theta")?.unwrap_or(1e4), scaling))
}

fn scaling_of(fields: &Fields<'_>, rope: &Fields<'_>, positions: usize) -> Result<Option<RopeScaling>> {
    if rope.get::<f64>("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        let why = "only rotary embeddings over the whole head are supported";
        return Err(rope.refusal("partial_rotary_factor", why));
    }
    let key = if rope.has("rope_type") { "rope_type" } else { "type" };
    let kind: Option<String> = rope.get(key)?;
    match kind.as_deref() {
        Some("linear") => Ok(Some(RopeScaling::Linear { factor: rope.require("factor")? })),
        Some("llama3") => {
            // A model may say beside its scaling what it was trained on first; `transformers` prefers that.
            let original = "original_max_position_embeddings";
            let original = fields.get(original)?.or(rope.get(original)?).unwrap_or(positions);
            Ok(Some(RopeScaling::Llama3 {
                factor: rope.require("factor")?,
                low_freq_factor: rope.require("low_freq_factor")?,
                high_freq_factor: rope.require("high_freq_factor")?,
                original_max_position_embeddings: original,
            }))
        }
        Some("default") => Ok(None),
        Some(_) => Err(rope.refusal(key, "expected default, linear or llama3")),
        // Versions before `rope_type` scaled by the factor alone.
        None if rope.get::<f64>("factor")?.is_some_and(|factor| factor != 1.0) => {
            Err(rope.refusal("factor", "no rope_type says how the angles are scaled"))
        }
        None => Ok(None),
    }
}
