//! Small models, tokens, and comparisons.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use vesper_model::{VesperConfig, VesperLM};

pub(crate) const CPU: Device = Device::Cpu;

/// Sizes that no register divides.
pub(crate) fn config(kv: usize, dim: usize) -> VesperConfig {
    let mut config = VesperConfig::preset("nano").unwrap().with_vocab(128).with_kv_heads(kv);
    config.num_hidden_layers = 2;
    config.hidden_size = 44;
    config.num_attention_heads = 6;
    config.head_dim = dim;
    config.intermediate_size = 70;
    config.max_position_embeddings = 400;
    config.initializer_range = 0.15; // logits that differ
    config
}

pub(crate) fn model(config: &VesperConfig, dtype: DType) -> VesperLM {
    VesperLM::initialize(config, &VarMap::new(), 7, dtype, &CPU).unwrap()
}

/// Tokens that depend on their places and on a seed.
pub(crate) fn tokens(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i + 1000 * seed).wrapping_mul(2_654_435_761) % 127).collect()
}

/// The logits after the last of the tokens, from the whole model at once, in f64.
pub(crate) fn whole(model: &VesperLM, tokens: &[u32]) -> Vec<f64> {
    let ids = Tensor::new(tokens, model.device()).unwrap().unsqueeze(0).unwrap();
    let logits = model.forward(&ids).unwrap().narrow(1, tokens.len() - 1, 1).unwrap();
    logits.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// The largest difference; infinite where something is NaN.
pub(crate) fn apart(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |most: f64, (a, b)| {
        let off = (f64::from(*a) - b).abs();
        if off.is_nan() { f64::INFINITY } else { most.max(off) }
    })
}

pub(crate) fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}
