//! A checkpoint that `transformers` wrote.

use std::path::PathBuf;

use vesper_model::candle_core::{DType, Device, IndexOp, Tensor, safetensors};
use vesper_model::hf::{Extras, read_config, read_generation_config, read_tokenizer, read_weights, save};

use super::{assert_equal, bits};

/// The checkpoint's folder, or `None` after saying that the test is skipped.
fn stories(test: &str) -> Option<PathBuf> {
    let data = std::env::var_os("VESPER_DATA").map(|data| PathBuf::from(data).join("models/stories260K"));
    if data.is_none() {
        println!("skipped: {test} (VESPER_DATA is not set)");
    }
    data
}

#[test]
fn stories260k_loads_packed() {
    let Some(dir) = stories("stories260k_loads_packed") else { return };
    let config = read_config(&dir).unwrap();
    assert_eq!((config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads), (5, 8, 4));
    assert_eq!((config.rms_norm_eps, config.max_position_embeddings), (1e-5, 512));
    let weights = read_weights(&dir, &config, DType::F32, &Device::Cpu).unwrap();
    let elements: usize = weights.values().map(Tensor::elem_count).sum();
    assert_eq!(elements, config.num_parameters());

    let file = safetensors::load(dir.join("model.safetensors"), &Device::Cpu).unwrap();
    let qkv = &weights["model.layers.4.self_attn.qkv_proj.weight"];
    assert_eq!(qkv.dims(), [128, 64]);
    for (name, rows) in [("q_proj", 0..64), ("k_proj", 64..96), ("v_proj", 96..128)] {
        let part = &file[&format!("model.layers.4.self_attn.{name}.weight")];
        assert_eq!(bits(&qkv.i(rows).unwrap()), bits(part), "{name}");
    }
    let gate_up = &weights["model.layers.2.mlp.gate_up_proj.weight"];
    for (name, rows) in [("gate_proj", 0..172), ("up_proj", 172..344)] {
        assert_eq!(
            bits(&gate_up.i(rows).unwrap()),
            bits(&file[&format!("model.layers.2.mlp.{name}.weight")])
        );
    }
}

#[test]
fn stories260k_saves_as_the_same_llama() {
    let Some(dir) = stories("stories260k_saves_as_the_same_llama") else { return };
    let config = read_config(&dir).unwrap();
    let weights = read_weights(&dir, &config, DType::F32, &Device::Cpu).unwrap();
    let tokenizer = std::fs::read_to_string(dir.join("tokenizer.json")).unwrap();
    let copy = tempfile::tempdir().unwrap();
    let extras = Extras { tokenizer_json: Some(&tokenizer), ..Extras::default() };
    save(copy.path(), &config, &weights, &extras).unwrap();

    let load =
        |dir: &std::path::Path| safetensors::load(dir.join("model.safetensors"), &Device::Cpu).unwrap();
    assert_equal(&load(copy.path()), &load(&dir));
    assert_eq!(read_config(copy.path()).unwrap(), config);
    let json = |dir: &std::path::Path| -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(dir.join("config.json")).unwrap()).unwrap()
    };
    let saved = json(copy.path());
    for (field, value) in json(&dir).as_object().unwrap() {
        assert_eq!(&saved[field], value, "{field}");
    }
    assert_eq!(read_generation_config(copy.path()).unwrap().eos_token_id, [2]);
    let tokenizer = read_tokenizer(copy.path(), &config).unwrap();
    assert_eq!(tokenizer.encode("Once upon a time", true).unwrap().get_ids()[..3], [1, 403, 407]);
}
