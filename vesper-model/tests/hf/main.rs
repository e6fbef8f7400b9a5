//! Hugging Face directories: what is read, what is refused, what is written.

#![allow(clippy::unwrap_used)] // helpers of tests

mod config;
mod damage;
mod llamas;
mod python;
mod real;
mod round_trip;
mod save;
mod shards;

use std::collections::HashMap;
use std::path::Path;

use flylora::LoraConfig;
use vesper_model::candle_core::{DType, Device, Tensor};
use vesper_model::{AdapterConfig, Projection, VesperConfig};

/// A model small enough to list: 2 blocks, 4 query heads over 2 key heads of size 4, sizes all different.
fn small() -> VesperConfig {
    VesperConfig {
        vocab_size: 24,
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        intermediate_size: 20,
        max_position_embeddings: 32,
        bos_token_id: Some(1),
        eos_token_id: Some(2),
        ..VesperConfig::preset("nano").unwrap()
    }
}

/// The same with adapters in its own files.
fn adapted() -> VesperConfig {
    let lora = LoraConfig::default().with_r(3).with_alpha(0.1);
    small().with_adapter(AdapterConfig { lora, targets: vec![Projection::VProj] })
}

/// The names in a folder.
fn names(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

/// The names and shapes in memory, written out by hand.
fn shapes(config: &VesperConfig) -> Vec<(String, Vec<usize>)> {
    let (d, f) = (config.hidden_size, config.intermediate_size);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, d]),
        ("model.norm.weight".to_owned(), vec![d]),
    ];
    if !config.tie_word_embeddings {
        shapes.push(("lm_head.weight".into(), vec![config.vocab_size, d]));
    }
    for i in 0..config.num_hidden_layers {
        let mut push = |name: &str, shape: &[usize]| {
            shapes.push((format!("model.layers.{i}.{name}.weight"), shape.to_vec()));
        };
        push("input_layernorm", &[d]);
        push("post_attention_layernorm", &[d]);
        push("self_attn.qkv_proj", &[config.qkv_size(), d]);
        push("self_attn.o_proj", &[d, config.num_attention_heads * config.head_dim]);
        push("mlp.gate_up_proj", &[2 * f, d]);
        push("mlp.down_proj", &[d, f]);
        for &target in config.adapter.iter().flat_map(|adapter| &adapter.targets) {
            let (input, output) = config.projection_size(target);
            let r = config.adapter.as_ref().unwrap().lora.r;
            push(&format!("{}.lora_A", target.path()), &[r, input]);
            push(&format!("{}.lora_B", target.path()), &[output, r]);
        }
    }
    shapes
}

/// Weights in memory: every element of the model is another number.
fn weights(config: &VesperConfig, dtype: DType) -> HashMap<String, Tensor> {
    let mut next = 0f32;
    shapes(config)
        .into_iter()
        .map(|(name, shape)| {
            let count: usize = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|i| (next + i as f32).sin() * 3.7).collect();
            next += count as f32;
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            (name, tensor)
        })
        .collect()
}

/// The exact bits, whatever the dtype: bf16, f16 and f32 are all exact in f64.
fn bits(tensor: &Tensor) -> (DType, Vec<usize>, Vec<u64>) {
    let values = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    (tensor.dtype(), tensor.dims().to_vec(), values.into_iter().map(f64::to_bits).collect())
}

fn assert_equal(got: &HashMap<String, Tensor>, expected: &HashMap<String, Tensor>) {
    let names = |weights: &HashMap<String, Tensor>| {
        let mut names: Vec<String> = weights.keys().cloned().collect();
        names.sort();
        names
    };
    assert_eq!(names(got), names(expected));
    for (name, tensor) in expected {
        assert_eq!(bits(&got[name]), bits(tensor), "{name}");
    }
}

/// The tensors of a model as Llama's files have them.
fn on_disk(config: &VesperConfig, weights: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    let mut tensors = HashMap::new();
    for (name, tensor) in weights {
        let split = |names: &[Projection]| {
            let mut start = 0;
            let mut parts = Vec::new();
            for &projection in names {
                let rows = config.projection_size(projection).1;
                let block = name.split(".self_attn").next().unwrap().split(".mlp").next().unwrap();
                let part = tensor.narrow(0, start, rows).unwrap().contiguous().unwrap();
                parts.push((format!("{block}.{}.weight", projection.path()), part));
                start += rows;
            }
            parts
        };
        if name.ends_with("qkv_proj.weight") {
            tensors.extend(split(&[Projection::QProj, Projection::KProj, Projection::VProj]));
        } else if name.ends_with("gate_up_proj.weight") {
            tensors.extend(split(&[Projection::GateProj, Projection::UpProj]));
        } else {
            tensors.insert(name.clone(), tensor.clone());
        }
    }
    tensors
}
