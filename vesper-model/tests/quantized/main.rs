//! Quantised models: in memory, in GGUF files, under adapters.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod adapters;
mod damage;
mod gguf;
mod largest;
mod llama;
mod llama3;
mod model;
mod products;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use era_act::Activation;
use vesper_model::{VesperConfig, VesperLM};

/// A small model; with SiLU other programs know it as a Llama.
fn config(width: usize, tied: bool, activation: Activation) -> VesperConfig {
    let mut config = VesperConfig::preset("nano").unwrap().with_vocab(64).with_activation(activation);
    config.hidden_size = width;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 4;
    config.num_key_value_heads = 2;
    config.head_dim = width / 4;
    config.intermediate_size = 3 * width / 2;
    config.max_position_embeddings = 64;
    config.tie_word_embeddings = tied;
    config.bos_token_id = Some(1);
    config.eos_token_id = Some(2);
    // Wide enough that the predictions are far from uniform.
    config.initializer_range = 0.1;
    config
}

fn model(config: &VesperConfig) -> VesperLM {
    VesperLM::initialize(config, &VarMap::new(), 3, DType::F32, &Device::Cpu).unwrap().detach()
}

fn ids(rows: usize, columns: usize) -> Tensor {
    let ids: Vec<u32> = (0..(rows * columns) as u32).map(|i| (i * 7 + i * i * 3 + 5) % 64).collect();
    Tensor::from_vec(ids, (rows, columns), &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Root of the mean squared difference, divided by that of the second.
fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let square = |t: Tensor| f64::from(t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
    (square((a - b).unwrap()) / square(b.clone())).sqrt()
}
