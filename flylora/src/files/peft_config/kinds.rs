//! What files say of every kind.

use crate::adapter::AdapterKind;

pub(super) fn peft_type(kind: &AdapterKind) -> &'static str {
    match kind {
        AdapterKind::Lora(_) | AdapterKind::Dora(_) => "LORA",
        AdapterKind::AdaLora(_) => "ADALORA",
        AdapterKind::FlyLora(_) => "FLYLORA",
        AdapterKind::MaskedLora(_) => "MASKED_FLYLORA",
    }
}

pub(super) fn rank_and_alpha(kind: &AdapterKind) -> (usize, f64) {
    match kind {
        AdapterKind::Lora(c) | AdapterKind::Dora(c) => (c.r, c.alpha),
        AdapterKind::MaskedLora(c) => (c.lora.r, c.lora.alpha),
        AdapterKind::AdaLora(c) => (c.init_r, c.alpha),
        AdapterKind::FlyLora(c) => (c.r, c.alpha),
    }
}

pub(super) fn dropout(kind: &AdapterKind) -> f64 {
    match kind {
        AdapterKind::Lora(c) | AdapterKind::Dora(c) => c.dropout,
        AdapterKind::MaskedLora(c) => c.lora.dropout,
        AdapterKind::AdaLora(c) => c.dropout,
        AdapterKind::FlyLora(_) => 0.0,
    }
}

/// What must be equal for an adapter to take the tensors of another.
pub(super) fn numbers(kind: &AdapterKind) -> Vec<(&'static str, f64)> {
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
