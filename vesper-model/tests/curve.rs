//! Two hundred steps on real text: the fused operations, their references and PyTorch go the same way.

#![allow(clippy::unwrap_used)] // helpers of tests

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use serde::Deserialize;
use velvet_optim::{GradClip, Optimizer, Velvet, VelvetConfig};
use vesper_model::ops::Path;
use vesper_model::{Activations, VesperConfig, VesperLM, trainable};

const CPU: Device = Device::Cpu;
const TEXT: &str = include_str!("golden/fables.txt");
const BATCH: usize = 4;
const SEQ: usize = 32;

/// What golden/curve.py wrote.
#[derive(Deserialize)]
struct Golden {
    losses: Vec<f64>,
}

fn golden() -> Vec<f64> {
    serde_json::from_str::<Golden>(include_str!("golden/curve.json")).unwrap().losses
}

/// The hash of golden/curve.py.
fn mix(k: u32, i: u32) -> u32 {
    let h = i.wrapping_mul(2_654_435_761).wrapping_add(k.wrapping_mul(40_503)).wrapping_add(1);
    let h = (h ^ (h >> 16)).wrapping_mul(0x045D_9F3B);
    let h = (h ^ (h >> 16)).wrapping_mul(0x045D_9F3B);
    h ^ (h >> 16)
}

fn config() -> VesperConfig {
    let mut config = VesperConfig::preset("nano").unwrap().with_vocab(256).with_kv_heads(2);
    config.hidden_size = 32;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 4;
    config.head_dim = 8;
    config.intermediate_size = 64;
    config.max_position_embeddings = SEQ;
    config
}

/// The losses of a run, one a step.
fn curve(steps: usize, change: impl Fn(VesperLM) -> VesperLM) -> Vec<f64> {
    let (config, varmap) = (config(), VarMap::new());
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &CPU);
    let model = change(VesperLM::new(&config, vb).unwrap());
    for (k, parameter) in config.parameters().into_iter().enumerate() {
        let n: usize = parameter.shape.iter().product();
        let value = |i| {
            let bits = mix(k as u32, i as u32);
            match parameter.shape.len() {
                1 => 1.0 + ((bits >> 24) as f32 - 128.0) / 2048.0,
                _ => ((bits >> 8) as f32 - 8_388_608.0) / 67_108_864.0,
            }
        };
        let values = Tensor::from_vec((0..n).map(value).collect(), parameter.shape.as_slice(), &CPU).unwrap();
        varmap.data().lock().unwrap()[&parameter.name].set(&values).unwrap();
    }
    let text = TEXT.replace("\r\n", "\n").into_bytes();
    let settings = VelvetConfig::default().with_lr(3e-3).with_clip(GradClip::GlobalNorm(1.0));
    let mut optimizer = Velvet::named(trainable(&config, &varmap).unwrap(), settings).unwrap();
    let mut losses = Vec::new();
    for step in 0..steps {
        let rows: Vec<u32> = (0..BATCH)
            .flat_map(|row| {
                let start = mix(1000 + step as u32, row as u32) as usize % (text.len() - SEQ);
                text[start..=start + SEQ].iter().map(|&byte| u32::from(byte)).collect::<Vec<_>>()
            })
            .collect();
        let rows = Tensor::from_vec(rows, (BATCH, SEQ + 1), &CPU).unwrap();
        let (ids, targets) = (rows.narrow(1, 0, SEQ).unwrap(), rows.narrow(1, 1, SEQ).unwrap());
        let loss = model.loss(&ids, &targets).unwrap().loss;
        losses.push(f64::from(loss.to_scalar::<f32>().unwrap()));
        optimizer.step(&loss.backward().unwrap()).unwrap();
    }
    losses
}

/// The largest difference at one step.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).max_by(f64::total_cmp).unwrap()
}

#[test]
fn the_curve_is_that_of_the_reference_and_of_pytorch() {
    let golden = golden();
    assert_eq!(golden.len(), 200);
    assert!(golden[199] < golden[0] - 3.0, "this curve does not learn");
    let fused = curve(200, |model| model);
    let off = apart(&fused, &golden);
    println!("fused and PyTorch: {off:.2e}");
    assert!(off < 1e-3, "off PyTorch's curve by {off:e}");
    let reference = curve(200, |model| model.with_path(Path::Reference));
    let off = apart(&fused, &reference);
    println!("fused and reference: {off:.2e}");
    assert!(off < 1e-3, "off the reference's curve by {off:e}");
}

#[test]
fn recomputed_activations_give_the_same_bits() {
    let recomputed = curve(20, |model| model.with_activations(Activations::Recompute));
    assert_eq!(recomputed, curve(20, |model| model));
}
