//! Adapters over a quantised model: the gradient reaches all of their parameters, and they generate.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Optimizer, SGD};
use era_act::Activation;
use vesper_model::VesperLM;
use vesper_model::flylora::{
    self, AdaLoraConfig, Adapter, AdapterKind, FlyLoraConfig, LoraConfig, LoraInit, MaskedLoraConfig, Targets,
};
use vesper_model::generate::NextLogits;
use vesper_model::quantized::{BlockType, Gguf, GgufExtras, Policy, save};

use super::{config, ids, model, relative};

fn kinds() -> Vec<AdapterKind> {
    let lora = LoraConfig::default().with_r(4);
    vec![
        AdapterKind::Lora(lora.clone()),
        AdapterKind::Lora(lora.clone().with_init(LoraInit::Pissa { iterations: Some(3) })),
        AdapterKind::Dora(lora.clone()),
        AdapterKind::AdaLora(AdaLoraConfig::default().with_init_r(4)),
        AdapterKind::FlyLora(FlyLoraConfig::default().with_ranks(16, 4)),
        AdapterKind::MaskedLora(MaskedLoraConfig::default().with_lora(lora)),
    ]
}

fn parameters(model: &VesperLM) -> Vec<(String, Var)> {
    let of = |(path, adapter): (String, Arc<dyn Adapter>)| {
        let named = move |(name, var)| (format!("{path}.{name}"), var);
        adapter.parameters().into_iter().map(named).collect::<Vec<_>>()
    };
    model.adapters().into_iter().flat_map(of).collect()
}

/// A model that was written and loaded again.
fn loaded(block: BlockType) -> VesperLM {
    let plain = model(&config(64, true, Activation::default()));
    let (small, _) = plain.quantized(&Policy::new(block)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    save(&path, &small, &GgufExtras::default()).unwrap();
    Gguf::open(&path).unwrap().model(DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn every_kind_trains_over_blocks_and_generates() {
    let base = loaded(BlockType::Q8_0);
    let want = base.forward(&ids(1, 24)).unwrap();
    for kind in kinds() {
        let mut adapted = base.clone();
        adapted.attach(&kind, &Targets::all_linear()).unwrap();
        assert_eq!(adapted.adapters().len(), 2 * 7);
        assert!(adapted.is_quantized());
        assert!(relative(&adapted.forward(&ids(1, 24)).unwrap(), &want) < 1e-4, "{kind}");

        for (i, (_, var)) in parameters(&adapted).iter().enumerate() {
            // Away from the start, where half of the gradients are 0.
            let value = |j: usize| 0.02 * (((j * 37 + i * 11) % 19) as f32 / 9.0 - 1.0);
            let moved = (0..var.elem_count()).map(value).collect();
            let moved = Tensor::from_vec(moved, var.shape(), var.device()).unwrap();
            var.set(&(var.as_detached_tensor() + moved).unwrap()).unwrap();
        }
        let loss = || adapted.loss(&ids(1, 24), &ids(1, 24)).unwrap().loss;
        let first = loss();
        let grads = first.backward().unwrap();
        flylora::audit(parameters(&adapted), &grads).unwrap();
        let mut sgd = SGD::new(parameters(&adapted).into_iter().map(|(_, var)| var).collect(), 0.02).unwrap();
        for _ in 0..6 {
            sgd.backward_step(&loss()).unwrap();
        }
        assert!(loss().to_scalar::<f32>().unwrap() < first.to_scalar::<f32>().unwrap(), "{kind}");

        let y = adapted.forward(&ids(1, 24)).unwrap();
        let mut session = adapted.session(32).unwrap();
        let tokens: Vec<u32> = ids(1, 24).flatten_all().unwrap().to_vec1().unwrap();
        session.append(&tokens[..23]).unwrap();
        let logits = Tensor::from_vec(session.append(&tokens[23..]).unwrap(), 64, &Device::Cpu).unwrap();
        let error = relative(&logits, &y.get(0).unwrap().get(23).unwrap());
        assert!(error < 0.05, "{kind}: {error}");

        let dir = tempfile::tempdir().unwrap();
        adapted.save_adapters(dir.path()).unwrap();
        let mut again = base.clone();
        again.attach_from(dir.path()).unwrap();
        assert!(relative(&again.forward(&ids(1, 24)).unwrap(), &y) < 1e-4, "{kind}");
        if let Some(merged) = adapted.merged().unwrap() {
            assert!(relative(&merged.forward(&ids(1, 24)).unwrap(), &y) < 1e-3, "{kind}");
        }
    }
}

#[test]
fn the_gradient_is_that_over_the_blocks_values() {
    let base = loaded(BlockType::Q4_0);
    let kind = AdapterKind::Lora(LoraConfig::default().with_r(4).with_seed(7));
    let gradients = |mut model: VesperLM| {
        model.attach(&kind, &Targets::all_linear()).unwrap();
        let grads = model.loss(&ids(2, 20), &ids(2, 20)).unwrap().loss.backward().unwrap();
        let named = |(name, var): (String, Var)| (name, grads.get(&var).unwrap().clone());
        parameters(&model).into_iter().map(named).collect::<Vec<_>>()
    };
    let over_values = gradients(base.dequantized().unwrap());
    for ((name, got), (_, want)) in gradients(base).into_iter().zip(over_values) {
        if name.ends_with("lora_B.weight") || name.contains("lora_B") {
            assert!(relative(&got, &want) < 1e-3, "{name}: {}", relative(&got, &want));
        }
    }
}

#[test]
fn an_adapter_for_another_model_is_refused() {
    let mut base = loaded(BlockType::Q8_0);
    let mut other = model(&config(96, true, Activation::default()));
    other.attach(&AdapterKind::Lora(LoraConfig::default().with_r(2)), &Targets::all_linear()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    other.save_adapters(dir.path()).unwrap();
    let error = base.attach_from(dir.path()).unwrap_err().to_string();
    assert!(error.contains("q_proj") && !error.contains('\n'), "{error}");
    assert!(base.adapters().is_empty());
}
