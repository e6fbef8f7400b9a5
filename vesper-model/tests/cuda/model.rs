use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::{AdamW, Optimizer, VarMap};
use vesper_model::ops::Path;
use vesper_model::{AdapterConfig, Projection, VesperConfig, VesperLM, trainable};

use crate::common::{brief, error, gpu, ids, to_f64};

/// Two blocks with the head size of the presets, grouped queries and a tied embedding.
fn small() -> VesperConfig {
    let mut config = VesperConfig::preset("nano").unwrap().with_vocab(300).with_kv_heads(1);
    config.num_hidden_layers = 2;
    config.hidden_size = 96;
    config.num_attention_heads = 2;
    config.head_dim = 64;
    config.intermediate_size = 136;
    config
}

fn batch(device: &Device) -> (Tensor, Tensor) {
    let rows = ids(3 * 71, 290).reshape((3, 71)).unwrap().to_device(device).unwrap();
    (rows.narrow(1, 0, 70).unwrap(), rows.narrow(1, 1, 70).unwrap())
}

/// The loss and the gradient of every trained parameter, by name, in f64 on the CPU.
fn gradients(
    config: &VesperConfig,
    device: &Device,
    (dtype, compute): (DType, DType),
    path: Path,
) -> (f64, HashMap<String, Tensor>) {
    let varmap = VarMap::new();
    let model = VesperLM::initialize(config, &varmap, 42, dtype, device).unwrap();
    let model = model.with_compute_dtype(compute).with_path(path);
    let (ids, targets) = batch(device);
    let loss = model.loss(&ids, &targets).unwrap().loss;
    let grads = loss.backward().unwrap();
    let named = trainable(config, &varmap).unwrap();
    let all: HashMap<String, Tensor> = named
        .iter()
        .map(|(name, var)| {
            let gradient = grads.get(var).unwrap_or_else(|| panic!("no gradient reaches {name}"));
            assert_eq!((gradient.dtype(), gradient.dims()), (dtype, var.dims()), "{name}");
            (name.clone(), to_f64(gradient))
        })
        .collect();
    let frozen = varmap.all_vars().iter().filter(|v| grads.get(v).is_some()).count();
    assert_eq!(frozen, all.len(), "a frozen parameter has a gradient");
    (to_f64(&loss).to_scalar().unwrap(), all)
}

fn compare(config: &VesperConfig, device: &Device) {
    let (exact_loss, exact) = gradients(config, &Device::Cpu, (DType::F64, DType::F64), Path::Reference);
    for dtypes in [(DType::F32, DType::F32), (DType::F32, DType::BF16), (DType::BF16, DType::BF16)] {
        let (loss, fused) = gradients(config, device, dtypes, Path::Fused);
        let (composed_loss, composed) =
            if brief() { (loss, fused.clone()) } else { gradients(config, device, dtypes, Path::Reference) };
        println!("{dtypes:?}: loss {loss}, composition {composed_loss}, exact {exact_loss}");
        let limit = if dtypes.1 == DType::F32 { 1e-5 } else { 1e-2 };
        assert!((loss - exact_loss).abs() < limit * exact_loss);
        let mut names: Vec<&String> = exact.keys().collect();
        names.sort();
        for name in names {
            let (off, other) = (error(&fused[name], &exact[name]), error(&composed[name], &exact[name]));
            println!("{dtypes:?} {name}: off by {off:.2e}, composition {other:.2e}");
            let limit = if dtypes.1 == DType::F32 { 1e-4 } else { (2.0 * other).max(1e-2) };
            assert!(off < limit, "{dtypes:?} {name}: off by {off:e}, composition {other:e}");
        }
    }
}

#[test]
fn gradients_reach_every_parameter_and_equal_the_reference() {
    let Some((_lock, device)) = gpu("gradients_reach_every_parameter_and_equal_the_reference") else {
        return;
    };
    compare(&small(), &device);
    if brief() {
        return;
    }
    let mut untied = small();
    untied.tie_word_embeddings = false;
    compare(&untied, &device);
}

#[test]
fn adapters_of_a_frozen_model_train() {
    let Some((_lock, device)) = gpu("adapters_of_a_frozen_model_train") else { return };
    let adapter = AdapterConfig {
        lora: serde_json::from_value(serde_json::json!({"r": 4, "alpha": 8.0})).unwrap(),
        targets: vec![Projection::QProj, Projection::VProj, Projection::DownProj],
    };
    let config = small().with_adapter(adapter);
    for compute in [DType::BF16, DType::F32].into_iter().take(if brief() { 1 } else { 2 }) {
        let (loss, fused) = gradients(&config, &device, (DType::F32, compute), Path::Fused);
        let (expected, composed) = gradients(&config, &device, (DType::F32, compute), Path::Reference);
        assert!((loss - expected).abs() < 1e-2);
        for (name, gradient) in &fused {
            let off = error(gradient, &composed[name]);
            assert!(off < if compute == DType::F32 { 1e-4 } else { 3e-2 }, "{name}: off by {off:e}");
        }
    }
}

#[test]
fn a_training_run_follows_the_reference() {
    let Some((_lock, device)) = gpu("a_training_run_follows_the_reference") else { return };
    let config = small();
    let steps = if brief() { 2 } else { 20 };
    let run = |compute: DType, path: Path| {
        let varmap = VarMap::new();
        let model = VesperLM::initialize(&config, &varmap, 42, DType::F32, &device).unwrap();
        let model = model.with_compute_dtype(compute).with_path(path);
        let vars = trainable(&config, &varmap).unwrap().into_iter().map(|(_, var)| var).collect();
        let mut optimizer = AdamW::new_lr(vars, 1e-3).unwrap();
        let (ids, targets) = batch(&device);
        let mut losses = Vec::new();
        for _ in 0..steps {
            let loss = model.loss(&ids, &targets).unwrap().loss;
            losses.push(loss.to_scalar::<f32>().unwrap());
            optimizer.backward_step(&loss).unwrap();
        }
        losses
    };
    for (compute, limit) in [(DType::F32, 2e-3), (DType::BF16, 3e-2)] {
        let (fused, reference) = (run(compute, Path::Fused), run(compute, Path::Reference));
        println!("{compute:?}: {fused:?}\n  and {reference:?}");
        assert!(brief() || fused[19] < fused[0] - 0.5);
        for (step, (a, b)) in fused.iter().zip(&reference).enumerate() {
            assert!((a - b).abs() < limit, "{compute:?} step {step}: {a} against {b}");
        }
    }
}

#[test]
fn evaluation_without_gradients_gives_the_same_loss() {
    let Some((_lock, device)) = gpu("evaluation_without_gradients_gives_the_same_loss") else { return };
    let varmap = VarMap::new();
    let model = VesperLM::initialize(&small(), &varmap, 42, DType::F32, &device).unwrap();
    let model = model.with_compute_dtype(DType::BF16);
    let (ids, targets) = batch(&device);
    let bits = |model: &VesperLM| {
        let out = model.loss(&ids, &targets).unwrap();
        [out.loss, out.entropy].map(|x| x.to_scalar::<f32>().unwrap().to_bits())
    };
    assert_eq!(bits(&model), bits(&model.detach()));
}
