//! What is saved loads back, bit for bit.

use flylora::LoraConfig;
use vesper_model::candle_core::{DType, Device, Tensor, safetensors};
use vesper_model::generate::GenerationConfig;
use vesper_model::hf::{Extras, read_config, read_generation_config, read_weights, save};
use vesper_model::{AdapterConfig, Projection, VesperConfig};

use super::{assert_equal, bits, on_disk, small, weights};

fn adapter(targets: &[Projection]) -> AdapterConfig {
    AdapterConfig { lora: LoraConfig::default().with_r(3).with_alpha(0.1), targets: targets.to_vec() }
}

fn configs() -> Vec<VesperConfig> {
    let silu = small().with_activation("silu".parse().unwrap());
    vec![
        small(),
        VesperConfig { tie_word_embeddings: false, ..small() },
        silu.clone(),
        VesperConfig {
            tie_word_embeddings: false,
            bos_token_id: None,
            eos_token_id: None,
            head_dim: 6,
            ..silu.clone()
        },
        small().with_kv_heads(4),
        small().with_kv_heads(1),
        small().with_adapter(adapter(&[Projection::VProj])),
        silu.with_adapter(adapter(&Projection::ALL)),
    ]
}

#[test]
fn configuration_and_weights_survive_bit_for_bit() {
    for config in configs() {
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let dir = tempfile::tempdir().unwrap();
            let weights = weights(&config, dtype);
            save(dir.path(), &config, &weights, &Extras::default()).unwrap();
            assert_eq!(read_config(dir.path()).unwrap(), config);
            assert_equal(&read_weights(dir.path(), &config, dtype, &Device::Cpu).unwrap(), &weights);
        }
    }
}

#[test]
fn special_values_survive() {
    use vesper_model::candle_core::Tensor;
    let config = small();
    let mut weights = weights(&config, DType::F32);
    let values: Vec<f32> = [f32::MIN_POSITIVE / 4.0, -0.0, f32::INFINITY, f32::MAX, 1e-45]
        .into_iter()
        .cycle()
        .take(config.hidden_size)
        .collect();
    weights.insert(
        "model.norm.weight".into(),
        Tensor::from_vec(values, config.hidden_size, &Device::Cpu).unwrap(),
    );
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &config, &weights, &Extras::default()).unwrap();
    assert_equal(&read_weights(dir.path(), &config, DType::F32, &Device::Cpu).unwrap(), &weights);
}

#[test]
fn the_file_has_llamas_names_and_the_rows_in_order() {
    let config = small();
    let weights = weights(&config, DType::F32);
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &config, &weights, &Extras::default()).unwrap();
    let file = safetensors::load(dir.path().join("model.safetensors"), &Device::Cpu).unwrap();
    assert_equal(&file, &on_disk(&config, &weights));
}

#[test]
fn the_file_says_that_it_is_of_format_pt_and_its_tensors_are_aligned() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &small(), &weights(&small(), DType::BF16), &Extras::default()).unwrap();
    let bytes = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let (size, metadata) = ::safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    assert!(size.is_multiple_of(8));
}

#[test]
fn the_same_model_gives_the_same_bytes() {
    let config = VesperConfig { tie_word_embeddings: false, ..small() };
    let files = || {
        let dir = tempfile::tempdir().unwrap();
        // A new map each time: its order is another.
        save(dir.path(), &config, &weights(&config, DType::F32), &Extras::default()).unwrap();
        let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
        (read("model.safetensors"), read("config.json"), read("generation_config.json"))
    };
    assert_eq!(files(), files());
}

#[test]
fn weights_are_converted_to_the_dtype_asked_for() {
    let config = small();
    let original = weights(&config, DType::F32);
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &config, &original, &Extras::default()).unwrap();
    for dtype in [DType::BF16, DType::F16, DType::F64] {
        for (name, tensor) in read_weights(dir.path(), &config, dtype, &Device::Cpu).unwrap() {
            assert_eq!(bits(&tensor), bits(&original[&name].to_dtype(dtype).unwrap()), "{name}");
        }
    }
}

#[test]
fn parts_of_several_dtypes_are_packed_in_the_dtype_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = on_disk(&small(), &weights(&small(), DType::F32));
    let cast = |tensor: &Tensor, dtype| tensor.to_dtype(dtype).unwrap();
    // What each part has after its own dtype, in f32.
    let mut rounded = tensors.clone();
    for (part, dtype) in [("q_proj", DType::BF16), ("k_proj", DType::F64), ("up_proj", DType::F16)] {
        for name in tensors.keys().filter(|name| name.contains(part)).cloned().collect::<Vec<_>>() {
            let stored = cast(&tensors[&name], dtype);
            rounded.insert(name.clone(), cast(&stored, DType::F32));
            tensors.insert(name, stored);
        }
    }
    safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
    let mixed = read_weights(dir.path(), &small(), DType::F32, &Device::Cpu).unwrap();
    safetensors::save(&rounded, dir.path().join("model.safetensors")).unwrap();
    let plain = read_weights(dir.path(), &small(), DType::F32, &Device::Cpu).unwrap();
    assert_equal(&mixed, &plain);
}

#[test]
fn tensors_that_are_packed_in_the_file_load_as_they_are() {
    let config = small();
    let original = weights(&config, DType::F32);
    let dir = tempfile::tempdir().unwrap();
    safetensors::save(&original, dir.path().join("model.safetensors")).unwrap();
    assert_equal(&read_weights(dir.path(), &config, DType::F32, &Device::Cpu).unwrap(), &original);
}

#[test]
fn a_silu_model_is_a_llama_on_disk_and_any_other_a_vesper() {
    let kind = |config: &VesperConfig| {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), config, &weights(config, DType::BF16), &Extras::default()).unwrap();
        let text = std::fs::read_to_string(dir.path().join("config.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        (json["model_type"].clone(), json["architectures"][0].clone(), json["torch_dtype"].clone())
    };
    let silu = small().with_activation("silu".parse().unwrap());
    assert_eq!(kind(&silu), ("llama".into(), "LlamaForCausalLM".into(), "bfloat16".into()));
    // `transformers` has no adapters inside a model.
    let adapted = silu.with_adapter(adapter(&[Projection::QProj]));
    assert_eq!(kind(&adapted).0, "vesper");
    assert_eq!(kind(&small()), ("vesper".into(), "VesperForCausalLM".into(), serde_json::Value::Null));
}

#[test]
fn settings_of_generation_survive_and_get_the_models_tokens() {
    let config = small();
    let dir = tempfile::tempdir().unwrap();
    let generation = GenerationConfig::default().with_top_k(7).with_temperature(0.3).with_seed(11);
    let extras = Extras { generation: generation.clone(), ..Extras::default() };
    save(dir.path(), &config, &weights(&config, DType::F32), &extras).unwrap();
    let expected = generation.with_bos(Some(1)).with_eos([2]);
    assert_eq!(read_generation_config(dir.path()).unwrap(), expected);
}
