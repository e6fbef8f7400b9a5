//! Adapters of every kind on a model.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Optimizer, SGD, VarMap};
use flylora::files::{PeftConfig, SaveOptions, save_adapters_with};
use flylora::{
    AdaLoraConfig, Adapter, AdapterKind, FlyLoraConfig, LoraConfig, LoraInit, MaskedLoraConfig, Merge,
    Targets,
};
use vesper_model::ops::Path;
use vesper_model::{VesperConfig, VesperLM, flylora};

fn config() -> VesperConfig {
    let mut config = VesperConfig::preset("nano").unwrap().with_vocab(64).with_kv_heads(2);
    config.num_hidden_layers = 2;
    config
}

fn model() -> VesperLM {
    VesperLM::initialize(&config(), &VarMap::new(), 5, DType::F32, &Device::Cpu).unwrap()
}

fn kinds() -> Vec<AdapterKind> {
    let lora = LoraConfig::default().with_r(4);
    vec![
        AdapterKind::Lora(lora.clone()),
        AdapterKind::Lora(lora.clone().with_bias(true)),
        AdapterKind::Lora(lora.clone().with_init(LoraInit::Pissa { iterations: Some(3) })),
        AdapterKind::Dora(lora.clone()),
        AdapterKind::AdaLora(AdaLoraConfig::default().with_init_r(4)),
        AdapterKind::FlyLora(FlyLoraConfig::default().with_ranks(16, 4)),
        AdapterKind::MaskedLora(MaskedLoraConfig::default().with_lora(lora)),
    ]
}

fn ids(seed: u32) -> Tensor {
    let ids: Vec<u32> = (0..24).map(|i: u32| (i * 7 + seed * 13 + i * i) % 64).collect();
    Tensor::from_vec(ids, (2, 12), &Device::Cpu).unwrap()
}

/// The largest difference; NaN where there is one, which candle's own maximum passes over.
fn difference(a: &Tensor, b: &Tensor) -> f32 {
    let off = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    off.into_iter().max_by(f32::total_cmp).unwrap()
}

fn vars(model: &VesperLM) -> Vec<(String, Var)> {
    let adapters = model.adapters();
    let of = |(path, adapter): &(String, std::sync::Arc<dyn Adapter>)| {
        adapter
            .parameters()
            .into_iter()
            .map(|(name, var)| (format!("{path}.{name}"), var))
            .collect::<Vec<_>>()
    };
    adapters.iter().flat_map(of).collect()
}

#[test]
fn every_kind_starts_as_the_model_trains_saves_loads_and_merges() {
    let targets = Targets::names(["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]);
    let plain = model();
    let want = plain.forward(&ids(0)).unwrap();
    for kind in kinds() {
        let mut adapted = plain.clone();
        adapted.attach(&kind, &targets).unwrap();
        assert_eq!(adapted.adapters().len(), 2 * 5);
        assert_eq!(adapted.adapters()[0].0, "model.layers.0.self_attn.q_proj");
        assert!(difference(&adapted.forward(&ids(0)).unwrap(), &want) < 1e-5, "{kind}");

        for (i, (_, var)) in vars(&adapted).iter().enumerate() {
            // Away from the start, where half of the gradients are 0.
            let n = var.elem_count();
            let values: Vec<f32> =
                (0..n).map(|j| 0.05 * (((j * 37 + i * 11) % 19) as f32 / 9.0 - 1.0)).collect();
            let moved = Tensor::from_vec(values, var.shape(), var.device()).unwrap();
            var.set(&(var.as_detached_tensor() + moved).unwrap()).unwrap();
        }
        let loss = || adapted.loss(&ids(1), &ids(2)).unwrap().loss;
        let first = loss();
        let grads = first.backward().unwrap();
        flylora::audit(vars(&adapted), &grads).unwrap();
        let weights = adapted.weights();
        let mut sgd = SGD::new(vars(&adapted).into_iter().map(|(_, var)| var).collect(), 0.05).unwrap();
        for _ in 0..8 {
            sgd.backward_step(&loss()).unwrap();
        }
        assert!(loss().to_scalar::<f32>().unwrap() < first.to_scalar::<f32>().unwrap(), "{kind}");
        for (name, weight) in adapted.weights() {
            assert!(grads.get(&weights[&name]).is_none());
            assert_eq!(difference(&weight, &weights[&name]), 0.0, "{kind}: {name} moved");
        }

        let y = adapted.forward(&ids(3)).unwrap();
        assert!(difference(&y, &plain.forward(&ids(3)).unwrap()) > 1e-3, "{kind}");
        assert!(difference(&adapted.detach().forward(&ids(3)).unwrap(), &y) < 1e-5);
        let dir = tempfile::tempdir().unwrap();
        adapted.save_adapters(dir.path()).unwrap();
        let mut loaded = plain.clone();
        loaded.attach_from(dir.path()).unwrap();
        assert!(difference(&loaded.forward(&ids(3)).unwrap(), &y) < 1e-5, "{kind}");
        match adapted.merged().unwrap() {
            None => {
                // Routing is no matrix, and the layers have no bias.
                let bias = matches!(&kind, AdapterKind::Lora(c) if c.bias);
                assert!(bias || matches!(kind, AdapterKind::FlyLora(_)));
                assert_eq!(adapted.merge_quality(), Merge::Unsupported);
            }
            Some(merged) => {
                assert_eq!(adapted.merge_quality(), Merge::Exact);
                assert!(merged.adapters().is_empty());
                assert!(difference(&merged.forward(&ids(3)).unwrap(), &y) < 1e-4, "{kind}");
            }
        }
    }
}

#[test]
fn many_rows_give_with_each_kind_what_the_reference_gives() {
    let targets = Targets::names(["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]);
    // More rows than most projections have inputs.
    let tokens: Vec<u32> = (0..5 * 64).map(|i| (i * 7 + i / 9) % 64).collect();
    let batch = Tensor::from_vec(tokens, (5, 64), &Device::Cpu).unwrap();
    for kind in kinds() {
        let mut model = model();
        model.attach(&kind, &targets).unwrap();
        for (i, (_, var)) in vars(&model).iter().enumerate() {
            let values: Vec<f32> =
                (0..var.elem_count()).map(|j| 0.02 * (((j * 37 + i * 11) % 19) as f32 / 9.0 - 1.0)).collect();
            let moved = Tensor::from_vec(values, var.shape(), var.device()).unwrap();
            var.set(&(var.as_detached_tensor() + moved).unwrap()).unwrap();
        }
        let reference = model.clone().with_path(Path::Reference);
        let run = |model: &VesperLM| {
            let loss = model.loss(&batch, &batch).unwrap().loss;
            (model.forward(&batch).unwrap(), loss.backward().unwrap())
        };
        let ((y, grads), (want, want_grads)) = (run(&model), run(&reference));
        assert!(difference(&y, &want) < 2e-4, "{kind}: {}", difference(&y, &want));
        // Activations in another dtype than the weights'.
        let mixed = model.clone().with_compute_dtype(DType::BF16).loss(&batch, &batch).unwrap().loss;
        let loss = model.loss(&batch, &batch).unwrap().loss;
        assert!(difference(&mixed, &loss) < 2e-2, "{kind} in bf16");
        for (name, var) in vars(&model) {
            let (got, want) = (grads.get(&var).unwrap(), want_grads.get(&var).unwrap());
            let size = want.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(
                difference(got, want) < 1e-3 * (0.01 + size),
                "{kind}: {name}, {}",
                difference(got, want)
            );
        }
    }
}

#[test]
fn adapters_train_in_mixed_precision_over_few_and_many_rows() {
    let plain = model();
    let many: Vec<u32> = (0..320u32).map(|i| (i * 7 + i * i) % 64).collect();
    let many = Tensor::from_vec(many, (2, 160), &Device::Cpu).unwrap();
    for kind in kinds() {
        let mut wide = plain.clone();
        wide.attach(&kind, &Targets::all_linear()).unwrap();
        for (i, (_, var)) in vars(&wide).iter().enumerate() {
            let moved = (Tensor::ones(var.shape(), DType::F32, &Device::Cpu).unwrap()
                * (0.01 * (i % 5 + 1) as f64))
                .unwrap();
            var.set(&(var.as_detached_tensor() + moved).unwrap()).unwrap();
        }
        let mixed = wide.clone().with_compute_dtype(DType::BF16);
        for ids in [&ids(1), &many] {
            let [exact, loss] = [&wide, &mixed].map(|model| model.loss(ids, ids).unwrap().loss);
            let grads = loss.backward().unwrap();
            flylora::audit(vars(&mixed), &grads).unwrap();
            let [exact, loss] = [exact, loss].map(|loss| loss.to_scalar::<f32>().unwrap());
            assert!((exact - loss).abs() < 0.02 * exact, "{kind}: {exact} and {loss}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_the_model_stays_as_it_was() {
    let mut model = model();
    let kind = AdapterKind::Lora(LoraConfig::default().with_r(4));
    let error = model.attach(&kind, &Targets::names(["lm_head"])).unwrap_err().to_string();
    assert!(error.contains("select none of the model's projections"), "{error}");
    let huge = LoraConfig::default().with_r(4000).with_init(LoraInit::Pissa { iterations: None });
    let huge = AdapterKind::Lora(huge);
    assert!(
        model.attach(&huge, &Targets::all_linear()).unwrap_err().to_string().contains("r must be at most")
    );
    assert!(model.adapters().is_empty());

    // Adapters of a model with more layers.
    let mut larger = config();
    larger.num_hidden_layers = 3;
    let mut other = VesperLM::initialize(&larger, &VarMap::new(), 5, DType::F32, &Device::Cpu).unwrap();
    other.attach(&kind, &Targets::names(["q_proj"])).unwrap();
    let dir = tempfile::tempdir().unwrap();
    other.save_adapters(dir.path()).unwrap();
    let error = model.attach_from(dir.path()).unwrap_err().to_string();
    assert!(error.contains("no projection named model.layers.2.self_attn.q_proj"), "{error}");
    assert!(error.starts_with(&dir.path().display().to_string()), "{error}");
    // Adapters that come with a parameter of the model itself, which would be lost.
    let with_head = tempfile::tempdir().unwrap();
    let adapters = other.adapters();
    let named: Vec<_> = adapters.iter().take(1).map(|(path, adapter)| (path.as_str(), adapter)).collect();
    let head = Tensor::zeros((4, 4), DType::F32, &Device::Cpu).unwrap();
    let options = SaveOptions {
        saved_parameters: [("score.weight".to_owned(), head)].into(),
        ..SaveOptions::default()
    };
    save_adapters_with(with_head.path(), &named, &options).unwrap();
    let error = model.attach_from(with_head.path()).unwrap_err().to_string();
    assert!(error.contains("a parameter of the model itself, score.weight"), "{error}");
    // Of one with other names for all of its projections.
    let strange = tempfile::tempdir().unwrap();
    let named: Vec<_> = adapters.iter().take(1).map(|(_, adapter)| ("h.0.attn.c_attn", adapter)).collect();
    save_adapters_with(strange.path(), &named, &SaveOptions::default()).unwrap();
    let error = model.attach_from(strange.path()).unwrap_err().to_string();
    assert!(error.contains("no projection named h.0.attn.c_attn"), "{error}");
    // And of one whose layers are wider.
    let wider = VesperConfig { num_attention_heads: 2 * config().num_attention_heads, ..config() }
        .with_kv_heads(config().num_key_value_heads);
    let mut other = VesperLM::initialize(&wider, &VarMap::new(), 5, DType::F32, &Device::Cpu).unwrap();
    other.attach(&kind, &Targets::names(["q_proj"])).unwrap();
    let wide = tempfile::tempdir().unwrap();
    other.save_adapters(wide.path()).unwrap();
    let error = model.attach_from(wide.path()).unwrap_err().to_string();
    assert!(
        error.contains("adapter_model.safetensors")
            && error.contains("q_proj")
            && error.contains("expected shape"),
        "{error}"
    );
    assert!(model.adapters().is_empty());
    assert!(model.save_adapters(dir.path()).unwrap_err().to_string().contains("no adapter"));
}

/// Adapters that PEFT trained, on a model that VesperLM loads as a Llama.
#[test]
fn ranks_and_alphas_of_single_projections_are_kept_in_the_files() {
    let lora = AdapterKind::Lora(LoraConfig::default().with_r(2).with_alpha(4.0));
    let targets = Targets::names(["q_proj", "v_proj", "down_proj"]);
    let config = PeftConfig::new(lora, targets)
        .with_rank_pattern([("down_proj", 6), (r"layers\.1\..*", 3)])
        .unwrap()
        .with_alpha_pattern([(r"layers\.0\.self_attn\.v_proj", 1.0)])
        .unwrap();
    let mut adapted = model();
    adapted.attach_config(&config).unwrap();
    let ranks = |model: &VesperLM| -> Vec<(String, usize, f64)> {
        let adapters = model.adapters();
        let of = |(path, adapter): &(String, std::sync::Arc<dyn Adapter>)| match adapter.kind() {
            AdapterKind::Lora(config) => {
                (path.trim_start_matches("model.layers.").into(), config.r, config.alpha)
            }
            other => panic!("{other}"),
        };
        adapters.iter().map(of).collect()
    };
    let want = [
        ("0.self_attn.q_proj", 2, 4.0),
        ("0.self_attn.v_proj", 2, 1.0),
        ("0.mlp.down_proj", 6, 4.0),
        ("1.self_attn.q_proj", 3, 4.0),
        ("1.self_attn.v_proj", 3, 4.0),
        ("1.mlp.down_proj", 6, 4.0),
    ];
    assert_eq!(ranks(&adapted), want.map(|(path, r, alpha)| (path.to_owned(), r, alpha)));
    for (i, (_, var)) in vars(&adapted).iter().enumerate() {
        let values: Vec<f32> = (0..var.elem_count()).map(|j| ((j * 5 + i) % 7) as f32 * 0.01).collect();
        var.set(&Tensor::from_vec(values, var.shape(), var.device()).unwrap()).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    adapted.save_adapters(folder.path()).unwrap();
    let mut again = model();
    again.attach_from(folder.path()).unwrap();
    assert_eq!(ranks(&again), ranks(&adapted));
    let got = again.forward(&ids(0)).unwrap();
    assert_eq!(difference(&got, &adapted.forward(&ids(0)).unwrap()), 0.0);
    assert!(difference(&got, &model().forward(&ids(0)).unwrap()) > 1e-3);

    // What the file says makes new adapters, too.
    let mut new = model();
    new.attach_config(&PeftConfig::read(folder.path()).unwrap()).unwrap();
    assert_eq!(ranks(&new), ranks(&adapted));
    let file = folder.path().join("adapter_config.json");
    let mut fields: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    fields["modules_to_save"] = serde_json::json!(["lm_head"]);
    std::fs::write(&file, fields.to_string()).unwrap();
    let mut plain = model();
    let error = plain.attach_config(&PeftConfig::read(folder.path()).unwrap()).unwrap_err().to_string();
    assert!(error.contains("modules_to_save") && error.contains("lm_head"), "{error}");
    assert!(plain.adapters().is_empty());
}

#[test]
fn adapters_of_peft_give_their_reference_logits() {
    let Some(data) = std::env::var_os("VESPER_DATA").map(std::path::PathBuf::from) else {
        println!("skipped: adapters_of_peft_give_their_reference_logits (VESPER_DATA is not set)");
        return;
    };
    for name in ["stories260K-lora-qv-r8", "stories260K-lora-all-linear-r4-rslora"] {
        let dir = data.join("peft").join(name);
        let text = std::fs::read_to_string(dir.join("reference_logits.json")).unwrap();
        let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
        let numbers = |field: &str| -> Vec<f32> {
            reference[field].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
        };
        let folder = data.join("models/stories260K");
        let mut model = VesperLM::load(folder, DType::F32, &Device::Cpu).unwrap();
        model.attach_from(&dir).unwrap();
        let ids: Vec<u32> = numbers("prompt_ids").iter().map(|id| *id as u32).collect();
        let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let want = Tensor::new(numbers("last_logits"), &Device::Cpu).unwrap();
        for model in [model.merged().unwrap().unwrap(), model] {
            let logits = model.forward(&ids).unwrap();
            let last = logits.squeeze(0).unwrap().get(ids.dim(1).unwrap() - 1).unwrap();
            assert!(difference(&last, &want) < 1e-4, "{name}: {}", difference(&last, &want));
        }
    }
}
