//! Weights in several files.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::json;
use vesper_model::VesperConfig;
use vesper_model::candle_core::{DType, Device, Tensor, safetensors};
use vesper_model::hf::read_weights;

use super::{assert_equal, on_disk, small, weights};

/// Writes every `n`th tensor, by name, to one of `n` files.
fn write_shards(dir: &Path, tensors: &HashMap<String, Tensor>, n: usize) -> BTreeMap<String, String> {
    let sorted: BTreeMap<&String, &Tensor> = tensors.iter().collect();
    let file = |i: usize| format!("model-{:05}-of-{n:05}.safetensors", i + 1);
    for shard in 0..n {
        let part: HashMap<String, Tensor> = sorted
            .iter()
            .skip(shard)
            .step_by(n)
            .map(|(name, tensor)| ((*name).clone(), (*tensor).clone()))
            .collect();
        safetensors::save(&part, dir.join(file(shard))).unwrap();
    }
    let map: BTreeMap<String, String> =
        sorted.keys().enumerate().map(|(i, name)| ((*name).clone(), file(i % n))).collect();
    write_index(dir, &map);
    map
}

fn write_index(dir: &Path, map: &BTreeMap<String, String>) {
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn error(dir: &Path) -> String {
    read_weights(dir, &small(), DType::F32, &Device::Cpu).unwrap_err().to_string()
}

#[test]
fn shards_load_as_one_file_does() {
    let original = weights(&small(), DType::BF16);
    for n in [1, 2, 5] {
        let dir = tempfile::tempdir().unwrap();
        // The parts of a packed tensor lie in different files.
        write_shards(dir.path(), &on_disk(&small(), &original), n);
        assert_equal(&read_weights(dir.path(), &small(), DType::BF16, &Device::Cpu).unwrap(), &original);
    }
}

#[test]
fn a_wrong_index_or_shard_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = on_disk(&small(), &weights(&small(), DType::F32));
    let map = write_shards(dir.path(), &tensors, 2);

    for name in ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "C:\\x", ""] {
        let mut outside = map.clone();
        outside.insert("model.norm.weight".into(), name.into());
        write_index(dir.path(), &outside);
        let error = error(dir.path());
        assert!(
            error.contains("index.json") && error.contains("is not the name of a file"),
            "{name}: {error}"
        );
    }

    let mut elsewhere = map.clone();
    let moved = map.iter().find(|(_, file)| file.starts_with("model-00001")).unwrap().0;
    elsewhere.insert(moved.clone(), "model-00002-of-00002.safetensors".into());
    write_index(dir.path(), &elsewhere);
    let message = error(dir.path());
    assert!(message.contains("model-00002") && message.contains(&format!("missing: {moved}")), "{message}");

    write_index(dir.path(), &map);
    let shard = dir.path().join("model-00002-of-00002.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 3]).unwrap();
    let message = error(dir.path());
    assert!(message.contains("model-00002-of-00002.safetensors: truncated"), "{message}");
    std::fs::remove_file(&shard).unwrap();
    assert!(error(dir.path()).contains("model-00002-of-00002.safetensors: "));
    let mut more = map.clone();
    more.insert("model.norm.weight".into(), "model-00003-of-00002.safetensors".into());
    std::fs::write(&shard, &bytes).unwrap();
    write_index(dir.path(), &more);
    let message = error(dir.path());
    assert!(message.contains("model-00003-of-00002.safetensors: "), "{message}");

    // Good files, but not of this model.
    write_index(dir.path(), &map);
    let deeper = VesperConfig { num_hidden_layers: 3, ..small() };
    let message = read_weights(dir.path(), &deeper, DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(message.contains("index.json: missing: model.layers.2.input_layernorm.weight"), "{message}");
    let wider = VesperConfig { intermediate_size: 21, ..small() };
    let message = read_weights(dir.path(), &wider, DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(
        message.contains("-of-00002.safetensors: ")
            && message.contains("has shape [20, 16], expected [21, 16]"),
        "{message}"
    );

    std::fs::write(dir.path().join("model.safetensors.index.json"), "{\"weight_map\": 3}").unwrap();
    assert!(error(dir.path()).contains("index.json: "));
}

#[test]
fn a_tensor_in_two_files_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = on_disk(&small(), &weights(&small(), DType::F32));
    let map = write_shards(dir.path(), &tensors, 2);
    safetensors::save(&tensors, dir.path().join(&map["model.norm.weight"])).unwrap();
    let error = error(dir.path());
    assert!(error.contains("is also in"), "{error}");
}
