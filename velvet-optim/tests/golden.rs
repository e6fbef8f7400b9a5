//! Agreement with `torch.optim.AdamW`; `golden/adamw.py` made the values.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops there")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::store;
use serde::Deserialize;
use velvet_optim::{BackendChoice, GradClip, NonFinite, Optimizer, Velvet, VelvetConfig};

#[derive(Deserialize)]
struct Golden {
    shapes: Vec<Vec<usize>>,
    steps: u64,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    dtype: String,
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    clip: Option<f64>,
    schedule: bool,
    missing: bool,
    norms: Vec<f64>,
    parameters: Vec<Vec<f64>>,
    exp_avg: Vec<Vec<f64>>,
    exp_avg_sq: Vec<Vec<f64>>,
}

fn parameter(k: usize, shape: &[usize], dtype: DType) -> Var {
    let value = |i: usize| {
        let sign = if (i + k).is_multiple_of(2) { 1.0 } else { -1.0 };
        sign * (0.5 + ((i * 37 + k * 11) % 512) as f64 / 512.0)
    };
    let values: Vec<f64> = (0..shape.iter().product()).map(value).collect();
    let t = Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    Var::from_tensor(&t).unwrap()
}

fn gradient(k: usize, shape: &[usize], step: u64, dtype: DType) -> Tensor {
    let scale = 0.5f64.powi((step % 5) as i32);
    let value = |i: usize| {
        let n = (i as u64 * 7919 + step * 104_729 + k as u64 * 31) % 2001;
        (n as f64 - 1000.0) / 1024.0 * scale
    };
    let values: Vec<f64> = (0..shape.iter().product()).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// The largest difference in units of `tolerance * max(|expected|, floor)`.
fn worst(got: &Tensor, expected: &[f64], tolerance: f64, floor: f64) -> f64 {
    let got = got.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    assert_eq!(got.len(), expected.len());
    got.iter()
        .zip(expected)
        // Equal ones first: both may be 0, and so the unit.
        .map(|(got, expected)| {
            if got == expected {
                0.0
            } else {
                (got - expected).abs() / (tolerance * expected.abs().max(floor))
            }
        })
        .max_by(f64::total_cmp)
        .unwrap_or(0.0)
}

fn agrees_with_torch(backend: BackendChoice, non_finite: NonFinite) {
    let golden: Golden = serde_json::from_str(include_str!("golden/adamw.json")).unwrap();
    assert!(golden.cases.len() >= 6 && golden.steps == 50);
    for case in &golden.cases {
        let (dtype, tolerance) = match case.dtype.as_str() {
            "float32" => (DType::F32, 1e-6),
            _ => (DType::F64, 1e-12),
        };
        let vars: Vec<Var> =
            golden.shapes.iter().enumerate().map(|(k, shape)| parameter(k, shape, dtype)).collect();
        let named = vars.iter().enumerate().map(|(k, var)| (format!("p{k}"), var.clone())).collect();
        let config = VelvetConfig {
            lr: case.lr,
            beta1: case.beta1,
            beta2: case.beta2,
            eps: case.eps,
            weight_decay: case.weight_decay,
            clip: case.clip.map_or(GradClip::Off, GradClip::GlobalNorm),
            backend,
            non_finite,
            ..VelvetConfig::default()
        };
        let mut opt = Velvet::named(named, config).unwrap();
        common::record_warnings(&mut opt);
        for step in 1..=golden.steps {
            if case.schedule {
                opt.set_learning_rate(case.lr * step as f64 / golden.steps as f64);
            }
            let grads = vars
                .iter()
                .enumerate()
                .filter(|&(k, _)| !(case.missing && k as u64 == step % 7))
                .map(|(k, var)| (var, gradient(k, var.dims(), step, dtype)));
            opt.step(&store(grads)).unwrap();
            if let Some(norm) = case.norms.get(step as usize - 1) {
                let got = opt.stats().unwrap().grad_norm.unwrap();
                assert!((got - norm).abs() <= 1e-6 * norm, "{}: norm {got}, expected {norm}", case.name);
            }
        }
        let state = opt.state().unwrap();
        for (k, var) in vars.iter().enumerate() {
            let error = worst(var, &case.parameters[k], tolerance, 0.0);
            assert!(error <= 1.0, "{}: parameter {k} is off by {error} tolerances", case.name);
            // An average of both signs cancels: its error is relative to what was averaged.
            let largest = case.exp_avg[k].iter().fold(0f64, |a, b| a.max(b.abs()));
            let error = worst(&state[&format!("p{k}.exp_avg")], &case.exp_avg[k], tolerance, largest);
            assert!(error <= 1.0, "{}: exp_avg {k} is off by {error} tolerances", case.name);
            // Fifty roundings by beta2 in each implementation, in f32.
            let error = worst(&state[&format!("p{k}.exp_avg_sq")], &case.exp_avg_sq[k], tolerance, 0.0);
            assert!(error <= 2.0, "{}: exp_avg_sq {k} is off by {error} tolerances", case.name);
        }
    }
}

#[test]
fn the_fused_pass_agrees_with_torch_adamw_over_50_steps() {
    agrees_with_torch(BackendChoice::Auto, NonFinite::Error);
}

#[test]
fn the_plain_back_end_agrees_with_torch_adamw_over_50_steps() {
    agrees_with_torch(BackendChoice::Plain, NonFinite::Unchecked);
}
