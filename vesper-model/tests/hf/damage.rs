//! Damaged and wrong weights: one line that names the file and the key, never a panic.

use std::collections::HashMap;
use std::path::Path;
use std::sync::OnceLock;

use flylora::LoraConfig;
use proptest::prelude::*;
use vesper_model::candle_core::{DType, Device, Tensor, safetensors};
use vesper_model::hf::{Extras, read_weights, save};
use vesper_model::{AdapterConfig, Projection, VesperConfig};

use super::{on_disk, small, weights};

fn write(dir: &Path, tensors: &HashMap<String, Tensor>) {
    safetensors::save(tensors, dir.join("model.safetensors")).unwrap();
}

fn error(dir: &Path, config: &VesperConfig) -> String {
    let error = read_weights(dir, config, DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: ") && !error.contains('\n'), "{error}");
    error
}

/// The error after a change to the tensors of a good file.
fn after(config: &VesperConfig, change: impl FnOnce(&mut HashMap<String, Tensor>)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = on_disk(config, &weights(config, DType::F32));
    change(&mut tensors);
    write(dir.path(), &tensors);
    error(dir.path(), config)
}

#[test]
fn a_missing_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    error(dir.path(), &small());
    error(&dir.path().join("nowhere"), &small());
}

#[test]
fn missing_tensors_are_named() {
    let error = after(&small(), |tensors| {
        tensors.remove("model.layers.1.self_attn.k_proj.weight");
        tensors.remove("model.norm.weight");
    });
    assert!(error.contains("missing: model.layers.1.self_attn.k_proj.weight, model.norm.weight"), "{error}");
    let untied = VesperConfig { tie_word_embeddings: false, ..small() };
    let error = after(&untied, |tensors| {
        tensors.remove("lm_head.weight");
    });
    assert!(error.contains("missing: lm_head.weight"), "{error}");
}

#[test]
fn missing_adapters_are_named() {
    let adapter = AdapterConfig { lora: LoraConfig::default().with_r(2), targets: vec![Projection::QProj] };
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &on_disk(&small(), &weights(&small(), DType::F32)));
    let error = error(dir.path(), &small().with_adapter(adapter));
    assert!(error.contains("missing: model.layers.0.self_attn.q_proj.lora_A.weight, "), "{error}");
}

#[test]
fn a_configuration_of_a_billion_blocks_fails_at_once() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &on_disk(&small(), &weights(&small(), DType::F32)));
    let config = VesperConfig { num_hidden_layers: 1 << 31, ..small() };
    assert!(error(dir.path(), &config).contains("model.layers.2.input_layernorm.weight"));
}

#[test]
fn unexpected_tensors_are_named() {
    let extra = || Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    let error = after(&small(), |tensors| {
        tensors.insert("model.layers.0.self_attn.q_proj.bias".into(), extra());
    });
    assert!(error.contains("the model has no model.layers.0.self_attn.q_proj.bias"), "{error}");
    let shallow = VesperConfig { num_hidden_layers: 1, ..small() };
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &on_disk(&small(), &weights(&small(), DType::F32)));
    let error = self::error(dir.path(), &shallow);
    assert!(error.contains("model.layers.1.") && error.ends_with("and more"), "{error}");
}

#[test]
fn what_old_files_store_beside_the_weights_is_ignored() {
    let config = small();
    let mut tensors = on_disk(&config, &weights(&config, DType::F32));
    let frequencies = Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap();
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), frequencies);
    tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &tensors);
    let loaded = read_weights(dir.path(), &config, DType::F32, &Device::Cpu).unwrap();
    assert!(!loaded.contains_key("lm_head.weight"));
}

#[test]
fn a_wrong_shape_is_named_with_what_was_expected() {
    let error = after(&small(), |tensors| {
        let wrong = Tensor::zeros((8, 15), DType::F32, &Device::Cpu).unwrap();
        tensors.insert("model.layers.0.self_attn.v_proj.weight".into(), wrong);
    });
    assert!(
        error.contains("model.layers.0.self_attn.v_proj.weight has shape [8, 15], expected [8, 16]"),
        "{error}"
    );
    // The same number of elements in another shape is another tensor.
    let error = after(&small(), |tensors| {
        let name = "model.layers.0.mlp.down_proj.weight";
        tensors.insert(name.into(), tensors[name].t().unwrap().contiguous().unwrap());
    });
    assert!(error.contains("has shape [20, 16], expected [16, 20]"), "{error}");
}

#[test]
fn weights_that_are_no_floats_are_refused() {
    let error = after(&small(), |tensors| {
        let wrong = Tensor::zeros(16, DType::U8, &Device::Cpu).unwrap();
        tensors.insert("model.norm.weight".into(), wrong);
    });
    assert!(error.contains("model.norm.weight has dtype U8, expected F32, BF16, F16 or F64"), "{error}");
}

/// A good file's bytes.
fn good() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &small(), &weights(&small(), DType::F32), &Extras::default()).unwrap();
        std::fs::read(dir.path().join("model.safetensors")).unwrap()
    })
}

fn of_bytes(bytes: &[u8]) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    read_weights(dir.path(), &small(), DType::F32, &Device::Cpu).map(drop).map_err(|error| error.to_string())
}

#[test]
fn a_truncated_file_says_so() {
    let bytes = good();
    assert_eq!(of_bytes(bytes), Ok(()));
    assert!(of_bytes(&[]).unwrap_err().contains("the file is empty"));
    for length in [1, 7, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        let error = of_bytes(&bytes[..length]).unwrap_err();
        assert!(error.contains("model.safetensors: truncated"), "{length}: {error}");
    }
}

#[test]
fn what_is_no_safetensors_says_so() {
    for (bytes, part) in [
        (&b"PK\x03\x04 this is a pickle or a zip file"[..], "not safetensors"),
        (b"\x04\0\0\0\0\0\0\0nope", "invalid safetensors header"),
        (b"\x02\0\0\0\0\0\0\0{}", "missing: model.embed_tokens.weight"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{}", "not safetensors"),
    ] {
        let error = of_bytes(bytes).unwrap_err();
        assert!(error.contains("model.safetensors: ") && error.contains(part), "{error}");
    }
    let mut longer = good().to_vec();
    longer.push(0);
    assert!(of_bytes(&longer).unwrap_err().contains("data after the last tensor"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn no_truncation_loads_or_panics(length in 0..good().len()) {
        prop_assert!(of_bytes(&good()[..length]).is_err());
    }

    #[test]
    fn no_change_of_the_header_panics(
        changes in prop::collection::vec((0..3000usize, any::<u8>()), 1..4)
    ) {
        let mut bytes = good().to_vec();
        for (place, byte) in changes {
            bytes[place] = byte;
        }
        // A change of a digit may leave a good header; whatever comes, it is an answer.
        let _ = of_bytes(&bytes);
    }
}
