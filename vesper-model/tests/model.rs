//! The whole model: counts, gradients, causality, caches, dtypes, adapters.

#![allow(clippy::unwrap_used)] // helpers of tests

use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use vesper_model::generate::NextLogits;
use vesper_model::ops::Path;
use vesper_model::{AdapterConfig, Projection, VesperConfig, VesperLM, trainable};

const CPU: Device = Device::Cpu;

fn small() -> VesperConfig {
    let mut config = VesperConfig::preset("nano").unwrap().with_vocab(90).with_kv_heads(2);
    config.num_hidden_layers = 2;
    config.hidden_size = 24;
    config.num_attention_heads = 4;
    config.head_dim = 6;
    config.intermediate_size = 40;
    config.max_position_embeddings = 64;
    config
}

fn ids(b: usize, t: usize, seed: u32) -> Tensor {
    let ids: Vec<u32> = (0..(b * t) as u32).map(|i| (i + seed).wrapping_mul(2_654_435_761) % 90).collect();
    Tensor::from_vec(ids, (b, t), &CPU).unwrap()
}

fn scalar(t: &Tensor) -> f64 {
    t.to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

/// NaN where there is one, which candle's own maximum passes over.
fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    let difference = (a.to_dtype(DType::F64).unwrap() - b.to_dtype(DType::F64).unwrap()).unwrap();
    let off = difference.abs().unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    off.into_iter().max_by(f64::total_cmp).unwrap()
}

fn lora() -> AdapterConfig {
    AdapterConfig {
        lora: serde_json::from_value(serde_json::json!({"r": 4, "alpha": 8.0})).unwrap(),
        targets: Projection::ALL.to_vec(),
    }
}

#[test]
fn the_count_equals_the_sum_of_the_variables() {
    for config in [small(), small().with_adapter(lora()), {
        let mut untied = small();
        untied.tie_word_embeddings = false;
        untied
    }] {
        let varmap = VarMap::new();
        VesperLM::initialize(&config, &varmap, 0, DType::F32, &CPU).unwrap();
        let sum: usize = varmap.all_vars().iter().map(|v| v.elem_count()).sum();
        assert_eq!(config.num_parameters(), sum);
        let trained: usize = trainable(&config, &varmap).unwrap().iter().map(|(_, v)| v.elem_count()).sum();
        assert_eq!(config.num_trainable_parameters(), trained);
    }
}

#[test]
fn presets_have_the_published_sizes() {
    let count = |name: &str| VesperConfig::preset(name).unwrap().num_parameters();
    assert!((1_000_000..2_000_000).contains(&count("nano")));
    assert_eq!(count("small"), 22_934_400);
    assert_eq!(count("medium") / 100_000, 1095);
    assert_eq!(count("large") / 1_000_000, 341);
    for name in VesperConfig::PRESETS {
        VesperConfig::preset(name).unwrap().validate().unwrap();
    }
    let message = VesperConfig::preset("huge").unwrap_err().to_string();
    assert!(message.contains("huge") && message.contains("nano, tiny, small, medium, large"), "{message}");
}

#[test]
fn every_parameter_receives_a_gradient() {
    for path in [Path::Fused, Path::Reference] {
        for tied in [true, false] {
            let mut config = small();
            config.tie_word_embeddings = tied;
            let varmap = VarMap::new();
            let model = VesperLM::initialize(&config, &varmap, 1, DType::F32, &CPU).unwrap().with_path(path);
            let grads = model.loss(&ids(2, 9, 0), &ids(2, 9, 1)).unwrap().loss.backward().unwrap();
            for (name, var) in trainable(&config, &varmap).unwrap() {
                let gradient = grads.get(&var).unwrap_or_else(|| panic!("{name} has no gradient"));
                let size = scalar(&gradient.abs().unwrap().max_all().unwrap());
                assert!(size > 0.0 && size.is_finite(), "{name}: gradient of size {size}");
            }
        }
    }
}

#[test]
fn with_adapters_they_alone_receive_gradients() {
    let config = small().with_adapter(lora());
    let varmap = VarMap::new();
    let model = VesperLM::initialize(&config, &varmap, 1, DType::F32, &CPU).unwrap();
    // B starts at zero, so A's gradient would be zero.
    for (name, var) in trainable(&config, &varmap).unwrap() {
        assert!(name.contains("lora_"));
        if name.ends_with("lora_B.weight") {
            assert_eq!(scalar(&var.abs().unwrap().max_all().unwrap()), 0.0);
            var.set(&var.affine(1.0, 0.01).unwrap()).unwrap();
        }
    }
    let grads = model.loss(&ids(2, 9, 0), &ids(2, 9, 1)).unwrap().loss.backward().unwrap();
    for (name, var) in varmap.data().lock().unwrap().iter() {
        match grads.get(var) {
            Some(gradient) => {
                assert!(name.contains("lora_"), "{name} is frozen but has a gradient");
                assert!(scalar(&gradient.abs().unwrap().max_all().unwrap()) > 0.0, "{name}");
            }
            None => assert!(!name.contains("lora_"), "{name} has no gradient"),
        }
    }
}

#[test]
fn fresh_adapters_do_not_change_the_model() {
    let (plain, adapted) = (small(), small().with_adapter(lora()));
    let logits = |config: &VesperConfig| {
        let model = VesperLM::initialize(config, &VarMap::new(), 3, DType::F32, &CPU).unwrap();
        model.forward(&ids(1, 7, 0)).unwrap()
    };
    assert_eq!(largest_difference(&logits(&plain), &logits(&adapted)), 0.0);
}

#[test]
fn the_fused_model_equals_its_reference() {
    for config in [small(), small().with_kv_heads(4), small().with_kv_heads(1)] {
        let varmap = VarMap::new();
        let fused = VesperLM::initialize(&config, &varmap, 5, DType::F64, &CPU).unwrap();
        let reference = fused.clone().with_path(Path::Reference);
        let (x, y) = (ids(2, 17, 0), ids(2, 17, 4));
        assert!(largest_difference(&fused.forward(&x).unwrap(), &reference.forward(&x).unwrap()) < 1e-10);
        let (a, b) = (fused.loss(&x, &y).unwrap(), reference.loss(&x, &y).unwrap());
        assert!(largest_difference(&a.loss, &b.loss) < 1e-10);
        assert!(largest_difference(&a.entropy, &b.entropy) < 1e-10);
        let (a, b) = (a.loss.backward().unwrap(), b.loss.backward().unwrap());
        for (name, var) in trainable(&config, &varmap).unwrap() {
            let off = largest_difference(a.get(&var).unwrap(), b.get(&var).unwrap());
            assert!(off < 1e-10, "{name}: gradients differ by {off:e}");
        }
    }
}

#[test]
fn the_loss_is_the_cross_entropy_of_the_logits() {
    let model = VesperLM::initialize(&small(), &VarMap::new(), 2, DType::F32, &CPU).unwrap();
    let (x, y) = (ids(2, 11, 0), ids(2, 11, 7));
    let logits = model.forward(&x).unwrap().flatten(0, 1).unwrap();
    let expected = candle_nn::loss::cross_entropy(&logits, &y.flatten_all().unwrap()).unwrap();
    assert!(largest_difference(&model.loss(&x, &y).unwrap().loss, &expected) < 1e-5);
}

#[test]
fn logits_do_not_depend_on_later_tokens() {
    let model = VesperLM::initialize(&small(), &VarMap::new(), 2, DType::F64, &CPU).unwrap();
    let whole = model.forward(&ids(1, 20, 0)).unwrap().narrow(1, 0, 12).unwrap();
    let start = model.forward(&ids(1, 12, 0)).unwrap();
    assert!(largest_difference(&whole, &start) < 1e-12);
}

#[test]
fn decoding_with_a_cache_gives_the_same_logits() {
    for kv in [4, 2, 1] {
        let config = small().with_kv_heads(kv);
        let model = VesperLM::initialize(&config, &VarMap::new(), 2, DType::F32, &CPU).unwrap();
        let x = ids(1, 12, 0);
        let tokens = x.flatten_all().unwrap().to_vec1::<u32>().unwrap();
        let logits = model.forward(&x).unwrap();
        let mut session = model.session(12).unwrap();
        let mut read = 0;
        // A prompt, single tokens, then several at once.
        for n in [5, 1, 1, 4, 1] {
            let last = session.append(&tokens[read..read + n]).unwrap();
            read += n;
            let expected = logits.narrow(1, read - 1, 1).unwrap().flatten_all().unwrap();
            let last = Tensor::new(last, &CPU).unwrap();
            assert!(largest_difference(&last, &expected) < 1e-4);
        }
        assert_eq!(session.remaining(), 0);
        let message = session.append(&[1]).unwrap_err().to_string();
        assert!(message.contains("13 tokens") && message.contains("12"), "{message}");
    }
}

#[test]
fn wrong_ids_and_lengths_are_refused() {
    let model = VesperLM::initialize(&small(), &VarMap::new(), 2, DType::F32, &CPU).unwrap();
    let message = model.forward(&Tensor::new(&[[200u32]], &CPU).unwrap()).unwrap_err().to_string();
    assert!(message.contains("200"), "{message}");
    let message = model.forward(&ids(1, 65, 0)).unwrap_err().to_string();
    assert!(message.contains("65 tokens") && message.contains("64"), "{message}");
    let mut session = model.session(8).unwrap();
    assert!(session.append(&[128]).unwrap_err().to_string().contains("128"));
    assert!(session.append(&[]).is_err());
}

#[test]
fn bf16_activations_train_f32_parameters() {
    let varmap = VarMap::new();
    let model = VesperLM::initialize(&small(), &varmap, 2, DType::F32, &CPU).unwrap();
    let mixed = model.clone().with_compute_dtype(DType::BF16);
    let (x, y) = (ids(2, 9, 0), ids(2, 9, 1));
    let (a, b) = (model.loss(&x, &y).unwrap().loss, mixed.loss(&x, &y).unwrap().loss);
    assert_eq!(b.dtype(), DType::F32);
    assert!(largest_difference(&a, &b) < 2e-2);
    let grads = b.backward().unwrap();
    for (name, var) in trainable(model.config(), &varmap).unwrap() {
        assert_eq!(grads.get(&var).unwrap_or_else(|| panic!("{name}")).dtype(), DType::F32);
    }
}

#[test]
fn a_seed_gives_the_same_model_and_another_seed_another() {
    let logits = |seed| {
        let model = VesperLM::initialize(&small(), &VarMap::new(), seed, DType::F32, &CPU).unwrap();
        model.forward(&ids(1, 5, 0)).unwrap()
    };
    assert_eq!(largest_difference(&logits(7), &logits(7)), 0.0);
    assert!(largest_difference(&logits(7), &logits(8)) > 0.0);
}

#[test]
fn impossible_configurations_are_refused_by_field() {
    type Change = fn(&mut VesperConfig);
    let changes: [(&str, Change); 7] = [
        ("num_key_value_heads", |c| c.num_key_value_heads = 3),
        ("head_dim", |c| c.head_dim = 5),
        ("hidden_size", |c| c.hidden_size = 0),
        ("rms_norm_eps", |c| c.rms_norm_eps = f64::NAN),
        ("rope_theta", |c| c.rope_theta = 0.0),
        ("adapter.lora.r", |c| {
            let mut adapter = lora();
            adapter.lora.r = 25;
            c.adapter = Some(adapter);
        }),
        // It would be no parameter of the configuration's: neither trained nor saved.
        ("adapter.lora.bias", |c| {
            let mut adapter = lora();
            adapter.lora.bias = true;
            c.adapter = Some(adapter);
        }),
    ];
    for (field, change) in changes {
        let mut config = small();
        change(&mut config);
        let message =
            VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &CPU).unwrap_err().to_string();
        assert!(message.contains(field), "{message}");
    }
}

#[test]
fn detached_models_see_updates_and_build_no_graph() {
    let varmap = VarMap::new();
    let model = VesperLM::initialize(&small(), &varmap, 2, DType::F32, &CPU).unwrap();
    let detached = model.detach();
    let (x, y) = (ids(2, 9, 0), ids(2, 9, 1));
    let before = detached.loss(&x, &y).unwrap().loss;
    assert!(!before.track_op());
    for var in varmap.all_vars() {
        var.set(&(var.as_tensor() * 1.5).unwrap()).unwrap();
    }
    let after = detached.loss(&x, &y).unwrap().loss;
    assert!(largest_difference(&before, &after) > 1e-6);
    assert_eq!(largest_difference(&after, &model.loss(&x, &y).unwrap().loss), 0.0);
}
